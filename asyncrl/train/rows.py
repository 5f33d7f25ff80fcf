"""Samples decoded for training, and what is known of a batch before any forward pass.

Owns the checks a sample must pass to be trained, and the rollout/... and staleness/... metrics. No torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from asyncrl.errors import DataError
from asyncrl.messages.routing import routing_of
from asyncrl.messages.sample import Sample, Status, logprobs_of, mask_of, tokens_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample, decoded and checked."""

    name: str
    """group.index, for errors."""
    prompt: np.ndarray[Any, Any]
    response: np.ndarray[Any, Any]
    logprobs: np.ndarray[Any, Any]
    mask: np.ndarray[Any, Any]
    """uint8; all 0 when the sample is removed from the loss."""
    versions: np.ndarray[Any, Any]
    """int64, the version that sampled each response token."""
    reward: float
    group_id: int
    truncated: bool
    sample_index: int = 0
    """Its ordinal in the run where the group's size is known, else its position in the group."""
    teacher_logprobs: np.ndarray[Any, Any] | None = None
    """float32, the teacher's log-prob of each response token, where its score has them."""
    routed_experts: np.ndarray[Any, Any] | None = None
    """int16 [P + R - 1, L, K], the engine's experts; None where nobody recorded them."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.prompt) + len(self.response)

    def defect(self) -> str | None:
        """The sample's name with what is NaN or infinite in what was recorded; None when all is finite."""
        if not math.isfinite(self.reward):
            return f"{self.name} (reward {self.reward})"
        if not np.isfinite(self.logprobs[self.mask > 0]).all():
            return f"{self.name} (log-probs of the engine)"
        return None

    def with_reward(self, reward: float) -> Row:
        """The same sample with another raw reward."""
        return replace(self, reward=reward)


def decode(sample: Sample, *, group_size: int = 0) -> Row:
    """The sample's arrays, checked. Raises DataError naming the sample."""
    name = f"{sample.group_id}.{sample.index}"
    response, logprobs = tokens_of(sample.tokens), logprobs_of(sample.logprobs)
    mask = mask_of(sample.loss_mask)
    lengths = (len(response), len(logprobs), len(mask), sum(span.num_tokens for span in sample.spans))
    if len(set(lengths)) != 1:
        raise DataError(
            "sample {}: {} response tokens, {} log-probs, {} loss-mask entries, {} tokens in spans; all four "
            "must be equal (a custom generate function must fill all of them)".format(name, *lengths)
        )
    if sample.score is None:
        raise DataError(f"sample {name}: has no score; only scored samples can be trained")
    if not sample.prompt.tokens:
        raise DataError(f"sample {name}: has no prompt tokens; the first response token needs a context")
    return Row(
        name=name,
        prompt=tokens_of(sample.prompt.tokens),
        response=response,
        logprobs=logprobs,
        mask=np.zeros_like(mask) if sample.score.remove_sample else mask,
        versions=np.repeat(
            np.array([span.version for span in sample.spans], dtype=np.int64),
            np.array([span.num_tokens for span in sample.spans], dtype=np.int64),
        ),
        reward=sample.score.reward,
        group_id=sample.group_id,
        truncated=sample.status is Status.TRUNCATED,
        sample_index=sample.group_id * group_size + sample.index,
        teacher_logprobs=_teacher(sample, name=name),
        routed_experts=routing_of(sample),
    )


def _teacher(sample: Sample, *, name: str) -> np.ndarray[Any, Any] | None:
    assert sample.score is not None, "only scored samples get here"
    if not sample.score.teacher_logprobs and sample.num_tokens:
        return None
    teacher = logprobs_of(sample.score.teacher_logprobs)
    if len(teacher) != sample.num_tokens:
        raise DataError(
            f"sample {name}: {len(teacher)} teacher log-probs for {sample.num_tokens} response tokens; the "
            "reward must give one per token"
        )
    return teacher


def require_teacher(rows: Sequence[Row]) -> None:
    """Raise DataError naming the first sample without teacher log-probs."""
    without = [row.name for row in rows if row.teacher_logprobs is None]
    if without:
        raise DataError(
            f"sample {without[0]}: has no teacher log-probs, like {len(without)} of {len(rows)} samples of "
            'the batch; algorithm.opd_type = "engine" distils from them: set teacher_url in every [[reward]] '
            "table, or let your reward function set sample.teacher_log_probs"
        )


def data_metrics(rows: list[Row], rewards: list[float]) -> dict[str, float]:
    """The rollout/... metrics of slime and Miles that need no forward pass; `rewards` after normalisation."""
    lengths = [len(row.response) for row in rows]
    groups: dict[int, list[float]] = {}
    for row in rows:
        groups.setdefault(row.group_id, []).append(row.reward)
    equal = [values[0] for values in groups.values() if min(values) == max(values)]
    versions = [row.versions for row in rows if len(row.versions)]
    return {
        "rollout/raw_reward": statistics.fmean(row.reward for row in rows),
        "rollout/rewards": statistics.fmean(rewards),
        "rollout/response_len/mean": statistics.fmean(lengths),
        "rollout/response_len/median": float(statistics.median(lengths)),
        "rollout/response_len/max": float(max(lengths)),
        "rollout/response_len/min": float(min(lengths)),
        "rollout/truncated_ratio": statistics.fmean(row.truncated for row in rows),
        "rollout/zero_std/ratio": len(equal) / len(groups),
        **{f"rollout/zero_std/count_{value:g}": float(equal.count(value)) for value in sorted(set(equal))},
        "rollout/num_samples": float(len(rows)),
        "rollout/num_tokens": float(sum(lengths)),
        "rollout/weight_version/mean": float(np.concatenate(versions).mean()) if versions else 0.0,
        "rollout/weight_version/mixed_version_ratio": statistics.fmean(
            len(row.versions) > 0 and int(row.versions.min()) != int(row.versions.max()) for row in rows
        ),
    }


def staleness_metrics(rows: Sequence[Row], *, rollout_step: int) -> dict[str, float]:
    """Ages of the batch's tokens in rollout steps (rollout_step - version of the span).

    `mean` over samples of their tokens' mean age, `max` and `min` over all tokens, `oldest_token` mean over
    samples of their oldest token's age, `by_length/A-B` as `mean` for responses of A to B tokens.
    """
    ages = [(rollout_step - row.versions, len(row.versions)) for row in rows if len(row.versions)]
    if not ages:
        return {}
    means = [(float(age.mean()), num_tokens) for age, num_tokens in ages]
    bands: dict[str, list[float]] = {}
    for mean, num_tokens in means:
        low = 1 << (num_tokens.bit_length() - 1)
        bands.setdefault(f"{low}-{2 * low - 1}", []).append(mean)
    return {
        "staleness/mean": statistics.fmean(mean for mean, _ in means),
        "staleness/max": float(max(age.max() for age, _ in ages)),
        "staleness/min": float(min(age.min() for age, _ in ages)),
        "staleness/oldest_token": statistics.fmean(float(age.max()) for age, _ in ages),
        "staleness/mixed_version_ratio": statistics.fmean(bool(age.max() != age.min()) for age, _ in ages),
        **{f"staleness/by_length/{band}": statistics.fmean(values) for band, values in bands.items()},
    }
