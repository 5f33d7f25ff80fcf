"""What a trainer makes of pieces lost with a connection, on a memory link with a desk played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.actor.base import Context
from asyncrl.actor.pieces import Pieces
from asyncrl.link import Hub, bind
from asyncrl.messages.control import (
    BatchPart,
    Committed,
    Finish,
    Goodbye,
    Hello,
    HelloAgain,
    Kind,
    Saved,
    ToBuffer,
    Trained,
    TrainerStart,
    Want,
    Welcome,
)
from asyncrl.messages.parts import GroupParts, encode_body
from asyncrl.messages.sample import Segment
from asyncrl.roles.trainer import TrainerRole
from tests.desk import make_plan
from tests.train_support import make_sample

WITHIN_S = 20.0
TRAINER = b"trainer.life"
SCRIPTED = 'backend = "scripted"\nscripted_step_s = 0.0\nprefetch_batches = 1'


class Played:
    """A trainer, and the desk that it talks to."""

    def __init__(self, directory: Path) -> None:
        hub = Hub()
        plan = make_plan(num_rollout=20, trainer=SCRIPTED)
        (directory / "metrics").mkdir()
        self.link = bind("memory://desk", receives=ToBuffer, hub=hub)
        self.role = TrainerRole(
            Context(
                name="trainer", role="trainer", incarnation="life", plan=plan, run_dir=directory,
                attempt_dir=directory, control_address="memory://control", desk_address="memory://desk",
                hub=hub,
            )
        )  # fmt: skip
        self.task = asyncio.create_task(self.role.run())

    async def hear(self, *kinds: type) -> Any:
        """The next message of these kinds; a checkpoint is committed at once."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                message = (await self.link.recv()).message
                if isinstance(message, Saved):
                    await self.link.send(TRAINER, Committed(what="checkpoint", number=message.rollout_step))
                if isinstance(message, kinds):
                    return message

    async def welcome(self, hello: Hello) -> Want:
        """Answer a hello; returns the room that it names then."""
        start = TrainerStart(incarnation=1)
        await self.link.send(TRAINER, Welcome(run_id="run", desk="a", number=hello.number, trainer=start))
        want: Want = await self.hear(Want)
        return want

    async def piece(self, batch: int, part: int, num_parts: int = 2) -> None:
        """One piece of a batch: one group of two samples."""
        group_id = batch * 10 + part
        samples = [
            make_sample(
                group_id=group_id, index=i, prompt=[3], response=[4, 5], logprobs=[-1.0, -1.0], reward=i
            )
            for i in range(2)
        ]  # fmt: skip
        frames = [encode_body(samples[0].prompt)]
        for sample in samples:
            segment = Segment(tokens=sample.tokens, logprobs=sample.logprobs, spans=sample.spans)
            assert sample.score is not None
            frames += [encode_body(segment), encode_body(sample.score)]
        parts = GroupParts(
            group_id=group_id, indices=[0, 1], statuses=[s.status for s in samples], segments=[1, 1],
            scored=True, removed=[],
        )  # fmt: skip
        message = BatchPart(batch=batch, part=part, num_parts=num_parts, groups=[parts], num_bytes=7)
        await self.link.send(TRAINER, message, frames)

    async def trained(self) -> tuple[int, int]:
        """The next batch that was trained, and its tokens."""
        message = await self.hear(Trained)
        return message.batch, message.tokens

    async def end(self) -> None:
        """The run is over; the trainer saves what it has and leaves."""
        await self.link.send(TRAINER, Finish(reason="enough"))
        await self.hear(Goodbye)
        await asyncio.wait([self.task])
        await self.link.close()


@pytest.fixture
async def played(tmp_path: Path) -> AsyncIterator[Played]:
    """A trainer that was welcomed and has room for two batches."""
    played = Played(tmp_path)
    want = await played.welcome(await played.hear(Hello))
    assert (want.kind, want.samples) == (Kind.TRAIN, 2)
    yield played
    await played.end()


async def test_a_batch_without_its_beginning_is_not_trained(played: Played) -> None:
    """Fails when pieces are taken as they come: batch 0 would be trained with one of its two groups."""
    await played.piece(0, 1)
    want = await played.hear(Want, Trained)
    assert (want.samples, want.num_bytes) == (0, 7), "the bytes of a piece that is dropped are room again"
    await played.piece(0, 0)
    await played.piece(0, 1)
    assert await played.trained() == (0, 8)


async def test_a_batch_with_a_hole_comes_again_and_one_that_is_early_waits(played: Played) -> None:
    """Fails when whatever is complete is trained, batch 2 before batch 1, and when batch 2 is thrown away."""
    await played.piece(0, 0, 3)
    await played.piece(0, 2, 3)
    await played.piece(2, 0, 1)
    await played.piece(0, 0)
    await played.piece(0, 1)
    assert await played.trained() == (0, 8)
    await played.piece(1, 0, 1)
    assert [await played.trained(), await played.trained()] == [(1, 4), (2, 4)]


async def test_the_room_of_the_batch_at_work_is_not_named_twice(played: Played) -> None:
    """Fails when a further welcome is answered with all room there is while a batch is being trained."""
    role = played.role
    release = asyncio.Event()
    train, loop = role.trainer.train_prepared, asyncio.get_running_loop()

    def slowly(*args: Any) -> Any:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(WITHIN_S)
        return train(*args)

    role.trainer.train_prepared = slowly  # type: ignore[method-assign]
    await played.piece(0, 0, 1)
    await played.hear(Want)
    async with asyncio.timeout(WITHIN_S):
        while not role.introduce(role.hello()).batches:  # noqa: ASYNC110 - a thread is about to begin
            await asyncio.sleep(0)
    await played.link.send(TRAINER, HelloAgain(desk="b"))
    hello = await played.hear(Hello)
    assert hello.batches == 1
    assert (await played.welcome(hello)).samples == 1
    release.set()
    assert await played.trained() == (0, 4)
    assert (await played.hear(Want)).samples == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_pieces_that_follow_on_make_whole_deliveries(came: list[tuple[int, int]]) -> None:
    pieces = Pieces()
    taken = [piece for piece in came if pieces.follows(*piece)]
    assert all(piece in taken for piece in came if piece[1] == 0)
    whole: list[tuple[int, int]] = []
    for delivery, part in taken:
        whole = [(delivery, 0)] if part == 0 else [*whole, (delivery, part)]
        assert whole == [(delivery, n) for n in range(part + 1)]
