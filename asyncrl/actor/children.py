"""The processes that a supervisor has started: each is started, killed, waited for and reported once.

Owns handles and last words. It decides nothing: what the end of a process means is for `on_end` to say, which
is called after the process has been reaped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable

from asyncrl.actor.base import LAST_WORDS_S
from asyncrl.actor.launchers import Handle, Launcher
from asyncrl.actor.roster import MemberState, Roster, story
from asyncrl.topology.plan import ProcessPlan

OnEnd = Callable[[ProcessPlan, MemberState, int], Awaitable[None]]
"""Called with a process of the plan, the member it was and its exit code."""


class Children:
    """See the module's docstring."""

    def __init__(self, launcher: Launcher, roster: Roster, *, on_end: OnEnd) -> None:
        self._launcher = launcher
        self._roster = roster
        self._on_end = on_end
        self._handles: dict[str, Handle] = {}
        self._said: dict[str, asyncio.Event] = {}
        """By name: whether its present life has said its last words."""

    async def start(
        self, process: ProcessPlan, tasks: asyncio.TaskGroup, *, control: str, buffer: str, resumed: bool
    ) -> None:
        """Start a process (again); a task of `tasks` sees to its end.

        Args:
            process: what to start.
            tasks: where its end is waited for.
            control: the supervisor's address.
            buffer: the buffer's; for the buffer itself, where to listen.
            resumed: whether the run is; what is started again in one launch is not.
        """
        incarnation = uuid.uuid4().hex[:12]
        member = self._roster.join(process.name, process.role, incarnation, now=time.monotonic())
        self._said[process.name] = asyncio.Event()
        handle = await self._launcher.start(
            process,
            incarnation=incarnation,
            control=control,
            buffer=buffer,
            # Its former life, too, belongs to this launch, and so do the workers that hold leases.
            resumed=resumed and not member.restarts,
        )
        member.pid = handle.pid
        self._handles[process.name] = handle
        tasks.create_task(self._reap(process, member, handle))

    async def _reap(self, process: ProcessPlan, member: MemberState, handle: Handle) -> None:
        """consumes: the end of one process    waits for: it    produces: a call of `on_end`"""
        code = await handle.wait()
        if code > 0:
            # They were sent before it ended, but may still lie in our own socket.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._said[member.name].wait(), LAST_WORDS_S)
        if self._handles.get(member.name) is handle:
            del self._handles[member.name]
        await self._on_end(process, member, code)

    def said_why(self, name: str) -> None:
        """A process has said its last words."""
        if name in self._said:
            self._said[name].set()

    def story(self, member: MemberState, code: int) -> str:
        """How a process ended, and where to look when it said nothing."""
        text = story(member, code)
        output = self._launcher.attempt_dir / "log" / f"{member.name}.out"
        return text if member.last_words or code == 0 else f"{text}; its output is in {output}"

    def kill(self, name: str) -> bool:
        """End one at once; whether there was one."""
        handle = self._handles.get(name)
        if handle is not None:
            handle.kill()
        return handle is not None

    def kill_all(self) -> None:
        """End all at once."""
        for handle in self._handles.values():
            handle.kill()

    async def wait_all(self, deadline_s: float) -> None:
        """Wait until all have ended, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                for handle in list(self._handles.values()):
                    await handle.wait()
