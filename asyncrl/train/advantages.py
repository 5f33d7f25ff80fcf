"""Which rewards and advantages a batch gets, by the options of [algorithm].

Owns the choice and the order of algo/'s functions: rewards are normalised before any forward pass, advantages
follow once the log-probs and values they need are known. Holds no state.

Shape letters: R response tokens of the batch, S its samples.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from asyncrl.algo.advantage import leave_one_out, normalize_rewards
from asyncrl.algo.kl import kl_estimate
from asyncrl.algo.returns import generalized_advantages, reinforce_plus_plus_returns, terminal_rewards
from asyncrl.algo.segment import weighted_sum
from asyncrl.algo.whiten import masked_whiten
from asyncrl.errors import DataError
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.train.tokens import TokenData

GROUP_RELATIVE = ("grpo", "gspo", "cispo")
"""Estimators that share GRPO's advantages."""


def distils(algorithm: AlgorithmConfig) -> bool:
    """Whether advantages are made of a teacher's log-probs, alone or beside others."""
    return algorithm.use_opd or algorithm.advantage_estimator == "on_policy_distillation"


def normalized_rewards(
    rewards_S: Tensor, *, group_S: Tensor, rollout_S: Tensor | None, algorithm: AlgorithmConfig
) -> Tensor:
    """The rewards [S] that the estimator starts from. Source: slime-miles.md 3.1.

    Without rewards_normalization they are as given, but for rloo, which is nothing without its baseline.

    grpo, gspo, cispo: minus the group's mean, over its standard deviation; reinforce_plus_plus_baseline:
    minus the mean; rloo: minus the mean of the others; the rest takes rewards as they are.
    """
    estimator = algorithm.advantage_estimator
    if estimator == "rloo":
        return leave_one_out(rewards_S, group_S=group_S)
    if not algorithm.rewards_normalization:
        return rewards_S.clone()
    if estimator in GROUP_RELATIVE or estimator == "reinforce_plus_plus_baseline":
        std = algorithm.grpo_std_normalization and estimator in GROUP_RELATIVE
        try:
            return normalize_rewards(rewards_S, group_S=group_S, rollout_S=rollout_S, std_normalization=std)
        except ValueError as error:
            raise DataError(f"training batch: {error}") from error
    return rewards_S.clone()


def fill_advantages(
    data: TokenData,
    *,
    algorithm: AlgorithmConfig,
    custom: Callable[[TokenData], None] | None = None,
) -> dict[str, float]:
    """Set `advantage_R` and `return_R`; returns metrics by public name.

    Order (slime-miles.md 3.3): KL, estimator or the custom function, distillation, whitening.
    """
    data.kl_R = _kl(data, algorithm)
    if custom is None:
        data.advantage_R, data.return_R = _estimate(data, algorithm)
    else:
        custom(data)
    metrics = _distil(data, algorithm)
    if algorithm.normalize_advantages:
        data.advantage_R = masked_whiten(_known(data.advantage_R), mask_R=data.mask_R)
    return metrics | _observed(data)


def _kl(data: TokenData, algorithm: AlgorithmConfig) -> Tensor:
    """KL of the old policy to the reference at every token; 0 without kl_coef."""
    if algorithm.kl_coef == 0:
        return torch.zeros_like(data.rollout_R)
    old_R = data.rollout_R if algorithm.use_rollout_logprobs else _known(data.old_R)
    return kl_estimate(old_R, reference_R=_known(data.reference_R), kind=algorithm.kl_loss_type)


def _estimate(data: TokenData, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns [R] of the estimator."""
    estimator, kl_R = algorithm.advantage_estimator, _known(data.kl_R)
    reward_R = data.reward_S[data.sample_R]
    if estimator == "ppo":
        return _actor_critic(data, algorithm)
    if estimator == "reinforce_plus_plus":
        returns_R = _returns(data, algorithm)
        return returns_R, returns_R.clone()
    if estimator == "reinforce_plus_plus_baseline":
        advantage_R = reward_R - algorithm.kl_coef * kl_R
        return advantage_R, advantage_R.clone()
    if estimator == "on_policy_distillation":
        advantage_R = _known(data.teacher_R) - _student(data, algorithm)
        return advantage_R, advantage_R.clone()
    return reward_R, reward_R.clone()


def _actor_critic(data: TokenData, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    over_masked = algorithm.gae_over_masked_tokens
    rewards_R = terminal_rewards(
        data.reward_S, mask_R=data.mask_R, sample_R=data.sample_R, over_masked_tokens=over_masked
    )
    found = generalized_advantages(
        _known(data.value_R),
        rewards_R=rewards_R,
        mask_R=data.mask_R,
        sample_R=data.sample_R,
        num_samples=data.num_samples,
        gamma=algorithm.gamma,
        lambd=algorithm.lambd,
        over_masked_tokens=over_masked,
    )
    return found.advantages_R, found.returns_R


def _returns(data: TokenData, algorithm: AlgorithmConfig) -> Tensor:
    """REINFORCE++ returns; a sample without a token in the loss has no return, and needs none."""
    trained_S = torch.zeros(data.num_samples, dtype=torch.bool, device=data.mask_R.device)
    trained_S[data.sample_R[data.mask_R > 0]] = True
    rows_R = trained_S[data.sample_R]
    index_S = trained_S.cumsum(0) - 1
    returns_R = torch.zeros_like(data.mask_R)
    returns_R[rows_R] = reinforce_plus_plus_returns(
        data.reward_S[trained_S],
        kl_R=_known(data.kl_R)[rows_R],
        mask_R=data.mask_R[rows_R],
        sample_R=index_S[data.sample_R[rows_R]],
        kl_coef=algorithm.kl_coef,
        gamma=algorithm.gamma,
        mask_kl=algorithm.mask_kl_reward,
    )
    return returns_R


def _distil(data: TokenData, algorithm: AlgorithmConfig) -> dict[str, float]:
    """A_t -= opd_kl_coef (student - teacher), whatever the estimator."""
    # Scores may hold a teacher's log-probs for a hook alone; the old policy's may be unknown then.
    if not distils(algorithm):
        return {}
    reverse_kl_R = _student(data, algorithm) - _known(data.teacher_R)
    if algorithm.use_opd:
        data.advantage_R = _known(data.advantage_R) - algorithm.opd_kl_coef * reverse_kl_R
    return {"train/opd_reverse_kl": _mean(reverse_kl_R, data)}


def _student(data: TokenData, algorithm: AlgorithmConfig) -> Tensor:
    return data.rollout_R if algorithm.use_rollout_logprobs else _known(data.old_R)


def _observed(data: TokenData) -> dict[str, float]:
    named = {
        "advantages": data.advantage_R,
        "returns": data.return_R,
        "values": data.value_R,
        "kl": data.kl_R,
    }
    return {f"rollout/{name}": _mean(values, data) for name, values in named.items() if values is not None}


def _mean(values_R: Tensor, data: TokenData) -> float:
    """Mean over the tokens in the loss."""
    return float(weighted_sum(values_R, weights_R=data.mask_R) / data.mask_R.sum().clamp(min=1))


def _known(values: Tensor | None) -> Tensor:
    assert values is not None, "the backend runs every forward pass that the options ask for"
    return values
