"""The life of an actor: open, loops in one TaskGroup, drain, close. A loop that ends or fails ends the actor.

Every actor dials the supervisor (control link) and every actor but the buffer dials the buffer (desk link).
It reports, answers the doctor and can be told to leave from its first moment on, while it still loads.
Each link has one reader loop here; a role reacts in `handle` and does its work in `loops`. Compute never runs
on the event loop: `compute` is the one way to a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from asyncrl.actor.waiting import Peers, silence_of
from asyncrl.chaos import Life, tapped_client, tapped_server
from asyncrl.errors import AsyncrlError, ExitCode
from asyncrl.link import ClientLink, Hub, Key, OnMalformed, ServerLink, bind, connect
from asyncrl.messages.codec import schema_hash
from asyncrl.messages.control import (
    PROTOCOL,
    FromBuffer,
    Hello,
    ToBuffer,
)
from asyncrl.messages.supervision import (
    Diagnose,
    Diagnosis,
    Drain,
    Exiting,
    FromSupervisor,
    Stop,
    Telemetry,
    ToSupervisor,
)
from asyncrl.obs.metrics import MetricsWriter, Waits
from asyncrl.obs.stacks import task_stacks, thread_stacks
from asyncrl.obs.view import MemberUpdate, Update
from asyncrl.obs.vitals import Facts, LoopLag, Traffic, events_of, queues_of, rss_bytes, waits_of
from asyncrl.topology.plan import Plan

T = TypeVar("T")

LAST_WORDS_S = 1.0
"""How long a leaving actor tries to deliver what it has sent."""
SAY_S = 1.0
"""How long an actor waits for the supervisor to read, while a thousand messages lie unread."""

SUPERVISOR = "the supervisor"
"""What it is called where its silence is told."""

SCHEMA = schema_hash([ToBuffer, FromBuffer, ToSupervisor, FromSupervisor])
"""What this code's messages look like; peers built from other code are refused."""


@dataclass(kw_only=True)
class Context:
    """What an actor is given; one per life of an actor."""

    name: str
    role: str
    incarnation: str
    plan: Plan
    run_dir: Path
    attempt_dir: Path
    control_address: str
    desk_address: str = ""
    """The buffer's; for the buffer itself, where it shall listen."""
    index: int | None = None
    """Position of its table among [[generator]] or [[reward]]."""
    hub: Hub | None = None
    key: Key | None = None
    resumed: bool = False
    """The run directory is that of an interrupted run."""
    host: str = ""
    life: Life | None = None
    """Its orders, where there are any (`asyncrl.chaos`)."""
    waits: Waits = field(default_factory=Waits)

    def connect(self, address: str, *, receives: Any) -> ClientLink:
        """Dial as this life of the actor. Raises as `asyncrl.link.connect` does."""
        identity = f"{self.name}.{self.incarnation}".encode()
        dial = functools.partial(
            connect, address, identity=identity, receives=receives, security=self.key, hub=self.hub
        )
        return tapped_client(dial, self.life)

    def bind(self, address: str, *, receives: Any, on_malformed: OnMalformed) -> ServerLink:
        """Listen. Raises as `asyncrl.link.bind` does."""
        link = bind(address, receives=receives, security=self.key, hub=self.hub, on_malformed=on_malformed)
        return tapped_server(link, self.life)


