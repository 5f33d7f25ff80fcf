"""The torch backend: any transformers causal LM in one process, on the CPU or one device.

Owns the model, the frozen reference, the optimizer and the numbers of steps taken. Groups come in through
`prepare`, weights go out as live tensors. Checkpoint files are `checkpoint`'s, formulas are `algo`'s.

Invariants: weights change only inside `train` and `restore`; a NumericsError leaves the weights of the last
finished optimizer step; with trainer.deterministic the same calls give the same bits in a fresh process.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asyncrl.algo.loss import TokenStatistics
from asyncrl.errors import NumericsError
from asyncrl.messages.sample import Sample
from asyncrl.train import checkpoint
from asyncrl.train.backend import StepReport, TrainPlan
from asyncrl.train.data import MicroBatch, PreparedBatch, prepare_batch
from asyncrl.train.forward import response_statistics
from asyncrl.train.model import has_dropout, load_model, unique_weights
from asyncrl.train.objective import needs_reference, policy_objective
from asyncrl.train.optimizer import NamedOptimizer, learning_rate
from asyncrl.train.rows import staleness_metrics

ROLLOUT_METRICS = ("log_probs", "rollout_log_probs", "ref_log_probs")
"""Metrics of the forward passes that slime and Miles report about the data, not about training."""


class TorchBackend:
    """See asyncrl.train.backend.Backend."""

    def __init__(self, plan: TrainPlan) -> None:
        self.plan = plan
        self.step = 0
        self._device = torch.device(plan.trainer.device)
        self._model: Any = None
        self._reference: Any = None
        self._optimizer: NamedOptimizer
        self._phase_s: dict[str, float] = {}

    def load(self) -> None:
        """Initial weights, optimizer and reference; pins threads and seeds torch."""
        self._load(Path(self.plan.trainer.hf_checkpoint))
        torch.manual_seed(self.plan.seed)

    def _load(self, directory: Path) -> None:
        self._pin()
        trainer = self.plan.trainer
        self._model = load_model(directory, trainer=trainer)
        if trainer.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        if needs_reference(self.plan.algorithm):
            self._reference = load_model(Path(trainer.ref_load or trainer.hf_checkpoint), trainer=trainer)
            self._reference.requires_grad_(requires_grad=False).eval()
        self._optimizer = NamedOptimizer(dict(self._model.named_parameters()), trainer=trainer)
        self.step = 0

    def prepare(self, groups: list[list[Sample]]) -> PreparedBatch:
        """Advantages and packing; may run on another thread beside `train`."""
        start = time.perf_counter()
        prepared = prepare_batch(groups, plan=self.plan)
        return replace(prepared, prepare_s=time.perf_counter() - start)

    def train(self, prepared: PreparedBatch, *, rollout_step: int) -> StepReport:
        """All optimizer steps of one rollout step; see Backend."""
        self._phase_s.clear()
        steps = [[micro.to(self._device) for micro in step] for step in prepared.steps]
        old = self._old_logprobs(steps)
        values: dict[str, list[float]] = {}
        for micros, old_logprobs in zip(steps, old, strict=True):
            for name, value in self._optimizer_step(micros, old_logprobs, rollout_step).items():
                values.setdefault(name, []).append(value)
        metrics = {name: statistics.fmean(found) for name, found in values.items()}
        metrics["train/skipped_steps"] = sum(values["train/skipped_steps"])
        metrics["train/step"] = float(self.step)
        phase_s = {"prepare": prepared.prepare_s, **self._phase_s}
        return StepReport(
            metrics=prepared.metrics | staleness_metrics(prepared.rows, rollout_step=rollout_step) | metrics,
            step=self.step,
            num_samples=prepared.num_samples,
            num_tokens=prepared.num_tokens,
            phase_s=phase_s,
        )

    def weights(self) -> dict[str, Tensor]:
        """Live tensors by Hugging Face name; a tied tensor once."""
        return unique_weights(self._model)

    def digest(self) -> str:
        """xxh3-128 over all of `weights()`, hex."""
        from asyncrl.weights.manifest import digest_of

        return digest_of(self.weights())

    def save(self, directory: Path, *, rollout_step: int) -> Path:
        """Write `directory`/step-NNNNNN; see checkpoint."""
        return checkpoint.save(
            directory,
            model=self._model,
            optimizer=self._optimizer.state(),
            plan=self.plan,
            rollout_step=rollout_step,
            step=self.step,
        )

    def restore(self, directory: Path) -> int:
        """Become what `save` stored; returns its rollout step."""
        state = checkpoint.read(directory)
        checkpoint.check_same_reference(state, plan=self.plan)
        self._load(directory)
        self._optimizer.load_state(state.optimizer)
        self.step = state.step
        checkpoint.set_random_state(state.random)
        return state.rollout_step

    def export_hf(self, directory: Path) -> None:
        """Write a Hugging Face model directory."""
        checkpoint.export_hf(self._model, directory, hf_checkpoint=Path(self.plan.trainer.hf_checkpoint))

    def _pin(self) -> None:
        """Fix what the bits of a result depend on."""
        trainer = self.plan.trainer
        torch.set_num_threads(trainer.num_threads)
        if self._device.type == "cuda":
            # cuBLAS reads this when its handle is made; without it deterministic mode refuses to multiply.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(trainer.deterministic)
        # Filling fresh memory costs time and guards only against reads of uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._phase_s[name] = self._phase_s.get(name, 0.0) + time.perf_counter() - start

    def _statistics(self, model: Any, micro: MicroBatch) -> TokenStatistics:
        trainer, algorithm = self.plan.trainer, self.plan.algorithm
        return response_statistics(
            model,
            micro,
            packed=trainer.attn_implementation == "packed",
            temperature=self.plan.rollout_temperature,
            chunk_size=trainer.log_probs_chunk_size,
            entropy_gradient=algorithm.entropy_coef != 0,
        )

    def _old_logprobs(self, steps: list[list[MicroBatch]]) -> list[list[Tensor | None]]:
        """Log-probs [R] under the weights at the start of the rollout step, by step and micro-batch.

        None where they need no forward of their own: the engine's are used instead, or there is a single
        optimizer step without dropout, whose own log-probs they are.
        """
        if self.plan.algorithm.use_rollout_logprobs or (len(steps) == 1 and not has_dropout(self._model)):
            return [[None] * len(micros) for micros in steps]
        self._model.eval()
        with self._phase("log_probs"), torch.no_grad():
            return [[self._statistics(self._model, micro).logprobs_R for micro in micros] for micros in steps]

    def _reference_logprobs(self, micro: MicroBatch) -> Tensor | None:
        if self._reference is None:
            return None
        with self._phase("ref_log_probs"), torch.no_grad():
            return self._statistics(self._reference, micro).logprobs_R

    def _optimizer_step(
        self, micros: list[MicroBatch], old: list[Tensor | None], rollout_step: int
    ) -> dict[str, float]:
        """Accumulate gradients over the micro-batches, check, clip, step; metrics by public name."""
        self._model.train()
        self._optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        broken: str | None = None
        for micro, old_R in zip(micros, old, strict=True):
            metrics = self._backward(micro, old_R)
            if not torch.isfinite(metrics["loss"]):
                broken = f"the loss is {metrics['loss'].item()}: samples {', '.join(micro.names)}"
                break
            for name, value in metrics.items():
                totals[name] = totals[name] + value if name in totals else value
        with self._phase("optimizer"):
            lr = learning_rate(self.step, trainer=self.plan.trainer, decay_iters=self.plan.lr_decay_iters)
            self._optimizer.set_lr(lr)
            if broken is None:
                totals["grad_norm"] = self._optimizer.clip()
                if not torch.isfinite(totals["grad_norm"]):
                    broken = self._broken_gradient(micros, old)
            if broken is None:
                self._optimizer.step()
            elif self.plan.trainer.on_nan == "fail":
                self._optimizer.zero_grad()
                raise NumericsError(
                    f"rollout step {rollout_step}, optimizer step {self.step}: {broken}; the weights are "
                    'those before this step (trainer.on_nan = "skip" goes on without it)'
                )
        self.step += 1
        self._optimizer.zero_grad()
        return self._public(totals if broken is None else {}, micros, skipped=broken is not None)

    def _backward(self, micro: MicroBatch, old_R: Tensor | None) -> dict[str, Tensor]:
        reference_R = self._reference_logprobs(micro)
        with self._phase("train"):
            loss, metrics = policy_objective(
                self._statistics(self._model, micro),
                micro,
                algorithm=self.plan.algorithm,
                old_R=old_R,
                reference_R=reference_R,
            )
            loss.backward()
        return metrics

    def _broken_gradient(self, micros: list[MicroBatch], old: list[Tensor | None]) -> str:
        """Which micro-batch has NaN or Inf in its gradient, found by running each alone again."""
        for micro, old_R in zip(micros, old, strict=True):
            self._optimizer.zero_grad()
            self._backward(micro, old_R)
            if not torch.isfinite(self._optimizer.clip()):
                return f"NaN or Inf in the gradient: samples {', '.join(micro.names)}"
        names = [name for micro in micros for name in micro.names]
        return f"NaN or Inf in the summed gradient: samples {', '.join(names)}"

    def _public(
        self, totals: dict[str, Tensor], micros: list[MicroBatch], *, skipped: bool
    ) -> dict[str, float]:
        values = torch.stack([value.double().cpu() for value in totals.values()]).tolist() if totals else []
        metrics = {
            f"{'rollout' if name in ROLLOUT_METRICS else 'train'}/{name}": value
            for name, value in zip(totals, values, strict=True)
        }
        for index, lr in enumerate(self._optimizer.learning_rates):
            metrics[f"train/lr-pg_{index}"] = lr
        metrics["train/global_batch_size"] = float(micros[0].num_step_samples)
        metrics["train/num_tokens"] = float(sum(sum(micro.lengths) for micro in micros))
        metrics["train/num_micro_batches"] = float(len(micros))
        metrics["train/skipped_steps"] = float(skipped)
        return metrics
