"""Data-parallel ranks: who trains which micro-batches, and sums over all of them.

Owns the collectives of the torch backend. Every rank holds the whole batch's tokens (they are small beside a
model) and runs the models on its own micro-batches only; what the forward passes find is summed into the
whole, so advantages, whitening and hooks see the batch, and are the same on every rank without a word more.

Invariant: every rank calls every collective, in the same order: nothing here depends on a rank's own data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn

BUCKET_NUMBERS = 1 << 22
"""Gradients summed by one collective, unless one parameter has more."""


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

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over ranks; one that a rank did not touch counts as 0.

        A parameter that no rank touched keeps no gradient, as on one rank: the optimizer leaves it alone
        instead of decaying it.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if self.size == 1 or not trained:
            return
        touched = [float(parameter.grad is not None) for parameter in trained]
        counts = self.sum_(torch.tensor(touched, device=trained[0].device)).tolist()
        waiting: list[Tensor] = []
        for parameter, count in zip(trained, counts, strict=True):
            if not count:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(parameter.grad)
        for bucket in _buckets(waiting):
            flat = self.sum_(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type, up to BUCKET_NUMBERS: a collective has a cost of its own."""
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        if bucket and (numbers + tensor.numel() > BUCKET_NUMBERS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket
