"""A backend without a model: a rollout step takes as long as it is told, and does nothing else.

For tests, dry runs and benchmarks, beside the scripted engine (the embedded one refuses its weights). Its
weights are 16 numbers that every trained token changes, so that equal batches give equal digests and
different ones do not; checkpoints hold those numbers, and export the initial model's files as they are.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from asyncrl.errors import StorageError
from asyncrl.messages.sample import Sample
from asyncrl.train.backend import StepReport, TrainPlan
from asyncrl.train.rows import Row, data_metrics, decode, staleness_metrics

if TYPE_CHECKING:
    import torch

STATE = "scripted.json"


class _State(msgspec.Struct, frozen=True):
    """What a checkpoint holds."""

    rollout_step: int
    step: int
    weights: str
    """16 bytes, hex."""


@dataclass(frozen=True, kw_only=True)
class ScriptedBatch:
    """A batch ready to be pretended to train on."""

    rows: list[Row]
    num_samples: int


class ScriptedBackend:
    """See asyncrl.train.backend.Backend."""

    def __init__(self, plan: TrainPlan) -> None:
        self.plan = plan
        self.step = 0
        self._weights = b""

    def load(self) -> None:
        """Initial weights: a function of the seed."""
        self.step = 0
        self._weights = xxhash.xxh3_128_digest(str(self.plan.seed).encode())

    def prepare(self, groups: list[list[Sample]]) -> ScriptedBatch:
        """Decodes and checks the samples. Raises DataError for a malformed one."""
        rows = [decode(sample) for group in groups for sample in group]
        return ScriptedBatch(rows=rows, num_samples=len(rows))

    def train(self, prepared: ScriptedBatch, *, rollout_step: int) -> StepReport:
        """Take trainer.scripted_step_s, then change the weights."""
        start = time.perf_counter()
        hasher = xxhash.xxh3_128(self._weights)
        for row in prepared.rows:
            hasher.update(row.response.tobytes())
        # Not a wait for anything: this is the work.
        time.sleep(max(0.0, self.plan.trainer.scripted_step_s - (time.perf_counter() - start)))
        self._weights = hasher.digest()
        self.step += self.plan.num_steps_per_rollout
        metrics = data_metrics(prepared.rows, [0.0] * prepared.num_samples)
        return StepReport(
            metrics=metrics | staleness_metrics(prepared.rows, rollout_step=rollout_step),
            step=self.step,
            num_samples=prepared.num_samples,
            num_tokens=sum(int(row.mask.sum()) for row in prepared.rows),
            phase_s={"train": time.perf_counter() - start},
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """One tensor of 16 numbers."""
        import torch

        return {"scripted": torch.tensor(list(self._weights), dtype=torch.float32)}

    def digest(self) -> str:
        """xxh3-128 over all of `weights()`, hex."""
        from asyncrl.weights.manifest import digest_of

        return digest_of(self.weights())

    def save(self, directory: Path, *, rollout_step: int) -> Path:
        """Write `directory`/step-NNNNNN; one of the same name is replaced. Raises StorageError."""
        final = directory / f"step-{rollout_step:06d}"
        temporary = directory / f".{final.name}.tmp"
        state = _State(rollout_step, self.step, self._weights.hex())
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with (temporary / STATE).open("wb") as file:
                file.write(msgspec.json.encode(state))
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except OSError as error:
            raise StorageError(f"checkpoint {final}: cannot be written: {error}") from error
        return final

    def restore(self, directory: Path) -> int:
        """Become what `save` stored; returns its rollout step. Raises StorageError."""
        try:
            state = msgspec.json.decode((directory / STATE).read_bytes(), type=_State)
        except (OSError, msgspec.DecodeError) as error:
            raise StorageError(
                f"checkpoint {directory}: is none of the scripted backend: {error}; take an older one"
            ) from error
        self.step, self._weights = state.step, bytes.fromhex(state.weights)
        return state.rollout_step

    def export_hf(self, directory: Path) -> None:
        """Copy the files of the initial model."""
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(self.plan.trainer.hf_checkpoint).iterdir()):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
