"""Sums over the samples of a packed micro-batch, and the two reducers of slime and Miles.

Owns how a per-token quantity becomes one number. Never looks at what the quantity means.

Shape letters: R response tokens of a micro-batch, packed sample after sample; S its samples.

Invariant: a reducer is one weight per token, so the result of a step is the plain sum of its micro-batches'
results however they were cut. Denominators come from the loss mask as it was recorded, never from a mask a
correction computes: rejecting tokens must not make the remaining ones count more (slime-miles.md 3.7).
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

import torch
from torch import Tensor


def sample_sums(values_R: Tensor, *, sample_R: Tensor, num_samples: int) -> Tensor:
    """Sum of the values of each sample [S]; `sample_R` int64 gives each token's sample."""
    sums_S = values_R.new_zeros(num_samples)
    return sums_S.index_add(0, sample_R, values_R)


def sample_means(values_R: Tensor, *, mask_R: Tensor, sample_R: Tensor, num_samples: int) -> Tensor:
    """Masked mean of each sample [S]: sum(x m) / max(sum(m), 1); 0 for a sample that is masked out."""
    sums_S = sample_sums(values_R * mask_R, sample_R=sample_R, num_samples=num_samples)
    counts_S = sample_sums(mask_R, sample_R=sample_R, num_samples=num_samples)
    return sums_S / counts_S.clamp(min=1)


def per_sample_weights(mask_R: Tensor, *, sample_R: Tensor, num_tokens_S: Tensor, num_samples: int) -> Tensor:
    """Weights [R] whose weighted sum is the mean over samples of each sample's token mean.

    w_t = m_t / max(num_tokens_i, 1) / num_samples (slime: sum_of_sample_mean, then / global_batch_size).
    `num_tokens_S` counts each sample's unmasked tokens; `num_samples` counts all samples of the optimizer
    step, those that are removed from the loss too.
    """
    return mask_R / num_tokens_S.clamp(min=1)[sample_R] / num_samples


def per_token_weights(mask_R: Tensor, *, num_tokens: int) -> Tensor:
    """Weights [R] whose weighted sum is the mean over the unmasked tokens of the optimizer step.

    w_t = m_t / num_tokens (slime: sum_of_token with --calculate-per-token-loss).
    """
    return mask_R / max(num_tokens, 1)


def weighted_sum(values_R: Tensor, *, weights_R: Tensor) -> Tensor:
    """sum(x w) over the tokens with a weight; a token without one is ignored even where it is NaN or Inf."""
    return torch.where(weights_R > 0, values_R * weights_R, 0.0).sum()
