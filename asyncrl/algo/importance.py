"""Importance weights and rejection between the policy that sampled and the one that trains.

Owns truncated importance sampling at three levels and three modes (TIS, IcePop, MIS), rejection with its
veto, the weights of the decoupled loss and the log-linear proximal policy. Never touches the KL term or the
entropy, and never a denominator: a rejected token still counts (peers.md section 3, denominator trap).

With d = old - rollout, the level decides whose ratio a token gets: its own (token), its sequence's product
(sequence) or its sequence's geometric mean (geometric); the mode decides what a bound does to it.

Shape letters: R response tokens of any number of samples, packed sample after sample; S the samples.

Invariants: everything here is without gradient; log ratios are clamped to [-20, 20] before exp; what stands
at a masked token (mask_R 0) has no influence on any other, NaN included; a rejected token keeps its weight
in `weight_R` while its `keep_R` is 0 (Miles), so the loss is surrogate * weight_R * keep_R.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from asyncrl.algo.kl import bounded_exp
from asyncrl.algo.segment import sample_means, sample_sums

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["clip", "truncate", "mask"]

MIN_MEAN_WEIGHT = 1e-8
"""A mean weight at or below this is not divided by (Miles)."""


class Correction(NamedTuple):
    """What a correction does to each token's surrogate, and the numbers that say so."""

    weight_R: Tensor
    """To multiply the surrogate with, [R]."""
    keep_R: Tensor
    """1.0 or 0.0, [R]; to multiply the surrogate with as well."""
    metrics: dict[str, Tensor]
    """Per-token values [R], to reduce with the step's weights."""


@torch.no_grad()
def importance_weights(
    old_R: Tensor,
    *,
    rollout_R: Tensor,
    mask_R: Tensor,
    sample_R: Tensor,
    num_samples: int,
    level: Level = "token",
    mode: Mode = "clip",
    upper: float = 2.0,
    lower: float = 0.0,
    batch_normalize: bool = False,
) -> Correction:
    """Importance weights w = exp(level(old - rollout)), bounded; 0 at masked tokens.

    `clip`: clamp(w, lower, upper) (slime's TIS at level token); `truncate`: min(w, upper); `mask`: w as it
    is and keep = [lower <= w <= upper] (IcePop at level token). `batch_normalize` divides by the mean weight
    of the tokens handed in (level token), or by the mean over their sequences (level sequence; sequences that
    are masked out do not count); level geometric has no such mean: ValueError, as for bounds other than
    0 <= lower <= upper. Metrics: `tis` the ratio before its bounds, `tis_clipfrac` 1 where a bound changed or
    rejected it, `tis_abs` |ratio - 1|, and Miles' mis_*. Flags tis_level, tis_mode, tis_clip, tis_clip_low,
    tis_batch_normalize. Source: slime-miles.md 3.5, vectors 10 and 11.
    """
    _check_bounds(lower, upper, function="importance_weights", flags="tis_clip_low and tis_clip")
    if batch_normalize and level == "geometric":
        raise ValueError(
            "importance_weights: batch_normalize with level 'geometric'; allowed with: token, sequence; "
            "unset tis_batch_normalize or set another tis_level"
        )
    log_ratio_R = torch.where(mask_R > 0, old_R - rollout_R, 0.0)
    ratio_R = bounded_exp(
        _at_level(log_ratio_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples, level=level)
    )
    bounded = _bound(ratio_R, mode=mode, upper=upper, lower=lower)
    weight_R = torch.where(mask_R > 0, bounded.weight_R, 0.0)
    metrics = {
        "tis": ratio_R,
        "tis_abs": (ratio_R - 1).abs(),
        "mis_tis_weight_before_bound": ratio_R,
        "mis_tis_weight_after_bound": weight_R,
        **bounded.metrics,
        "mis_is_ratio_mean_after_tis_rs": weight_R,
    }
    if batch_normalize:
        factor = _mean_weight(
            weight_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples, level=level
        )
        metrics["mis_batch_norm_factor"] = factor.expand_as(weight_R)
        weight_R = weight_R / factor
    metrics |= _final_weights(weight_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)
    return Correction(weight_R=weight_R, keep_R=bounded.keep_R, metrics=metrics)


