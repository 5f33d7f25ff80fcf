"""Replay: the trainer alone on a run's recorded batches, in this process, with no generators.

Without changes it proves that the records make the weights: after every batch the digest must be the
recorded one. With changes it is a counterfactual: the same data under another algorithm, with other rewards
or in another order, and the metrics of both. It writes below RUN/replays only and never touches the run's
records.

`from_step` N begins where the weights hold N batches, as in the name of checkpoints/step-N. What leads there
is trained as it was recorded, from the newest checkpoint that is not beyond it; a counterfactual changes only
what comes after.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncrl.buffer.records import CheckpointRow, Records, TrainedRow
from asyncrl.errors import ConfigError, DataError, StorageError
from asyncrl.messages.sample import Sample
from asyncrl.obs import metrics
from asyncrl.run.rescore import Rescorer, Rewards, num_changed, rewards_of, shuffled
from asyncrl.run.rundir import read_plan
from asyncrl.topology.load import override
from asyncrl.topology.plan import Plan, compile_plan
from asyncrl.topology.schema import Topology
from asyncrl.train.backend import StepReport, train_plan
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend

REPLAYS = "replays"
CHECKPOINTS = "checkpoints"
BRANCH = "branch"
"""Where the weights of `from_step` rest while the settings change."""


class Order(StrEnum):
    """The order of the groups inside each batch; batches always come as recorded."""

    RECORDED = "recorded"
    SHUFFLED = "shuffled"


class Place(NamedTuple):
    """Where training may begin."""

    step: int
    """Rollout steps in these weights."""
    checkpoint: Path | None
    """None: the initial model."""


class Rescored(NamedTuple):
    """The rewards of one batch under the recorded reward and under the new one."""

    recorded: Rewards
    replayed: Rewards
    changed: int
    """Samples with another reward."""
    samples: int


class Outcome(NamedTuple):
    """One replayed rollout step."""

    batch: int
    recorded: str
    """Weights' digest after it in the recorded run; empty in an imported one."""
    replayed: str
    metrics: dict[str, float]
    rewards: Rescored | None = None
    """Of a replay with a new reward."""

    @property
    def equal(self) -> bool:
        """Whether the weights are the recorded ones to the bit."""
        return self.recorded == self.replayed


