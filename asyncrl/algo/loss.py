"""Per-token quantities of the policy loss.

Owns log-probs and entropy from logits, and the clipped surrogate. Never reduces: `segment` does.

Shape letters: R response tokens, V vocabulary.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.algo.kl import bounded_exp


class TokenStatistics(NamedTuple):
    """What the logits say about the tokens that were sampled."""

    logprobs_R: Tensor
    """log softmax(logits / temperature) at the token, [R]."""
    entropy_R: Tensor
    """Entropy of softmax(logits / temperature), [R], nats."""


class Surrogate(NamedTuple):
    """The clipped surrogate of each token."""

    loss_R: Tensor
    ratio_R: Tensor
    """exp(logprob - old), [R]."""
    clipped_R: Tensor
    """1.0 where the clip cut the ratio, [R]."""


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


def ppo_surrogate(
    logprobs_R: Tensor,
    *,
    old_R: Tensor,
    advantages_R: Tensor,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
) -> Surrogate:
    """PPO's clipped surrogate, as a loss to minimise.

    ratio = exp(logprob - old); L1 = -ratio A; L2 = -clip(ratio, 1 - eps_clip, 1 + eps_clip_high) A;
    loss = max(L1, L2). `eps_clip_high` None means `eps_clip`. With `eps_clip_c` = c > 1 (dual clip,
    arXiv:1912.09729) loss = min(loss, -c A) where A < 0. Source: slime-miles.md 3.4, vector 2.
    """
    high = eps_clip if eps_clip_high is None else eps_clip_high
    ratio_R = bounded_exp(logprobs_R - old_R)
    plain_R = -ratio_R * advantages_R
    cut_R = -ratio_R.clamp(1 - eps_clip, 1 + high) * advantages_R
    loss_R = torch.maximum(plain_R, cut_R)
    if eps_clip_c is not None:
        loss_R = torch.where(advantages_R < 0, torch.minimum(loss_R, -eps_clip_c * advantages_R), loss_R)
    return Surrogate(loss_R=loss_R, ratio_R=ratio_R, clipped_R=(cut_R > plain_R).to(loss_R.dtype))
