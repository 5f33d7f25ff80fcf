"""The optimizer and its state by parameter name.

Owns AdamW and SGD over named parameters: which ones decay, clipping, and the fp32 master copies of bf16
weights. The learning rate is `schedule`'s. Invariant: after `step` and `load_state` a weight with a master is
the master rounded to bf16. Weights must hold their initial values before the optimizer is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from asyncrl.errors import ConfigError
from asyncrl.topology.training import TrainerConfig

STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps per parameter."""
MASTER = "master"
"""Kind of a state tensor that is the fp32 copy of a bf16 weight."""


class NamedOptimizer:
    """A torch optimizer over a model's named parameters, in two groups: matrices decay, vectors do not.

    With trainer.main_params_dtype = "float32" it steps an fp32 master copy of every bf16 weight: bf16 has 8
    significant bits, and a step below 1/512 of a weight would round away (arXiv:1710.03740, section 3.1).
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, trainer: TrainerConfig, lr: float | None = None
    ) -> None:
        """`lr` is the first learning rate, such as a critic's; None: trainer.lr."""
        self._parameters = dict(parameters)
        self._trainer = trainer
        self._masters = {
            name: nn.Parameter(parameter.detach().float())
            for name, parameter in self._parameters.items()
            if trainer.main_params_dtype == "float32"
            and parameter.dtype == torch.bfloat16
            and parameter.requires_grad
        }
        self._stepped = self._parameters | self._masters
        """What the torch optimizer changes: the master where there is one."""
        self._optimizer = _torch_optimizer(
            list(self._stepped.values()), trainer, trainer.lr if lr is None else lr
        )

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    @property
    def learning_rates(self) -> list[float]:
        """The current learning rate of each parameter group."""
        return [group["lr"] for group in self._optimizer.param_groups]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The torch optimizer, for hooks that probe or change it."""
        return self._optimizer

    def clip(self) -> Tensor:
        """Scale gradients down to clip_grad; returns the norm before it, a scalar (Inf or NaN included)."""
        limit = self._trainer.clip_grad or math.inf
        return nn.utils.clip_grad_norm_(self._parameters.values(), limit)

    def step(self) -> None:
        """Apply the gradients; a bf16 one is copied up to fp32 for its master."""
        for name, master in self._masters.items():
            gradient = self._parameters[name].grad
            master.grad = None if gradient is None else gradient.float()
        self._optimizer.step()
        for name, master in self._masters.items():
            # Memory of a gradient twice the weight's size is not held until the next step.
            master.grad = None
            self._round(name)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def reset(self) -> None:
        """Forget the moments and their step counters (slime: --reset-optimizer-states); masters stay."""
        self._optimizer.state.clear()

    def state(self) -> dict[str, Tensor]:
        """Live state tensors as "parameter|kind".

        The kinds are "master", and those of STATE_NAMES; the latter are missing before the first step, and
        for SGD.
        """
        masters = {f"{name}|{MASTER}": master.detach() for name, master in self._masters.items()}
        return masters | {
            f"{name}|{kind}": self._optimizer.state[stepped][kind]
            for name, stepped in self._stepped.items()
            for kind in STATE_NAMES
            if kind in self._optimizer.state.get(stepped, {})
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; bit for bit where the trainer keeps the same types.

        A master also sets its weight, and sets it alone where this trainer keeps none. One that is missing
        (state of a run without masters) stays what the weight gave. Raises ConfigError for another model's.
        """
        unknown = {key.rpartition("|")[0] for key in tensors} - set(self._parameters)
        if unknown:
            raise ConfigError(
                f"checkpoint: optimizer state of {min(unknown)!r}, which the model does not have; "
                "restore with the model the checkpoint was made from"
            )
        self._optimizer.state.clear()
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition("|")
            self._load(name, kind, tensor)

    def _load(self, name: str, kind: str, tensor: Tensor) -> None:
        stepped = self._stepped[name]
        if kind == "step":
            # AdamW keeps its step counters on the CPU unless it is fused on a device.
            self._optimizer.state[stepped][kind] = tensor.clone()
            return
        if tensor.shape != stepped.shape:
            raise ConfigError(
                f"checkpoint: optimizer state {name}|{kind} has shape {list(tensor.shape)}, the model's "
                f"{name} {list(stepped.shape)}; restore with the model the checkpoint was made from"
            )
        if kind == MASTER:
            with torch.no_grad():
                stepped.copy_(tensor)
            self._round(name)
        else:
            self._optimizer.state[stepped][kind] = tensor.to(stepped.device, stepped.dtype, copy=True)

    def _round(self, name: str) -> None:
        """Set a weight to its master, if it has one."""
        if name in self._masters:
            with torch.no_grad():
                self._parameters[name].copy_(self._masters[name])


def _torch_optimizer(
    parameters: list[nn.Parameter], trainer: TrainerConfig, lr: float
) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": trainer.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if trainer.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    betas = (trainer.adam_beta1, trainer.adam_beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=trainer.adam_eps)
