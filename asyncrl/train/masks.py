"""What the age of tokens does to a batch, and what is reported by it.

Owns the staleness masks and the numbers that need the whole optimizer step or the whole batch at once. Masks
take numerators away; denominators were fixed by the recorded loss mask.

Shape letters: R response tokens of the batch.
"""

# ruff: noqa: N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Any

from asyncrl.algo.importance import importance_weights
from asyncrl.algo.mismatch import kl_by_age, mismatch
from asyncrl.algo.stale import newest_version_mask, stale_mask
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.train.tokens import TokenData


def apply_staleness(
    data: TokenData, *, algorithm: AlgorithmConfig, rollout_step: int, num_steps_per_rollout: int
) -> None:
    """Set `keep_R` by stale, stale_after and mask_offpolicy_in_partial_rollout.

    A token's age is counted in optimizer steps between the weights that sampled it and those that the rollout
    step starts from.
    """
    where: dict[str, Any] = {
        "sample_R": data.sample_R,
        "num_samples": data.num_samples,
        "mask_R": data.mask_R,
    }
    if algorithm.stale != "train" and algorithm.stale_after is not None:
        age_R = (rollout_step - data.version_R) * num_steps_per_rollout
        data.keep_R = stale_mask(age_R, **where, stale=algorithm.stale, stale_after=algorithm.stale_after)
    if algorithm.mask_offpolicy_in_partial_rollout:
        data.keep_R = data.keep_R * newest_version_mask(data.version_R, **where)


def step_normalizer(data: TokenData, *, samples: range, algorithm: AlgorithmConfig) -> float:
    """The mean importance weight of an optimizer step, which tis_batch_normalize divides by; 1 without it."""
    normalises = algorithm.use_tis and algorithm.tis_batch_normalize and data.old_R is not None
    if not normalises or not len(data.rollout_R):
        return 1.0
    assert data.old_R is not None, "the mean weight is known only from the old log-probs"
    inside_R = (data.sample_R >= samples.start) & (data.sample_R < samples.stop)
    found = importance_weights(
        data.old_R,
        rollout_R=data.rollout_R,
        mask_R=data.mask_R * inside_R,
        sample_R=data.sample_R,
        num_samples=data.num_samples,
        level=algorithm.tis_level,
        mode=algorithm.tis_mode,
        upper=algorithm.tis_clip,
        lower=algorithm.tis_clip_low,
        batch_normalize=True,
    )
    return float(found.metrics["mis_batch_norm_factor"][0])


def mismatch_by_age(data: TokenData, *, rollout_step: int) -> dict[str, float]:
    """KL between engine and trainer by the age of tokens, in rollout steps: where a lag starts to hurt."""
    trainer_R = data.current_R if data.old_R is None else data.old_R
    assert trainer_R is not None, "training has seen every token"
    kl_R = mismatch(trainer_R, rollout_R=data.rollout_R)["train_rollout_kl"]
    found = kl_by_age(kl_R, age_R=rollout_step - data.version_R, mask_R=data.mask_R)
    return {
        f"staleness/train_rollout_kl/{bucket}": float(total / count)
        for bucket, (total, count) in found.items()
        if count > 0
    }
