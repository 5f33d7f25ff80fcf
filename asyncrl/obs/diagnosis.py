"""Which part of a run holds the others up, in one sentence an operator can act on. A pure function."""

from __future__ import annotations

import msgspec

BATCH_WAITS = ("batch",)
"""Waits of a trainer that mean: nothing to train on."""
WORK_WAITS = ("lease", "work")
"""Waits of a generator that mean: nothing to generate."""
NOTICEABLE = 0.10
"""A share of waiting below this is noise."""
SATURATED = 0.85
"""A worker that is busy for this share has no room left."""


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """Recent shares of wall time, 0 to 1; None where nobody has reported yet."""

    trainer_wait: float | None = None
    """The trainer waits for a batch."""
    trainer_other: tuple[str, float] | None = None
    """The largest other wait of the trainer, by name."""
    generator_wait: float | None = None
    """Generators wait for work, mean."""
    reward_busy: float | None = None
    """Reward workers are busy, mean."""
    tickets_free: int = 0
    """Groups that could still be issued."""
    waiting_for_score: int = 0
    """Finished samples that no reward worker has taken."""
    max_staleness: int | None = None


def bottleneck(shares: Shares) -> str:
    """The sentence. It names the slow part, the measured share, and, where it is ours to say, the knob."""
    trainer, generators = shares.trainer_wait, shares.generator_wait
    if trainer is None:
        return "measuring who waits for whom"
    name, other = shares.trainer_other or ("", 0.0)
    if other >= NOTICEABLE and other > trainer:
        return f"{name} is the bottleneck: the trainer waits {other:.0%} of the time for it"
    if trainer >= NOTICEABLE:
        return _starved(trainer, generators or 0.0, shares)
    if generators is not None and generators >= NOTICEABLE:
        return f"training is the bottleneck: generators wait {generators:.0%} of the time for work"
    return "balanced: neither training nor generation waits"


def _starved(trainer: float, generators: float, shares: Shares) -> str:
    waits = f"the trainer waits {trainer:.0%} of the time for a batch"
    scoring_full = shares.reward_busy is not None and shares.reward_busy >= SATURATED
    if scoring_full and shares.waiting_for_score > 0:
        return f"scoring is the bottleneck: {waits}, {shares.waiting_for_score} samples wait for a reward"
    if generators < NOTICEABLE:
        return f"generation is the bottleneck: {waits}"
    both = f"trainer ({trainer:.0%}) and generators ({generators:.0%})"
    if shares.tickets_free <= 0 and shares.max_staleness is not None:
        return f"max_staleness = {shares.max_staleness} is the bottleneck: {both} wait for each other"
    return f"the supply of work is the bottleneck: {both} wait, and tickets are free"