class Replay:
    """One replay of one run; `start`, then `steps`, then `close`."""

    def __init__(
        self, run_dir: Path, *, overrides: Sequence[str] = (), num_threads: int | None = None,
        from_step: int | None = None, order: Order = Order.RECORDED, order_seed: int = 0,
        rescore: str | None = None,
    ) -> None:  # fmt: skip
        """Compile what to train with; nothing is loaded yet.

        Args:
            run_dir: a run that has trained at least one batch, or an imported one.
            overrides: `table.key=value`, as for `launch`.
            num_threads: torch threads; None: as recorded.
            from_step: rollout steps in the weights at which it begins; None: as early as the records allow.
            order: of the groups inside each batch.
            order_seed: chooses one of the other orders.
            rescore: a reward, as [[reward]] use names it, that takes the place of the recorded ones.

        Raises:
            DataError: there is no run, or nothing was trained in it.
            ConfigError: an override is wrong, or there is no such step.
        """
        plan = read_plan(run_dir)
        self.run_dir = run_dir
        self.changes = [*overrides]
        """What is not as recorded, in words."""
        if order is Order.SHUFFLED:
            self.changes.append(f"groups shuffled (seed {order_seed})")
        if rescore is not None:
            self.changes.append(f"rewards of {rescore}")
        self.topology = _topology(plan, overrides, num_threads)
        self.recorded_topology = _topology(plan, (), num_threads)
        self._seed = order_seed if order is Order.SHUFFLED else None
        self._rescorer = Rescorer(rescore, topology=self.topology) if rescore is not None else None
        self._from_step = from_step
        self.records = Records(run_dir)
        self.imported = self.records.imported
        self.lineage = _batches(self.records) if self.imported else self.records.lineage()
        self.first = 0
        """The first batch that is reported."""
        self.approach: list[Outcome] = []
        """Steps trained before `first`, as recorded."""
        self.directory = run_dir / REPLAYS / "000"
        try:
            self._check()
        except (ConfigError, DataError):
            self.close()
            raise

    @property
    def counterfactual(self) -> bool:
        """Whether anything is not as recorded, so that other weights are to be expected."""
        return bool(self.changes)

    def _check(self) -> None:
        last = len(self.lineage) - 1
        if last < 0:
            raise DataError(
                f"{self.run_dir}: no batch of this run was trained, so there is nothing to replay"
            )
        if self._from_step is not None and not 0 <= self._from_step <= last:
            raise ConfigError(
                f"--from-step {self._from_step}: {self.run_dir} has {last + 1} trained batches; 0 to {last}"
                " are allowed (the number of batches in the weights, as in checkpoints/step-N)"
            )

    def start(self) -> str:
        """Load the weights to start from; returns in words which they are.

        Raises:
            DataError: the model, or the bodies and every checkpoint that could replace them, are gone.
            ConfigError: the new reward cannot be loaded.
        """
        places = self._starting_places()
        if self._rescorer is not None:
            self._rescorer.start()
        step, checkpoint = self._load(places)
        self.first = step if self._from_step is None else self._from_step
        self.directory = _new_directory(self.run_dir / REPLAYS)
        threads = self.topology.trainer.num_threads
        recorded = f"; steps up to {self.first} as recorded" if step < self.first else ""
        if checkpoint is None:
            return f"from {self.topology.trainer.hf_checkpoint} at step 0, {threads} thread(s){recorded}"
        why = (
            ': the bodies of earlier batches are no longer on disk (buffer.keep = "all" keeps them)'
            if self._from_step is None
            else recorded
        )
        return f"from {checkpoint} at step {step}, {threads} thread(s){why}"

    def _load(self, places: Sequence[Place]) -> Place:
        """Become the first of these that is whole; returns it."""
        for place in places:
            # The recorded settings lead to `from_step`; at it, or without it, the changed ones hold.
            before = self._from_step is not None and place.step < self._from_step
            self._train_with(self.recorded_topology if before else self.topology)
            try:
                self.trainer.start(checkpoint=place.checkpoint)
            except StorageError:
                if place == places[-1]:
                    raise
            else:
                return place
        raise AssertionError("there is always a place to start from")

    def _train_with(self, topology: Topology) -> None:
        self.trainer = Trainer(make_backend(train_plan(topology)))

    def steps(self) -> Iterator[Outcome]:
        """Train every batch of the lineage in order, and report from `first` on.

        A step before it is reported, too, where an exact replay differs there. Raises StorageError for a body
        that was altered, RewardError for a sample without a new reward.
        """
        step = self.trainer.rollout_step
        for row in self.lineage[step : self.first]:
            outcome, _ = self._step(row, recorded=True)
            self.approach.append(outcome)
            if not (outcome.equal or self.counterfactual or self.imported):
                yield outcome
        if self.counterfactual and step < self.first:
            self._branch()
        writer = metrics.MetricsWriter(self.directory / "metrics.jsonl")
        try:
            for row in self.lineage[self.first :]:
                outcome, report = self._step(row)
                writer.write(report.metrics, step=row.batch + 1)
                yield outcome
        finally:
            writer.close()

    def _branch(self) -> None:
        """Go on from the same weights with the changed settings."""
        path = self.trainer.save(self.directory / BRANCH)
        self._train_with(self.topology)
        self.trainer.start(checkpoint=path)
        shutil.rmtree(self.directory / BRANCH)

    def _step(self, row: TrainedRow, *, recorded: bool = False) -> tuple[Outcome, StepReport]:
        groups = self.records.batch(row.batch)
        rewards = None
        if not recorded:
            groups, rewards = self._changed(row.batch, groups)
        report, digest = self.trainer.train_batch(row.batch, groups)
        return Outcome(row.batch, row.digest, digest, report.metrics, rewards), report

    def _changed(self, batch: int, groups: list[list[Sample]]) -> tuple[list[list[Sample]], Rescored | None]:
        rewards = None
        if self._rescorer is not None:
            fresh = self._rescorer.score(groups)
            rewards = Rescored(
                rewards_of(groups), rewards_of(fresh), num_changed(groups, fresh), sum(map(len, groups))
            )
            groups = fresh
        if self._seed is not None:
            groups = shuffled(groups, seed=self._seed, batch=batch)
        return groups, rewards

    def save(self) -> Path:
        """Write a checkpoint of the weights as they are now; returns its directory. Raises StorageError."""
        return self.trainer.save(self.directory / CHECKPOINTS)

    def close(self) -> None:
        """Let go of the records and the reward. May be called twice."""
        self.records.close()
        if self._rescorer is not None:
            self._rescorer.close()

    def recorded_metrics(self) -> dict[int, dict[str, float]]:
        """What the recorded run's trainer wrote down, by rollout step; a step trained twice counts last."""
        found: dict[int, dict[str, float]] = {}
        for row in metrics.read(self.run_dir / "metrics" / "trainer.jsonl"):
            step = row.get("step")
            if step is not None and "train/loss" in row:
                found[int(step)] = row
        return found

    def _starting_places(self) -> list[Place]:
        """Where training may begin, the best first.

        Without `from_step`: the initial model, or the oldest checkpoint after which every batch is there.
        With it: the newest checkpoint at or before it, then older ones, then the initial model.
        """
        missing = [row.batch for row in self.lineage if not self.records.has_bodies(row.batch)]
        needed = max(missing, default=-1) + 1
        last = len(self.lineage) - 1 if self._from_step is None else self._from_step
        found: list[Place] = []
        if self._from_step is not None or missing:
            found += [
                Place(row.rollout_step, path)
                for row in self.records.checkpoints()
                if needed <= row.rollout_step <= last and self._survives(row)
                if (path := self._place(row)) is not None
            ]
        if self._from_step is not None:
            found.reverse()
        if not missing:
            found.append(Place(0, None))
        if found:
            return found
        between = "later, with batches after it," if self._from_step is None else f"up to {last}"
        raise DataError(
            f"{self.run_dir}: the bodies of batch {max(missing)} are gone and no checkpoint of rollout step"
            f" {needed} or {between} is on disk; "
            'buffer.keep = "all" keeps what a whole replay needs'
        )

    def _survives(self, row: CheckpointRow) -> bool:
        """Whether the checkpoint is of the surviving lineage."""
        return self.lineage[row.rollout_step - 1].incarnation <= row.incarnation

    def _place(self, row: CheckpointRow) -> Path | None:
        """The checkpoint's directory: the run's own, wherever it was moved, before the place it had then."""
        for path in (self.run_dir / CHECKPOINTS / Path(row.path).name, Path(row.path)):
            if path.is_dir():
                return path
        return None


