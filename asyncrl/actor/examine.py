"""The doctor's round, at the supervisor: ask every member, look at those that are mute, judge, write down.

An answer has a deadline. Who misses it is looked at from outside: what /proc says of its process, and its
stacks by signal, which come even while its event loop is blocked. Children that run user code are always
looked at like that. Nothing here ends or changes a process: SIGUSR1 goes only to those that answer it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.actor.health import State
from asyncrl.actor.roster import MemberState, Roster
from asyncrl.link import Delivery
from asyncrl.messages.supervision import Alarm, Diagnose, Diagnosis, Reply
from asyncrl.obs.doctor import Report, report_on, save
from asyncrl.obs.stacks import ask, descendants
from asyncrl.obs.view import QueueUpdate, StepUpdate, Update
from asyncrl.obs.vitals import Case, Facts, Member, Process, process_of
from asyncrl.topology.plan import Plan

ANSWER_S = 2.0
"""How long a member may take to answer."""
STACKS_S = 1.0
"""How long processes may take to write their stacks."""
LOOK_S = 5.0
"""How long looking at this host's processes may take altogether."""

_FACTS = msgspec.json.Decoder(Facts)


class Doctor:
    """Keeps what the supervisor hears of members, and examines them when asked to."""

    def __init__(
        self,
        plan: Plan,
        *,
        run_dir: Path,
        roster: Roster,
        send: Callable[[bytes, msgspec.Struct], Awaitable[None]],
        phase: Callable[[], str],
        fail: Callable[[str], None],
    ) -> None:
        """`send` does not mind a peer that is gone; `phase` is the run's, `fail` ends it with a reason."""
        self._plan = plan
        self._run_dir = run_dir
        self._roster = roster
        self._send = send
        self._phase = phase
        self._fail = fail
        self._rounds: set[asyncio.Task[None]] = set()
        self._askers: dict[bytes, None] = {}
        self._number = 0
        self._answers: dict[str, Facts] = {}
        self._answered = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._step = 0
        self._evaluated = 0
        self._stepped = time.monotonic()

    # What it hears.

    def take(self, delivery: Delivery) -> None:
        """A message to the supervisor; some are for the doctor. What it cannot know or read is no answer."""
        match delivery.message:
            case Diagnose():
                if not self._askers:
                    self._aside(self._tell())
                self._askers[delivery.peer] = None
            case Diagnosis() if self._is(delivery):
                self._answer(delivery.message)
            case Alarm() if self._is(delivery):
                self._aside(self._alarmed(delivery.message))

    def _is(self, delivery: Delivery) -> bool:
        """Whether a message comes from the member it names."""
        member = self._roster.members.get(delivery.message.name)
        return member is not None and member.peer == delivery.peer

    def noticed(self, update: Update) -> None:
        """People were shown something; a rollout step is what a run is measured by.

        So are answers that are evaluated: nothing can be trained meanwhile in the beginning and at the end,
        and as each version has so many of them, they excuse nothing for ever.
        """
        if isinstance(update, StepUpdate):
            self._step, self._stepped = update.step, time.monotonic()
        if isinstance(update, QueueUpdate) and update.evaluated > self._evaluated:
            self._evaluated, self._stepped = update.evaluated, time.monotonic()

    @property
    def since_step_s(self) -> float:
        """Seconds since the last rollout step (evaluated group, start). Leases that move are no excuse."""
        return time.monotonic() - self._stepped

    def _answer(self, message: Diagnosis) -> None:
        # An answer to an earlier question comes too late.
        if message.number == self._number:
            # Facts that cannot be read are none: that member is looked at from outside.
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self._answers[message.name] = _FACTS.decode(message.facts)
            self._answered.set()

    # What it does.

    async def verdict(self, why: str) -> str:
        """Examine everybody because of `why`; what to end the run with, the cause first."""
        report = await self.examine()
        where = f"; report: {report.path}" if report.path else ""
        return f"{report.cause} ({why}{where})"

    async def _tell(self) -> None:
        """One round answers everybody who has asked until it begins."""
        async with self._one_at_a_time:
            askers, self._askers = self._askers, {}
            report = await self._round()
        reply = Reply(ok=True, text=report.cause, data=msgspec.json.encode(report))
        for peer in askers:
            await self._send(peer, reply)

    async def _alarmed(self, message: Alarm) -> None:
        self._fail(await self.verdict(f"said by {message.name}"))

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        # Beside the supervisor's reader, through which the answers come.
        task = asyncio.create_task(work)
        self._rounds.add(task)
        task.add_done_callback(self._rounds.discard)

    def close(self) -> None:
        """Give up rounds under way; the run has ended."""
        for task in self._rounds:
            task.cancel()

    async def examine(self) -> Report:
        """Gather everything and judge; written below the run directory. Takes at most some seconds."""
        async with self._one_at_a_time:
            return await self._round()

    async def _round(self) -> Report:
        asked = [m for m in self._roster.present() if m.state is not State.RESTARTING]
        await self._ask([m for m in asked if m.peer])
        members = [self._member(m) for m in self._roster.present()]
        case = self._case(await self._look(members))
        return await asyncio.to_thread(lambda: save(report_on(case), self._run_dir))

    async def _ask(self, members: list[MemberState]) -> None:
        """Everybody at once; returns when all have answered, or at the deadline."""
        self._number += 1
        self._answers = {}
        for member in members:
            await self._send(member.peer, Diagnose(number=self._number))
        names = {member.name for member in members}
        try:
            async with asyncio.timeout(ANSWER_S):
                while not names <= self._answers.keys():
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            return  # who is missing is what we want to know

    def _member(self, member: MemberState) -> Member:
        return Member(
            name=member.name,
            role=member.role,
            state=str(member.state),
            pid=member.pid,
            host=member.host,
            attached=member.attached,
            restarts=member.restarts,
            last_words=member.last_words,
            heard_s=time.monotonic() - member.heard_at if member.beats else None,
            local=member.host in {"", os.uname().nodename},
            asked=bool(member.peer) and member.state is not State.RESTARTING,
            facts=self._answers.get(member.name),
        )

    async def _look(self, members: list[Member]) -> list[Member]:
        try:
            async with asyncio.timeout(LOOK_S):
                return await asyncio.to_thread(look_at, members)
        except TimeoutError:
            return members  # a kernel that does not answer: what the members said has to do

    def _case(self, members: list[Member]) -> Case:
        topology = self._plan.topology
        return Case(
            run=str(self._run_dir),
            at=time.time(),
            phase=self._phase(),
            step=self._step,
            since_step_s=self.since_step_s,
            stall_s=topology.run.stall_s,
            reward_timeout_s=max((table.timeout_s for table in topology.reward), default=0.0),
            members=members,
        )


def look_at(members: Iterable[Member]) -> list[Member]:
    """Add what this host's kernel says of members and their children, and stacks by signal. Blocks.

    Members of this very process (an in-process run) and of other hosts are left as they are.
    """
    members = list(members)
    here = [m for m in members if m.local and m.pid not in {0, os.getpid()}]
    # The number of a process that is gone may be somebody else's by now.
    own = {m.name: m.pid for m in here if m.state != State.RESTARTING}
    below = {name: descendants(pid) for name, pid in own.items()}
    silent = {own[m.name] for m in members if m.name in own and m.facts is None}
    stacks = ask(silent | {pid for pids in below.values() for pid in pids}, deadline_s=STACKS_S)

    def process(pid: int) -> Process:
        return process_of(pid, stacks=stacks.get(pid))

    return [
        msgspec.structs.replace(
            member,
            process=process(own[member.name]),
            children=[process(pid) for pid in below[member.name]],
        )
        if member.name in own
        else member
        for member in members
    ]
