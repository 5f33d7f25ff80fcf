"""The torch backend: any transformers causal LM, on the CPU or one device per process.

Owns the models, their optimizers and how they come and go: loading, checkpoints, the order of a rollout step
is `step`'s, checkpoint files are `checkpoint`'s, formulas are `algo`'s. Groups come in through `prepare`,
weights go out as live tensors. Where torch.distributed is initialised, each process trains its share of every
optimizer step.

Invariants: weights change only inside `train` and `restore`; with trainer.deterministic the same calls give
the same bits in a fresh process.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from asyncrl.messages.hooks import Args
from asyncrl.messages.sample import Sample
from asyncrl.train import checkpoint
from asyncrl.train.backend import StepReport, TrainPlan
from asyncrl.train.critic import Critic
from asyncrl.train.data import PreparedBatch, prepare_batch
from asyncrl.train.hooks import TrainHooks
from asyncrl.train.learner import Learner
from asyncrl.train.model import ModelShape, load_model, model_shape, unique_weights
from asyncrl.train.passes import Passes
from asyncrl.train.phases import Phases
from asyncrl.train.policies import Policies
from asyncrl.train.ranks import Ranks
from asyncrl.train.routing import routing_rows
from asyncrl.train.rows import staleness_metrics
from asyncrl.train.schedule import scheduled
from asyncrl.train.step import RolloutStep


class TorchBackend:
    """See asyncrl.train.backend.Backend."""

    def __init__(self, plan: TrainPlan) -> None:
        self.plan = plan
        self.step = 0
        self._device = torch.device(plan.trainer.device)
        self._phases = Phases(self._device)
        self._ranks = Ranks.current()
        self._hooks = TrainHooks(plan.algorithm, args=hook_args(plan))
        self._passes = Passes(plan, hooks=self._hooks, phases=self._phases, ranks=self._ranks)
        self._model: Any = None
        self._shape: ModelShape | None = None
        self._rollout: RolloutStep

    def load(self) -> None:
        """Initial weights, optimizer and frozen models; pins threads and seeds torch."""
        trainer = self.plan.trainer
        if trainer.load is None:
            self._load(Path(trainer.hf_checkpoint))
        else:
            stored = checkpoint.read(Path(trainer.load))
            if not trainer.no_load_optim:
                self.plan = self._continued(stored)
            # A critic named beside it is another one: neither weights nor moments are the checkpoint's.
            named = trainer.critic_load is not None
            self._load(Path(trainer.load), critic=None if named else stored.tensors.get("critic"))
            if not trainer.no_load_optim:
                self._load_learners(stored, critic=not named)
        torch.manual_seed(self.plan.seed)

    def _continued(self, stored: checkpoint.Stored) -> TrainPlan:
        """The plan with the schedule that trainer.load asks for."""
        theirs = stored.plan["trainer"]
        return msgspec.structs.replace(self.plan, trainer=scheduled(self.plan.trainer, stored=theirs))

    def _load(self, directory: Path, *, critic: dict[str, Tensor] | None = None) -> None:
        """Models and fresh optimizers; `critic` are a checkpoint's weights of it."""
        self._pin()
        trainer, algorithm = self.plan.trainer, self.plan.algorithm
        self._model = load_model(directory, trainer=trainer)
        self._shape = model_shape(self._model)
        self._passes.check_model(self._model)
        if trainer.gradient_checkpointing:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
        parts: dict[str, Any] = {"phases": self._phases, "ranks": self._ranks}
        self._rollout = RolloutStep(
            plan=self.plan,
            model=self._model,
            actor=Learner(dict(self._model.named_parameters()), trainer=trainer, **parts),
            critic=Critic(trainer=trainer, weights=critic, **parts)
            if algorithm.advantage_estimator == "ppo"
            else None,
            policies=Policies(self.plan, self._model),
            passes=self._passes,
            hooks=self._hooks,
            device=self._device,
            **parts,
        )
        self.step = 0

    def _load_learners(self, stored: checkpoint.Stored, *, critic: bool = True) -> None:
        """Optimizers and schedule positions of a checkpoint, the critic's too where it has one."""
        rollout, counters = self._rollout, stored.counters
        rollout.actor.optimizer.load_state(stored.tensors["optimizer"])
        rollout.actor.updates = counters.updates
        if critic and rollout.critic is not None and "critic" in stored.tensors:
            rollout.critic.learner.optimizer.load_state(stored.tensors["critic_optimizer"])
            rollout.critic.learner.updates = counters.critic_updates

    def prepare(self, groups: list[list[Sample]]) -> PreparedBatch:
        """Rewards and packing; may run on another thread beside `train`."""
        start = time.perf_counter()
        prepared = prepare_batch(
            groups, plan=self.plan, hooks=self._hooks, ranks=self._ranks, shape=self._shape
        )
        if self.plan.trainer.use_rollout_routing_replay:
            padded = prepared.data.num_tokens + 1
            prepared.data.routing_NLK = routing_rows(prepared.rows, num_tokens=padded)
        return replace(prepared, prepare_s=time.perf_counter() - start)

    def train(self, prepared: PreparedBatch, *, rollout_step: int) -> StepReport:
        """All optimizer steps of one rollout step; see Backend."""
        self._phases.clear()
        metrics = prepared.metrics | staleness_metrics(prepared.rows, rollout_step=rollout_step)
        metrics |= self._rollout.train(prepared, rollout_step=rollout_step)
        self.step += len(prepared.steps)
        return StepReport(
            metrics={**metrics, "train/step": float(self.step)},
            step=self.step,
            num_samples=prepared.num_samples,
            num_tokens=prepared.num_tokens,
            phase_s={"prepare": prepared.prepare_s, **self._phases.seconds},
        )

    def weights(self) -> dict[str, Tensor]:
        """Live tensors by Hugging Face name; a tied tensor once."""
        return unique_weights(self._model)

    def digest(self) -> str:
        """xxh3-128 over all of `weights()`, hex."""
        from asyncrl.weights.manifest import digest_of

        return digest_of(self.weights())

    def save(self, directory: Path, *, rollout_step: int) -> Path:
        """Write `directory`/step-NNNNNN, on the first rank; see checkpoint."""
        if self._ranks.rank != 0:
            return directory / checkpoint.name_of(rollout_step)
        actor, critic = self._rollout.actor, self._rollout.critic
        return checkpoint.save(
            directory,
            model=self._model,
            tensors={
                "optimizer": actor.optimizer.state(),
                **self._rollout.policies.state(),
                **({} if critic is None else critic.state()),
            },
            plan=self.plan,
            counters=checkpoint.Counters(
                rollout_step=rollout_step,
                step=self.step,
                updates=actor.updates,
                critic_updates=0 if critic is None else critic.learner.updates,
            ),
        )

    def restore(self, directory: Path) -> int:
        """Become what `save` stored; returns its rollout step."""
        stored = checkpoint.read(directory)
        checkpoint.check_same_reference(stored, plan=self.plan)
        trainer = self.plan.trainer
        if trainer.load is not None and not trainer.no_load_optim:
            # This run's own checkpoint carries the schedule on: the other run's may be gone by now.
            self.plan = self._continued(stored)
        self._load(directory, critic=stored.tensors.get("critic"))
        self._load_learners(stored)
        self._rollout.policies.load_state(stored.tensors)
        self.step = stored.counters.step
        checkpoint.set_random_state(stored.random)
        return stored.counters.rollout_step

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


def hook_args(plan: TrainPlan) -> Args:
    """What hooks get as `args`: every option of the run, or of these two tables where there is no run."""
    options = plan.options or {
        **msgspec.structs.asdict(plan.trainer),
        **msgspec.structs.asdict(plan.algorithm),
    }
    return Args(options, custom_config_path=options.get("custom_config_path"))
