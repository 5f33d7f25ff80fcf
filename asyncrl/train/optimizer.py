"""The optimizer, its schedule and its state by parameter name.

Owns AdamW and SGD over named parameters: which ones decay, the learning rate of a step, clipping. The
learning rate is a pure function of the number of steps taken, so a restored optimizer needs no scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from asyncrl.errors import ConfigError
from asyncrl.topology.training import TrainerConfig

STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps per parameter."""


def learning_rate(step: int, *, trainer: TrainerConfig, decay_iters: int | None) -> float:
    """The learning rate after `step` optimizer steps, Megatron's schedule.

    Linear from lr_warmup_init to lr over lr_warmup_iters, then constant, or linear or cosine decay to min_lr
    at `decay_iters`; None decays nothing.
    """
    warmup = trainer.lr_warmup_iters
    if step < warmup:
        return trainer.lr_warmup_init + (trainer.lr - trainer.lr_warmup_init) * step / warmup
    if trainer.lr_decay_style == "constant" or decay_iters is None:
        return trainer.lr
    if step >= decay_iters:
        return trainer.min_lr
    progress = (step - warmup) / max(decay_iters - warmup, 1)
    left = 1 - progress if trainer.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * progress) + 1)
    return trainer.min_lr + (trainer.lr - trainer.min_lr) * left


class NamedOptimizer:
    """A torch optimizer over a model's named parameters, in two groups: matrices decay, vectors do not."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, trainer: TrainerConfig) -> None:
        self._parameters = dict(parameters)
        self._trainer = trainer
        self._optimizer = _torch_optimizer(self._parameters.values(), trainer)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    @property
    def learning_rates(self) -> list[float]:
        """The current learning rate of each parameter group."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def clip(self) -> Tensor:
        """Scale gradients down to clip_grad; returns the norm before it, a scalar (Inf or NaN included)."""
        limit = self._trainer.clip_grad or math.inf
        return nn.utils.clip_grad_norm_(self._parameters.values(), limit)

    def step(self) -> None:
        """Apply the gradients."""
        self._optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Live state tensors as "parameter|kind"; empty before the first step, and for SGD."""
        return {
            f"{name}|{kind}": self._optimizer.state[parameter][kind]
            for name, parameter in self._parameters.items()
            for kind in STATE_NAMES
            if kind in self._optimizer.state.get(parameter, {})
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ConfigError for names of another model or optimizer."""
        unknown = {key.rpartition("|")[0] for key in tensors} - set(self._parameters)
        if unknown:
            raise ConfigError(
                f"checkpoint: optimizer state of {min(unknown)!r}, which the model does not have; "
                "restore with the model the checkpoint was made from"
            )
        self._optimizer.state.clear()
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition("|")
            parameter = self._parameters[name]
            # AdamW keeps its step counters on the CPU unless it is fused on a device.
            device = tensor.device if kind == "step" else parameter.device
            self._optimizer.state[parameter][kind] = tensor.to(device).clone()


def _torch_optimizer(parameters: Iterable[nn.Parameter], trainer: TrainerConfig) -> torch.optim.Optimizer:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": trainer.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if trainer.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=trainer.lr)
    betas = (trainer.adam_beta1, trainer.adam_beta2)
    return torch.optim.AdamW(groups, lr=trainer.lr, betas=betas, eps=trainer.adam_eps)
