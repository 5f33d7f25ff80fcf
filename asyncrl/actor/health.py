"""How one member of a run stands: a state machine without a clock. Pure: time comes in with every call.

    STALE --verified report--> HEALTHY <--reports well again-- SUSPECT
      |                           |------------doubt------------->|
      +------------+--------------+-------------------------------+
                   v
                 DEAD --> RESTARTING --> STALE              from everywhere: RETIRED, for good

A life begins STALE: it has not shown yet that it can be trusted. It becomes HEALTHY with the first report
that says so: a generator's has to name the version that it serves and the digest that it has checked,
everybody else's only has to come. Nothing leads from DEAD to HEALTHY but a new life and such a report. One
sign of trouble is never enough for a doubt: the thresholds are in `SUSPECT_HEARTBEATS` and in `slowness`.

One object belongs to a name from its first life until it is retired; the next life of a retired name is
another member.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

SUSPECT_HEARTBEATS = 3.0
"""Heartbeats that may stay out before their sender is a suspect."""
WELL_REPORTS = 3
"""Reports in a row without a doubt that make a suspect healthy again."""


class State(StrEnum):
    """How a member stands."""

    STALE = "stale"
    """Started, and not verified yet: it loads, or serves nothing."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Silent for some heartbeats, or slow; see `Doubt`."""
    DEAD = "dead"
    """Ended, or about to be: nothing it says counts any more."""
    RESTARTING = "restarting"
    """Reaped; its next life waits for the back-off."""
    RETIRED = "retired"
    """Left for good."""


_ALIVE = (State.STALE, State.HEALTHY, State.SUSPECT)
NEXT: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.STALE: frozenset({State.HEALTHY, State.DEAD, State.RETIRED}),
        State.HEALTHY: frozenset({State.SUSPECT, State.DEAD, State.RETIRED}),
        State.SUSPECT: frozenset({State.HEALTHY, State.DEAD, State.RETIRED}),
        State.DEAD: frozenset({State.RESTARTING, State.RETIRED}),
        State.RESTARTING: frozenset({State.STALE, State.RETIRED}),
        State.RETIRED: frozenset(),
    }
)
"""The states that may follow each state; there are no others."""


class Doubt(StrEnum):
    """Why a member is a suspect."""

    SILENT = "silent"
    LAGGING = "lagging"
    """Its event loop stands still again and again."""
    SLOW = "slow"
    """It samples far fewer tokens than the other generators."""
    LOADING = "loading"
    """It takes far longer to load a version than the other generators."""


SLOWNESS = frozenset({Doubt.LAGGING, Doubt.SLOW, Doubt.LOADING})
"""Doubts about one that is there, only slow."""


@dataclass(slots=True)
class Health:
    """See the module's docstring. Times are seconds of any one monotonic clock."""

    since: float = 0.0
    """When the present state began."""
    state: State = State.STALE
    doubts: dict[Doubt, str] = field(default_factory=dict)
    """What speaks against a suspect, in words."""
    slow_since: float | None = None
    """Since when a suspect is one for being slow; None for others."""
    proven_at: float | None = None
    """When this life was HEALTHY first; None before that."""
    _well: int = 0

    @property
    def alive(self) -> bool:
        """Whether there is a process of which reports may come."""
        return self.state in _ALIVE

    @property
    def why(self) -> str:
        """What speaks against a suspect, in one line; empty for others."""
        return "; ".join(self.doubts.values())

    def report(self, now: float, *, verified: bool, doubts: Mapping[Doubt, str] | None = None) -> None:
        """It reported. Reports that were under way when it died change nothing.

        Args:
            now: the present time.
            verified: whether it may be trusted: a generator names a version whose digest it has checked.
            doubts: what is wrong by this report and those before it, in words.
        """
        if not self.alive:
            return
        if self.state is State.STALE:
            if verified:
                self._move(State.HEALTHY, now)
                self.proven_at = now
        elif doubts:
            self._suspect(dict(doubts), now)
        elif self.state is State.SUSPECT:
            self._well += 1
            if verified and self._well >= WELL_REPORTS:
                self._move(State.HEALTHY, now)

    def silent(self, now: float, *, seconds: float, suspect_after_s: float) -> None:
        """Nothing was heard of it for so long. Whoever has not shown itself yet may load in peace."""
        if self.state in {State.HEALTHY, State.SUSPECT} and seconds >= suspect_after_s:
            words = f"nothing was heard of it for {seconds:.1f} s"
            self._suspect({**self.doubts, Doubt.SILENT: words}, now)

    def died(self, now: float) -> None:
        """It has ended, or counts as dead and is being killed. Raises ValueError where nobody lives."""
        if self.state is not State.DEAD:
            self._move(State.DEAD, now)

    def restart(self, now: float) -> None:
        """It is to have another life. Raises ValueError unless it is DEAD."""
        self._move(State.RESTARTING, now)

    def begin(self, now: float) -> None:
        """Its next life has been started. Raises ValueError unless it is RESTARTING."""
        self._move(State.STALE, now)
        self.proven_at = None

    def retire(self, now: float) -> None:
        """It is gone for good; more than once is once."""
        if self.state is not State.RETIRED:
            self._move(State.RETIRED, now)

    def _suspect(self, doubts: dict[Doubt, str], now: float) -> None:
        if self.state is not State.SUSPECT:
            self._move(State.SUSPECT, now)
        self.doubts, self._well = doubts, 0
        if self.slow_since is None and SLOWNESS & doubts.keys():
            self.slow_since = now

    def _move(self, to: State, now: float) -> None:
        if to not in NEXT[self.state]:
            allowed = ", ".join(sorted(NEXT[self.state])) or "nothing"
            raise ValueError(f"{self.state} -> {to}; allowed: {allowed}")
        self.state, self.since, self._well = to, now, 0
        self.doubts, self.slow_since = {}, None