@torch.no_grad()
def rejection(
    old_R: Tensor,
    *,
    rollout_R: Tensor,
    mask_R: Tensor,
    sample_R: Tensor,
    num_samples: int,
    level: Level = "geometric",
    upper: float = 2.0,
    lower: float = 0.5,
    veto: float | None = None,
) -> Correction:
    """Rejection sampling: keep = [lower <= exp(level(old - rollout)) <= upper]; the weight is 1.

    At the levels sequence and geometric whole sequences go. `veto` (a ratio, such as 1e-4) also drops every
    sequence with an unmasked token below it: old - rollout < log veto. Metrics: mis_rs_mask_fraction_low and
    _high, and with a veto mis_rs_catastrophic_token_fraction and _seq_fraction. Raises ValueError for bounds
    other than 0 <= lower <= upper and for a veto that is not positive. Flags rs_level, rs_upper_bound,
    rs_lower_bound, rs_veto_threshold. Source: slime-miles.md 3.5, vector 11.
    """
    _check_bounds(lower, upper, function="rejection", flags="rs_lower_bound and rs_upper_bound")
    if veto is not None and veto <= 0:
        raise ValueError(
            f"rejection: veto {veto}; allowed: a ratio above 0, such as 1e-4, or None; set rs_veto_threshold"
        )
    log_ratio_R = torch.where(mask_R > 0, old_R - rollout_R, 0.0)
    ratio_R = bounded_exp(
        _at_level(log_ratio_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples, level=level)
    )
    low_R, high_R = (ratio_R < lower).to(ratio_R.dtype), (ratio_R > upper).to(ratio_R.dtype)
    keep_R = 1 - low_R - high_R
    metrics = {"mis_rs_mask_fraction_low": low_R, "mis_rs_mask_fraction_high": high_R}
    if veto is not None:
        catastrophic_R = (log_ratio_R < math.log(veto)).to(ratio_R.dtype)
        count_S = sample_sums(catastrophic_R, sample_R=sample_R, num_samples=num_samples)
        vetoed_R = (count_S > 0).to(ratio_R.dtype)[sample_R]
        keep_R = keep_R * (1 - vetoed_R)
        metrics["mis_rs_catastrophic_token_fraction"] = catastrophic_R
        metrics["mis_rs_catastrophic_seq_fraction"] = vetoed_R
    return Correction(weight_R=torch.ones_like(ratio_R), keep_R=keep_R, metrics=metrics)


@torch.no_grad()
def decoupled_weights(old_R: Tensor, *, rollout_R: Tensor, cap: float | None = 5.0) -> Correction:
    """Decoupled PPO's behaviour weight w = exp(old - rollout), untruncated; tokens with w > cap are dropped.

    The PPO ratio is then current / old, its clip around the proximal policy `old_R`. Per token, so no mask is
    needed. `cap` None drops none; one that is not positive raises ValueError. Metrics: `behave_imp_weight` w,
    `behave_approx_kl` old - rollout, `behave_mask_fraction` 1 where dropped. Flags use_decoupled_loss,
    behave_imp_weight_cap. Source: arXiv:2505.24298 (AReaL), peers.md section 3.
    """
    if cap is not None and cap <= 0:
        raise ValueError(
            f"decoupled_weights: cap {cap}; allowed: a ratio above 0, or None; set behave_imp_weight_cap"
        )
    log_ratio_R = old_R - rollout_R
    weight_R = bounded_exp(log_ratio_R)
    keep_R = torch.ones_like(weight_R) if cap is None else (weight_R <= cap).to(weight_R.dtype)
    metrics = {
        "behave_imp_weight": weight_R,
        "behave_approx_kl": log_ratio_R,
        "behave_mask_fraction": 1 - keep_R,
    }
    return Correction(weight_R=weight_R, keep_R=keep_R, metrics=metrics)


@torch.no_grad()
def loglinear_proximal(
    current_R: Tensor, *, rollout_R: Tensor, version_R: Tensor, proximal_version: int
) -> Tensor:
    """The proximal policy's log-probs [R] without a forward pass, between the engine's and the current ones.

    log old ~ rollout + alpha (current - rollout), alpha = (v_prox - v) / (v_prox + 1 - v) clamped to [0, 1],
    where `version_R` int64 is the version v that sampled the token: 0 for a token as new as the proximal
    policy, towards 1 with age. Newer ones (v > v_prox) take the engine's log-prob. Flag prox_logp_method =
    "loglinear". Source: AReaL (prox_logp_method), peers.md section 3.
    """
    gap_R = (proximal_version - version_R).clamp(min=0).to(current_R.dtype)
    return rollout_R + gap_R / (gap_R + 1) * (current_R - rollout_R)


