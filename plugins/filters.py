"""Filters to copy. They see scored groups and run where rewards do:

    [rollout]
    dynamic_sampling_filter_path = "plugins.filters:nonzero_std"
    rollout_sample_filter_path = "plugins.filters:drop_truncated"
    buffer_filter_path = "plugins.filters:pop_first"

A refused group is settled as filtered and replaced by a new one.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

MIN_STD = 1e-8
"""Miles' threshold; slime has 1e-6."""


@dataclass(frozen=True)
class FilterOutput:
    """What a dynamic sampling filter may return instead of a bool."""

    keep: bool
    reason: str | None = None


def nonzero_std(args: Any, samples: list[Any], **kwargs: Any) -> FilterOutput:  # noqa: ARG001
    """Keep a group whose rewards differ: without a difference its advantages are all zero (DAPO)."""
    rewards = [float(sample.get_reward_value(args)) for sample in samples]
    if len(rewards) > 1 and statistics.stdev(rewards) > MIN_STD:
        return FilterOutput(keep=True)
    return FilterOutput(keep=False, reason=f"zero_std_{round(rewards[0], 1)}")


def drop_truncated(args: Any, data: list[list[Any]]) -> None:  # noqa: ARG001
    """Keep answers that hit the length limit out of the loss; their rewards still count in the mean."""
    for group in data:
        for sample in group:
            if sample.status == "truncated":
                sample.remove_sample = True


def pop_first(
    args: Any,  # noqa: ARG001
    rollout_id: int | None,  # noqa: ARG001
    buffer: list[list[Any]],
    num_samples: int,
) -> list[list[Any]]:
    """Take the oldest groups. A filter of yours leaves out what it does not want; delete what is taken."""
    taken, buffer[:] = buffer[:num_samples], buffer[num_samples:]
    return taken
