"""The real ledger under any order of events, with crashes of the desk among them.

Peers are scripts (`ledger_cast`); what must hold is in `ledger_world.World.check`. At the end of every
example the peers do their work, and the run has to end with every group settled once.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ledger_world import GENERATORS, REWARDS, Setup, World

from asyncrl.buffer.config import LedgerConfig
from asyncrl.messages import control

PICK = st.integers(0, 11)
NAMES = st.sampled_from(["source", "trainer", "evaluator", *GENERATORS, *REWARDS])


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Runs of a few small batches, with every option that changes who may do what."""
    staleness, size = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    straggler = draw(st.sampled_from(["wait", "wait", "drop", "train"]))
    surplus = draw(st.integers(0, 2)) if straggler == "drop" else 0
    num_rollout = draw(st.sampled_from([3, 4, 6, None]))
    ledger = LedgerConfig(
        batch_size=size,
        max_staleness=staleness,
        tickets=(staleness + 1) * (size + surplus),
        num_rollout=num_rollout,
        on_straggler=straggler,
        allow_partial_train_step=draw(st.booleans()),
        partial_rollout=draw(st.booleans()),
        filters=draw(st.booleans()),
        group_rm=draw(st.booleans()),
        max_attempts=draw(st.integers(1, 3)),
        evaluates=draw(st.booleans()),
        eval_interval=draw(st.sampled_from([None, 1, 2])),
        skip_eval_before_train=draw(st.booleans()),
        update_weights_interval=draw(st.integers(1, min(3, staleness + 1))),
        prompt_lead=draw(st.sampled_from([0, 1, 5])),
    )
    few = size * draw(st.integers(2, 5)) + draw(st.integers(0, 1))
    return Setup(
        ledger=ledger,
        prompts=few if num_rollout is None or draw(st.booleans()) else 1000,
        save_interval=draw(st.integers(1, 3)),
        prefetch=draw(st.integers(0, 2)),
        exact=draw(st.booleans()),
        capacity=draw(st.integers(2, 5)),
        window=draw(st.sampled_from([0, 300, 1200])),
    )


class LedgerMachine(RuleBasedStateMachine):
    """Events in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.world: World | None = None

    @property
    def run(self) -> World:
        assert self.world is not None
        return self.world

    @initialize(setup=setups())
    def begin(self, setup: Setup) -> None:
        self.world = World(self.directory, setup)
        self.world.join_all()
        self.commit()

    @rule()
    def commit(self) -> None:
        self.run.commit()
        self.run.check_stored()

    @rule(pick=PICK, action=st.sampled_from([0, 0, 1, 1, 1, 2, 3, 4, 5]))
    def generate(self, pick: int, action: int) -> None:
        self.run.generate(pick, action)

    @rule(pick=PICK, good=st.sampled_from([True, True, True, False]))
    def judge(self, pick: int, *, good: bool) -> None:
        self.run.judge(pick, good=good)

    @rule(name=st.sampled_from(["trainer", "trainer", "source", "evaluator"]))
    def act(self, name: str) -> None:
        self.run.act(name)

    @rule(pick=PICK)
    def late(self, pick: int) -> None:
        self.run.late(pick)

    @rule(pick=PICK)
    def swap(self, pick: int) -> None:
        peer = self.run.generator(pick)
        if peer is not None:
            peer.read()
            peer.swap()

    @rule(name=NAMES, seen=st.booleans(), ours=st.booleans())
    def die(self, name: str, *, seen: bool, ours: bool) -> None:
        self.run.die(name, seen=seen, ours=ours)

    @rule(name=NAMES)
    def join(self, name: str) -> None:
        self.run.join(name)

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        peer = self.run.peers.pop(name, None)
        if peer is not None:
            peer.send(control.Goodbye())

    @rule(name=NAMES)
    def partition(self, name: str) -> None:
        self.run.partition(name)

    @rule(committed=st.booleans(), survivors=st.booleans())
    def crash(self, *, committed: bool, survivors: bool) -> None:
        self.run.crash(committed=committed, survivors=survivors)

    @rule(low=st.booleans())
    def disk(self, *, low: bool) -> None:
        self.run.desk.ledger.low_on_disk = low

    @precondition(lambda self: not self.run.desk.ledger.draining)
    @rule()
    def drain(self) -> None:
        self.run.desk.ledger.draining = True

    @invariant()
    def everything_holds(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        try:
            if self.world is not None:
                self.world.finish()
        finally:
            if self.world is not None:
                self.world.desk.store.close()
            shutil.rmtree(self.directory)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(6))
def test_long_runs_of_likely_events(seed: int, tmp_path: Path) -> None:
    """Mostly work, with a fault now and then: gets further into a run than a search does."""
    draw = random.Random(seed)
    staleness = 1 + seed % 3
    config = LedgerConfig(
        batch_size=2,
        max_staleness=staleness,
        tickets=2 * (staleness + 1),
        num_rollout=12,
        filters=seed % 2 == 0,
        evaluates=seed % 3 != 0,
        eval_interval=2,
        group_rm=seed == 5,
        update_weights_interval=1 + seed % 2,
    )
    setup = Setup(ledger=config, save_interval=3, exact=seed % 2 == 0)
    world = World(tmp_path, setup)
    for _ in range(400):
        world.join_all()
        world.commit()
        world.check_stored()
        kind = draw.random()
        if kind < 0.5:
            world.generate(draw.randrange(100), draw.choice([0, 1, 1, 1, 1, 2, 3, 5]))
        elif kind < 0.75:
            world.judge(draw.randrange(100), good=draw.random() < 0.9)
        elif kind < 0.97:
            world.act(draw.choice(["trainer", "source", "evaluator"]))
        elif kind < 0.99:
            world.die(draw.choice(sorted(world.peers)), seen=draw.random() < 0.5)
        else:
            world.crash(committed=draw.random() < 0.5, survivors=draw.random() < 0.5)
        world.check()
    assert world.desk.ledger.batches.num_trained > 2, "the run got somewhere"
    world.finish()
    world.desk.store.close()
