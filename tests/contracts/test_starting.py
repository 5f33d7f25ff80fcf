"""An actor that still loads reports, answers the doctor, and leaves when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.actor.base import Actor, Context
from asyncrl.errors import ExitCode, RunError
from asyncrl.link import Hub, ServerLink, bind
from asyncrl.messages.control import Hello, MemberLost
from asyncrl.messages.supervision import (
    Diagnose,
    Diagnosis,
    Drain,
    Exiting,
    Stop,
    Telemetry,
    ToSupervisor,
)
from tests.desk import make_plan

WITHIN_S = 10.0
LOST = MemberLost(name="g", incarnation="a", reason="killed", ours=False)


class Loader(Actor):
    """Loads until it is told that it has loaded."""

    role = "source"

    def __init__(self, context: Context, *, keeps: bool = False) -> None:
        super().__init__(context)
        self.loaded = asyncio.Event()
        self.drains_while_starting = not keeps
        self.told: list[str] = []

    async def open(self) -> None:
        await self.loaded.wait()
        self.told.append("opened")

    async def on_control(self, message: Any) -> None:
        self.told.append(type(message).__name__)

    async def drain(self) -> None:
        self.told.append("drained")
        self.leave(ExitCode.DRAINED)

    async def close(self) -> None:
        self.told.append("closed")


class Played:
    """An actor that loads, and its supervisor, played by hand."""

    def __init__(self, directory: Path, *, keeps: bool, heartbeat_s: float) -> None:
        hub = Hub()
        plan = make_plan()
        run = msgspec.structs.replace(plan.topology.run, heartbeat_s=heartbeat_s)
        plan = msgspec.structs.replace(plan, topology=msgspec.structs.replace(plan.topology, run=run))
        (directory / "metrics").mkdir()
        self.link: ServerLink = bind("memory://control", receives=ToSupervisor, hub=hub)
        context = Context(
            name="s", role="source", incarnation="life", plan=plan, run_dir=directory,
            attempt_dir=directory, control_address="memory://control", hub=hub,
        )  # fmt: skip
        self.actor = Loader(context, keeps=keeps)
        self.task = asyncio.create_task(self.actor.run())
        self.peer = b""

    async def hear(self, kind: type) -> Any:
        """Its next message of that kind."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                delivery = await self.link.recv()
                self.peer = delivery.peer
                if isinstance(delivery.message, kind):
                    return delivery.message

    async def state(self) -> str:
        """What its next report says."""
        return str(msgspec.json.decode((await self.hear(Telemetry)).facts)[-1]["state"])

    async def ended(self) -> ExitCode:
        """How it ended."""
        return await asyncio.wait_for(self.task, WITHIN_S)


@asynccontextmanager
async def played(directory: Path, *, keeps: bool = False, heartbeat_s: float = 0.02) -> AsyncIterator[Played]:
    """One that has said hello and loads."""
    world = Played(directory, keeps=keeps, heartbeat_s=heartbeat_s)
    try:
        await world.hear(Hello)
        yield world
    finally:
        world.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RunError):
            await world.task
        await world.link.close()


async def test_it_reports_and_answers_the_doctor_while_it_loads(tmp_path: Path) -> None:
    """Fails when the control link is read, or heartbeats begin, only after `open`."""
    async with played(tmp_path) as world:
        assert await world.state() == "starting"
        await world.link.send(world.peer, Diagnose(number=7))
        answer = await world.hear(Diagnosis)
        assert (answer.number, msgspec.json.decode(answer.facts)["state"]) == (7, "starting")
        world.actor.loaded.set()
        async with asyncio.timeout(WITHIN_S):
            while await world.state() != "running":
                pass


@pytest.mark.parametrize(("message", "code"), [(Stop(), 0), (Drain(reason="asked to"), ExitCode.DRAINED)])
async def test_it_leaves_without_having_loaded(tmp_path: Path, message: msgspec.Struct, code: int) -> None:
    """Fails when Ctrl-C waits for a model to be loaded."""
    async with played(tmp_path) as world:
        await world.link.send(world.peer, message)
        assert (await world.hear(Exiting)).code == code
        assert await world.ended() == code
    assert world.actor.told == ["closed"]


async def test_one_that_is_told_to_leave_as_it_becomes_ready_runs_no_loop(tmp_path: Path) -> None:
    """Fails (a coroutine is never awaited) when the loops are made for one that leaves."""
    async with played(tmp_path) as world:
        actor = world.actor

        async def ready() -> None:
            actor.leave(ExitCode.DRAINED)

        actor.ready = ready  # type: ignore[method-assign]
        actor.loops = lambda: [asyncio.sleep(0)]  # type: ignore[method-assign]
        actor.loaded.set()
        assert await world.ended() == ExitCode.DRAINED


async def test_it_says_at_once_that_it_is_ready(tmp_path: Path) -> None:
    """Fails when that waits for the next heartbeat: who hangs before it would count as loading."""
    async with played(tmp_path, heartbeat_s=60.0) as world:
        assert await world.state() == "starting"
        world.actor.loaded.set()
        assert await world.state() == "running"


async def test_what_others_hand_back_to_is_not_gone_before_it_is_ready(tmp_path: Path) -> None:
    """The buffer's case: a drain waits for it, and what it is told meanwhile it hears once it can."""
    async with played(tmp_path, keeps=True) as world:
        await world.link.send(world.peer, LOST)
        await world.link.send(world.peer, Drain(reason="asked to"))
        async with asyncio.timeout(WITHIN_S):
            while await world.state() != "draining":
                pass
        world.actor.loaded.set()
        assert await world.ended() == ExitCode.DRAINED
    assert world.actor.told == ["opened", "MemberLost", "drained", "closed"]


async def test_an_error_while_it_loads_is_its_last_word(tmp_path: Path) -> None:
    async with played(tmp_path) as world:

        async def fail() -> None:
            raise RunError("no such model")

        world.actor.begin = fail  # type: ignore[method-assign]
        world.actor.loaded.set()
        said = await world.hear(Exiting)
        assert (said.code, said.message) == (ExitCode.FAILED, "no such model")
        with pytest.raises(RunError, match="no such model"):
            await world.ended()