class Actor:
    """Base of every role; see the module's docstring."""

    role = ""
    drains_while_starting = True
    """Whether it has nothing to hand back before it is ready, so that a drain ends it at once."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.name = context.name
        self.plan = context.plan
        self.waits = context.waits
        self.side_waits = Waits()
        """Of loops beside the one whose time is measured: they have names, but are no idleness of its."""
        self.log = structlog.stdlib.get_logger().bind(actor=context.name)
        self.state = "starting"
        self.gauges: dict[str, float] = {}
        self.exit_code = ExitCode.FINISHED
        self.metrics = MetricsWriter(context.run_dir / "metrics" / f"{context.name}.jsonl")
        self.traffic = Traffic()
        run = self.plan.topology.run
        self.peers = Peers(self.name, limit_s=silence_of(run), every_s=run.heartbeat_s)
        self._lag = LoopLag()
        self._tasks: asyncio.TaskGroup | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self._done = asyncio.Event()
        self._ready = asyncio.Event()
        self._early: list[Any] = []
        """What the supervisor said to the role before it was ready."""
        self._control: ClientLink | None = None
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{context.name}-compute")

    # What a role overrides.

    async def open(self) -> None:
        """Get ready before anything is promised: load a model, open files."""

    async def begin(self) -> None:
        """Dial whom the role needs."""

    async def ready(self) -> None:
        """Get ready for work; the loops start after it."""

    def loops(self) -> Sequence[Coroutine[Any, Any, None]]:
        """The work."""
        return []

    async def on_control(self, message: Any) -> None:
        """A message from the supervisor other than Drain and Stop, once the role is ready."""

    async def drain(self) -> None:
        """Finish or hand back what is held, then `leave`."""
        self.leave(ExitCode.DRAINED)

    async def close(self) -> None:
        """Let go of everything; called in any case."""

    def member(self) -> MemberUpdate:
        """What this actor reports about itself."""
        longest = self.waits.longest()
        return MemberUpdate(
            name=self.name,
            role=self.role,
            state=self.state,
            wall_s=self.waits.wall_s(),
            busy_s=self.waits.busy_s(),
            waits=self.waits.snapshot(),
            waits_for=longest[0] if longest else "",
            waits_for_s=longest[1] if longest else 0.0,
            lag_s=self._lag.take(),
        )

    def vitals(self) -> Facts:
        """What a doctor may want to know of this actor; roles add what they hold. Must not wait."""
        return Facts(
            name=self.name,
            role=self.role,
            state=self.state,
            pid=os.getpid(),
            uptime_s=self.waits.wall_s(),
            loop_lag_s=self._lag.worst_s,
            waits=waits_of(self.waits.now(), clock=time.monotonic()),
            side_waits=waits_of(self.side_waits.now(), clock=time.monotonic()),
            gauges=dict(self.gauges),
            queues=queues_of(self),
            events=events_of(self),
            links={name: msgspec.structs.asdict(link.statistics()) for name, link in self.links().items()},
            spoken=self.traffic.snapshot(),
            rss_bytes=rss_bytes(),
            # This thread is the one that answers: what it does now says nothing.
            stacks=task_stacks() + [s for s in thread_stacks() if s.name != threading.current_thread().name],
        )

    def links(self) -> dict[str, ClientLink | ServerLink]:
        """The open links, by what they are for."""
        return {} if self._control is None else {"control": self._control}

    # What a role uses.

    def leave(self, code: ExitCode = ExitCode.FINISHED) -> None:
        """End this actor; `run` returns `code`."""
        self.exit_code = code
        self._done.set()

    @property
    def leaving(self) -> bool:
        """Whether `leave` was called."""
        return self._done.is_set()

    @property
    def is_ready(self) -> bool:
        """Whether it has got ready for work."""
        return self._ready.is_set()

    def idle(self, name: str, *, beside: bool = False) -> contextlib.AbstractContextManager[None]:
        """Wait for work, however long; who never brings any falls silent, and that ends this actor.

        Args:
            name: what is waited for, in a word.
            beside: whether this is a loop beside the one whose time is measured.
        """
        return self.peers.idle(self.side_waits if beside else self.waits, name)

    async def compute(self, work: Callable[[], T]) -> T:
        """Run blocking work on the actor's one compute thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def tell(self, *updates: Update) -> None:
        """Show people something now."""
        await self._telemetry(list(updates))

    # The life.

    async def run(self) -> ExitCode:
        """Live; returns the exit code. Raises what ended the actor, an AsyncrlError where it can be named."""
        try:
            await self._dial_control()
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                own = (self._read_control(), self._heartbeat(), self._lag.watch(), self.peers.watch())
                running = [tasks.create_task(loop) for loop in own]
                if await self._started():
                    running += [tasks.create_task(self._guard(loop)) for loop in self.loops()]
                    await self._done.wait()
                for task in [*running, *([self._drain_task] if self._drain_task is not None else [])]:
                    task.cancel()
            await self._say(Exiting(name=self.name, code=int(self.exit_code)))
        except BaseExceptionGroup as group:
            error = first_error(group)
            await self._last_words(error)
            raise error from None
        except (AsyncrlError, OSError, ValueError) as error:
            await self._last_words(error)
            raise
        finally:
            await self._end()
        return self.exit_code

    async def _started(self) -> bool:
        """Get ready; False when it was told to leave before that. Raises what went wrong."""
        starting, leaving = asyncio.create_task(self._start()), asyncio.create_task(self._done.wait())
        try:
            await asyncio.wait([starting, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (starting, leaving):
                task.cancel()
            await asyncio.gather(starting, leaving, return_exceptions=True)
        # Also when both happen at once: loops that never run are never awaited.
        return not starting.cancelled() and starting.result() and not self.leaving

    async def _start(self) -> bool:
        await self.open()
        await self.begin()
        await self.ready()
        if self.state == "starting":
            self.state = "running"
        self._ready.set()
        # From now on it is missed when it is silent.
        await self._telemetry([])
        for message in self._early:
            await self.on_control(message)
        return True

    async def _guard(self, loop: Coroutine[Any, Any, None]) -> None:
        """A work loop that returns ends the actor."""
        await loop
        self._done.set()

    async def _last_words(self, error: BaseException) -> None:
        code = error.exit_code if isinstance(error, AsyncrlError) else ExitCode.FAILED
        text = str(error) if isinstance(error, AsyncrlError) else f"{type(error).__name__}: {error}"
        final = isinstance(error, AsyncrlError) and error.final
        # The supervisor may be what failed; our own error is the one to report.
        with contextlib.suppress(AsyncrlError, OSError):
            await self._say(Exiting(name=self.name, code=int(code), message=text, final=final))

    async def _end(self) -> None:
        self.state = "left"
        try:
            await self.close()
        finally:
            self.metrics.close()
            if self._control is not None:
                await self._control.close(linger_s=LAST_WORDS_S)
            self._threads.shutdown(wait=False, cancel_futures=True)

    # Control.

    def hello(self, *, address: str = "") -> Hello:
        """The first message on a link."""
        return Hello(
            name=self.name,
            role=self.role,
            incarnation=self.context.incarnation,
            protocol=PROTOCOL,
            schema=SCHEMA,
            host=self.context.host,
            pid=os.getpid(),
            address=address,
            run_id=self.plan.topology.run.name,
        )

    async def _dial_control(self) -> None:
        self._control = self.context.connect(self.context.control_address, receives=FromSupervisor)
        await self._control.send(self.hello())

    async def _say(self, message: msgspec.Struct) -> None:
        if self._control is None:
            return
        # A supervisor that is stopped must not stop us: what it does not read is dropped.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SAY_S):
                await self._control.send(message)
                self.traffic.said(message)

    async def _read_control(self) -> None:
        """consumes: drain, stop and what `on_control` takes    waits for: the supervisor, for ever"""
        assert self._control is not None
        while True:
            self.peers.heard(SUPERVISOR)
            message = (await self._control.recv()).message
            self.traffic.heard(message)
            match message:
                case Drain():
                    if self._drain_task is None and self._tasks is not None:
                        self.state = "draining"
                        # Beside this loop: whoever drains for long can still be asked how it is.
                        self._drain_task = self._tasks.create_task(self._drain(), name="drain")
                case Diagnose():
                    facts = msgspec.json.encode(self.vitals())
                    await self._say(Diagnosis(name=self.name, number=message.number, facts=facts))
                case Stop():
                    self.leave(ExitCode.DRAINED if self.state == "draining" else ExitCode.FINISHED)
                case _ if not self.is_ready:
                    self._early.append(message)
                case _:
                    await self.on_control(message)

    async def _drain(self) -> None:
        if self.is_ready or not self.drains_while_starting:
            await self._ready.wait()
            await self.drain()
        else:
            self.leave(ExitCode.DRAINED)

    async def _heartbeat(self) -> None:
        """produces: heartbeats and telemetry, every heartbeat_s    waits for: the clock"""
        every = self.plan.topology.run.heartbeat_s
        while True:
            await self.beat()
            await self._telemetry([])
            await asyncio.sleep(every)

    async def beat(self) -> None:
        """One heartbeat to whoever gives leases, once it knows us."""

    async def _telemetry(self, updates: list[Update]) -> None:
        facts = msgspec.json.encode([*updates, self.member()])
        await self._say(Telemetry(name=self.name, facts=facts))


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that a group of them is about: the first that is not a cancellation."""
    flat: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop(0)
        if isinstance(error, BaseExceptionGroup):
            stack = [*error.exceptions, *stack]
        else:
            flat.append(error)
    named = [error for error in flat if isinstance(error, AsyncrlError)]
    return (named or flat)[0]
