"""What is simulated: the run, the cluster, the links and the faults, in numbers that travel as one line.

Times are virtual seconds. A scenario and nothing else decides what happens: the same one gives the same run.
"""

from __future__ import annotations

import shlex

import msgspec

from asyncrl.buffer.config import LedgerConfig
from asyncrl.buffer.delivery import PIECE_BYTES

COMMAND = "python -m asyncrl.sim"


class Fault(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One fault of a given schedule."""

    at: float
    """Share of the run's samples finished when it strikes, 0 to 1."""
    kind: str
    """A name of `faults.KINDS`."""
    pick: int
    """Chooses the victim among those there are."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """See the module's docstring."""

    seed: int = 0
    samples: int = 10_000
    """Samples to train, rounded up to whole batches."""
    faults: int = 10
    """Faults at random, spread over the run; see `schedule`."""
    schedule: list[Fault] = []
    """Faults instead of random ones."""
    prompts: int | None = None
    """Groups in the data set, after which the source ends; None: no end, the number of batches is given."""

    group_size: int = 8
    batch_size: int = 64
    """Groups in a batch."""
    max_staleness: int = 6
    surplus: int = 0
    """Groups of over-sampling per batch (with on_straggler = "drop")."""
    interval: int = 1
    """update_weights_interval."""
    on_straggler: str = "wait"
    allow_partial_train_step: bool = False
    partial_rollout: bool = True
    filters: bool = True
    group_rm: bool = False
    max_attempts: int = 4
    evaluates: bool = True
    eval_interval: int | None = 25
    eval_prompts: int = 16
    dead_after_s: float = 5.0
    prompt_lead: int = 0

    generators: int = 64
    slots: int = 16
    """Samples a generator works on at once."""
    window_bytes: int = 1 << 20
    """Of every worker."""
    piece_bytes: int = PIECE_BYTES
    """Of a batch or an evaluation, in one message."""
    rewards: int = 8
    reward_batch: int = 64
    prefetch: int = 1
    save_interval: int = 5
    exact: bool = True
    """Whether retraining gives the same weights to the bit."""

    rate: float = 40.0
    """Tokens per second of one sample."""
    slow_share: float = 0.1
    """Share of generators that are slow machines, at half the rate."""
    mean_tokens: float = 600.0
    """Median answer length; lengths are lognormal."""
    sigma: float = 0.7
    max_tokens: int = 4096
    progress_tokens: int = 1024
    load_s: float = 4.0
    """Median time to fetch and verify new weights."""
    restart_s: float = 25.0
    """Median time until a dead generator says hello again."""
    step_s: float = 8.0
    """Median time of a training step."""
    commit_s: float = 0.4
    """Longest time of a commit."""
    latency_s: float = 0.004
    """Median time of a message on its way."""

    refused_share: float = 0.04
    """Groups a filter refuses."""
    reward_failures: float = 0.0005
    generation_failures: float = 0.0005
    duplicates: float = 0.01
    """Share of messages that arrive twice, of those that may."""
    reordered: float = 0.01
    """Share of messages that others overtake, of those that may."""

    check_every: int = 5000
    """Events between two checks of everything; the cheap invariants are checked at every event."""

    @property
    def target(self) -> int:
        """Batches of the run, at most."""
        return -(-self.samples // (self.group_size * self.batch_size))

    @property
    def ledger(self) -> LedgerConfig:
        """The ledger's configuration."""
        return LedgerConfig(
            batch_size=self.batch_size,
            max_staleness=self.max_staleness,
            tickets=(self.max_staleness + 1) * (self.batch_size + self.surplus),
            num_rollout=self.target if self.prompts is None else None,
            on_straggler=self.on_straggler,
            allow_partial_train_step=self.allow_partial_train_step,
            partial_rollout=self.partial_rollout,
            filters=self.filters,
            group_rm=self.group_rm,
            max_refused_per_step=1_000_000,
            max_attempts=self.max_attempts,
            dead_after_s=self.dead_after_s,
            evaluates=self.evaluates,
            eval_interval=self.eval_interval,
            update_weights_interval=self.interval,
            prompt_lead=self.prompt_lead,
        )

    def command(self) -> str:
        """The shell command that repeats it."""
        return f"{COMMAND} --scenario {shlex.quote(msgspec.json.encode(self).decode())}"
