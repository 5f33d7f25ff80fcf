"""The loss of a micro-batch: advantages, surrogate, corrections, KL and entropy put together.

Owns which function of algo/ sees which log-probs. Holds no state and runs no model.

Shape letters: R response tokens of a micro-batch, S its samples.

Invariant: loss and metrics are this micro-batch's share of the optimizer step's, so they add up.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncrl.algo.correction import effective_sample_ratio
from asyncrl.algo.importance import loglinear_proximal
from asyncrl.algo.kl import bounded_exp, kl_estimate
from asyncrl.algo.loss import (
    Surrogate,
    TokenStatistics,
    cispo_surrogate,
    dppo_surrogate,
    ppo_surrogate,
    sequence_log_ratio,
    value_loss,
)
from asyncrl.algo.mismatch import mismatch, mismatch_metrics
from asyncrl.algo.segment import weighted_sum
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.train.corrections import corrected
from asyncrl.train.hooks import TrainHooks
from asyncrl.train.tokens import TokenData


class Objective(NamedTuple):
    """What a micro-batch adds to its optimizer step."""

    loss: Tensor
    """Scalar to differentiate."""
    metrics: dict[str, Tensor]
    """Scalars without gradient, by the name after train/ or rollout/."""


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether the loss or the reward has a KL term."""
    return (algorithm.use_kl_loss and algorithm.kl_loss_coef != 0) or algorithm.kl_coef != 0


def policy_objective(
    statistics: TokenStatistics,
    tokens: TokenData,
    *,
    algorithm: AlgorithmConfig,
    proximal_version: int = 0,
    hooks: TrainHooks | None = None,
) -> Objective:
    """Loss = pg_loss - entropy_coef H + kl_loss_coef KL, each reduced over the optimizer step.

    `tokens.old_R` are the trainer's log-probs at the start of the rollout step; None where they are the
    current ones (a single optimizer step): the ratio is then 1 and its gradient the policy gradient. With
    use_rollout_logprobs the engine's take their place in the ratio. Source: slime-miles.md 3.4.
    """
    current_R = statistics.logprobs_R
    if algorithm.loss_type == "sft_loss":
        return _supervised(current_R, tokens)
    trainer_R = proximal_logprobs(current_R.detach(), tokens, algorithm, proximal_version)
    ratio_old_R = tokens.rollout_R if algorithm.use_rollout_logprobs else trainer_R
    surrogate = _surrogate(current_R, ratio_old_R, tokens, algorithm)
    result = corrected(
        surrogate.loss_R,
        tokens,
        current_R=current_R.detach(),
        trainer_R=trainer_R,
        algorithm=algorithm,
        hooks=hooks,
    )
    kept_R = tokens.weight_R * tokens.keep_R
    loss = _reduced(result.loss_R, result.keep_R, tokens, algorithm, hooks)
    entropy = weighted_sum(statistics.entropy_R, weights_R=kept_R)
    metrics = {**result.metrics, "pg_loss": loss, "entropy_loss": entropy}
    metrics["masked_ratio"] = weighted_sum(1 - result.keep_R * tokens.keep_R, weights_R=tokens.weight_R)
    if algorithm.entropy_coef != 0:
        loss = loss - algorithm.entropy_coef * entropy
    if tokens.reference_R is not None:
        metrics["ref_log_probs"] = weighted_sum(tokens.reference_R, weights_R=tokens.weight_R)
        if algorithm.use_kl_loss:
            importance_R = bounded_exp(current_R - ratio_old_R) if algorithm.use_unbiased_kl else None
            kl_R = kl_estimate(
                current_R,
                reference_R=tokens.reference_R,
                kind=algorithm.kl_loss_type,
                importance_R=importance_R,
            )
            metrics["kl_loss"] = weighted_sum(kl_R, weights_R=kept_R)
            loss = loss + algorithm.kl_loss_coef * metrics["kl_loss"]
    metrics |= _observations(surrogate, tokens, ratio_old_R, trainer_R, current_R.detach(), algorithm)
    return _objective(loss, metrics)


def value_objective(values_R: Tensor, tokens: TokenData, *, value_clip: float) -> Objective:
    """The critic's loss, reduced as the policy's. Source: slime-miles.md 3.8."""
    assert tokens.value_R is not None, "values are computed before the critic is trained"
    assert tokens.return_R is not None, "returns are computed before the critic is trained"
    found = value_loss(values_R, old_R=tokens.value_R, returns_R=tokens.return_R, value_clip=value_clip)
    kept_R = tokens.weight_R * tokens.keep_R
    loss = weighted_sum(found.loss_R, weights_R=kept_R)
    clipped = weighted_sum(found.clipped_R, weights_R=tokens.weight_R)
    return _objective(loss, {"value_loss": loss, "value_clipfrac": clipped})


