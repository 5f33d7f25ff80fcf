"""What a trainer has told the buffer that has to be committed: kept until it is.

A buffer that died may have lost it, so the role says all of `unsaid` again to one that comes back; it takes
nothing twice. What is told, and when, is the role's to decide.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

import msgspec

from asyncrl.actor.client import DeskActor, Statement
from asyncrl.actor.waiting import awaiting, deadline_of
from asyncrl.messages.control import Committed, Published, Saved, Trained


class _Promise(NamedTuple):
    told: Statement
    kept: asyncio.Event


class Promises:
    """See the module's docstring."""

    def __init__(self, actor: DeskActor) -> None:
        self._actor = actor
        self._open: dict[tuple[str, int], _Promise] = {}
        """Trained batches, versions and checkpoints that are not committed, in the order they were told."""

    @property
    def unsaid(self) -> list[Statement]:
        """Whatever is not committed, in the order it was told."""
        return [promise.told for promise in self._open.values()]

    async def promise(self, message: Trained | Published | Saved, *more: msgspec.Struct) -> None:
        """Tell what has to be committed, and `more` with it; it is said again until it is."""
        match message:
            case Trained():
                key = ("trained", message.batch)
            case Published():
                key = ("version", message.manifest.version)
            case Saved():
                key = ("checkpoint", message.rollout_step)
        self._open[key] = _Promise((message, ()), asyncio.Event())
        await self._actor.say((message, ()), *((other, ()) for other in more))

    def heard(self, message: Committed) -> None:
        """The buffer has committed something."""
        promise = self._open.pop((message.what, message.number), None)
        if promise is not None:
            promise.kept.set()

    async def committed(self, what: str, number: int) -> None:
        """Until the buffer has committed what was promised: a "checkpoint", say, by its number.

        Raises StalledError where `patience` does.
        """
        promise = self._open.get((what, number))
        if promise is None:
            return
        async with self.patience(what, f"the buffer to commit {what} {number}"):
            await promise.kept.wait()

    def patience(self, name: str, what: str) -> AbstractAsyncContextManager[None]:
        """A wait of the train loop for the buffer; one that restarts meanwhile hears what it has to know.

        Raises StalledError when the block takes longer than `actor.waiting.deadline_of`.
        """
        return awaiting(
            self._actor.waits,
            name,
            who=self._actor.name,
            what=what,
            deadline_s=deadline_of(self._actor.plan.topology.run),
            advice="see the buffer's log, or raise run.stall_s; `asyncrl launch --resume RUN` goes on",
        )
