"""Per-token losses of the policy and of the critic, and the log-probs they are made of.

Owns log-probs and entropy from logits, the surrogates (PPO and GSPO, CISPO, DPPO) and the value loss. Never
reduces (`segment` does) and never sees a mask, so a denominator cannot depend on what is computed here; only
`sequence_log_ratio`, which is a mean over a sequence, takes one. The SFT loss is minus the log-prob.

Shape letters: R response tokens, packed sample after sample; V vocabulary.

Invariant: gradient flows through `current_R` (or `values_R`) alone; `old_R`, `rollout_R` and `advantages_R`
are data.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.algo.kl import bounded_exp
from asyncrl.algo.segment import sample_means


class TokenStatistics(NamedTuple):
    """What the logits say about the tokens that were sampled."""

    logprobs_R: Tensor
    """log softmax(logits / temperature) at the token, [R]."""
    entropy_R: Tensor
    """Entropy of softmax(logits / temperature), [R], nats."""


class Surrogate(NamedTuple):
    """The surrogate of each token."""

    loss_R: Tensor
    """To minimise, [R]."""
    ratio_R: Tensor
    """exp(log ratio) before any clip, [R]."""
    clipped_R: Tensor
    """1.0 where the clip, or DPPO's mask, decided the loss, [R]."""


class ValueLoss(NamedTuple):
    """The critic's loss of each token."""

    loss_R: Tensor
    """To minimise, [R], in squared units of the return."""
    clipped_R: Tensor
    """1.0 where the value left its trust region, [R]."""


def token_statistics(
    logits_RV: Tensor, *, targets_R: Tensor, temperature: float = 1.0, entropy_gradient: bool = True
) -> TokenStatistics:
    """Log-prob and entropy of each token, in the logits' precision but at least float32.

    `targets_R` int64; temperature > 0 scales the logits, as the engine does. H = -sum(p log p); without
    `entropy_gradient` it is only reported, and keeps nothing for the backward pass. Source: vector 14.
    """
    logits_RV = logits_RV.float() if logits_RV.dtype.itemsize < 4 else logits_RV
    if temperature != 1.0:
        logits_RV = logits_RV / temperature
    log_softmax_RV = torch.log_softmax(logits_RV, dim=-1)
    logprobs_R = log_softmax_RV.gather(-1, targets_R.unsqueeze(-1)).squeeze(-1)
    if not entropy_gradient:
        log_softmax_RV = log_softmax_RV.detach()
    entropy_R = -(log_softmax_RV.exp() * log_softmax_RV).sum(-1)
    return TokenStatistics(logprobs_R=logprobs_R, entropy_R=entropy_R)


def sequence_log_ratio(log_ratio_R: Tensor, *, mask_R: Tensor, sample_R: Tensor, num_samples: int) -> Tensor:
    """GSPO's log ratio [R]: the masked mean of its sequence's, at every token of the sequence.

    sum((current - old) m) / max(sum(m), 1), with gradient; 0 for a sequence that is masked out. What stands
    at a masked token has no influence, NaN included. Source: arXiv:2507.18071, slime-miles.md 3.4, vector 4
    (which states minus this number, as ppo_kl).
    """
    counted_R = torch.where(mask_R > 0, log_ratio_R, 0.0)
    mean_S = sample_means(counted_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)
    return mean_S[sample_R]


def ppo_surrogate(
    current_R: Tensor,
    *,
    old_R: Tensor,
    advantages_R: Tensor,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
    log_ratio_R: Tensor | None = None,
) -> Surrogate:
    """PPO's clipped surrogate, as a loss to minimise.

    ratio = exp(current - old); L1 = -ratio A; L2 = -clip(ratio, 1 - eps_clip, 1 + eps_clip_high) A;
    loss = max(L1, L2). `eps_clip_high` None means `eps_clip`. With `eps_clip_c` = c > 1 (dual clip,
    arXiv:1912.09729) loss = min(loss, -c A) where A < 0. `log_ratio_R`, with gradient, takes the place of
    current - old (GSPO: `sequence_log_ratio`). Source: slime-miles.md 3.4, vector 2.
    """
    high = eps_clip if eps_clip_high is None else eps_clip_high
    ratio_R = bounded_exp(current_R - old_R if log_ratio_R is None else log_ratio_R)
    plain_R = -ratio_R * advantages_R
    cut_R = -ratio_R.clamp(1 - eps_clip, 1 + high) * advantages_R
    loss_R = torch.maximum(plain_R, cut_R)
    if eps_clip_c is not None:
        loss_R = torch.where(advantages_R < 0, torch.minimum(loss_R, -eps_clip_c * advantages_R), loss_R)
    return Surrogate(loss_R=loss_R, ratio_R=ratio_R, clipped_R=(cut_R > plain_R).to(loss_R.dtype))


