"""One rollout step of the torch backend, in order:

    forward passes (reference, teacher, old policy, values) -> advantages -> hooks -> staleness masks
    -> optimizer steps of the critic, then of the actor -> reference and old actor catch up

Owns that order and the metrics that come out of it. Loads and stores nothing.

Invariant: a NumericsError leaves the weights of the last finished optimizer step.
"""

# ruff: noqa: N806 -- tensors carry shape suffixes
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from asyncrl.errors import NumericsError
from asyncrl.train.advantages import fill_advantages
from asyncrl.train.backend import TrainPlan
from asyncrl.train.critic import Critic, critic_trainer
from asyncrl.train.data import PreparedBatch, Step
from asyncrl.train.hooks import OWN, SchedulePosition, TrainHooks
from asyncrl.train.learner import Backward, Learner, Update
from asyncrl.train.masks import apply_staleness, mismatch_by_age, step_normalizer
from asyncrl.train.micro import MicroBatch
from asyncrl.train.model import has_dropout
from asyncrl.train.objective import policy_objective, value_objective
from asyncrl.train.passes import Passes, needs_old_logprobs
from asyncrl.train.phases import Phases
from asyncrl.train.policies import Policies
from asyncrl.train.ranks import Ranks
from asyncrl.train.schedule import learning_rate
from asyncrl.train.tokens import TokenData

ROLLOUT_METRICS = ("log_probs", "rollout_log_probs", "ref_log_probs")
"""Metrics of the forward passes that slime and Miles report about the data, not about training."""


