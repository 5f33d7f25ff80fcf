"""Corrections for data that another policy, or another implementation of the same one, sampled.

Owns weights and masks on the surrogate, and the numbers that say what they did. Never touches the KL term or
the entropy, and never a denominator: a rejected sequence still counts (peers.md section 3, denominator trap).

Three log-probs meet here and are never mixed up: *rollout* (the engine's, when the token was sampled), *old*
(the trainer's, at the start of the rollout step), *current* (of the weights in training). old - rollout is
mismatch plus staleness; current - old is what the PPO clip bounds.

Shape letters: R response tokens of a micro-batch, packed; S its samples. Everything here is without gradient.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.algo.kl import bounded_exp, kl_estimate
from asyncrl.algo.segment import sample_means, sample_sums


class Weighting(NamedTuple):
    """A weight per token and what it did."""

    weight_R: Tensor
    metrics: dict[str, Tensor]
    """Per-token values [R] to reduce with the step's weights."""


class SequenceMask(NamedTuple):
    """Which sequences keep their policy gradient."""

    keep_R: Tensor
    """1.0 or 0.0 per token."""
    dropped_S: Tensor
    """1.0 for a sequence that was dropped."""


@torch.no_grad()
def truncated_importance(
    old_R: Tensor, *, rollout_R: Tensor, tis_clip: float = 2.0, tis_clip_low: float = 0.0
) -> Weighting:
    """Token-level truncated importance sampling: w = clamp(exp(old - rollout), tis_clip_low, tis_clip).

    Metrics: `tis` the ratio before its bounds, `tis_clipfrac` 1 where a bound cut it, `tis_abs` |ratio - 1|.
    Source: slime-miles.md 3.5, vector 10 (slime: vanilla_tis_function).
    """
    ratio_R = bounded_exp(old_R - rollout_R)
    weight_R = ratio_R.clamp(tis_clip_low, tis_clip)
    metrics = {
        "tis": ratio_R,
        "tis_clipfrac": (weight_R != ratio_R).to(ratio_R.dtype),
        "tis_abs": (ratio_R - 1).abs(),
    }
    return Weighting(weight_R=weight_R, metrics=metrics)


@torch.no_grad()
def off_policy_sequence_mask(
    current_R: Tensor,
    *,
    rollout_R: Tensor,
    mask_R: Tensor,
    sample_R: Tensor,
    advantages_S: Tensor,
    opsm_delta: float,
) -> SequenceMask:
    """OPSM: drop a whole sequence iff A < 0 and mean(rollout - current) > opsm_delta (DeepSeek-V3.2).

    `advantages_S` is one number per sequence: a sign per token would half-mask a sequence of mixed signs.
    The mean runs over unmasked tokens. Source: peers.md section 3 with its warning; vector 5.
    """
    num_samples = len(advantages_S)
    drift_S = sample_means(rollout_R - current_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)
    dropped_S = ((advantages_S < 0) & (drift_S > opsm_delta)).to(current_R.dtype)
    return SequenceMask(keep_R=(1 - dropped_S)[sample_R], dropped_S=dropped_S)


def sequence_advantages(
    advantages_R: Tensor, *, mask_R: Tensor, sample_R: Tensor, num_samples: int
) -> Tensor:
    """One advantage per sequence [S], the masked mean of its tokens': what OPSM takes the sign of."""
    return sample_means(advantages_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)


@torch.no_grad()
def effective_sample_ratio(
    log_ratio_R: Tensor, *, mask_R: Tensor, sample_R: Tensor, num_samples: int
) -> Tensor:
    """Effective over actual number of tokens of each sample [S]: (sum w)^2 / (n sum w^2), w = exp(log ratio).

    1 when all weights are equal, 1/n when one token carries all; 1 for a sample that is masked out. Miles:
    ess_ratio.
    """
    weight_R = bounded_exp(log_ratio_R) * mask_R
    sum_S = sample_sums(weight_R, sample_R=sample_R, num_samples=num_samples)
    square_S = sample_sums(weight_R.square(), sample_R=sample_R, num_samples=num_samples)
    count_S = sample_sums(mask_R, sample_R=sample_R, num_samples=num_samples)
    return torch.where(count_S > 0, sum_S.square() / (count_S * square_S).clamp(min=1e-30), 1.0)


@torch.no_grad()
def mismatch(old_R: Tensor, *, rollout_R: Tensor) -> dict[str, Tensor]:
    """How far the trainer's log-probs are from the engine's, per token [R].

    `train_rollout_kl` low_var_kl(rollout, old), an estimate of KL(engine || trainer);
    `train_rollout_logprob_abs_diff` |old - rollout|. Taken before any mask of a correction. Miles' names.
    """
    return {
        "train_rollout_kl": kl_estimate(rollout_R, reference_R=old_R, kind="low_var_kl"),
        "train_rollout_logprob_abs_diff": (old_R - rollout_R).abs(),
    }
