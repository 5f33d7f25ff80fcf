"""How far the trainer's log-probs are from those the engine sampled with.

Owns the mismatch metrics: two that are always on, Miles' whole list (get_mismatch_metrics), and the KL by
the age of a token. Only reports: never a weight, never a mask. Taken before any mask of a correction, or
they would show the data that was kept, not the data that came.

Shape letters: R response tokens of any number of samples, packed sample after sample.

Invariants: without gradient; statistics over unmasked tokens only; exponents are clamped to [-20, 20].
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.algo.kl import MAX_LOG_RATIO, bounded_exp, kl_estimate
from asyncrl.algo.segment import sample_means, sample_sums

AGE_BUCKETS = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64+")
"""Name of each bucket of ages, in rollout steps."""
AGE_BOUNDS = (1, 2, 4, 8, 16, 32, 64)
"""Least age of each bucket but the first."""


@torch.no_grad()
def mismatch(old_R: Tensor, *, rollout_R: Tensor) -> dict[str, Tensor]:
    """How far the trainer's log-probs are from the engine's, per token [R].

    `train_rollout_kl` low_var_kl(rollout, old), an estimate of KL(engine || trainer);
    `train_rollout_logprob_abs_diff` |old - rollout|. Miles' names.
    """
    return {
        "train_rollout_kl": kl_estimate(rollout_R, reference_R=old_R, kind="low_var_kl"),
        "train_rollout_logprob_abs_diff": (old_R - rollout_R).abs(),
    }


@torch.no_grad()
def mismatch_metrics(
    old_R: Tensor, *, rollout_R: Tensor, mask_R: Tensor, sample_R: Tensor, num_samples: int
) -> dict[str, Tensor]:
    """Every mismatch metric of Miles, at each token [R], to reduce with the step's weights; 0 where masked.

    With d = old - rollout and E the masked mean over the token's sequence: mis_training_log_ppl -E[old],
    mis_training_ppl its exp, mis_rollout_log_ppl and mis_rollout_ppl likewise, mis_kl -d (KL of engine and
    trainer), mis_k3_kl exp(d) - d - 1, mis_log_ppl_diff E[rollout] - E[old], mis_log_ppl_abs_diff,
    mis_ppl_ratio its exp, mis_chi2_token E[exp(d)^2] - 1, mis_chi2_seq exp(2 sum(d)) - 1. Flag
    get_mismatch_metrics. Source: slime-miles.md 3.5, vector 12.
    """
    inside_R = mask_R > 0
    old_R, rollout_R = torch.where(inside_R, old_R, 0.0), torch.where(inside_R, rollout_R, 0.0)
    log_ratio_R = old_R - rollout_R

    def mean(values_R: Tensor) -> Tensor:
        mean_S = sample_means(values_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)
        return mean_S[sample_R]

    old_ppl_R, rollout_ppl_R = -mean(old_R), -mean(rollout_R)
    sum_R = sample_sums(log_ratio_R, sample_R=sample_R, num_samples=num_samples)[sample_R]
    metrics = {
        "mis_training_log_ppl": old_ppl_R,
        "mis_training_ppl": bounded_exp(old_ppl_R),
        "mis_rollout_log_ppl": rollout_ppl_R,
        "mis_rollout_ppl": bounded_exp(rollout_ppl_R),
        "mis_kl": -log_ratio_R,
        "mis_k3_kl": bounded_exp(log_ratio_R) - log_ratio_R - 1,
        "mis_log_ppl_diff": old_ppl_R - rollout_ppl_R,
        "mis_log_ppl_abs_diff": (old_ppl_R - rollout_ppl_R).abs(),
        "mis_ppl_ratio": bounded_exp(old_ppl_R - rollout_ppl_R),
        "mis_chi2_token": mean(bounded_exp(log_ratio_R).square()) - 1,
        "mis_chi2_seq": torch.exp(2 * sum_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - 1,
    }
    return {name: torch.where(inside_R, value_R, 0.0) for name, value_R in metrics.items()}


@torch.no_grad()
def kl_by_age(kl_R: Tensor, *, age_R: Tensor, mask_R: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum of the values and number of the unmasked tokens in each bucket of age, both scalars.

    `age_R` int64 in rollout steps; buckets 0, 1, 2-3, 4-7, ..., 64+, all of them always, so that
    micro-batches and ranks add up whatever they hold. The mean of a bucket is sum / count where count > 0.
    """
    inside_R = mask_R > 0
    counted_R = torch.where(inside_R, kl_R, 0.0)
    bounds_B = torch.tensor(AGE_BOUNDS, device=age_R.device, dtype=age_R.dtype)
    bucket_R = torch.bucketize(age_R, bounds_B, right=True)
    sums_B = sample_sums(counted_R, sample_R=bucket_R, num_samples=len(AGE_BUCKETS))
    counts_B = sample_sums(inside_R.to(kl_R.dtype), sample_R=bucket_R, num_samples=len(AGE_BUCKETS))
    return {name: (sums_B[index], counts_B[index]) for index, name in enumerate(AGE_BUCKETS)}
