"""Whitening of per-token advantages over all ranks.

Owns the statistics of a rollout batch that is spread over ranks. Never talks to a process group itself: the
caller hands in the sum.

Shape letters: R response tokens of this rank, any number, none too.

Invariant: a rank's mask never decides whether it takes part in the collective, or the other ranks would wait.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VARIANCE_EPSILON = 1e-8
"""Added to the variance (slime, Miles)."""


@torch.no_grad()
def masked_whiten(
    values_R: Tensor,
    *,
    mask_R: Tensor,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Values with mean 0 and variance 1 over the unmasked tokens of all ranks [R].

    mean = sum(x m) / N; var = (sum(x^2 m) / N - mean^2) N / (N - 1), without Bessel's factor for N = 1;
    result (x - mean) rsqrt(var + 1e-8), at masked tokens as well. `all_reduce` takes this rank's (sum(x m),
    sum(x^2 m), N), float64 [3], and returns the sum over ranks; it is called exactly once, with an empty mask
    too; None: one rank, or values that are those of all ranks already, as the torch backend has them. Values
    are returned as they came where no rank has an unmasked token. Source: slime-miles.md 3.3, vector 9 (flag
    --normalize-advantages).
    """
    # float64: sum(x^2) / N - mean^2 cancels, and a float32 count stops at 2^24 tokens.
    kept_R = torch.where(mask_R > 0, values_R, 0.0).double()
    sums = torch.stack([kept_R.sum(), kept_R.square().sum(), (mask_R > 0).sum().double()])
    total, square, count = (all_reduce(sums) if all_reduce is not None else sums).tolist()
    if count == 0:
        return values_R.clone()
    mean = total / count
    variance = max(square / count - mean**2, 0.0) * count / max(count - 1, 1)
    whitened_R = (values_R.double() - mean) * (variance + VARIANCE_EPSILON) ** -0.5
    return whitened_R.to(values_R.dtype)
