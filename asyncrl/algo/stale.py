"""Which tokens are too old to be trained.

Owns the masks by version: by age in optimizer steps, and of everything but a sample's newest version. Never
looks at a log-prob and never changes a denominator: a token that is left out still counts.

Shape letters: R response tokens of any number of samples, packed sample after sample; S the samples.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Stale = Literal["mask", "drop"]


@torch.no_grad()
def stale_mask(
    age_R: Tensor,
    *,
    sample_R: Tensor,
    num_samples: int,
    stale: Stale,
    stale_after: int,
    mask_R: Tensor | None = None,
) -> Tensor:
    """1.0 or 0.0 per token [R]: whether its age is at most `stale_after` optimizer steps.

    `mask` judges each token, `drop` each sample by its oldest token. `age_R` int64, optimizer steps between
    the weights that sampled a token and those in training. With `mask_R` only unmasked tokens make a sample
    old. Flags stale, stale_after. Raises ValueError for a negative `stale_after` or another `stale`.
    """
    if stale_after < 0:
        raise ValueError(
            f"stale_mask: stale_after {stale_after}; allowed: 0 (fresh tokens only) or more optimizer steps"
        )
    if stale == "drop":
        age_R = _greatest(age_R, sample_R=sample_R, num_samples=num_samples, mask_R=mask_R)[sample_R]
    elif stale != "mask":
        raise ValueError(f"stale_mask: unknown stale {stale!r}; known: mask, drop (train needs no mask)")
    return _as_float(age_R <= stale_after, mask_R)


@torch.no_grad()
def newest_version_mask(
    version_R: Tensor, *, sample_R: Tensor, num_samples: int, mask_R: Tensor | None = None
) -> Tensor:
    """1.0 for the tokens of each sample's newest version, 0.0 for the others [R].

    `version_R` int64, the version that sampled each token. With `mask_R` the newest among unmasked tokens
    counts, so that text an environment added last cannot leave a sample without any. Flag
    mask_offpolicy_in_partial_rollout.
    """
    newest_S = _greatest(version_R, sample_R=sample_R, num_samples=num_samples, mask_R=mask_R)
    return _as_float(version_R >= newest_S[sample_R], mask_R)


def _greatest(values_R: Tensor, *, sample_R: Tensor, num_samples: int, mask_R: Tensor | None) -> Tensor:
    """Greatest integer of each sample's (unmasked) tokens [S]; the least integer there is for none."""
    least = torch.iinfo(values_R.dtype).min
    counted_R = values_R if mask_R is None else torch.where(mask_R > 0, values_R, least)
    return values_R.new_full((num_samples,), least).scatter_reduce(0, sample_R, counted_R, "amax")


def _as_float(keep_R: Tensor, mask_R: Tensor | None) -> Tensor:
    """1.0 and 0.0 in the mask's precision, float32 without one."""
    return keep_R.to(torch.float32 if mask_R is None else mask_R.dtype)