@dataclass(frozen=True, kw_only=True)
class RolloutStep:
    """Everything that takes part in a rollout step; `train` runs one."""

    plan: TrainPlan
    model: Any
    """The actor."""
    actor: Learner
    critic: Critic | None
    policies: Policies
    passes: Passes
    hooks: TrainHooks
    phases: Phases
    ranks: Ranks
    device: torch.device

    def train(self, prepared: PreparedBatch, *, rollout_step: int) -> dict[str, float]:
        """Train the batch; metrics by public name."""
        data = prepared.data.copy_to(self.device)
        moved = {
            id(micro): micro.to(self.device)
            for micro in (*prepared.forwards, *(micro for step in prepared.steps for micro in step.micros))
        }
        steps = [replace(step, micros=[moved[id(micro)] for micro in step.micros]) for step in prepared.steps]
        batch = _Batch(prepared=prepared, data=data, steps=steps, rollout_step=rollout_step)
        self._forward(batch, [moved[id(micro)] for micro in prepared.forwards])
        metrics = self._advantages(batch) | self._critic_steps(batch) | self._actor_steps(batch)
        self.policies.trained(rollout_step + 1)
        return metrics

    def _forward(self, batch: _Batch, micros: Sequence[MicroBatch]) -> None:
        """Every pass without a gradient that the options ask for."""
        policies, run, data = self.policies, self.passes.log_probs, batch.data
        if policies.reference is not None:
            run("reference_R", policies.reference, micros, data, prefix="ref_")
        if policies.teacher is not None:
            run("teacher_R", policies.teacher, micros, data, prefix="teacher_")
        dropout = has_dropout(self.model)
        if needs_old_logprobs(self.plan, num_steps=len(batch.steps), dropout=dropout, hooks=self.hooks):
            model = self.model if policies.old_actor is None else policies.old_actor
            run("old_R", model, micros, data, prefix="", follows_actor=True)
        if self.critic is not None:
            self.passes.values(self.critic, micros, data)

    def _advantages(self, batch: _Batch) -> dict[str, float]:
        algorithm, hooks, data = self.plan.algorithm, self.hooks, batch.data
        rows = batch.prepared.rows
        custom = None if hooks.advantage is None else partial(hooks.set_advantages, rows=rows)
        metrics = fill_advantages(data, algorithm=algorithm, custom=custom)
        hooks.post_process(data, rows, batch.prepared.samples, rollout_step=batch.rollout_step)
        apply_staleness(
            data,
            algorithm=algorithm,
            rollout_step=batch.rollout_step,
            num_steps_per_rollout=self.plan.num_steps_per_rollout,
        )
        return metrics

    # The critic.

    def _critic_steps(self, batch: _Batch) -> dict[str, float]:
        if self.critic is None:
            return {}
        self.critic.train()
        if self.plan.trainer.reset_optimizer_states:
            self.critic.learner.optimizer.reset()
        metrics = _means([self._critic_step(self.critic, batch, step) for step in batch.steps])
        metrics.pop("loss", None)
        if "grad_norm" in metrics:
            metrics["critic_grad_norm"] = metrics.pop("grad_norm")
        return {f"train/{name}": value for name, value in metrics.items()}

    def _critic_step(self, critic: Critic, batch: _Batch, step: Step) -> Mapping[str, float]:
        trainer = self.plan.trainer
        own = msgspec.structs.replace(trainer, **critic_trainer(trainer))
        batch.data.weigh(samples=step.samples, per_token=self.plan.algorithm.calculate_per_token_loss)
        backward = partial(self._value_backward, critic=critic, data=batch.data)
        lr = learning_rate(critic.learner.updates, trainer=own, decay_iters=self.plan.lr_decay_iters)
        update = critic.learner.update(step.micros, backward, lr=lr)
        self._check(update, critic.learner, backward, batch, step, who="critic: ")
        return update.metrics

    def _value_backward(self, micro: MicroBatch, *, critic: Critic, data: TokenData) -> dict[str, Tensor]:
        tokens = data.take(micro)
        with self.phases("train_critic"):
            values_R = critic.values(micro)
            loss, metrics = value_objective(values_R, tokens, value_clip=self.plan.algorithm.value_clip)
            loss.backward()
        return metrics

    # The actor.

    def _actor_steps(self, batch: _Batch) -> dict[str, float]:
        """The optimizer steps of the actor; none while only the critic learns."""
        trainer, data = self.plan.trainer, batch.data
        if batch.rollout_step < trainer.num_critic_only_steps:
            return {"train/skipped_steps": 0.0}
        if trainer.reset_optimizer_states:
            self.actor.optimizer.reset()
        data.current_R = torch.zeros_like(data.rollout_R)
        found = [self._actor_step(batch, step, index) for index, step in enumerate(batch.steps)]
        self.ranks.sum_(data.current_R)
        metrics = _means(found)
        metrics["train/skipped_steps"] = sum(each["train/skipped_steps"] for each in found)
        return metrics | mismatch_by_age(data, rollout_step=batch.rollout_step)

    def _actor_step(self, batch: _Batch, step: Step, index: int) -> dict[str, float]:
        algorithm, actor, data = self.plan.algorithm, self.actor, batch.data
        self.model.train()
        data.weigh(samples=step.samples, per_token=algorithm.calculate_per_token_loss)
        data.tis_normalizer = step_normalizer(data, samples=step.samples, algorithm=algorithm)
        backward = partial(self._policy_backward, data=data, rollout_step=batch.rollout_step)
        lr = learning_rate(actor.updates, trainer=self.plan.trainer, decay_iters=self.plan.lr_decay_iters)
        before = partial(
            self.hooks.train_step_begins,
            rollout_step=batch.rollout_step,
            step_index=index,
            model=self.model,
            optimizer=actor.optimizer.inner,
            scheduler=SchedulePosition(num_steps=actor.updates, lr=lr),
        )
        update = actor.update(step.micros, backward, lr=lr, before=before)
        self._check(update, actor, backward, batch, step)
        return self._public(update, batch, step)

    def _policy_backward(self, micro: MicroBatch, *, data: TokenData, rollout_step: int) -> dict[str, Tensor]:
        tokens = data.take(micro)
        with self.phases("train"), self.passes.replayed(self.model, micro, data):
            if self.hooks.custom_loss is not None:
                loss, metrics = self.hooks.loss(self.passes.logits(self.model, micro), tokens, micro)
            else:
                found = self.passes.statistics(self.model, micro)
                data.put("current_R", found.logprobs_R.detach(), micro=micro)
                loss, metrics = policy_objective(
                    found,
                    tokens,
                    algorithm=self.plan.algorithm,
                    proximal_version=rollout_step,
                    hooks=self.hooks,
                )
            loss.backward()
        return {**metrics, "loss": loss.detach()}

    def _public(self, update: Update, batch: _Batch, step: Step) -> dict[str, float]:
        public = {_public_name(name): value for name, value in update.metrics.items()}
        for index, lr in enumerate(self.actor.optimizer.learning_rates):
            public[f"train/lr-pg_{index}"] = lr
        public["train/global_batch_size"] = float(len(step.samples))
        public["train/num_tokens"] = float(sum(batch.prepared.rows[i].num_tokens for i in step.samples))
        public["train/num_micro_batches"] = float(len(step.micros))
        public["train/skipped_steps"] = float(update.problem is not None)
        return public

    def _check(
        self, update: Update, learner: Learner, backward: Backward, batch: _Batch, step: Step, who: str = ""
    ) -> None:
        """Raise NumericsError naming the samples that are not finite alone; on_nan = "skip" goes on."""
        if update.problem is None or self.plan.trainer.on_nan == "skip":
            return
        names = self._broken_samples(learner, backward, batch.prepared, step)
        raise NumericsError(
            f"rollout step {batch.rollout_step}, optimizer step {batch.steps.index(step)}: {who}"
            f"{update.problem}: {names}; the weights are those before this optimizer step "
            '(trainer.on_nan = "skip" goes on without it)'
        )

    def _broken_samples(
        self, learner: Learner, backward: Backward, prepared: PreparedBatch, step: Step
    ) -> str:
        """Every rank tells the same: each looks at its own samples, and they share what they found."""
        rows = prepared.rows
        causes = [cause for i in step.samples if (cause := rows[i].defect()) is not None]
        if causes:
            return f"samples {', '.join(causes)}"
        broken_S = torch.zeros(len(rows), device=self.device)
        for i in (member for micro in step.micros for member in micro.members):
            micro = prepared.layout.micro_batch([i]).to(self.device)
            broken_S[i] = float(not learner.is_finite(micro, backward))
        broken = self.ranks.sum_(broken_S).nonzero().flatten().tolist()
        names = [rows[i].name for i in broken or step.samples]
        return f"samples {', '.join(names)}{'' if broken else ' together'}"


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A batch on the device."""

    prepared: PreparedBatch
    data: TokenData
    steps: list[Step]
    rollout_step: int


def _public_name(name: str) -> str:
    if name.startswith(OWN):
        return name
    return f"rollout/{name}" if name in ROLLOUT_METRICS else f"train/{name}"


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric over the optimizer steps that report it."""
    values: dict[str, list[float]] = {}
    for metrics in found:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    return {name: statistics.fmean(each) for name, each in values.items()}
