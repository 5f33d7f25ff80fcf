"""Advantages from rewards.

Owns how a reward is compared with its group's. Never sees a log-prob.

Shape letters: S samples in any order, G groups. Groups are told apart by explicit ids, so groups of unequal
size, interleaved samples and a batch of one group are all the same case (slime's reshape is not; see
slime-miles.md 3.1).
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


def grpo_advantages(
    rewards_S: Tensor,
    *,
    group_S: Tensor,
    rewards_normalization: bool = True,
    grpo_std_normalization: bool = True,
) -> Tensor:
    """Group-relative advantages [S]: (r - mean_group) / (std_group + 1e-6).

    A group of one and a group of equal rewards get exactly 0, not a rounding error over 1e-6. Without
    `grpo_std_normalization` the division is left out (Dr.GRPO, arXiv:2503.20783); without
    `rewards_normalization` the rewards are the advantages. Source: slime-miles.md 3.1 (arXiv:2402.03300).
    """
    if not rewards_normalization:
        return rewards_S.clone()
    groups = group_statistics(rewards_S, group_S=group_S)
    advantages_S = rewards_S - groups.mean_G[groups.index_S]
    if grpo_std_normalization:
        advantages_S = advantages_S / (groups.std_G + STD_EPSILON)[groups.index_S]
    return torch.where(groups.equal_G[groups.index_S], 0.0, advantages_S)
