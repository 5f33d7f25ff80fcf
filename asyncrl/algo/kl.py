"""Estimators of the KL divergence from samples.

Owns the formulas of k1, k2, k3 and low_var_kl (http://joschu.net/blog/kl-approx.html), with Miles' clamps.

Shape letters: R response tokens.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlKind = Literal["k1", "k2", "k3", "low_var_kl"]

MAX_LOG_RATIO = 20.0
"""A log ratio is clamped to this before exp, so that one token cannot overflow a batch (Miles)."""
MAX_LOW_VAR_KL = 10.0
"""low_var_kl is clamped to plus and minus this."""


def bounded_exp(log_ratio_R: Tensor) -> Tensor:
    """exp(x) with x clamped to [-20, 20] and NaN taken as 0 (Miles)."""
    return log_ratio_R.nan_to_num(nan=0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_estimate(
    logprobs_R: Tensor, *, reference_R: Tensor, kind: KlKind, importance_R: Tensor | None = None
) -> Tensor:
    """Per-token estimate [R] of KL(policy || reference) at tokens the policy sampled.

    With d = logprob - reference: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d; low_var_kl is k3 with d clamped
    to [-20, 20] inside exp and the result clamped to [-10, 10]. `importance_R` = exp(logprob - old) weighs
    the estimate, gradient included (DeepSeek-V3.2, use_unbiased_kl), before the last clamp.
    Source: slime-miles.md 3.2, vector 1.
    """
    difference_R = logprobs_R - reference_R
    if kind == "k1":
        estimate_R = difference_R
    elif kind == "k2":
        estimate_R = difference_R.square() / 2
    elif kind == "k3":
        estimate_R = torch.exp(-difference_R) - 1 + difference_R
    elif kind == "low_var_kl":
        estimate_R = bounded_exp(-difference_R) - 1 + difference_R
    else:
        raise ValueError(f"kind: unknown estimator {kind!r}; known: k1, k2, k3, low_var_kl")
    if importance_R is not None:
        estimate_R = estimate_R * importance_R
    if kind == "low_var_kl":
        estimate_R = estimate_R.clamp(-MAX_LOW_VAR_KL, MAX_LOW_VAR_KL)
    return estimate_R
