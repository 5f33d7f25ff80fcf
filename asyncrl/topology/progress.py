"""How often a running answer is handed in, so that a generator's death costs one `progress_every_*` at most.

Pure arithmetic on two options; who hands in and who counts what was lost ask here, so that they agree.
"""

from __future__ import annotations

from typing import NamedTuple

from asyncrl.topology.schema import RolloutConfig

UNDER_WAY = 2
"""Hand-ins of one answer that a death may cost: one not yet acknowledged, one in the making."""


class HandIns(NamedTuple):
    """What comes between two hand-ins of one answer, whichever is over first."""

    tokens: int
    seconds: float
    """0: tokens alone decide."""


def hand_ins(rollout: RolloutConfig) -> HandIns:
    """Half of rollout.progress_every_tokens, rounded down, and half of rollout.progress_every_s.

    While one hand-in is not acknowledged, the next is in the making, and a death takes both: only at half of
    the interval are they one interval together, and rounding down keeps them within it. An interval of one
    token has no half, so ranges refuse it.
    """
    return HandIns(
        tokens=rollout.progress_every_tokens // UNDER_WAY, seconds=rollout.progress_every_s / UNDER_WAY
    )
