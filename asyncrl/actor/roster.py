"""Who belongs to a run, how each one stands, and the rule for starting one again. Pure.

    how it ended     finished   signal    failed    final   config
    of our own       expected   restart   restart   fail    fail       (restart: while its budget lasts)
    attached         expected   expected  expected  expected  expected

"final" is a failure that another try would repeat: the trainer's batch has NaN, the prompt file is malformed,
the filters refuse everything. A run that is ending expects every end. Time comes in with every call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from asyncrl.actor.budget import Budget
from asyncrl.actor.health import SUSPECT_HEARTBEATS, Health, State
from asyncrl.actor.waiting import Looks
from asyncrl.errors import ExitCode
from asyncrl.messages.supervision import Exiting


class Ending(StrEnum):
    """How a process ended."""

    FINISHED = "finished"
    """Exit code 0: an actor leaves with it only when the buffer told it that the run is over."""
    SIGNAL = "signal"
    FAILED = "failed"
    FINAL = "final"
    """An error that another try would repeat."""
    CONFIG = "config"


@dataclass(slots=True)
class MemberState:
    """One member."""

    name: str
    role: str
    incarnation: str
    attached: bool = False
    """Came by `asyncrl attach`: not our child, never restarted by us."""
    health: Health = field(default_factory=Health)
    budget: Budget = field(default_factory=Budget)
    """Like `health`, shared by all lives of a name until it is retired."""
    leaving: bool = False
    """Asked to drain or detach."""
    peer: bytes = b""
    pid: int = 0
    host: str = ""
    """Where it says it runs."""
    last_words: str = ""
    final: bool = False
    """Its last words name an error that another try would repeat."""
    said_why: bool = False
    """It has said its last words, so that it may be silent while it cleans up."""
    killed_for: str = ""
    """Why we killed it, in one word; empty when we did not."""
    killed_by_us: bool = False
    """For a reason of our own: its death is neither its own fault nor that of a sample."""
    heard_at: float = 0.0
    """When it was started or heard of last, on the clock of `Roster.silent`."""
    beats: bool = False
    """Whether it has said that it is ready; before that it loads, and may be silent for long."""
    stopped_at: float | None = None
    """When its process, which is still stopped (SIGSTOP), was seen stopped first."""

    @property
    def state(self) -> State:
        """How it stands."""
        return self.health.state

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return self.budget.restarts


class Fate(StrEnum):
    """What follows from the end of a process."""

    EXPECTED = "expected"
    RESTART = "restart"
    FAIL = "fail"


ROLES = ("source", "generator", "reward", "buffer", "trainer")
"""Roles that have a process of their own (the evaluator shares the source's)."""
_POLICY = {
    Ending.FINISHED: Fate.EXPECTED,
    Ending.SIGNAL: Fate.RESTART,
    Ending.FAILED: Fate.RESTART,
    Ending.FINAL: Fate.FAIL,
    Ending.CONFIG: Fate.FAIL,
}
POLICY = {(role, ending): fate for role in ROLES for ending, fate in _POLICY.items()}
"""What follows when a process of the run's own ends while the run goes on and its restarts last.

Every role is the same: the buffer and the trainer begin again from what is on disk, the others from the
leases and the cursor that the buffer has.
"""


def ending_of(code: int, *, final: bool) -> Ending:
    """How a process with this exit code (negative: a signal) and these last words ended."""
    if code < 0:
        return Ending.SIGNAL
    if code == int(ExitCode.FINISHED):
        return Ending.FINISHED
    if code == int(ExitCode.CONFIG):
        return Ending.CONFIG
    return Ending.FINAL if final else Ending.FAILED


@dataclass
class Roster:
    """All members, past ones included (a name is used again by its restart)."""

    max_restarts: int
    restart_window_s: float = float("inf")
    """A life that was healthy for so long starts its name's count of restarts anew."""
    members: dict[str, MemberState] = field(default_factory=dict)
    ending: bool = False
    """The run is finishing, draining or failing: an end is what we want."""
    _looks: Looks = field(default_factory=Looks)

    def join(
        self, name: str, role: str, incarnation: str, *, attached: bool = False, now: float = 0.0
    ) -> MemberState:
        """A process was started (again), or attached."""
        member = MemberState(name, role, incarnation, attached, Health(now), heard_at=now)
        known = self.members.get(name)
        if known is not None and known.state is State.RESTARTING:
            member.health, member.budget = known.health, known.budget
            member.health.begin(now)
        self.members[name] = member
        return member

    def said_why(self, peer: bytes, message: Exiting) -> MemberState | None:
        """Keep a member's last words; None where they are not from its own connection."""
        member = self.members.get(message.name)
        if member is None or member.peer != peer:
            return None
        member.last_words, member.final, member.said_why = message.message, message.final, True
        return member

    def heard(self, name: str, now: float, *, ready: bool = True) -> None:
        """It reported, and whether it is ready for work."""
        member = self.members.get(name)
        if member is not None:
            member.heard_at, member.beats = now, ready

    def silent(
        self, now: float, *, every_s: float, heartbeat_s: float, dead_after_s: float, start_s: float,
        stopped: Collection[str] = (),
    ) -> list[tuple[MemberState, float]]:  # fmt: skip
        """Processes of our own that are dead from now on, with how long they have been silent.

        Whoever missed `SUSPECT_HEARTBEATS` becomes a suspect before. A supervisor that stood still itself
        charges nobody for it: see `Looks`.

        Args:
            now: the present time.
            every_s: how often this is called when nothing is wrong.
            heartbeat_s: how often members report.
            dead_after_s: silence after which one that is ready counts as dead.
            start_s: how long one may be silent before that: loading may keep it from everything else.
            stopped: names of those whose process is stopped; nobody loads that way.
        """
        self._looks.look(now, every_s=every_s, limit_s=dead_after_s)
        found = []
        for member in self.present():
            member.heard_at = self._looks.since(member.heard_at)
            silence = now - member.heard_at
            reports = member.beats and not member.said_why
            if member.name not in stopped or reports:
                member.stopped_at = None  # who reports is missed when it is silent
            elif member.stopped_at is None:
                member.stopped_at = now
            else:
                member.stopped_at = self._looks.since(member.stopped_at)
            if not member.health.alive:
                continue
            if reports:
                member.health.silent(now, seconds=silence, suspect_after_s=SUSPECT_HEARTBEATS * heartbeat_s)
            stopped_s = now - member.stopped_at if member.stopped_at is not None else 0.0
            due = stopped_s > dead_after_s or silence > (dead_after_s if reports else start_s)
            if due and not member.attached:
                member.health.died(now)
                found.append((member, silence))
        return found

    def free_name(self, base: str) -> str:
        """A name nobody has: BASE-0, BASE-1, ..."""
        number = 0
        while f"{base}-{number}" in self.members:
            number += 1
        return f"{base}-{number}"

    def present(self, *, own: bool = False) -> Iterator[MemberState]:
        """Members that are not retired; `own` leaves out attached ones."""
        return (m for m in self.members.values() if m.state is not State.RETIRED and not (own and m.attached))

    def ended(self, member: MemberState, code: int, *, now: float = 0.0) -> Fate:
        """What the end of a process means; marks it restarting or retired."""
        health, budget = member.health, member.budget
        if self.ending or member.leaving or member.attached:
            health.retire(now)
            return Fate.EXPECTED
        fate = POLICY[member.role, ending_of(code, final=member.final)]
        if fate is Fate.EXPECTED:
            health.retire(now)
            return fate
        well_s = now - health.proven_at if health.proven_at is not None else 0.0
        health.died(now)
        budget.deaths[member.killed_for or (f"signal {-code}" if code < 0 else f"exit code {code}")] += 1
        if fate is Fate.RESTART and not budget.grant(
            member.incarnation,
            max_restarts=self.max_restarts,
            well_s=well_s,
            window_s=self.restart_window_s,
            ours=member.killed_by_us,
        ):
            fate = Fate.FAIL
        if fate is Fate.RESTART:
            health.restart(now)
        else:
            health.retire(now)
        return fate

    def acquit(self, incarnations: Collection[str]) -> list[MemberState]:
        """These deaths were a sample's doing: they count against nobody. Returns whose they were."""
        return [
            member
            for member in self.members.values()
            if [known for known in incarnations if member.budget.acquit(known)]
        ]

    def spent(self, member: MemberState) -> str:
        """What a story ends with when no restart is left; empty when there never was one to give."""
        charged = len(member.budget.charged)
        if not charged or charged < self.max_restarts:
            return ""
        return f" (restarted {charged} times before; run.max_restarts = {self.max_restarts})"


def story(member: MemberState, code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        how = f"was killed by signal {-code}"
    else:
        how = f"ended with exit code {code}"
    return f"{member.name} {how}" + (f": {member.last_words}" if member.last_words else "")
