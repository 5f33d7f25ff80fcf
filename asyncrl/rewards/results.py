"""Results of a reward worker as it tells them to the buffer. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asyncrl.messages import control
from asyncrl.messages.control import Lease, Scored, Scores
from asyncrl.messages.sample import Sample, Score
from asyncrl.rewards.base import RewardFailure, Verdict


def scores_of(
    fence: int, samples: Sequence[Sample], results: Sequence[Score | RewardFailure]
) -> tuple[Scores, list[bytes]]:
    """The message about a lease's samples with its bodies: each score encoded, nothing for a failure."""
    scores = [_scored(fence, *pair) for pair in zip(samples, results, strict=True)]
    frames = [msgspec.msgpack.encode(r) if isinstance(r, Score) else b"" for r in results]
    return Scores(scores=scores), frames


def _scored(fence: int, sample: Sample, result: Score | RewardFailure) -> Scored:
    if isinstance(result, RewardFailure):
        error = f"{result.kind}: {result.message}"
        return Scored(fence=fence, group_id=sample.group_id, index=sample.index, error=error)
    return Scored(
        fence=fence,
        group_id=sample.group_id,
        index=sample.index,
        reward=result.reward,
        remove_sample=result.remove_sample,
    )


def verdict_of(lease: Lease, samples: Sequence[Sample], verdict: Verdict | RewardFailure) -> control.Verdict:
    """The message about a complete group; a filter that failed does not keep it."""
    group_id = lease.parts.group_id
    if isinstance(verdict, RewardFailure):
        return control.Verdict(fence=lease.fence, group_id=group_id, keep=False, error=verdict.message)
    return control.Verdict(
        fence=lease.fence,
        group_id=group_id,
        keep=verdict.keep,
        reason=verdict.reason,
        removed=[samples[position].index for position in verdict.removed],
    )
