"""Which experts a token goes to, and with what weights: the router of mixture-of-experts layers.

Owns the formula, shared by the engine that routes and the trainer that replays. Pure.

Letters: T tokens, E experts of a layer, K experts per token.

    p = softmax(logits) in float32      s = p at the K chosen experts      s <- s / sum(s) where normalised

Invariant: `expert_scores` at the experts that `top_experts` chose gives its scores to the bit, and the same
gradient; the operations and their order are those of transformers.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["softmax", "normalized", "chosen"]
"""How scores follow from logits: probabilities as they are, made to sum to 1 (`norm_topk_prob`), or a softmax
over the chosen logits alone (the same numbers as "normalized", rounded otherwise)."""
RULES: tuple[Rule, ...] = ("softmax", "normalized", "chosen")


def top_experts(logits_TE: Tensor, *, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """(scores [T, K] in the dtype of the logits, indices [T, K] int64), the largest first."""
    probs_TE = torch.softmax(logits_TE, dtype=torch.float32, dim=-1)
    scores_TK, indices_TK = torch.topk(probs_TE, top_k, dim=-1)
    if normalize:
        scores_TK /= scores_TK.sum(dim=-1, keepdim=True)
    return scores_TK.to(logits_TE.dtype), indices_TK


def expert_scores(logits_TE: Tensor, *, indices_TK: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
    """Scores [T, K] of experts that were chosen elsewhere; the gradient flows through the probabilities.

    `dtype` is that of the result. (Routing replay: Ma et al. 2025; slime/Miles: use_routing_replay.)
    """
    if rule == "chosen":
        return torch.softmax(logits_TE.gather(-1, indices_TK), dim=-1).to(dtype)
    scores_TK = torch.softmax(logits_TE, dtype=torch.float32, dim=-1).gather(-1, indices_TK)
    if rule == "normalized":
        scores_TK /= scores_TK.sum(dim=-1, keepdim=True)
    return scores_TK.to(dtype)


def replayed(own_TK: Tensor, *, given_TK: Tensor) -> Tensor:
    """The given experts, and the model's own in rows where any given one is -1; int64."""
    given_TK = given_TK.to(own_TK.dtype)
    return torch.where((given_TK < 0).any(-1, keepdim=True), own_TK, given_TK)
