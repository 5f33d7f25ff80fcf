"""One model in training: gradients over micro-batches, summed over ranks, checked, clipped, applied.

Owns the optimizer of one model and the number of its updates. Knows nothing of losses: it is handed a
function that runs forward and backward of a micro-batch.

Invariant: an update whose loss or gradient is not finite leaves the weights alone, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asyncrl.topology.training import TrainerConfig
from asyncrl.train.micro import MicroBatch
from asyncrl.train.optimizer import NamedOptimizer
from asyncrl.train.phases import Phases
from asyncrl.train.ranks import Ranks

Backward = Callable[[MicroBatch], dict[str, Tensor]]
"""Runs loss and backward of a micro-batch; returns its share of the step's metrics, "loss" among them."""


FINITE = {"loss": "the loss is", "rollout_log_probs": "the mean of the engine's log-probs is"}
"""Metrics without which nothing can be learned from a step. An importance ratio of a NaN counts as 1, so the
engine's log-probs would not show in the loss."""


class Update(NamedTuple):
    """What an optimizer step did."""

    metrics: dict[str, float]
    """Empty when it was not applied."""
    problem: str | None
    """Why it was not applied."""


class Learner:
    """Named parameters with their optimizer."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        trainer: TrainerConfig,
        phases: Phases,
        ranks: Ranks,
        lr: float | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._phases = phases
        self._ranks = ranks
        self.optimizer = NamedOptimizer(self._parameters, trainer=trainer, lr=lr)
        self.updates = 0
        """Optimizer steps so far, those that were skipped too: the schedule's position."""

    def update(
        self,
        micros: Sequence[MicroBatch],
        backward: Backward,
        *,
        lr: float,
        before: Callable[[], None] | None = None,
    ) -> Update:
        """One optimizer step; `before` runs when gradients are zero."""
        self.optimizer.zero_grad()
        self.optimizer.set_lr(lr)
        if before is not None:
            before()
        totals = self._totals([backward(micro) for micro in micros])
        with self._phases("optimizer"):
            problem = next(
                (
                    f"{words} {totals[name].item()}"
                    for name, words in FINITE.items()
                    if _is_broken(totals, name)
                ),
                None,
            )
            if problem is None:
                self._ranks.sum_gradients(self._parameters.values())
                totals["grad_norm"] = self.optimizer.clip()
                if not torch.isfinite(totals["grad_norm"]):
                    problem = "NaN or Inf in the gradient"
            if problem is None:
                self.optimizer.step()
        self.updates += 1
        self.optimizer.zero_grad()
        values = torch.stack([value.double().cpu() for value in totals.values()]).tolist()
        return Update({} if problem else dict(zip(totals, values, strict=True)), problem)

    def is_finite(self, micro: MicroBatch, backward: Backward) -> bool:
        """Whether a micro-batch alone has a finite loss and gradient; changes nothing."""
        self.optimizer.zero_grad()
        loss = backward(micro)["loss"]
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(self.optimizer.clip()))
        self.optimizer.zero_grad()
        return finite

    def _totals(self, found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Sums over micro-batches and ranks."""
        totals = {name: torch.stack([metrics[name] for metrics in found]).sum() for name in found[0]}
        if self._ranks.size > 1:
            summed = self._ranks.sum_(torch.stack([value.double() for value in totals.values()]))
            totals = dict(zip(totals, summed, strict=True))
        return totals


def _is_broken(totals: Mapping[str, Tensor], name: str) -> bool:
    return name in totals and not torch.isfinite(totals[name])
