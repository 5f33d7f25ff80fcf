"""Off-policy sequence masking, and how many samples the weights are worth.

Owns OPSM and the effective sample size; weights and rejection are `importance`'s, distances `mismatch`'s.
Never touches the KL term or the entropy, and never a denominator: a rejected sequence still counts
(peers.md section 3, denominator trap).

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

from asyncrl.algo.kl import bounded_exp
from asyncrl.algo.segment import sample_means, sample_sums


class SequenceMask(NamedTuple):
    """Which sequences keep their policy gradient."""

    keep_R: Tensor
    """1.0 or 0.0 per token."""
    dropped_S: Tensor
    """1.0 for a sequence that was dropped, or by the per-token rule lost any of its unmasked tokens."""


@torch.no_grad()
def off_policy_sequence_mask(
    current_R: Tensor,
    *,
    rollout_R: Tensor,
    mask_R: Tensor,
    sample_R: Tensor,
    advantages_S: Tensor,
    opsm_delta: float,
    per_token: bool = False,
    advantages_R: Tensor | None = None,
) -> SequenceMask:
    """OPSM: drop a whole sequence iff A < 0 and mean(rollout - current) > opsm_delta (DeepSeek-V3.2).

    `advantages_S` is one number per sequence: a sign per token would half-mask a sequence of mixed signs.
    `per_token` is that rule all the same, slime's: a token goes iff its own `advantages_R` is below 0 and its
    sequence drifted; without `advantages_R` it raises ValueError. The mean runs over unmasked tokens.
    Flags use_opsm, opsm_delta, opsm_per_token. Source: peers.md section 3 with its warning; vector 5.
    """
    num_samples = len(advantages_S)
    drift_R = torch.where(mask_R > 0, rollout_R - current_R, 0.0)
    drift_S = sample_means(drift_R, mask_R=mask_R, sample_R=sample_R, num_samples=num_samples)
    drifted_S = drift_S > opsm_delta
    if not per_token:
        dropped_S = ((advantages_S < 0) & drifted_S).to(current_R.dtype)
        return SequenceMask(keep_R=(1 - dropped_S)[sample_R], dropped_S=dropped_S)
    if advantages_R is None:
        raise ValueError(
            "off_policy_sequence_mask: per_token without advantages_R; allowed: one advantage per token; "
            "pass them or unset opsm_per_token"
        )
    lost_R = ((advantages_R < 0) & drifted_S[sample_R]).to(current_R.dtype)
    lost_S = sample_sums(lost_R * mask_R, sample_R=sample_R, num_samples=num_samples)
    return SequenceMask(keep_R=1 - lost_R, dropped_S=(lost_S > 0).to(current_R.dtype))


def sequence_advantages(
    advantages_R: Tensor, *, mask_R: Tensor, sample_R: Tensor, num_samples: int
) -> Tensor:
    """One advantage per sequence [S], the masked mean of its tokens': what OPSM takes the sign of.

    What stands at a masked token is in no mean, NaN included.
    """
    advantages_R = torch.where(mask_R > 0, advantages_R, 0.0)
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