def _check_bounds(lower: float, upper: float, *, function: str, flags: str) -> None:
    """Raise ValueError unless 0 <= lower <= upper; NaN is refused too."""
    if not 0 <= lower <= upper:
        raise ValueError(
            f"{function}: lower {lower} and upper {upper}; allowed: 0 <= lower <= upper; set {flags}"
        )


def _at_level(
    log_ratio_R: Tensor, *, mask_R: Tensor, sample_R: Tensor, num_samples: int, level: Level
) -> Tensor:
    """The log ratio each token is judged by [R]; `log_ratio_R` is 0 at masked tokens."""
    if level == "token":
        return log_ratio_R
    if level == "sequence":
        return sample_sums(log_ratio_R, sample_R=sample_R, num_samples=num_samples)[sample_R]
    if level == "geometric":
        mean_S = sample_means(log_ratio_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)
        return mean_S[sample_R]
    raise ValueError(f"level: unknown {level!r}; known: token, sequence, geometric")


def _bound(ratio_R: Tensor, *, mode: Mode, upper: float, lower: float) -> Correction:
    """The ratio after its bounds, with tis_clipfrac and the mode's own fractions."""
    low_R, high_R = (ratio_R < lower).to(ratio_R.dtype), (ratio_R > upper).to(ratio_R.dtype)
    keep_R = torch.ones_like(ratio_R)
    if mode == "truncate":
        fractions = {"mis_tis_truncate_fraction": high_R, "tis_clipfrac": high_R}
        return Correction(ratio_R.clamp(max=upper), keep_R, fractions)
    cut_R = low_R + high_R
    if mode == "clip":
        fractions = {"mis_tis_clip_fraction_low": low_R, "mis_tis_clip_fraction_high": high_R}
        return Correction(ratio_R.clamp(lower, upper), keep_R, {**fractions, "tis_clipfrac": cut_R})
    if mode == "mask":
        fractions = {"mis_tis_mask_fraction_low": low_R, "mis_tis_mask_fraction_high": high_R}
        return Correction(ratio_R, keep_R - cut_R, {**fractions, "tis_clipfrac": cut_R})
    raise ValueError(f"importance_weights: unknown mode {mode!r}; known: clip, truncate, mask")


def _mean_weight(
    weight_R: Tensor, *, mask_R: Tensor, sample_R: Tensor, num_samples: int, level: Level
) -> Tensor:
    """The mean that batch normalisation divides by, scalar; 1 where there is none to speak of."""
    if level == "token":
        mean = weight_R.sum() / mask_R.sum().clamp(min=1)
    else:
        mean_S = sample_means(weight_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)
        count_S = sample_sums(mask_R, sample_R=sample_R, num_samples=num_samples)
        mean = mean_S.sum() / (count_S > 0).sum().clamp(min=1)
    return torch.where(mean > MIN_MEAN_WEIGHT, mean, 1.0)


def _final_weights(
    weight_R: Tensor, *, mask_R: Tensor, sample_R: Tensor, num_samples: int
) -> dict[str, Tensor]:
    """Mean, least and greatest weight of each sequence, at its tokens [R]; 0 where all are masked."""
    mean_S = sample_means(weight_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)
    some_S = sample_sums(mask_R, sample_R=sample_R, num_samples=num_samples) > 0
    metrics = {"mis_is_ratio_mean_final": mean_S[sample_R]}
    for name, reduce, empty in (("min", "amin", math.inf), ("max", "amax", -math.inf)):
        counted_R = torch.where(mask_R > 0, weight_R, empty)
        extreme_S = counted_R.new_full((num_samples,), empty).scatter_reduce(0, sample_R, counted_R, reduce)
        metrics[f"mis_is_ratio_{name}_final"] = torch.where(some_S, extreme_S, 0.0)[sample_R]
    return metrics
