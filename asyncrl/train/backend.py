"""The interface of a training backend: what the trainer role and replay ask, whatever trains behind it.

A backend owns the model, its optimizer and their durable form. It never talks to the buffer, publishes
nothing, and reads no clock but for the phases it reports. Groups go in exactly as they were recorded, and
their order is part of the result.

`rollout_step` always counts the rollout steps trained into the weights *before* a call: the weights that
`train(rollout_step=s)` starts from are version s, afterwards they are version s + 1; `save(rollout_step=v)`
stores version v and `restore` returns it, the next rollout step to train.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from asyncrl.errors import ConfigError
from asyncrl.messages.sample import Sample
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.topology.batch import solve
from asyncrl.topology.flat import flat_options
from asyncrl.topology.schema import Topology
from asyncrl.topology.training import TrainerConfig

if TYPE_CHECKING:
    import torch


class TrainPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a backend is told, resolved."""

    trainer: TrainerConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    num_steps_per_rollout: int = 1
    """Optimizer steps per rollout step."""
    rollout_temperature: float = 1.0
    """The engine's sampling temperature; log-probs are of logits / temperature. Above 0."""
    num_rollout: int | None = None
    """Rollout steps of the run, for decay over all of it. None: unknown."""
    seed: int = 1234
    num_samples: int | None = None
    """Samples of a full rollout batch; None: whatever comes."""
    n_samples_per_prompt: int = 0
    """Samples per group, for the run-wide index that hooks see."""
    update_weights_interval: int = 1
    """Rollout steps between pushes, for keep_old_actor."""
    options: dict[str, Any] = {}
    """Every option of the run by its bare name: what hooks find on `args`."""

    @property
    def lr_decay_iters(self) -> int | None:
        """Optimizer steps until the learning rate is `min_lr`; None when neither option nor run says."""
        if self.trainer.lr_decay_iters is not None:
            return self.trainer.lr_decay_iters
        return None if self.num_rollout is None else self.num_rollout * self.num_steps_per_rollout


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rollout step did."""

    metrics: dict[str, float]
    """Numbers by their public names (train/..., rollout/..., staleness/...), means over optimizer steps."""
    step: int
    """Optimizer steps trained into the weights after it."""
    num_samples: int
    num_tokens: int
    """Response tokens that the loss saw (loss mask 1, sample not removed)."""
    phase_s: dict[str, float]
    """Seconds by phase: prepare, log_probs, ref_log_probs, teacher_log_probs, values, train_critic and train
    (forward and backward), optimizer."""


class Prepared(Protocol):
    """A batch ready to train: advantages computed, samples packed. Belongs to the backend that made it."""

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""


class Backend(Protocol):
    """See the module's docstring. Calls come one at a time, but `prepare` may run beside `train`."""

    def load(self) -> None:
        """Initial weights from trainer.hf_checkpoint. Raises DataError, ConfigError."""

    def prepare(self, groups: list[list[Sample]]) -> Prepared:
        """Advantages and packing; CPU work that touches neither weights nor random numbers.

        Raises DataError for a sample without a score or with arrays of unequal length.
        """

    def train(self, prepared: Any, *, rollout_step: int) -> StepReport:
        """All optimizer steps of one rollout step. Raises NumericsError."""

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The live tensors by Hugging Face name; they change under the next `train`. No copy."""

    def digest(self) -> str:
        """xxh3-128 over names, shapes, dtypes and bytes of `weights()`, hex."""

    def save(self, directory: Path, *, rollout_step: int) -> Path:
        """Write the checkpoint `directory`/step-NNNNNN atomically; returns its path. Raises StorageError."""

    def restore(self, directory: Path) -> int:
        """Become what `save` stored in this checkpoint directory; returns its `rollout_step`.

        Raises StorageError for a torn checkpoint, ConfigError for one of another model.
        """

    def export_hf(self, directory: Path) -> None:
        """Write model, configuration and tokenizer as a Hugging Face model directory."""


def train_plan(topology: Topology) -> TrainPlan:
    """The plan of a topology; num_steps_per_rollout follows from the four-knob invariant where left out.

    rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout. Raises ConfigError.
    """
    knobs = solve(topology)
    if isinstance(knobs, str):
        raise ConfigError(knobs)
    rollout = topology.rollout
    return TrainPlan(
        trainer=topology.trainer,
        algorithm=topology.algorithm,
        num_steps_per_rollout=knobs.num_steps_per_rollout,
        rollout_temperature=rollout.rollout_temperature,
        num_rollout=topology.run.num_rollout,
        seed=topology.run.seed,
        num_samples=rollout.rollout_batch_size * rollout.n_samples_per_prompt,
        n_samples_per_prompt=rollout.n_samples_per_prompt,
        update_weights_interval=rollout.update_weights_interval,
        options=flat_options(topology),
    )
