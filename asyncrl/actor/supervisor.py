"""The supervisor: starts the processes of a plan, hears from them, restarts some, ends the run.

    buffer first (its address is what everybody needs) -> the others -> running -> finished | drained | failed

It owns the control link: hello, telemetry, attach, detach, status; what is for the doctor goes to `examine`.
It never sees a sample. A SIGINT drains, a second one stops at once; both come in through `drain` and `stop`.
A process that ends is reaped before its successor starts, and one that falls silent is killed first: there
are never two lives of one name.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from asyncrl.actor.base import SCHEMA
from asyncrl.actor.children import Children
from asyncrl.actor.examine import Doctor
from asyncrl.actor.launchers import Launcher
from asyncrl.actor.reception import ATTACHABLE, attach, crowded, detach, updates_of
from asyncrl.actor.roster import Fate, MemberState, Roster
from asyncrl.actor.watch import LOOK_S, START_DEADLINE_S, Watch
from asyncrl.chaos import begin_life, tapped_server
from asyncrl.errors import ExitCode, ProtocolError
from asyncrl.link import Complaints, Delivery, Hub, Key, PeerGone, ServerLink, bind, complain
from asyncrl.messages.control import PROTOCOL, Alive, Hello, MemberLost, Refused
from asyncrl.messages.supervision import (
    Acquitted,
    AttachRequest,
    DetachRequest,
    Drain,
    Exiting,
    Reply,
    StatusRequest,
    Stop,
    Telemetry,
    ToSupervisor,
)
from asyncrl.obs.metrics import MetricsWriter
from asyncrl.obs.view import MemberUpdate, NoteUpdate, PhaseUpdate, StepUpdate, Update
from asyncrl.topology.plan import Plan, ProcessPlan

DRAIN_DEADLINE_S = 120.0
"""How long a drain may take: a rollout step and a checkpoint."""
FINISH_DEADLINE_S = 30.0
"""How long actors may take to leave once the run has finished, and then again once they were told to stop."""


class Supervisor:
    """See the module's docstring."""

    def __init__(
        self,
        plan: Plan,
        *,
        launcher: Launcher,
        run_dir: Path,
        address: str,
        key: Key | None = None,
        hub: Hub | None = None,
        resumed: bool = False,
        show: Callable[[Update], None] = lambda _: None,
        on_address: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        """`show` gets every update for people; `on_address` the addresses once they are known."""
        self.plan = plan
        run = plan.topology.run
        self.roster = Roster(max_restarts=run.max_restarts, restart_window_s=run.restart_window_s)
        self.children = Children(launcher, self.roster, on_end=self._ended)
        self.run_dir = run_dir
        self.resumed = resumed
        self.failure = ""
        self.phase = "starting"
        self.log = structlog.stdlib.get_logger().bind(actor="supervisor")
        self._show_update = show
        self._on_address = on_address
        self._memory = hub is not None
        self._address = address
        self._key, self._hub = key, hub
        self._link: ServerLink | None = None
        self._complain = functools.partial(complain, Complaints(), self.log)
        self._buffer = ""
        self._buffer_known = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._deadline = float("inf")
        """Until when everybody has to have left, once the run drains or has finished."""
        self._over = asyncio.Event()
        self.doctor = Doctor(
            plan,
            run_dir=run_dir,
            roster=self.roster,
            send=self._send,
            phase=lambda: self.phase,
            fail=self._fail,
        )
        self._metrics: MetricsWriter | None = None
        self.watch = Watch(
            run,
            roster=self.roster,
            kill=self.children.kill,
            show=show,
            log=self.log,
            record=lambda row: self._metrics and self._metrics.write(row),
        )

    async def run(self) -> ExitCode:
        """Start everything and see it through."""
        self._metrics = MetricsWriter(self.run_dir / "metrics" / "supervisor.jsonl")
        life = begin_life("supervisor", plan=self.plan, run_dir=self.run_dir, in_process=self._memory)
        link = bind(
            self._address, receives=ToSupervisor, security=self._key, hub=self._hub,
            on_malformed=functools.partial(self._complain, "malformed"),
        )  # fmt: skip
        self._link = tapped_server(link, life)
        self._on_address(self._link.address, "")
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                running = [tasks.create_task(self._read()), tasks.create_task(self._watch())]
                await self._start_all()
                await self._over.wait()
                await self._finish()
                for task in running:
                    task.cancel()
        finally:
            self.children.kill_all()
            self.doctor.close()
            self._metrics.close()
            await self._link.close(linger_s=0.2)
        return self.exit_code

    @property
    def exit_code(self) -> ExitCode:
        """What the end was."""
        if self.failure:
            return ExitCode.FAILED
        return ExitCode.FINISHED if self.phase == "finished" else ExitCode.DRAINED

    async def _start_all(self) -> None:
        first, *rest = self.plan.processes
        assert first.role == "buffer", "its address is what the others need"
        await self._start(first)
        events = [asyncio.ensure_future(event.wait()) for event in (self._buffer_known, self._over)]
        done, pending = await asyncio.wait(
            events, timeout=START_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if not done:
            self._fail(f"the buffer did not start within {START_DEADLINE_S:.0f} s; see its log")
        if self._over.is_set():
            return
        for process in rest:
            await self._start(process)

    async def _start(self, process: ProcessPlan) -> None:
        assert self._link is not None
        assert self._tasks is not None
        listen = self._buffer
        if process.role == "buffer":
            listen = self._buffer or self._buffer_address()
        await self.children.start(
            process, self._tasks, control=self._link.address, buffer=listen, resumed=self.resumed
        )

    def _buffer_address(self) -> str:
        if self._memory:
            return "memory://buffer"
        if self.plan.topology.run.buffer_address:
            return self.plan.topology.run.buffer_address
        return self._address.rpartition(":")[0] + ":0"

    async def _ended(self, process: ProcessPlan, member: MemberState, code: int) -> None:
        """A process ended: what follows is the roster's to say."""
        fate = self.roster.ended(member, code, now=time.monotonic())
        text = self.children.story(member, code)
        self.watch.gone(member)
        if fate is Fate.EXPECTED:
            if member.last_words and code not in {0, int(ExitCode.DRAINED)}:
                self.log.warning("ended badly", member=member.name, code=code, message=member.last_words)
            self._maybe_over()
            return
        self._show_update(NoteUpdate(text=text))
        self.log.warning("died", member=member.name, code=code, fate=str(fate), message=member.last_words)
        if fate is Fate.FAIL:
            self._fail(text + self.roster.spent(member))
            return
        await self._to_buffer(
            MemberLost(
                name=member.name, incarnation=member.incarnation, reason=text, ours=member.killed_by_us
            )
        )
        await asyncio.sleep(member.budget.backoff_s(member.name))
        if not self.roster.ending:
            await self._start(process)
            return
        member.health.retire(time.monotonic())
        self._maybe_over()

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self.roster.ending = True
        self._enter("failed")
        self._over.set()

    def _maybe_over(self) -> None:
        """The run has finished or drained once everybody but the buffer has left, or the buffer has."""
        roles = {m.role for m in self.roster.present(own=True)}
        if self.roster.ending and (roles <= {"buffer"} or "buffer" not in roles):
            self._over.set()

    async def _finish(self) -> None:
        """The last to leave are the buffer and, after a failure, everybody."""
        for member in list(self.roster.present()):
            if member.peer and (not member.attached or self.failure):
                await self._send(member.peer, Stop())
        await self.children.wait_all(FINISH_DEADLINE_S if not self.failure else 5.0)
        self.children.kill_all()

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._show_update(PhaseUpdate(phase=phase))

    # What people and processes ask for.

    async def drain(self) -> None:
        """Ctrl-C: everybody finishes or hands back; the run can be resumed."""
        if self.roster.ending:
            return
        self.roster.ending = True
        self._enter("draining")
        for member in list(self.roster.present()):
            if member.peer:
                await self._send(member.peer, Drain(reason="asked to"))
        self._deadline = time.monotonic() + DRAIN_DEADLINE_S

    def stop(self) -> None:
        """The second Ctrl-C: everybody stops at once; what was acknowledged is safe."""
        self.roster.ending = True
        self.children.kill_all()
        self._over.set()

    async def _watch(self) -> None:
        """produces: a named failure when nothing moves, ends of the silent    waits for: the clock"""
        stall_s = self.plan.topology.run.stall_s
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            self.watch.look(now)
            if self.phase in {"training", "starting"} and self.doctor.since_step_s > stall_s:
                reason = await self.doctor.verdict(f"no rollout step for {stall_s:g} s (run.stall_s)")
                # It may have moved, or ended, meanwhile.
                if self.doctor.since_step_s > stall_s and not self._over.is_set():
                    self._fail(reason)
            if now > self._deadline and self.phase == "draining":
                waiting = ", ".join(m.name for m in self.roster.present(own=True))
                why = f"the drain took more than {DRAIN_DEADLINE_S:.0f} s; still here: {waiting}"
                self._fail(await self.doctor.verdict(why))
            elif now > self._deadline:
                self._over.set()

    async def _read(self) -> None:
        """consumes: what actors and commands say    waits for: them"""
        assert self._link is not None
        while True:
            await self._take(await self._link.recv())

    async def _take(self, delivery: Delivery) -> None:
        self.doctor.take(delivery)
        match delivery.message:
            case Hello():
                await self._hello(delivery.peer, delivery.message)
            case Telemetry():
                await self._telemetry(delivery.peer, delivery.message)
            case Exiting():
                self._exiting(delivery.peer, delivery.message)
            case Acquitted():
                self._acquitted(delivery.peer, delivery.message)
            case AttachRequest():
                reply = attach(
                    self.roster, delivery.message, schema=SCHEMA, plan=self.plan,
                    buffer_address=self._buffer, run_dir=self.run_dir,
                )  # fmt: skip
                await self._send(delivery.peer, reply)
            case DetachRequest():
                await self._send(delivery.peer, await self._detach(delivery.message))
            case StatusRequest():
                await self._send(delivery.peer, Reply(ok=True, data=msgspec.json.encode(self.status())))

    def _exiting(self, peer: bytes, message: Exiting) -> None:
        member = self.roster.said_why(peer, message)
        if member is None:
            return
        self.children.said_why(member.name)
        if member.attached:
            member.health.retire(time.monotonic())
            self.watch.gone(member)

    def _acquitted(self, peer: bytes, message: Acquitted) -> None:
        if not any(m.role == "buffer" and m.peer == peer for m in self.roster.present()):
            self._complain("malformed", peer, "only the buffer says whose fault a death was")
            return
        freed = [member.name for member in self.roster.acquit(message.incarnations)]
        if freed:
            text = f"{message.reason}: deaths of {', '.join(freed)} that do not count (run.max_restarts)"
            self.log.warning(text)
            self._show_update(NoteUpdate(text=text))

    async def _hello(self, peer: bytes, hello: Hello) -> None:
        if hello.protocol != PROTOCOL or hello.schema != SCHEMA:
            await self._send(peer, Refused(reason="other code than this run; install the same version"))
            return
        member = self.roster.members.get(hello.name)
        if member is None or member.incarnation != hello.incarnation:
            if hello.role not in (*ATTACHABLE, "evaluator"):
                return
            problem = crowded(self.roster)
            if problem:
                self._complain("unwelcome", peer, problem)
                await self._send(peer, Refused(reason=problem))
                return
            now = time.monotonic()
            member = self.roster.join(hello.name, hello.role, hello.incarnation, attached=True, now=now)
        member.peer, member.pid, member.host = peer, hello.pid, hello.host
        if self.phase == "draining":
            await self._send(peer, Drain(reason="asked to"))
        if hello.address:
            self._buffer = hello.address
            assert self._link is not None
            self._on_address(self._link.address, hello.address)
            self._buffer_known.set()

    async def _telemetry(self, peer: bytes, message: Telemetry) -> None:
        try:
            updates = updates_of(self.roster, peer, message)
        except ProtocolError as error:
            self._complain("malformed", peer, str(error))
            return
        await self._send(peer, Alive())
        for update in updates:
            if isinstance(update, MemberUpdate):
                self.roster.heard(message.name, time.monotonic(), ready=update.ready)
                self.watch.heard(update, time.monotonic())
                continue
            self.doctor.noticed(update)
            if isinstance(update, StepUpdate) and self.phase == "starting":
                self._enter("training")
            if isinstance(update, PhaseUpdate) and update.phase == "finished":
                self.roster.ending = True
                self.phase = "finished"
                self._deadline = time.monotonic() + FINISH_DEADLINE_S
                self._maybe_over()
            self._show_update(update)

    async def _detach(self, request: DetachRequest) -> Reply:
        reply, order = detach(self.roster, request)
        if order is not None:
            await self._send(self.roster.members[request.name].peer, order)
            self._show_update(NoteUpdate(text=reply.text))
        return reply

    def status(self) -> dict[str, Any]:
        """What `asyncrl status` shows of a live run."""
        return {"phase": self.phase, "failure": self.failure, "members": self.watch.describe()}

    async def _to_buffer(self, message: MemberLost) -> None:
        for member in self.roster.present():
            if member.role == "buffer" and member.peer:
                await self._send(member.peer, message)

    async def _send(self, peer: bytes, message: msgspec.Struct) -> None:
        assert self._link is not None
        # A peer that is gone needs no message.
        with contextlib.suppress(PeerGone):
            await self._link.send(peer, message)
