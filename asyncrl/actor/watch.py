"""The supervisor's eye on its members: what they reported last, who is a suspect, who is dead or too slow.

    reports -> health of each -> shown with it          look: silences, slowness -> kill (reaped elsewhere)

It owns no process and no link: it asks `kill` to end one, and what follows from that end is decided once it
has been reaped. Every change of anybody's health is logged, shown and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from structlog.stdlib import BoundLogger

from asyncrl.actor.health import State
from asyncrl.actor.roster import MemberState, Roster
from asyncrl.actor.slowness import Culling, Paces
from asyncrl.obs.view import MemberUpdate, NoteUpdate, Update
from asyncrl.obs.vitals import is_stopped
from asyncrl.topology.schema import RunConfig

START_DEADLINE_S = 120.0
"""How long a process may be silent until it is ready: importing torch on a cold disk is slow."""
LOOK_S = 0.5
"""How often the supervisor looks at stalls, silences and deadlines."""


class Watch:
    """See the module's docstring."""

    def __init__(
        self,
        run: RunConfig,
        *,
        roster: Roster,
        kill: Callable[[str], bool],
        show: Callable[[Update], None],
        log: BoundLogger,
        record: Callable[[dict[str, float]], object],
    ) -> None:
        """`kill` ends a process of ours by name and says whether there was one.

        `show` is for people, `record` for metrics.
        """
        self.reports: dict[str, MemberUpdate] = {}
        """What each member said of itself last."""
        self._run = run
        self._roster = roster
        self._kill = kill
        self._show = show
        self._log = log
        self._record = record
        self._paces = Paces()
        self._culling = Culling(
            after_s=run.slow_after_s, share=run.max_slow_kills, window_s=run.restart_window_s
        )
        self._known: dict[str, State] = {}
        self._spared = ""

    def heard(self, update: MemberUpdate, now: float) -> None:
        """A member reported."""
        member = self._roster.members[update.name]
        doubts = self._paces.report(update, now)
        # Only generators serve weights; a version without the digest they checked is none.
        serves = update.version is not None and update.version >= 0 and bool(update.digest)
        verified = serves if member.role == "generator" else update.ready
        member.health.report(now, verified=verified, doubts=doubts)
        self._keep(member, update)
        if self._noticed(member):
            self._count()

    def gone(self, member: MemberState) -> None:
        """Its process has ended; the roster knows already what follows."""
        self._paces.forget(member.name)
        report = self.reports.get(member.name)
        if report is not None:
            state = "dead" if member.state is State.RESTARTING else "left"
            self._keep(member, msgspec.structs.replace(report, state=state))
        self._noticed(member)
        self._count()

    def look(self, now: float) -> None:
        """Kill what counts as dead, and what has been slow for too long."""
        limit = self._run.dead_after_s
        silent = self._roster.silent(
            now,
            every_s=LOOK_S,
            heartbeat_s=self._run.heartbeat_s,
            dead_after_s=limit,
            start_s=START_DEADLINE_S,
            stopped={m.name for m in self._roster.present(own=True) if m.pid and is_stopped(m.pid)},
        )
        for member, silence in silent:
            if self._kill(member.name):
                member.killed_for = "silence"
                how = ", stopped by a signal" if member.stopped_at is not None else ""
                member.last_words = f"silent for {silence:.1f} s{how} (run.dead_after_s = {limit:g})"
        self._cull(now)
        changed = [member for member in self._roster.members.values() if self._noticed(member)]
        if changed:
            self._count()

    def _cull(self, now: float) -> None:
        generators = [m for m in self._roster.present() if m.role == "generator"]
        slow = {m.name: m.health.slow_since for m in generators if m.health.slow_since is not None}
        own = {m.name for m in generators if not m.attached and not m.leaving}
        due, spared = self._culling.choose(slow, own=own, num_generators=len(generators), now=now)
        if spared and not self._spared:
            self._log.warning(spared)
            self._show(NoteUpdate(text=spared))
        self._spared = spared
        for name in due:
            member = self._roster.members[name]
            words = f"{member.health.why} (run.slow_after_s = {self._run.slow_after_s:g})"
            if self._kill(name):
                member.killed_for, member.killed_by_us, member.last_words = "slowness", True, words
                member.health.died(now)

    def _keep(self, member: MemberState, report: MemberUpdate) -> None:
        self.reports[member.name] = report = msgspec.structs.replace(report, health=str(member.state))
        self._show(report)

    def _noticed(self, member: MemberState) -> bool:
        """Tell how one stands if that has changed since the last time; whether it has."""
        before, state = self._known.get(member.name), member.state
        if before is state:
            return False
        self._known[member.name] = state
        why = member.health.why
        if state is State.SUSPECT:
            self._log.warning("suspect", member=member.name, why=why)
            self._show(NoteUpdate(text=f"{member.name} is suspect: {why}"))
        elif before is not None:
            self._log.info("health", member=member.name, before=str(before), now=str(state))
        report = self.reports.get(member.name)
        if report is not None and report.health != state:
            self._keep(member, report)
        return True

    def _count(self) -> None:
        states = Counter(str(member.state) for member in self._roster.members.values())
        budgets = [member.budget for member in self._roster.members.values()]
        values = {f"fleet/{state}": float(states[state]) for state in State}
        values["fleet/restarts"] = sum(budget.restarts for budget in budgets)
        values["fleet/deaths"] = sum(budget.deaths.total() for budget in budgets)
        self._record(values)

    def describe(self) -> list[dict[str, Any]]:
        """Every member as plain data."""
        return [self._row(member) for member in self._roster.members.values()]

    def _row(self, member: MemberState) -> dict[str, Any]:
        report = self.reports.get(member.name)
        return {
            "name": member.name,
            "role": member.role,
            "state": str(member.state),
            "why": member.health.why,
            "leaving": member.leaving and member.state is not State.RETIRED,
            "pid": member.pid,
            "restarts": member.restarts,
            "deaths": dict(member.budget.deaths),
            "attached": member.attached,
            "report": None if report is None else msgspec.to_builtins(report),
        }

    def in_words(self) -> str:
        """Restarts and deaths of the whole run; empty where there were none."""
        return "; ".join(
            f"{member.name} {member.restarts} restarts ({member.budget.reasons()})"
            for member in self._roster.members.values()
            if member.budget.deaths
        )
