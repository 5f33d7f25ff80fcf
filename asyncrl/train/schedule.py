"""The learning rate of a step.

Owns warm-up and decay. Keeps no state: the learning rate is a pure function of the number of steps taken, so
a restored run needs no scheduler, only the same options (`schedule_of`). The formulas are Megatron's
(megatron/core/optimizer_param_scheduler.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from asyncrl.errors import ConfigError
from asyncrl.topology.training import TrainerConfig

SCHEDULE_OPTIONS = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "lr_warmup_init",
    "lr_decay_iters",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_style",
    "critic_lr",
    "critic_lr_warmup_iters",
)
"""Options of [trainer] that the learning rate of a step depends on."""


def learning_rate(step: int, *, trainer: TrainerConfig, decay_iters: int | None) -> float:
    """The learning rate after `step` optimizer steps.

    Linear from lr_warmup_init to lr over the warm-up, lr_warmup_iters steps or lr_warmup_fraction x
    `decay_iters`. Then min_lr + c x (lr - min_lr), with x the share of the way from the end of warm-up to
    `decay_iters`:

        constant    c = 1, also after decay_iters
        linear      c = 1 - x
        cosine      c = (1 + cos(pi x)) / 2
        WSD         c = 1 until lr_wsd_decay_iters before decay_iters; through those, x is the share of them:
                    exponential 2 (0.5^x) - 1, linear 1 - x, cosine (1 + cos(pi x)) / 2,
                    minus_sqrt 1 - sqrt(x)

    From `decay_iters` on it is min_lr; `decay_iters` = None decays nothing. Raises ConfigError where the
    options do not define a schedule.
    """
    warmup = _warmup(trainer, decay_iters)
    if warmup > 0 and step <= warmup:
        return trainer.lr_warmup_init + (trainer.lr - trainer.lr_warmup_init) * step / warmup
    if trainer.lr_decay_style == "constant" or decay_iters is None:
        return trainer.lr
    if step >= decay_iters:
        return trainer.min_lr
    if trainer.lr_decay_style == "WSD":
        if trainer.lr_wsd_decay_iters is None:
            raise ConfigError(
                'trainer.lr_wsd_decay_iters: not given; lr_decay_style = "WSD" needs it, '
                "1 or more optimizer steps"
            )
        start = decay_iters - trainer.lr_wsd_decay_iters
        if step <= start:
            return trainer.lr
        left = _left(trainer.lr_wsd_decay_style, (step - start) / trainer.lr_wsd_decay_iters)
    else:
        left = _left(trainer.lr_decay_style, (step - warmup) / (decay_iters - warmup))
    return trainer.min_lr + (trainer.lr - trainer.min_lr) * left


def schedule_of(trainer: TrainerConfig) -> dict[str, Any]:
    """The options that define the schedule, by name: a checkpoint of other ones goes on differently."""
    return {name: getattr(trainer, name) for name in SCHEDULE_OPTIONS}


def scheduled(trainer: TrainerConfig, *, stored: Mapping[str, Any]) -> TrainerConfig:
    """The options to go on with from a checkpoint of the options `stored` (Megatron's rule).

    With use_checkpoint_opt_param_scheduler the checkpoint's schedule, with override_opt_param_scheduler this
    one; without either both must be the same. Raises ConfigError naming what differs.
    """
    theirs = {name: stored.get(name) for name in SCHEDULE_OPTIONS}
    ours = schedule_of(trainer)
    if trainer.override_opt_param_scheduler or theirs == ours:
        return trainer
    if trainer.use_checkpoint_opt_param_scheduler:
        return msgspec.structs.replace(trainer, **theirs)
    different = [f"{name} {ours[name]} (there {theirs[name]})" for name in ours if ours[name] != theirs[name]]
    raise ConfigError(
        f"trainer.load: the checkpoint was made under another schedule: {', '.join(different)}; set "
        "override_opt_param_scheduler = true to follow this topology's, or "
        "use_checkpoint_opt_param_scheduler = true to follow the checkpoint's"
    )


def _warmup(trainer: TrainerConfig, decay_iters: int | None) -> float:
    if trainer.lr_warmup_fraction is None:
        return trainer.lr_warmup_iters
    if decay_iters is None:
        raise ConfigError(
            f"trainer.lr_warmup_fraction: {trainer.lr_warmup_fraction} of a run without an end; set "
            "trainer.lr_decay_iters, or lr_warmup_iters instead"
        )
    return trainer.lr_warmup_fraction * decay_iters


def _left(style: str, ratio: float) -> float:
    """The share of lr - min_lr that is left at `ratio`, 0 to 1, of a decay."""
    match style:
        case "linear":
            return 1 - ratio
        case "cosine":
            return 0.5 * (math.cos(math.pi * ratio) + 1)
        case "exponential":
            return 2 * 0.5**ratio - 1
        case "minus_sqrt":
            return 1 - math.sqrt(ratio)
        case _:
            raise ConfigError(f"trainer.lr_decay_style: {style!r}; not a style of decay")
