"""Ways to start an actor's process: a child process of this host, or tasks of this very process.

Both give a `Handle`; the supervisor knows no more. Children are their own session, so that the terminal's
Ctrl-C reaches the supervisor alone, and so that a kill takes everything they started along.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from asyncrl.errors import AsyncrlError, ExitCode
from asyncrl.link import Hub
from asyncrl.topology.plan import Plan, ProcessPlan


class Handle(Protocol):
    """One started process."""

    @property
    def pid(self) -> int:
        """Of the process; 0 for tasks."""

    async def wait(self) -> int:
        """Its exit code once it has ended; negative for a signal."""

    def kill(self) -> None:
        """End it at once; ignored when it has ended."""


class Launcher(Protocol):
    """Starts processes of a plan."""

    @property
    def attempt_dir(self) -> Path:
        """Where the logs of this launch are."""

    async def start(
        self, process: ProcessPlan, *, incarnation: str, control: str, buffer: str, resumed: bool
    ) -> Handle:
        """Start one; returns at once."""


def host_arguments(
    process: str, *, run_dir: Path, attempt_dir: Path, incarnation: str, control: str, buffer: str,
    resumed: bool, parent: int,
) -> list[str]:  # fmt: skip
    """The command line of `asyncrl.actor.host` for one process, without the interpreter."""
    arguments = [
        str(run_dir), process, "--attempt-dir", str(attempt_dir), "--control", control,
        "--incarnation", incarnation, "--buffer", buffer, "--parent", str(parent),
    ]  # fmt: skip
    return [*arguments, "--resumed"] if resumed else arguments


@dataclass(kw_only=True)
class ProcessLauncher:
    """Child processes: `python -m asyncrl.actor.host`."""

    run_dir: Path
    attempt_dir: Path

    async def start(
        self, process: ProcessPlan, *, incarnation: str, control: str, buffer: str, resumed: bool
    ) -> Handle:
        """See `Launcher`."""
        arguments = host_arguments(
            process.name, run_dir=self.run_dir, attempt_dir=self.attempt_dir, incarnation=incarnation,
            control=control, buffer=buffer, resumed=resumed, parent=os.getpid(),
        )  # fmt: skip
        arguments = [sys.executable, "-m", "asyncrl.actor.host", *arguments]
        output = (self.attempt_dir / "log" / f"{process.name}.out").open("ab")
        try:
            child = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **process.env},
                start_new_session=True,
            )
        finally:
            output.close()
        return _Child(child)


class _Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@dataclass(kw_only=True)
class TaskLauncher:
    """The same actors as tasks of this process, joined by a memory link (tests, `launch --in-process`)."""

    run_dir: Path
    attempt_dir: Path
    plan: Plan
    hub: Hub = field(default_factory=Hub)
    on_error: Callable[[str, BaseException], None] | None = None

    async def start(
        self, process: ProcessPlan, *, incarnation: str, control: str, buffer: str, resumed: bool
    ) -> Handle:
        """See `Launcher`."""
        from asyncrl.actor.host import live, make_actors

        actors = make_actors(
            self.plan,
            process.name,
            run_dir=self.run_dir,
            attempt_dir=self.attempt_dir,
            incarnation=incarnation,
            control=control,
            buffer=buffer,
            resumed=resumed,
            hub=self.hub,
        )
        return _Tasks(process.name, asyncio.create_task(live(actors), name=process.name), self.on_error)


class _Tasks:
    def __init__(
        self, name: str, task: asyncio.Task[ExitCode], on_error: Callable[[str, BaseException], None] | None
    ) -> None:
        self._name = name
        self._task = task
        self._on_error = on_error

    @property
    def pid(self) -> int:
        return 0

    async def wait(self) -> int:
        await asyncio.wait([self._task])
        if self._task.cancelled():
            return -int(signal.SIGKILL)
        error = self._task.exception()
        if error is None:
            return int(self._task.result())
        from asyncrl.actor.base import first_error

        cause = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        if self._on_error is not None:
            self._on_error(self._name, cause)
        return int(cause.exit_code) if isinstance(cause, AsyncrlError) else int(ExitCode.FAILED)

    def kill(self) -> None:
        self._task.cancel()
