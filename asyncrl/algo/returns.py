"""Returns and advantages per token: rewards laid over the tokens of a response and carried back.

Owns the two recurrences over a response, discounted returns and GAE. Never compares samples with each other
(`advantage` does), never reduces.

Shape letters: R response tokens, packed sample after sample; S samples. `sample_R` int64 is each token's
sample, `mask_R` 1 where a token is trained. All results are without gradient, in the inputs' precision.

Invariants: a sample's result depends on its own tokens only, so the order samples are packed in changes
nothing; a sample without tokens is no special case. The tokens of a sample lie together and in order.

Miles and slime differ on masked tokens (tool output, say). Miles: they are no steps of the decision process,
so nothing decays over them; they get no reward and 0 everywhere. slime: they are steps as any other.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Returns(NamedTuple):
    """What a critic's values and the rewards say about each token."""

    advantages_R: Tensor
    """A_t, [R]."""
    returns_R: Tensor
    """A_t + V_t, what the critic is trained towards, [R]."""


@torch.no_grad()
def terminal_rewards(
    rewards_S: Tensor, *, mask_R: Tensor, sample_R: Tensor, over_masked_tokens: bool = False
) -> Tensor:
    """Each sample's reward on its last trained token, 0 on all others [R].

    With `over_masked_tokens` the last token of any kind takes it (slime). A sample without such a token gives
    its reward to none. Source: slime-miles.md 3.3, ppo.
    """
    position_R = torch.arange(len(sample_R), device=sample_R.device)
    eligible_R = torch.ones_like(mask_R, dtype=torch.bool) if over_masked_tokens else mask_R > 0
    last_S = torch.full((len(rewards_S),), -1, dtype=torch.int64, device=sample_R.device)
    last_S = last_S.scatter_reduce(0, sample_R[eligible_R], position_R[eligible_R], "amax")
    rewards_R = rewards_S.new_zeros(len(sample_R))
    rewards_R[last_S[last_S >= 0]] = rewards_S[last_S >= 0]
    return rewards_R


@torch.no_grad()
def generalized_advantages(
    values_R: Tensor,
    *,
    rewards_R: Tensor,
    mask_R: Tensor,
    sample_R: Tensor,
    num_samples: int,
    gamma: float,
    lambd: float,
    over_masked_tokens: bool = False,
) -> Returns:
    """Generalized advantage estimation (arXiv:1506.02438) over each sample.

    d_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token; A_t = d_t + gamma lambd A_{t+1};
    returns = A + V. t + 1 is the next trained token; masked ones get 0 and their rewards are not read. With
    `over_masked_tokens` (flag gae_over_masked_tokens) it is the next token of any kind and masked ones get
    their A and return. gamma, lambd in [0, 1]. Source: slime-miles.md 3.3, vector 7, both variants.
    """
    if not over_masked_tokens:
        trained_R = mask_R > 0
        packed = generalized_advantages(
            values_R[trained_R],
            rewards_R=rewards_R[trained_R],
            mask_R=mask_R[trained_R],
            sample_R=sample_R[trained_R],
            num_samples=num_samples,
            gamma=gamma,
            lambd=lambd,
            over_masked_tokens=True,
        )
        zeros_R = packed.advantages_R.new_zeros(len(values_R))
        return Returns(*(zeros_R.masked_scatter(trained_R, part) for part in packed))
    next_R = _ahead(values_R, sample_R=sample_R, distance=1)
    delta_R = rewards_R + gamma * next_R - values_R
    advantages_R = _discount(delta_R, sample_R=sample_R, num_samples=num_samples, decay=gamma * lambd)
    return Returns(advantages_R=advantages_R, returns_R=advantages_R + values_R)


@torch.no_grad()
def discounted_returns(rewards_R: Tensor, *, sample_R: Tensor, num_samples: int, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token to its sample's end [R]: G_t = r_t + gamma G_{t+1}.

    gamma in [0, 1]. Source: slime-miles.md 3.3.
    """
    return _discount(rewards_R, sample_R=sample_R, num_samples=num_samples, decay=gamma)


@torch.no_grad()
def reinforce_plus_plus_returns(
    rewards_S: Tensor,
    *,
    kl_R: Tensor,
    mask_R: Tensor,
    sample_R: Tensor,
    kl_coef: float,
    gamma: float,
    mask_kl: bool = False,
) -> Tensor:
    """Returns of REINFORCE++ [R] (arXiv:2501.03262), which are its advantages before whitening.

    r_t = -kl_coef kl_t, + r_i on the last trained token; G_t = r_t + gamma G_{t+1} over all tokens, masked
    ones too. `mask_kl` (flag mask_kl_reward) leaves out the KL of masked tokens (slime). Raises ValueError,
    with its index, for a sample whose tokens are all masked: nothing of it can carry the reward.
    Source: slime-miles.md 3.3, vector 6, both variants.
    """
    num_samples = len(rewards_S)
    sizes_S = torch.bincount(sample_R, minlength=num_samples)
    trained_S = torch.bincount(sample_R[mask_R > 0], minlength=num_samples)
    masked_out = torch.nonzero((sizes_S > 0) & (trained_S == 0))
    if len(masked_out):
        index = int(masked_out[0])
        raise ValueError(
            f"sample {index}: all {int(sizes_S[index])} tokens are masked, so none can carry its reward; "
            "reinforce_plus_plus needs at least one trained token in each sample: leave the sample out"
        )
    if mask_kl:
        kl_R = torch.where(mask_R > 0, kl_R, 0.0)
    terminal_R = terminal_rewards(rewards_S, mask_R=mask_R, sample_R=sample_R)
    return discounted_returns(
        terminal_R - kl_coef * kl_R, sample_R=sample_R, num_samples=num_samples, gamma=gamma
    )


def _discount(values_R: Tensor, *, sample_R: Tensor, num_samples: int, decay: float) -> Tensor:
    """y_t = x_t + decay y_{t+1} within each sample, in log2(longest) passes over all tokens.

    Doubling: once y_t holds its next n terms, y_t + decay^n y_{t+n} holds 2 n. No power above 1 and no
    quotient of powers occurs, so any decay in [0, 1] and any length are exact to rounding.
    """
    longest = _longest(sample_R, num_samples=num_samples)
    distance = 1
    # A power that underflowed to 0 has nothing more to carry.
    while distance < longest and decay != 0:
        values_R = values_R + decay * _ahead(values_R, sample_R=sample_R, distance=distance)
        decay, distance = decay * decay, 2 * distance
    return values_R


def _ahead(values_R: Tensor, *, sample_R: Tensor, distance: int) -> Tensor:
    """The value `distance` tokens later in the same sample, 0 past its end."""
    same_R = sample_R[distance:] == sample_R[:-distance]
    return pad(torch.where(same_R, values_R[distance:], 0.0), (0, len(values_R) - len(same_R)))


def _longest(sample_R: Tensor, *, num_samples: int) -> int:
    """Tokens of the longest sample; ValueError where the packing is not what the module promises."""
    if not len(sample_R):
        return 0
    run_ids, run_sizes = torch.unique_consecutive(sample_R, return_counts=True)
    runs_S = torch.bincount(run_ids, minlength=num_samples)
    if len(runs_S) > num_samples:
        raise ValueError(f"sample_R: sample {len(runs_S) - 1} of {num_samples}; indices run from 0")
    if int(runs_S.max()) > 1:
        raise ValueError(
            f"sample_R: the tokens of sample {int(runs_S.argmax())} do not lie together; "
            "lay the tokens of each sample end to end"
        )
    return int(run_sizes.max())