def cispo_surrogate(
    current_R: Tensor,
    *,
    old_R: Tensor,
    advantages_R: Tensor,
    eps_clip: float = 1.0,
    eps_clip_high: float | None = 4.0,
) -> Surrogate:
    """CISPO: loss = -w A logprob, with w = clip(exp(current - old), 1 - eps_clip, 1 + eps_clip_high) fixed.

    The weight has no gradient, so a token beyond the clip still learns, with gradient -w A. The defaults are
    the method's own (no lower bound); `eps_clip_high` None means `eps_clip`. `clipped_R` is 1 where the
    ratio was cut. Source: arXiv:2506.13585, slime-miles.md 3.4, vector 3.
    """
    high = eps_clip if eps_clip_high is None else eps_clip_high
    ratio_R = bounded_exp((current_R - old_R).detach())
    weight_R = ratio_R.clamp(1 - eps_clip, 1 + high)
    loss_R = -weight_R * advantages_R * current_R
    return Surrogate(loss_R=loss_R, ratio_R=ratio_R, clipped_R=(weight_R != ratio_R).to(loss_R.dtype))


def dppo_surrogate(
    current_R: Tensor,
    *,
    rollout_R: Tensor,
    advantages_R: Tensor,
    mask_low: float = 0.2,
    mask_high: float = 0.2,
    kl_coef: float = 1e-3,
) -> Surrogate:
    """DPPO: the policy gradient of the tokens whose probability has not yet moved far the way it is pushed.

    With d = current - rollout: loss = -exp(d) A keep + kl_coef d^2. A token is left out (keep = 0) where
    A > 0 and p - q > mask_high, or A < 0 and p - q < -mask_low; p = exp(current) and q = exp(rollout) are
    probabilities, so the bounds are total variation in [0, 1] (flags dppo_mask_high, dppo_mask_low). The
    squared term stays on every token. `clipped_R` is 1 - keep. Source: prime-rl, peers.md section 3.
    """
    log_ratio_R = current_R - rollout_R
    ratio_R = bounded_exp(log_ratio_R)
    moved_R = (current_R.exp() - rollout_R.exp()).detach()
    left_out_R = ((advantages_R > 0) & (moved_R > mask_high)) | ((advantages_R < 0) & (moved_R < -mask_low))
    clipped_R = left_out_R.to(current_R.dtype)
    loss_R = -ratio_R * advantages_R * (1 - clipped_R) + kl_coef * log_ratio_R.square()
    return Surrogate(loss_R=loss_R, ratio_R=ratio_R, clipped_R=clipped_R)


def value_loss(values_R: Tensor, *, old_R: Tensor, returns_R: Tensor, value_clip: float = 0.2) -> ValueLoss:
    """The critic's clipped loss: max((v - R)^2, (v_c - R)^2), v_c = v_old + clamp(v - v_old, +-value_clip).

    No factor of one half. `old_R` are the values the advantages were computed with; `clipped_R` is
    [|v - v_old| > value_clip], whichever of the two decided. Source: slime-miles.md 3.8, vector 15.
    """
    change_R = values_R - old_R
    near_R = old_R + change_R.clamp(-value_clip, value_clip)
    loss_R = torch.maximum((values_R - returns_R).square(), (near_R - returns_R).square())
    return ValueLoss(loss_R=loss_R, clipped_R=(change_R.abs() > value_clip).to(loss_R.dtype))
