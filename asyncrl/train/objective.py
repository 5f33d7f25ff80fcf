"""The loss of a micro-batch: advantages, surrogate, corrections, KL and entropy put together.

Owns which function of algo/ sees which log-probs. Holds no state and runs no model.

Shape letters: R response tokens of a micro-batch, S its samples.

Invariant: loss and metrics are this micro-batch's share of the optimizer step's, so they add up.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.algo.correction import (
    effective_sample_ratio,
    mismatch,
    off_policy_sequence_mask,
    truncated_importance,
)
from asyncrl.algo.kl import bounded_exp, kl_estimate
from asyncrl.algo.loss import Surrogate, TokenStatistics, ppo_surrogate
from asyncrl.algo.segment import weighted_sum
from asyncrl.topology.training import AlgorithmConfig
from asyncrl.train.data import MicroBatch


class Objective(NamedTuple):
    """What a micro-batch adds to its optimizer step."""

    loss: Tensor
    """Scalar to differentiate."""
    metrics: dict[str, Tensor]
    """Scalars without gradient, by the name after train/ or rollout/."""


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether the loss has a KL term."""
    return algorithm.use_kl_loss and algorithm.kl_loss_coef != 0


def policy_objective(
    statistics: TokenStatistics,
    batch: MicroBatch,
    *,
    algorithm: AlgorithmConfig,
    old_R: Tensor | None = None,
    reference_R: Tensor | None = None,
) -> Objective:
    """Loss = pg_loss - entropy_coef H + kl_loss_coef KL, each reduced over the optimizer step.

    `old_R` are the trainer's log-probs at the start of the rollout step; None where they are the current
    ones (a single optimizer step): the ratio is then 1 and its gradient the policy gradient. With
    use_rollout_logprobs the engine's take their place in the ratio. Source: slime-miles.md 3.4.
    """
    current_R = statistics.logprobs_R
    trainer_R = current_R.detach() if old_R is None else old_R
    ratio_old_R = batch.rollout_R if algorithm.use_rollout_logprobs else trainer_R
    surrogate = ppo_surrogate(
        current_R,
        old_R=ratio_old_R,
        advantages_R=batch.advantage_R,
        eps_clip=algorithm.eps_clip,
        eps_clip_high=algorithm.eps_clip_high,
        eps_clip_c=algorithm.eps_clip_c,
    )
    corrected_R, metrics = _corrected(surrogate, batch, current_R.detach(), trainer_R, algorithm)
    loss = weighted_sum(corrected_R, weights_R=batch.weight_R)
    entropy = weighted_sum(statistics.entropy_R, weights_R=batch.weight_R)
    metrics |= {"pg_loss": loss, "entropy_loss": entropy}
    if algorithm.entropy_coef != 0:
        loss = loss - algorithm.entropy_coef * entropy
    if reference_R is not None:
        importance_R = bounded_exp(current_R - ratio_old_R) if algorithm.use_unbiased_kl else None
        kl_R = kl_estimate(
            current_R, reference_R=reference_R, kind=algorithm.kl_loss_type, importance_R=importance_R
        )
        metrics["kl_loss"] = weighted_sum(kl_R, weights_R=batch.weight_R)
        metrics["ref_log_probs"] = weighted_sum(reference_R, weights_R=batch.weight_R)
        loss = loss + algorithm.kl_loss_coef * metrics["kl_loss"]
    metrics |= _observations(surrogate, batch, ratio_old_R, trainer_R, current_R.detach())
    return Objective(
        loss, {name: value.detach() for name, value in metrics.items()} | {"loss": loss.detach()}
    )


def _corrected(
    surrogate: Surrogate,
    batch: MicroBatch,
    current_R: Tensor,
    trainer_R: Tensor,
    algorithm: AlgorithmConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate's loss per token after the corrections that are on, and their metrics."""
    loss_R, metrics = surrogate.loss_R, {}
    if algorithm.use_opsm:
        mask = off_policy_sequence_mask(
            current_R,
            rollout_R=batch.rollout_R,
            mask_R=batch.mask_R,
            sample_R=batch.sample_R,
            advantages_S=batch.advantage_S,
            opsm_delta=algorithm.opsm_delta,
        )
        loss_R = loss_R * mask.keep_R
        metrics["opsm_clipfrac"] = weighted_sum(1 - mask.keep_R, weights_R=batch.weight_R)
        metrics["opsm_masked_fraction"] = mask.dropped_S.sum() / batch.num_step_samples
    if algorithm.use_tis:
        weighting = truncated_importance(
            trainer_R,
            rollout_R=batch.rollout_R,
            tis_clip=algorithm.tis_clip,
            tis_clip_low=algorithm.tis_clip_low,
        )
        loss_R = loss_R * weighting.weight_R
        for name, values_R in weighting.metrics.items():
            metrics[name] = weighted_sum(values_R, weights_R=batch.weight_R)
    return loss_R, metrics


@torch.no_grad()
def _observations(
    surrogate: Surrogate, batch: MicroBatch, ratio_old_R: Tensor, trainer_R: Tensor, current_R: Tensor
) -> dict[str, Tensor]:
    """What is reported whatever the options, over tokens before any correction's mask."""
    values = {
        "pg_clipfrac": surrogate.clipped_R,
        "ppo_kl": ratio_old_R - current_R,
        "ois": surrogate.ratio_R,
        "log_probs": trainer_R,
        "rollout_log_probs": batch.rollout_R,
        **mismatch(trainer_R, rollout_R=batch.rollout_R),
    }
    metrics = {name: weighted_sum(value_R, weights_R=batch.weight_R) for name, value_R in values.items()}
    for name, log_ratio_R in {
        "ess_ratio": current_R - ratio_old_R,
        "rollout_ess_ratio": current_R - batch.rollout_R,
    }.items():
        ess_S = effective_sample_ratio(
            log_ratio_R, mask_R=batch.mask_R, sample_R=batch.sample_R, num_samples=batch.num_samples
        )
        metrics[name] = ess_S.sum() / batch.num_step_samples
    return metrics
