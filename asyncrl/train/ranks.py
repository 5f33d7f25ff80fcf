"""Data-parallel ranks: who trains which micro-batches, and sums over all of them.

Owns the collectives of the torch backend. Every rank holds the whole batch's tokens (they are small beside a
model) and runs the models on its own micro-batches only; what the forward passes find is summed into the
whole, so advantages, whitening and hooks see the batch, and are the same on every rank without a word more.

Invariant: every rank calls every collective, in the same order: nothing here depends on a rank's own data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor


class Ranks(NamedTuple):
    """This process among the trainer's processes."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Ranks:
        """From torch.distributed where it is initialised; one rank otherwise."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return Ranks()
        return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over ranks; returns it."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over ranks; one that a rank did not touch counts as 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
