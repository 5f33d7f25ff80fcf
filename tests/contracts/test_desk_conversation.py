"""What an actor says to a desk that dies and comes back, on a memory link with the desk played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.actor import client
from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor, Statement
from asyncrl.link import Hub, bind
from asyncrl.messages.control import (
    EvaluationSeen,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    HelloAgain,
    Kind,
    Refused,
    ToBuffer,
    Want,
    Welcome,
)
from tests.desk import make_plan

WITHIN_S = 10.0


class Worker(DeskActor):
    """Says what it is told to say, and holds two leases."""

    role = "reward"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.to_say: asyncio.Queue[int] = asyncio.Queue()
        self.unsaid: list[int] = []
        """Numbers that nobody has acknowledged (nobody does, here)."""

    def introduce(self, hello: Hello) -> Hello:
        return msgspec.structs.replace(hello, leases=[3, 5])

    def restate(self, welcome: Welcome) -> list[Statement]:
        del welcome
        return [*((seen(number), ()) for number in self.unsaid), (Want(kind=Kind.SCORE, samples=9), ())]

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._talk()]

    async def _talk(self) -> None:
        while True:
            number = await self.to_say.get()
            self.unsaid.append(number)
            await self.say((seen(number), ()), (Want(kind=Kind.SCORE, samples=1), ()))


def seen(number: int) -> EvaluationSeen:
    """A message with a number."""
    return EvaluationSeen(version=number, incarnation=0)


class Played:
    """A desk and one worker."""

    def __init__(self, directory: Path) -> None:
        hub = Hub()
        plan = make_plan()
        run = msgspec.structs.replace(plan.topology.run, heartbeat_s=0.02)
        plan = msgspec.structs.replace(plan, topology=msgspec.structs.replace(plan.topology, run=run))
        (directory / "metrics").mkdir()
        self.link = bind("memory://desk", receives=ToBuffer, hub=hub)
        self.worker = Worker(
            Context(
                name="r", role="reward", incarnation="life", plan=plan, run_dir=directory,
                attempt_dir=directory, control_address="memory://control", desk_address="memory://desk",
                hub=hub,
            )
        )  # fmt: skip
        self.task = asyncio.create_task(self.worker.run())

    async def hear(self, *, beats: bool = False) -> Any:
        """The next thing the worker says; heartbeats only where they are asked for."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                message = (await self.link.recv()).message
                if beats or not isinstance(message, Heartbeat):
                    return message

    async def beat(self) -> None:
        """Wait for a heartbeat."""
        while not isinstance(await self.hear(beats=True), Heartbeat):
            pass

    async def tell(self, message: msgspec.Struct) -> None:
        """The desk says something."""
        await self.link.send(b"r.life", message)

    async def greet(self, life: str) -> Hello:
        """A desk with this life meets the worker for the first time."""
        await self.beat()
        await self.tell(HelloAgain(desk=life))
        hello = await self.hear()
        assert isinstance(hello, Hello)
        return hello

    async def welcome(self, life: str, hello: Hello) -> None:
        """The answer to a hello."""
        await self.tell(Welcome(run_id="run", desk=life, number=hello.number, held=[3, 5]))


@pytest.fixture
async def played(tmp_path: Path) -> AsyncIterator[Played]:
    """A worker that has been welcomed."""
    played = Played(tmp_path)
    hello = await played.hear()
    assert (hello.name, hello.incarnation, hello.leases) == ("r", "life", [])
    await played.tell(Welcome(run_id="run", desk="one"))
    yield played
    if not played.task.done():
        await played.tell(Finish(reason="enough"))
        assert isinstance(await played.hear(), Goodbye)
    await asyncio.wait([played.task])
    await played.link.close()


async def test_a_desk_that_came_back_hears_everything_once(played: Played) -> None:
    await played.worker.to_say.put(1)
    assert [await played.hear(), await played.hear()] == [seen(1), Want(kind=Kind.SCORE, samples=1)]
    # The desk dies here; its successor answers the next heartbeat.
    hello = await played.greet("two")
    assert hello.leases == [3, 5]
    await played.tell(HelloAgain(desk="two"))  # to something older than the hello: no second hello
    await played.worker.to_say.put(2)
    await played.beat()
    await played.welcome("two", hello)
    # What was about to be said is part of what is stated anew; then the conversation goes on.
    assert [await played.hear() for _ in range(3)] == [seen(1), seen(2), Want(kind=Kind.SCORE, samples=9)]
    await played.worker.to_say.put(3)
    assert [await played.hear(), await played.hear()] == [seen(3), Want(kind=Kind.SCORE, samples=1)]


async def test_a_desk_that_dies_before_it_answers_is_greeted_in_its_next_life(played: Played) -> None:
    first = await played.greet("two")
    second = await played.greet("three")
    assert second.leases == [3, 5]
    # A welcome to the first hello is about a desk that has heard the second one since: no credit for it.
    await played.welcome("three", first)
    await played.welcome("three", second)
    assert await played.hear() == Want(kind=Kind.SCORE, samples=9)
    assert isinstance(await played.hear(beats=True), Heartbeat)
    # The same life may give us up for dead later.
    await played.welcome("three", await played.greet("three"))
    assert await played.hear() == Want(kind=Kind.SCORE, samples=9)


async def test_a_desk_that_dies_before_the_first_welcome_is_greeted_again(tmp_path: Path) -> None:
    played = Played(tmp_path)
    assert isinstance(await played.hear(), Hello)
    assert isinstance(await played.greet("two"), Hello)
    await played.tell(Refused(reason="a newer life of r has taken its place"))
    with pytest.raises(Exception, match="a newer life of r"):
        await played.task
    await played.link.close()


async def test_a_first_hello_that_nobody_answers_is_said_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when only a lost connection has it said again: hello and welcome can vanish on a living one."""
    monkeypatch.setattr(client, "HELLO_AGAIN_S", 0.05)
    played = Played(tmp_path)
    began = asyncio.get_running_loop().time()
    first, second, third = [await played.hear() for _ in range(3)]
    assert [type(hello) for hello in (first, second, third)] == [Hello, Hello, Hello]
    assert [hello.number for hello in (first, second, third)] == [0, 1, 2]
    assert asyncio.get_running_loop().time() - began > 0.05 + 0.1, "a slow desk is given more time each time"
    # What a slow desk says to a hello that was said again is not for now: it has still to read the last one.
    await played.welcome("one", first)
    await played.beat()
    assert not played.worker.is_ready
    await played.welcome("one", third)
    await played.worker.to_say.put(1)
    while isinstance(said := await played.hear(), Hello):  # on a busy machine this answer may be late, too
        await played.welcome("one", said)
    assert [said, await played.hear()] == [seen(1), Want(kind=Kind.SCORE, samples=1)]
    await played.tell(Finish(reason="enough"))
    assert isinstance(await played.hear(), Goodbye)
    await played.task
    await played.link.close()
