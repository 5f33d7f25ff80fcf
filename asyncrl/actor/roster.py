"""Who belongs to a run, how each one stands, and the rule for starting one again. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from asyncrl.errors import ExitCode

RESTARTABLE = ("generator", "reward", "source")
"""Roles whose death costs only their current work."""
FIRST_BACKOFF_S = 0.2


class State(StrEnum):
    """How a member stands with the supervisor."""

    STARTING = "starting"
    RUNNING = "running"
    LEAVING = "leaving"
    """Asked to drain or detach."""
    RESTARTING = "restarting"
    GONE = "gone"


@dataclass(slots=True)
class MemberState:
    """One member."""

    name: str
    role: str
    incarnation: str
    attached: bool = False
    """Came by `asyncrl attach`: not our child, never restarted by us."""
    state: State = State.STARTING
    peer: bytes = b""
    pid: int = 0
    host: str = ""
    """Where it says it runs."""
    restarts: int = 0
    last_words: str = ""
    killed_by_us: bool = False


class Fate(StrEnum):
    """What follows from the end of a process."""

    EXPECTED = "expected"
    RESTART = "restart"
    FAIL = "fail"


@dataclass
class Roster:
    """All members, past ones included (a name is used again by its restart)."""

    max_restarts: int
    members: dict[str, MemberState] = field(default_factory=dict)
    ending: bool = False
    """The run is finishing, draining or failing: an end is what we want."""

    def join(self, name: str, role: str, incarnation: str, *, attached: bool = False) -> MemberState:
        """A process was started (again), or attached."""
        known = self.members.get(name)
        member = MemberState(name, role, incarnation, attached, restarts=known.restarts if known else 0)
        self.members[name] = member
        return member

    def free_name(self, base: str) -> str:
        """A name nobody has: BASE-0, BASE-1, ..."""
        number = 0
        while f"{base}-{number}" in self.members:
            number += 1
        return f"{base}-{number}"

    def present(self, *, own: bool = False) -> Iterator[MemberState]:
        """Members that are not gone; `own` leaves out attached ones."""
        return (m for m in self.members.values() if m.state is not State.GONE and not (own and m.attached))

    def ended(self, member: MemberState, code: int) -> Fate:
        """What the end of a process means; marks it gone or restarting."""
        leaving = member.state is State.LEAVING
        member.state = State.GONE
        # An actor leaves with 0 only when the buffer told it that the run is over.
        if self.ending or leaving or member.attached or code == int(ExitCode.FINISHED):
            return Fate.EXPECTED
        hopeless = code == int(ExitCode.CONFIG)
        by_signal = code < 0
        restartable = member.role in RESTARTABLE or (member.role == "trainer" and by_signal)
        if not restartable or (hopeless and not by_signal) or member.restarts >= self.max_restarts:
            return Fate.FAIL
        member.state = State.RESTARTING
        member.restarts += 1
        return Fate.RESTART

    def spent(self, member: MemberState) -> str:
        """What a story ends with when no restart is left; empty when there never was one to give."""
        if not member.restarts or member.restarts < self.max_restarts:
            return ""
        return f" (restarted {member.restarts} times before; run.max_restarts = {self.max_restarts})"

    def backoff_s(self, member: MemberState) -> float:
        """How long to wait before this restart; doubles with each."""
        return float(FIRST_BACKOFF_S * 2 ** (member.restarts - 1))


def story(member: MemberState, code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        how = f"was killed by signal {-code}"
    else:
        how = f"ended with exit code {code}"
    return f"{member.name} {how}" + (f": {member.last_words}" if member.last_words else "")
