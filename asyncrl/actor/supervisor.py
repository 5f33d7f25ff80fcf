"""The supervisor: starts the processes of a plan, hears from them, restarts some, ends the run.

    buffer first (its address is what everybody needs) -> the others -> running -> finished | drained | failed

It owns the control link: hello, telemetry, attach, detach, status; what is for the doctor goes to `examine`.
It never sees a sample. A SIGINT drains, a second one stops at once; both come in through `drain` and `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from asyncrl.actor.base import SCHEMA
from asyncrl.actor.examine import Doctor
from asyncrl.actor.launchers import Handle, Launcher
from asyncrl.actor.reception import ATTACHABLE, attach, describe, detach
from asyncrl.actor.roster import Fate, MemberState, Roster, State, story
from asyncrl.errors import ExitCode
from asyncrl.link import Delivery, Hub, Key, PeerGone, ServerLink, bind
from asyncrl.messages.control import PROTOCOL, Hello, MemberLost, Refused
from asyncrl.messages.supervision import (
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
from asyncrl.obs.view import MemberUpdate, NoteUpdate, PhaseUpdate, StepUpdate, Update
from asyncrl.topology.plan import Plan, ProcessPlan

START_DEADLINE_S = 120.0
"""How long a process may take from start to hello: importing torch on a cold disk is slow."""
DRAIN_DEADLINE_S = 120.0
"""How long a drain may take: a rollout step and a checkpoint."""
FINISH_DEADLINE_S = 30.0
"""How long actors may take to leave once the run has finished."""

_UPDATES = msgspec.json.Decoder(list[Update])


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
        self.roster = Roster(max_restarts=plan.topology.run.max_restarts)
        self.launcher = launcher
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
        self._buffer = ""
        self._buffer_known = asyncio.Event()
        self._handles: dict[str, Handle] = {}
        self._over = asyncio.Event()
        self.doctor = Doctor(
            plan,
            run_dir=run_dir,
            roster=self.roster,
            send=self._send,
            phase=lambda: self.phase,
            fail=self._fail,
        )
        self._reports: dict[str, MemberUpdate] = {}

    # The life of a run.

    async def run(self) -> ExitCode:
        """Start everything and see it through."""
        self._link = bind(self._address, receives=ToSupervisor, security=self._key, hub=self._hub)
        self._on_address(self._link.address, "")
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._read()), tasks.create_task(self._watch())]
                await self._start_all(tasks)
                await self._over.wait()
                await self._finish(tasks)
                for task in running:
                    task.cancel()
        finally:
            self._kill_all()
            self.doctor.close()
            await self._link.close(linger_s=0.2)
        return self.exit_code

    @property
    def exit_code(self) -> ExitCode:
        """What the end was."""
        if self.failure:
            return ExitCode.FAILED
        return ExitCode.FINISHED if self.phase == "finished" else ExitCode.DRAINED

    async def _start_all(self, tasks: asyncio.TaskGroup) -> None:
        first, *rest = self.plan.processes
        assert first.role == "buffer", "the buffer's address is what the others need"
        await self._start(first, tasks)
        waiters = [asyncio.ensure_future(self._buffer_known.wait()), asyncio.ensure_future(self._over.wait())]
        done, pending = await asyncio.wait(
            waiters, timeout=START_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if not done:
            self._fail(f"the buffer did not start within {START_DEADLINE_S:.0f} s; see its log")
        if self._over.is_set():
            return
        for process in rest:
            await self._start(process, tasks)

    async def _start(self, process: ProcessPlan, tasks: asyncio.TaskGroup) -> None:
        incarnation = uuid.uuid4().hex[:12]
        member = self.roster.join(process.name, process.role, incarnation)
        listen = self._buffer
        if process.role == "buffer":
            listen = self._buffer or self._buffer_address()
        assert self._link is not None
        handle = await self.launcher.start(
            process, incarnation=incarnation, control=self._link.address, buffer=listen, resumed=self.resumed
        )
        member.pid = handle.pid
        self._handles[process.name] = handle
        tasks.create_task(self._reap(process, member, handle, tasks))

    def _buffer_address(self) -> str:
        if self._memory:
            return "memory://buffer"
        if self.plan.topology.run.buffer_address:
            return self.plan.topology.run.buffer_address
        return self._address.rpartition(":")[0] + ":0"

    async def _reap(
        self, process: ProcessPlan, member: MemberState, handle: Handle, tasks: asyncio.TaskGroup
    ) -> None:
        """A process ended: what follows is the roster's to say."""
        code = await handle.wait()
        fate = self.roster.ended(member, code)
        text = self._story(member, code)
        self._gone(member)
        if self._handles.get(member.name) is handle:
            del self._handles[member.name]
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
        await asyncio.sleep(self.roster.backoff_s(member))
        if not self.roster.ending:
            await self._start(process, tasks)

    def _story(self, member: MemberState, code: int) -> str:
        """How a process ended, and where to look when it said nothing."""
        text = story(member, code)
        output = self.launcher.attempt_dir / "log" / f"{member.name}.out"
        return text if member.last_words or code == 0 else f"{text}; its output is in {output}"

    def _gone(self, member: MemberState) -> None:
        report = self._reports.get(member.name)
        if report is not None:
            state = "dead" if member.state is State.RESTARTING else "left"
            self._note_member(msgspec.structs.replace(report, state=state))

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self.roster.ending = True
        self._enter("failed")
        self._over.set()

    def _maybe_over(self) -> None:
        """The run has finished or drained once everybody but the buffer has left."""
        left = [m for m in self.roster.present(own=True) if m.role != "buffer"]
        buffer_left = all(m.role != "buffer" for m in self.roster.present())
        if self.roster.ending and (not left or buffer_left):
            self._over.set()

    async def _finish(self, tasks: asyncio.TaskGroup) -> None:
        """The last to leave are the buffer and, after a failure, everybody."""
        del tasks
        for member in self.roster.present():
            if member.peer and (member.role == "buffer" or self.failure):
                await self._send(member.peer, Stop())
        deadline = FINISH_DEADLINE_S if not self.failure else 5.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                for handle in list(self._handles.values()):
                    await handle.wait()
        self._kill_all()

    def _kill_all(self) -> None:
        for handle in self._handles.values():
            handle.kill()

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
        self._drain_deadline = time.monotonic() + DRAIN_DEADLINE_S

    def stop(self) -> None:
        """The second Ctrl-C: everybody stops at once; what was acknowledged is safe."""
        self.roster.ending = True
        self._kill_all()
        self._over.set()

    def kill(self, name: str) -> bool:
        """SIGKILL one process, as a fault; whether there was one."""
        handle = self._handles.get(name)
        if handle is not None:
            handle.kill()
        return handle is not None

    async def _watch(self) -> None:
        """produces: a named failure when nothing moves    waits for: the clock"""
        stall_s = self.plan.topology.run.stall_s
        self._drain_deadline = float("inf")
        while True:
            await asyncio.sleep(0.5)
            if self.phase in {"training", "starting"} and self.doctor.since_step_s > stall_s:
                reason = await self.doctor.verdict(f"no rollout step for {stall_s:g} s (run.stall_s)")
                if self.doctor.since_step_s <= stall_s or self._over.is_set():
                    continue  # it has moved, or ended, meanwhile
                return self._fail(reason)
            if time.monotonic() > self._drain_deadline:
                waiting = ", ".join(m.name for m in self.roster.present(own=True))
                why = f"the drain took more than {DRAIN_DEADLINE_S:.0f} s; still here: {waiting}"
                return self._fail(await self.doctor.verdict(why))

    # Control messages.

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
                self._telemetry(delivery.message)
            case Exiting():
                member = self.roster.members.get(delivery.message.name)
                if member is not None:
                    member.last_words = delivery.message.message
                    if member.attached:
                        member.state = State.GONE
                        self._gone(member)
            case AttachRequest():
                reply = attach(
                    self.roster,
                    delivery.message,
                    schema=SCHEMA,
                    plan=self.plan,
                    buffer_address=self._buffer,
                    run_dir=self.run_dir,
                )
                await self._send(delivery.peer, reply)
            case DetachRequest():
                await self._send(delivery.peer, await self._detach(delivery.message))
            case StatusRequest():
                await self._send(delivery.peer, Reply(ok=True, data=msgspec.json.encode(self.status())))

    async def _hello(self, peer: bytes, hello: Hello) -> None:
        if hello.protocol != PROTOCOL or hello.schema != SCHEMA:
            await self._send(peer, Refused(reason="other code than this run; install the same version"))
            return
        member = self.roster.members.get(hello.name)
        if member is None or member.incarnation != hello.incarnation:
            if hello.role not in (*ATTACHABLE, "evaluator"):
                return
            member = self.roster.join(hello.name, hello.role, hello.incarnation, attached=True)
        member.peer, member.pid, member.host = peer, hello.pid, hello.host
        if member.state is State.STARTING:
            member.state = State.RUNNING
        if self.phase == "draining":
            await self._send(peer, Drain(reason="asked to"))
        if hello.address:
            self._buffer = hello.address
            assert self._link is not None
            self._on_address(self._link.address, hello.address)
            self._buffer_known.set()

    def _telemetry(self, message: Telemetry) -> None:
        for update in _UPDATES.decode(message.facts):
            if isinstance(update, MemberUpdate):
                self._note_member(update)
                continue
            self.doctor.noticed(update)
            if isinstance(update, StepUpdate) and self.phase == "starting":
                self._enter("training")
            if isinstance(update, PhaseUpdate) and update.phase == "finished":
                self.roster.ending = True
                self.phase = "finished"
                self._maybe_over()
            self._show_update(update)

    def _note_member(self, update: MemberUpdate) -> None:
        self._reports[update.name] = update
        self._show_update(update)

    async def _detach(self, request: DetachRequest) -> Reply:
        reply, order = detach(self.roster, request)
        if order is not None:
            await self._send(self.roster.members[request.name].peer, order)
            self._show_update(NoteUpdate(text=reply.text))
        return reply

    def status(self) -> dict[str, Any]:
        """What `asyncrl status` shows of a live run."""
        return {
            "phase": self.phase,
            "failure": self.failure,
            "members": describe(self.roster, self._reports),
        }

    async def _to_buffer(self, message: MemberLost) -> None:
        for member in self.roster.present():
            if member.role == "buffer" and member.peer:
                await self._send(member.peer, message)

    async def _send(self, peer: bytes, message: msgspec.Struct) -> None:
        assert self._link is not None
        # A peer that is gone needs no message.
        with contextlib.suppress(PeerGone):
            await self._link.send(peer, message)