class Comparison(NamedTuple):
    """A metric's mean over the replayed steps, and at the last one."""

    name: str
    recorded_mean: float
    replayed_mean: float
    recorded_last: float
    replayed_last: float


def compare(recorded: dict[int, dict[str, float]], outcomes: Sequence[Outcome]) -> list[Comparison]:
    """Recorded against replayed metrics, over the steps that both have; unchanged ones are there, too.

    After a new reward the recorded and the new rewards come first (reward/...).
    """
    found = []
    rescored = [outcome.rewards for outcome in outcomes if outcome.rewards is not None]
    for name in Rewards._fields if rescored else ():
        pairs = [(getattr(one.recorded, name), getattr(one.replayed, name)) for one in rescored]
        found.append(_comparison(f"reward/{name}", pairs))
    for name in outcomes[-1].metrics if outcomes else ():
        pairs = [
            (recorded[outcome.batch + 1][name], outcome.metrics[name])
            for outcome in outcomes
            if name in recorded.get(outcome.batch + 1, {}) and name in outcome.metrics
        ]
        if pairs:
            found.append(_comparison(name, pairs))
    return found


def _comparison(name: str, pairs: Sequence[tuple[float, float]]) -> Comparison:
    olds, news = zip(*pairs, strict=True)
    return Comparison(name, _mean(olds), _mean(news), olds[-1], news[-1])


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _batches(records: Records) -> list[TrainedRow]:
    """The batches of an imported run, as if trained: nobody knows the weights after them."""
    return [TrainedRow(row.batch, 0, 0, "", 0.0, 0.0, 0) for row in records.batches()]


def _topology(plan: Plan, overrides: Sequence[str], num_threads: int | None) -> Topology:
    topology = plan.topology
    if overrides:
        topology = compile_plan(override(topology, overrides, source="--set")).topology
    if num_threads is not None:
        trainer = msgspec.structs.replace(topology.trainer, num_threads=num_threads)
        topology = msgspec.structs.replace(topology, trainer=trainer)
    return topology


def _new_directory(parent: Path) -> Path:
    """The next free number below `parent`."""
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    directory = parent / f"{max(numbers, default=0) + 1:03d}"
    directory.mkdir()
    return directory
