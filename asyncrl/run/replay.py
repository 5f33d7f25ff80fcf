"""Replay: the trainer alone on a run's recorded batches, in this process, with no generators.

Without overrides it proves that the records make the weights: after every batch the digest must be the
recorded one. With overrides it is a counterfactual: the same data under another algorithm, and the metrics
of both. It writes below RUN/replays only and never touches the run's records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncrl.buffer.records import CheckpointRow, Records, TrainedRow
from asyncrl.errors import DataError
from asyncrl.obs import metrics
from asyncrl.run.rundir import read_plan
from asyncrl.topology.load import override
from asyncrl.topology.plan import Plan, compile_plan
from asyncrl.topology.schema import Topology
from asyncrl.train.backend import StepReport, train_plan
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend

REPLAYS = "replays"
CHECKPOINTS = "checkpoints"


class Outcome(NamedTuple):
    """One replayed rollout step."""

    batch: int
    recorded: str
    """Weights' digest after it in the recorded run."""
    replayed: str
    metrics: dict[str, float]

    @property
    def equal(self) -> bool:
        """Whether the weights are the recorded ones to the bit."""
        return self.recorded == self.replayed


class Replay:
    """One replay of one run; `start`, then `steps`."""

    def __init__(
        self, run_dir: Path, *, overrides: Sequence[str] = (), num_threads: int | None = None
    ) -> None:
        """Compile what to train with; nothing is loaded yet.

        Args:
            run_dir: a run that has trained at least one batch.
            overrides: `table.key=value`, as for `launch`.
            num_threads: torch threads; None: as recorded.

        Raises:
            DataError: there is no run, or nothing was trained in it.
            ConfigError: an override is wrong.
        """
        self.run_dir = run_dir
        self.counterfactual = bool(overrides)
        self.topology = _topology(read_plan(run_dir), overrides, num_threads)
        self.records = Records(run_dir)
        self.lineage = self.records.lineage()
        self.first = 0
        """The first batch that is trained again."""
        self.directory = run_dir / REPLAYS / "000"
        if not self.lineage:
            self.records.close()
            raise DataError(f"{run_dir}: no batch of this run was trained, so there is nothing to replay")

    def start(self) -> str:
        """Load the weights to start from; returns in words which they are.

        Raises:
            DataError: the model, or the bodies and every checkpoint that could replace them, are gone.
        """
        checkpoint = self._starting_checkpoint()
        self.trainer = Trainer(make_backend(train_plan(self.topology)))
        self.first = self.trainer.start(checkpoint=checkpoint)
        self.directory = _new_directory(self.run_dir / REPLAYS)
        threads = self.topology.trainer.num_threads
        if checkpoint is None:
            return f"from {self.topology.trainer.hf_checkpoint} at step 0, {threads} thread(s)"
        return (
            f"from {checkpoint} at step {self.first}, {threads} thread(s): the bodies of earlier batches are"
            f" no longer "
            'on disk (buffer.keep = "all" keeps them)'
        )

    def steps(self) -> Iterator[Outcome]:
        """Train every batch of the lineage in order. Raises StorageError for a body that was altered."""
        writer = metrics.MetricsWriter(self.directory / "metrics.jsonl")
        try:
            for row in self.lineage[self.first :]:
                outcome, report = self._step(row)
                writer.write(report.metrics, step=row.batch + 1)
                yield outcome
        finally:
            writer.close()

    def _step(self, row: TrainedRow) -> tuple[Outcome, StepReport]:
        report, digest = self.trainer.train_batch(row.batch, self.records.batch(row.batch))
        return Outcome(row.batch, row.digest, digest, report.metrics), report

    def close(self) -> None:
        """Let go of the records."""
        self.records.close()

    def recorded_metrics(self) -> dict[int, dict[str, float]]:
        """What the recorded run's trainer wrote down, by rollout step; a step trained twice counts last."""
        found: dict[int, dict[str, float]] = {}
        for row in metrics.read(self.run_dir / "metrics" / "trainer.jsonl"):
            step = row.get("step")
            if step is not None and "train/loss" in row:
                found[int(step)] = row
        return found

    def _starting_checkpoint(self) -> Path | None:
        """None to start at step 0; else the oldest checkpoint from which every batch is still there."""
        missing = [row.batch for row in self.lineage if not self.records.has_bodies(row.batch)]
        if not missing:
            return None
        needed = max(missing) + 1
        for row in self.records.checkpoints():
            path = self._place(row)
            if needed <= row.rollout_step < len(self.lineage) and path is not None and self._survives(row):
                return path
        raise DataError(
            f"{self.run_dir}: the bodies of batch {max(missing)} are gone and no checkpoint of rollout step"
            f" {needed} or "
            'later, with batches after it, is on disk; buffer.keep = "all" keeps what a whole replay needs'
        )

    def _survives(self, row: CheckpointRow) -> bool:
        """Whether the checkpoint is of the surviving lineage."""
        return self.lineage[row.rollout_step - 1].incarnation <= row.incarnation

    def _place(self, row: CheckpointRow) -> Path | None:
        """The checkpoint's directory; the run directory may have been moved since."""
        for path in (Path(row.path), self.run_dir / CHECKPOINTS / Path(row.path).name):
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
    """Recorded against replayed metrics, over the steps that both have; unchanged ones are there, too."""
    found = []
    for name in outcomes[-1].metrics if outcomes else ():
        pairs = [
            (recorded[outcome.batch + 1][name], outcome.metrics[name])
            for outcome in outcomes
            if name in recorded.get(outcome.batch + 1, {}) and name in outcome.metrics
        ]
        if pairs:
            olds, news = zip(*pairs, strict=True)
            found.append(Comparison(name, _mean(olds), _mean(news), olds[-1], news[-1]))
    return found


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


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