def proximal_logprobs(
    current_R: Tensor, tokens: TokenData, algorithm: AlgorithmConfig, proximal_version: int
) -> Tensor:
    """The trainer's log-probs at the start of the rollout step: recomputed, approximated, or the current."""
    if algorithm.prox_logp_method == "loglinear":
        return loglinear_proximal(
            current_R,
            rollout_R=tokens.rollout_R,
            version_R=tokens.version_R,
            proximal_version=proximal_version,
        )
    return current_R if tokens.old_R is None else tokens.old_R


def _surrogate(current_R: Tensor, old_R: Tensor, tokens: TokenData, algorithm: AlgorithmConfig) -> Surrogate:
    """The policy loss per token by the options."""
    advantages_R = tokens.advantage_R
    assert advantages_R is not None, "advantages are computed before any loss"
    # Masked tokens are in no sum; their log-probs may be anything, NaN included.
    advantages_R = torch.where(tokens.mask_R > 0, advantages_R, 0.0)
    if algorithm.use_dppo:
        return dppo_surrogate(
            current_R,
            rollout_R=torch.where(tokens.mask_R > 0, tokens.rollout_R, current_R.detach()),
            advantages_R=advantages_R,
            mask_low=algorithm.dppo_mask_low,
            mask_high=algorithm.dppo_mask_high,
            kl_coef=algorithm.dppo_kl_coef,
        )
    high = algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high
    if algorithm.advantage_estimator == "cispo":
        return cispo_surrogate(
            current_R, old_R=old_R, advantages_R=advantages_R, eps_clip=algorithm.eps_clip, eps_clip_high=high
        )
    log_ratio_R = None
    if algorithm.advantage_estimator == "gspo":
        log_ratio_R = sequence_log_ratio(
            current_R - old_R,
            mask_R=tokens.mask_R,
            sample_R=tokens.sample_R,
            num_samples=tokens.num_samples,
        )
    return ppo_surrogate(
        current_R,
        old_R=old_R,
        advantages_R=advantages_R,
        eps_clip=algorithm.eps_clip,
        eps_clip_high=high,
        eps_clip_c=algorithm.eps_clip_c,
        log_ratio_R=log_ratio_R,
    )


def _reduced(
    loss_R: Tensor,
    keep_R: Tensor,
    tokens: TokenData,
    algorithm: AlgorithmConfig,
    hooks: TrainHooks | None,
) -> Tensor:
    """The policy loss as one number: the step's reducer, a constant divisor (Dr.GRPO), or the user's."""
    if hooks is not None and hooks.pg_loss_reducer is not None:
        return hooks.reduce(loss_R, tokens, keep_R=keep_R * tokens.keep_R)
    weight_R = tokens.weight_R
    if algorithm.pg_loss_divisor is not None:
        weight_R = tokens.mask_R / algorithm.pg_loss_divisor / tokens.num_step_samples
    return weighted_sum(loss_R, weights_R=weight_R * tokens.keep_R)


def _supervised(current_R: Tensor, tokens: TokenData) -> Objective:
    loss = -weighted_sum(current_R, weights_R=tokens.weight_R * tokens.keep_R)
    logprobs = weighted_sum(current_R, weights_R=tokens.weight_R)
    return _objective(loss, {"log_probs": logprobs})


def _objective(loss: Tensor, metrics: dict[str, Tensor]) -> Objective:
    return Objective(
        loss, {**{name: value.detach() for name, value in metrics.items()}, "loss": loss.detach()}
    )


@torch.no_grad()
def _observations(
    surrogate: Surrogate,
    tokens: TokenData,
    ratio_old_R: Tensor,
    trainer_R: Tensor,
    current_R: Tensor,
    algorithm: AlgorithmConfig,
) -> dict[str, Tensor]:
    """What is reported whatever the options, over tokens before any correction's mask."""
    values = {
        "pg_clipfrac": surrogate.clipped_R,
        "ppo_kl": ratio_old_R - current_R,
        "ois": surrogate.ratio_R,
        "log_probs": trainer_R,
        "rollout_log_probs": tokens.rollout_R,
        **mismatch(trainer_R, rollout_R=tokens.rollout_R),
    }
    where: dict[str, Any] = {
        "mask_R": tokens.mask_R,
        "sample_R": tokens.sample_R,
        "num_samples": tokens.num_samples,
    }
    if algorithm.get_mismatch_metrics:
        values |= mismatch_metrics(trainer_R, rollout_R=tokens.rollout_R, **where)
    metrics = {name: weighted_sum(value_R, weights_R=tokens.weight_R) for name, value_R in values.items()}
    for name, log_ratio_R in {
        "ess_ratio": current_R - ratio_old_R,
        "rollout_ess_ratio": current_R - tokens.rollout_R,
    }.items():
        metrics[name] = effective_sample_ratio(log_ratio_R, **where).sum() / tokens.num_step_samples
    return metrics
