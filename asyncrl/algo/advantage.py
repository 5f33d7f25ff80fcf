"""Advantages from rewards.

Owns how a reward is compared with its group's. Never sees a log-prob, never spreads a number over tokens
(`returns` does).

Shape letters: S samples in any order, K rollouts, G groups. Groups are told apart by explicit ids, so groups
of unequal size, interleaved samples and a batch of one group are all the same case (slime's reshape is not;
see slime-miles.md 3.1).

Invariant: a rollout counts once in its group's statistics, however many samples it was cut into.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STD_EPSILON = 1e-6
"""Added to a group's standard deviation (slime, Miles)."""


class GroupStatistics(NamedTuple):
    """What the rewards of each group look like; samples removed from the loss are part of it."""

    index_S: Tensor
    """int64 [S], each sample's row in the tensors below."""
    size_G: Tensor
    """int64 [G]."""
    mean_G: Tensor
    """[G]."""
    std_G: Tensor
    """[G], unbiased (ddof = 1); 0 for a group of one."""
    equal_G: Tensor
    """bool [G]: all rewards of the group are the same number."""


def group_statistics(rewards_S: Tensor, *, group_S: Tensor) -> GroupStatistics:
    """Mean, unbiased standard deviation and size per group id; `group_S` int64, any values."""
    _, index_S = torch.unique(group_S, return_inverse=True)
    num_groups = int(index_S.max()) + 1 if index_S.numel() else 0
    size_G = torch.bincount(index_S, minlength=num_groups)
    zeros_G = rewards_S.new_zeros(num_groups)
    mean_G = zeros_G.index_add(0, index_S, rewards_S) / size_G
    deviation_S = rewards_S - mean_G[index_S]
    square_G = zeros_G.index_add(0, index_S, deviation_S.square())
    std_G = (square_G / (size_G - 1).clamp(min=1)).sqrt()
    low_G = zeros_G.scatter_reduce(0, index_S, rewards_S, "amin", include_self=False)
    high_G = zeros_G.scatter_reduce(0, index_S, rewards_S, "amax", include_self=False)
    return GroupStatistics(
        index_S=index_S, size_G=size_G, mean_G=mean_G, std_G=std_G, equal_G=low_G == high_G
    )


def normalize_rewards(
    rewards_S: Tensor, *, group_S: Tensor, rollout_S: Tensor | None = None, std_normalization: bool
) -> Tensor:
    """Rewards relative to their group [S]: (r - mean_group) / (std_group + 1e-6), std unbiased.

    Without `std_normalization` the division is left out (Dr.GRPO, arXiv:2503.20783; also the baseline of
    REINFORCE++). A group of one and a group of equal rewards get exactly 0, not a rounding error over 1e-6.
    `group_S` and `rollout_S` are int64 ids of any values. Samples of one group with the same rollout id are
    siblings: parts of one rollout, with one reward, counted once; None makes every sample its own rollout. A
    rollout id means nothing outside its group. Raises ValueError for siblings of unequal rewards.
    Source: slime-miles.md 3.1, vector 8 (arXiv:2402.03300; flags --grpo-std-normalization, Miles' grouping).
    """
    rollouts = _rollouts(rewards_S, group_S=group_S, rollout_S=rollout_S)
    groups = group_statistics(rollouts.rewards_K, group_S=rollouts.group_K)
    relative_K = rollouts.rewards_K - groups.mean_G[groups.index_S]
    if std_normalization:
        relative_K = relative_K / (groups.std_G + STD_EPSILON)[groups.index_S]
    return torch.where(groups.equal_G[groups.index_S], 0.0, relative_K)[rollouts.index_S]


def leave_one_out(rewards_S: Tensor, *, group_S: Tensor, rollout_S: Tensor | None = None) -> Tensor:
    """Reward minus the mean of the group's other rewards [S]: r_i - (sum_group - r_i) / (n - 1).

    0 for a group of one, exactly 0 for a group of equal rewards. Ids and errors are those of
    `normalize_rewards`: siblings are not each other's baseline. Source: RLOO, arXiv:2402.14740.
    """
    rollouts = _rollouts(rewards_S, group_S=group_S, rollout_S=rollout_S)
    groups = group_statistics(rollouts.rewards_K, group_S=rollouts.group_K)
    # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1): no difference of two large sums.
    size_K = groups.size_G[groups.index_S]
    relative_K = (rollouts.rewards_K - groups.mean_G[groups.index_S]) * size_K / (size_K - 1).clamp(min=1)
    return torch.where(groups.equal_G[groups.index_S], 0.0, relative_K)[rollouts.index_S]


class _Rollouts(NamedTuple):
    """One reward per rollout."""

    index_S: Tensor
    """int64 [S], each sample's row in the tensors below."""
    rewards_K: Tensor
    group_K: Tensor


def _rollouts(rewards_S: Tensor, *, group_S: Tensor, rollout_S: Tensor | None) -> _Rollouts:
    if rollout_S is None:
        return _Rollouts(
            index_S=torch.arange(len(rewards_S), device=rewards_S.device),
            rewards_K=rewards_S,
            group_K=group_S,
        )
    ids_2K, index_S = torch.unique(torch.stack([group_S, rollout_S]), dim=1, return_inverse=True)
    zeros_K = rewards_S.new_zeros(ids_2K.shape[1])
    low_K = zeros_K.scatter_reduce(0, index_S, rewards_S, "amin", include_self=False)
    high_K = zeros_K.scatter_reduce(0, index_S, rewards_S, "amax", include_self=False)
    unequal = torch.nonzero(low_K < high_K)
    if len(unequal):
        row = int(unequal[0])
        group, rollout = ids_2K[:, row].tolist()
        low, high = low_K[row].item(), high_K[row].item()
        raise ValueError(
            f"rewards: the samples of rollout {rollout} (group {group}) have rewards from {low:g} to "
            f"{high:g}; samples of one rollout share one reward: give each of them the rollout's reward, "
            "or its own rollout id"
        )
    return _Rollouts(index_S=index_S, rewards_K=low_K, group_K=ids_2K[0])
