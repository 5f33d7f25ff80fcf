"""The frozen models beside the actor: reference, teacher, and the actor of some steps ago.

Owns which of them a run has, when they change, and their durable form. Trains nothing.

    reference   KL loss and KL reward; ref_load, and a copy of the actor every ref_update_interval
    teacher     on-policy distillation; opd_teacher_load, never changes
    old actor   keep_old_actor: the weights that the engines sampled with, so that the old log-probs are
                theirs. With a push every rollout step that is the push before the last one (the last one's
                samples are still to come), otherwise the last push. Source: slime-miles.md 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asyncrl.errors import ConfigError
from asyncrl.train.advantages import distils
from asyncrl.train.backend import TrainPlan
from asyncrl.train.model import load_model, unique_weights
from asyncrl.train.objective import needs_reference

Tensors = dict[str, Tensor]


def needs_teacher(plan: TrainPlan) -> bool:
    """Whether a frozen teacher runs in the trainer."""
    return distils(plan.algorithm) and plan.algorithm.opd_type == "model"


class Policies:
    """See the module's docstring."""

    def __init__(self, plan: TrainPlan, actor: Any) -> None:
        """Load what the options ask for. Raises DataError, ConfigError."""
        self._plan = plan
        self._actor = actor
        trainer, algorithm = plan.trainer, plan.algorithm
        reference, teacher = trainer.ref_load, algorithm.opd_teacher_load
        self.reference = self._frozen(reference, "trainer.ref_load") if needs_reference(algorithm) else None
        self.teacher = self._frozen(teacher, "algorithm.opd_teacher_load") if needs_teacher(plan) else None
        self.old_actor = self._frozen(None, "") if trainer.keep_old_actor else None
        if self.reference is not None:
            check_same_vocabulary(self.reference, actor, option="trainer.ref_load")
            if trainer.ref_update_interval is not None:
                check_same_shape(self.reference, actor)
        if self.teacher is not None:
            check_same_vocabulary(self.teacher, actor, option="algorithm.opd_teacher_load")
        # Every rollout step is pushed then, so these are the weights of the actor whenever it rests, and a
        # restored actor's too: no checkpoint needs them.
        self._published: Tensors = _copy(actor) if self._is_queue else {}
        if self.old_actor is not None:
            _become(self.old_actor, unique_weights(actor))

    def _frozen(self, directory: str | None, option: str) -> Any:
        """The model of the directory that `option` names; None: the initial one."""
        trainer = self._plan.trainer
        if directory is None:
            directory, option = trainer.hf_checkpoint, "trainer.hf_checkpoint"
        model = load_model(Path(directory), trainer=trainer, option=option)
        model.requires_grad_(requires_grad=False).eval()
        return model

    @property
    def _is_queue(self) -> bool:
        return self._plan.trainer.keep_old_actor and self._plan.update_weights_interval == 1

    def trained(self, rollout_step: int) -> None:
        """The actor holds `rollout_step` rollout steps now."""
        interval = self._plan.trainer.ref_update_interval
        if self.reference is not None and interval is not None and rollout_step % interval == 0:
            _become(self.reference, unique_weights(self._actor))
        if self.old_actor is None or rollout_step % self._plan.update_weights_interval:
            return
        if self._is_queue:
            _become(self.old_actor, self._published)
            self._published = _copy(self._actor)
        else:
            _become(self.old_actor, unique_weights(self._actor))

    def state(self) -> dict[str, Tensors]:
        """What a checkpoint needs of them: those that change. Live tensors."""
        state: dict[str, Tensors] = {}
        if self.reference is not None and self._plan.trainer.ref_update_interval is not None:
            state["reference"] = unique_weights(self.reference)
        if self.old_actor is not None:
            state["old_actor"] = unique_weights(self.old_actor)
        return state

    def load_state(self, state: Mapping[str, Tensors]) -> None:
        """Take over what `state` gave."""
        if "reference" in state and self.reference is not None:
            _become(self.reference, state["reference"])
        if "old_actor" in state and self.old_actor is not None:
            _become(self.old_actor, state["old_actor"])


@torch.no_grad()
def _become(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model of the same shape."""
    for name, tensor in unique_weights(model).items():
        tensor.copy_(weights[name])


def _copy(model: Any) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in unique_weights(model).items()}


def check_same_vocabulary(model: Any, actor: Any, *, option: str) -> None:
    """Raise ConfigError, naming `option`, when a model reads other tokens than the actor writes."""
    ours, theirs = (m.get_input_embeddings().weight.shape[0] for m in (actor, model))
    if ours != theirs:
        raise ConfigError(
            f"{option}: the model there has {theirs} tokens in its vocabulary, the one in training {ours}; "
            "log-probs are compared token by token: both need one tokenizer"
        )


def check_same_shape(reference: Any, actor: Any) -> None:
    """Raise ConfigError when the reference cannot become a copy of the actor."""
    ours, theirs = (
        {name: tensor.shape for name, tensor in unique_weights(model).items()} for model in (actor, reference)
    )
    if ours != theirs:
        raise ConfigError(
            "trainer.ref_update_interval: the model of trainer.ref_load has other weights than the one in "
            "training, so it cannot become a copy of it; leave ref_update_interval out, or name a reference "
            "of the same architecture"
        )
