"""Logits to tokens, the whole batch at once.

Owns the mathematics of sampling. Never owns randomness: the caller brings one uniform number per row, and a
row's token depends on that number and on the row's logits only, not on the rest of the batch.

Letters: N rows, V vocabulary.
"""
# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class BatchParams:
    """Sampling parameters of N rows; None where no row needs the feature, which skips its kernels."""

    temperature_N1: torch.Tensor | None = None
    """float32 [N, 1], 1 for greedy rows; None when all are 1."""
    greedy_N: torch.Tensor | None = None
    """bool [N]."""
    top_p_N: torch.Tensor | None = None
    """float32 [N], 1 is off. Given together with `top_k_N`."""
    top_k_N: torch.Tensor | None = None
    """int64 [N], V or more is off."""


def sample(
    logits_NV: torch.Tensor,
    *,
    uniforms_N: torch.Tensor,
    params: BatchParams,
    banned_NV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [N] and their log-probabilities float32 [N].

    The log-probability is log_softmax(logits / temperature), before top-p, top-k and `banned_NV` (bool:
    tokens that may not be taken now): it is what the trainer's forward gives for the same token. The token is
    the inverse of the cumulative distribution at the row's uniform number (float64 [N], in [0, 1)).
    """
    if params.temperature_N1 is not None:
        logits_NV = logits_NV / params.temperature_N1
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    allowed_NV = logprobs_NV
    if banned_NV is not None:
        allowed_NV = logprobs_NV.masked_fill(banned_NV, -torch.inf)
    if params.top_p_N is not None and params.top_k_N is not None:
        # Renormalised, so that top-p is a share of what may be taken.
        open_NV = torch.softmax(allowed_NV, -1) if banned_NV is not None else allowed_NV.exp()
        probs_NV = keep_top(open_NV, top_p_N=params.top_p_N, top_k_N=params.top_k_N)
    else:
        probs_NV = allowed_NV.exp()
    tokens_N = invert_cdf(probs_NV, uniforms_N)
    if params.greedy_N is not None:
        tokens_N = torch.where(params.greedy_N, allowed_NV.argmax(-1), tokens_N)
    return tokens_N, logprobs_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)


def invert_cdf(probs_NV: torch.Tensor, uniforms_N: torch.Tensor) -> torch.Tensor:
    """The first token at which the cumulative sum exceeds uniform * total; never one of probability 0.

    Summed in float64: with a large vocabulary float32 loses tail tokens.
    """
    cdf_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    target_N1 = uniforms_N.unsqueeze(1) * cdf_NV[:, -1:]
    # A product that rounds up to the total would point behind the last token.
    target_N1 = torch.minimum(target_N1, torch.nextafter(cdf_NV[:, -1:], torch.zeros_like(target_N1)))
    # NaN finds no place at all: the last token stands in for it, and its log-probability is NaN too.
    return torch.searchsorted(cdf_NV, target_N1, right=True).squeeze(1).clamp_(max=probs_NV.shape[1] - 1)


def keep_top(probs_NV: torch.Tensor, *, top_p_N: torch.Tensor, top_k_N: torch.Tensor) -> torch.Tensor:
    """Probabilities with everything outside top-p and outside top-k set to 0, not renormalised.

    Both are taken of the same distribution, as SGLang does: token i in descending order stays when i < k and
    when the tokens before it sum to at most p.
    """
    sorted_NV, order_NV = probs_NV.sort(stable=True, dim=-1, descending=True)
    before_NV = sorted_NV.cumsum(-1, dtype=torch.float64) - sorted_NV
    ranks_V = torch.arange(probs_NV.shape[1], device=probs_NV.device)
    out_NV = (before_NV > top_p_N.unsqueeze(1)) | (ranks_V >= top_k_N.unsqueeze(1))
    out_NV[:, 0] = False
    return torch.zeros_like(probs_NV).scatter_(1, order_NV, sorted_NV.masked_fill_(out_NV, 0.0))
