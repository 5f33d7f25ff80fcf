"""Batches on their way to the trainer: put together from pieces, prepared ahead, handed out in their turn.

    BatchPart... -> unpack, prepare (thread beside) -> next

It owns the room that is given back to the buffer for pieces, and what is prepared. It trains nothing and
decides only the order: a batch that has overtaken the one before it waits, one that is past came again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from asyncrl.actor.client import DeskActor
from asyncrl.actor.pieces import Pieces
from asyncrl.messages.control import BatchPart, Kind, Want
from asyncrl.messages.parts import unpack
from asyncrl.messages.sample import Sample
from asyncrl.obs.vitals import Part
from asyncrl.train.backend import Prepared


class Job(NamedTuple):
    """A batch to train."""

    batch: int
    recorded: str
    """Digest of the weights it led to when it was trained before; empty: it was not."""
    prepared: Prepared


class Deliveries(Part):
    """See the module's docstring."""

    def __init__(self, actor: DeskActor, *, prepare: Callable[[list[list[Sample]]], Prepared]) -> None:
        """`prepare` is called on a thread beside training, for `trainer.prefetch_batches` ahead of it."""
        self._actor = actor
        self._prepare = prepare
        self._parts: asyncio.Queue[tuple[BatchPart, list[bytes]]] = asyncio.Queue()
        self._prepared: asyncio.Queue[Job] = asyncio.Queue(
            maxsize=max(1, actor.plan.topology.trainer.prefetch_batches)
        )
        self._finish = asyncio.Event()
        self._early: dict[int, Job] = {}
        """Prepared, and not yet due when they came."""

    def put(self, part: BatchPart, frames: list[bytes]) -> None:
        """A piece has come."""
        self._parts.put_nowait((part, frames))

    def finish(self) -> None:
        """No batch will come, or none is wanted any more."""
        self._finish.set()

    def room(self, *, held: int = 0) -> Want:
        """All the credit there is, while the trainer holds so many batches that give theirs back later."""
        topology = self._actor.plan.topology
        free = 1 + topology.trainer.prefetch_batches - held
        return Want(kind=Kind.TRAIN, samples=free, num_bytes=topology.buffer.window_bytes)

    async def begin(self) -> None:
        """Give the first credit."""
        await self._actor.send(self.room())

    async def _taken(self, part: BatchPart) -> None:
        """A piece lies here no longer: its bytes are credit again."""
        await self._actor.send(Want(kind=Kind.TRAIN, samples=0, num_bytes=part.num_bytes))

    async def fetch(self) -> None:
        """consumes: pieces of batches    waits for: the buffer    produces: prepared batches, one ahead"""
        groups: list[list[Sample]] = []
        pieces, rest = Pieces(), ""
        while True:
            part, frames = await self._actor.take_piece(self._parts, "part", rest=rest, beside=True)
            if not pieces.follows(part.batch, part.part):
                await self._taken(part)
                continue
            rest = pieces.rest(f"batch {part.batch}", part.num_parts)
            if part.part == 0:
                groups = []
            groups += await asyncio.to_thread(unpack, part.groups, frames)
            await self._taken(part)
            if part.part + 1 == part.num_parts:
                prepared = await asyncio.to_thread(self._prepare, groups)
                with self._actor.side_waits("training"):
                    await self._prepared.put(Job(part.batch, part.recorded_digest, prepared))

    async def next(self, due: int) -> Job | None:
        """Batch `due`, once it is here; None once the run ends or drains and nothing more is prepared."""
        while due not in self._early:
            job = await self._any()
            if job is None:
                return None
            if job.batch >= due:
                self._early[job.batch] = job
        return self._early.pop(due)

    async def _any(self) -> Job | None:
        """The next batch that is prepared, in its turn or not; None once the run ends or drains."""
        getting = asyncio.create_task(self._prepared.get())
        finishing = asyncio.create_task(self._finish.wait())
        try:
            with self._actor.idle("batch"):
                await asyncio.wait((getting, finishing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            getting.cancel()
            finishing.cancel()
        return getting.result() if getting.done() else None
