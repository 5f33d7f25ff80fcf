"""The off-policy corrections that are on, applied to the policy loss of a micro-batch.

Owns their order and which log-probs each one sees. A correction multiplies the surrogate by a weight or takes
tokens out of its numerator; it never touches the KL term, the entropy, or a denominator.

Shape letters: R response tokens of a micro-batch, S its samples.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asyncrl.algo.correction import off_policy_sequence_mask, sequence_advantages
from asyncrl.algo.importance import Correction, decoupled_weights, importance_weights, rejection
from asyncrl.algo.segment import weighted_sum
from asyncrl.topology.algorithm import AlgorithmConfig, rejection_bounds
from asyncrl.train.hooks import Corrected, TrainHooks
from asyncrl.train.tokens import TokenData

DETAILS = ("mis_tis_weight", "mis_is_ratio")
"""Metrics of importance weights that are reported with get_mismatch_metrics alone."""


def corrected(
    loss_R: Tensor,
    tokens: TokenData,
    *,
    current_R: Tensor,
    trainer_R: Tensor,
    algorithm: AlgorithmConfig,
    hooks: TrainHooks | None = None,
) -> Corrected:
    """`loss_R` weighted and masked; `trainer_R` are the proximal policy's log-probs, without gradient."""
    keep_R = torch.ones_like(loss_R)
    metrics: dict[str, Tensor] = {}
    if algorithm.use_opsm:
        opsm_R, metrics = _sequence_mask(tokens, current_R, algorithm)
        loss_R, keep_R = loss_R * opsm_R, keep_R * opsm_R
    for correction in _importance(tokens, trainer_R, algorithm):
        loss_R, keep_R = loss_R * correction.weight_R * correction.keep_R, keep_R * correction.keep_R
        metrics |= {
            name: weighted_sum(values_R, weights_R=tokens.weight_R)
            for name, values_R in correction.metrics.items()
            if algorithm.get_mismatch_metrics or not name.startswith(DETAILS)
        }
    if hooks is not None and hooks.custom_tis is not None:
        custom = hooks.correct(loss_R, tokens, trainer_R=trainer_R)
        metrics |= custom.metrics
        # With get_mismatch_metrics alone it is asked for its metrics.
        if algorithm.use_tis:
            loss_R, keep_R = custom.loss_R * custom.keep_R, keep_R * custom.keep_R
    return Corrected(loss_R, keep_R, metrics)


def _importance(tokens: TokenData, trainer_R: Tensor, algorithm: AlgorithmConfig) -> list[Correction]:
    """The weights and rejections that compare the trainer's old log-probs with the engine's."""
    found = []
    where: dict[str, Any] = {
        "rollout_R": tokens.rollout_R,
        "mask_R": tokens.mask_R,
        "sample_R": tokens.sample_R,
        "num_samples": tokens.num_samples,
    }
    if algorithm.use_tis and algorithm.custom_tis_function_path is None:
        weights = importance_weights(
            trainer_R,
            **where,
            level=algorithm.tis_level,
            mode=algorithm.tis_mode,
            upper=algorithm.tis_clip,
            lower=algorithm.tis_clip_low,
        )
        found.append(weights._replace(weight_R=weights.weight_R / tokens.tis_normalizer))
    if algorithm.use_rs:
        lower, upper = rejection_bounds(algorithm)
        found.append(
            rejection(
                trainer_R,
                **where,
                level=algorithm.rs_level,
                upper=upper,
                lower=lower,
                veto=algorithm.rs_veto_threshold,
            )
        )
    if algorithm.use_decoupled_loss:
        cap = algorithm.behave_imp_weight_cap
        found.append(decoupled_weights(trainer_R, rollout_R=tokens.rollout_R, cap=cap))
    return found


def _sequence_mask(
    tokens: TokenData, current_R: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    assert tokens.advantage_R is not None, "advantages are computed before any loss"
    mask = off_policy_sequence_mask(
        current_R,
        rollout_R=tokens.rollout_R,
        mask_R=tokens.mask_R,
        sample_R=tokens.sample_R,
        advantages_S=sequence_advantages(
            tokens.advantage_R,
            mask_R=tokens.mask_R,
            sample_R=tokens.sample_R,
            num_samples=tokens.num_samples,
        ),
        opsm_delta=algorithm.opsm_delta,
        per_token=algorithm.opsm_per_token,
        advantages_R=tokens.advantage_R,
    )
    return mask.keep_R, {
        "opsm_clipfrac": weighted_sum(1 - mask.keep_R, weights_R=tokens.weight_R),
        "opsm_masked_fraction": mask.dropped_S.sum() / tokens.num_step_samples,
    }
