"""One rollout step of training, the same for the live trainer and for replay.

Owns the order prepare - train - digest and the count of rollout steps. Never talks to the buffer and
publishes nothing: whoever holds it hands groups in and takes the report.
"""

from __future__ import annotations

from pathlib import Path

from asyncrl.messages.sample import Sample
from asyncrl.train.backend import Backend, Prepared, StepReport


class Trainer:
    """A backend with its place in the run: `rollout_step` counts the batches in the weights."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.rollout_step = 0

    def start(self, *, checkpoint: Path | None = None) -> int:
        """Load the initial weights, or a checkpoint's; returns the index of the next batch to train."""
        if checkpoint is None:
            self.backend.load()
            self.rollout_step = 0
        else:
            self.rollout_step = self.backend.restore(checkpoint)
        return self.rollout_step

    def prepare(self, groups: list[list[Sample]]) -> Prepared:
        """CPU work on a batch ahead of its turn; may run on another thread beside `train_prepared`."""
        return self.backend.prepare(groups)

    def train_prepared(self, batch_index: int, prepared: Prepared) -> tuple[StepReport, str]:
        """Train batch `batch_index`, which must be the next one; returns the report and the weights' digest.

        Raises ValueError for a batch out of turn, NumericsError.
        """
        if batch_index != self.rollout_step:
            raise ValueError(
                f"batch_index: {batch_index}; the weights hold {self.rollout_step} batches, so "
                f"{self.rollout_step} is next"
            )
        report = self.backend.train(prepared, rollout_step=batch_index)
        self.rollout_step += 1
        return report, self.backend.digest()

    def train_batch(self, batch_index: int, groups: list[list[Sample]]) -> tuple[StepReport, str]:
        """`prepare` and `train_prepared` in one."""
        return self.train_prepared(batch_index, self.prepare(groups))

    def save(self, directory: Path) -> Path:
        """Write a checkpoint of the current weights below `directory`; returns its path."""
        return self.backend.save(directory, rollout_step=self.rollout_step)
