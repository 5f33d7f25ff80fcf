"""The trainer: takes recorded batches, trains, settles, publishes, saves. Compute is on one thread.

    BatchPart... -> unpack, prepare (thread beside) -> train (compute thread) -> Trained
                                                    -> snapshot -> write (thread beside) -> Published
                                                    -> checkpoint -> Saved

What the buffer has not committed is kept, and said again to a desk that has come back without it. A trainer
that starts again loads its newest committed checkpoint, is handed the batches after it as recorded,
and publishes nothing until it reaches the last published step again.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor, Statement
from asyncrl.errors import ExitCode, ProtocolError
from asyncrl.messages.control import (
    BatchPart,
    Committed,
    Finish,
    Hello,
    Kind,
    Retire,
    Trained,
    Want,
    Welcome,
)
from asyncrl.train.backend import Prepared, StepReport, train_plan
from asyncrl.train.deliveries import Deliveries
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend
from asyncrl.train.promises import Promises
from asyncrl.train.saves import Saves
from asyncrl.train.showing import Showing
from asyncrl.weights.pushes import Pushes, push_settings


class TrainerRole(DeskActor):
    """See the module's docstring.

    consumes: batches    waits for: a batch    unblocked by: generators and rewards, through the buffer
    produces: trained, versions, checkpoints
    """

    role = "trainer"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.trainer = Trainer(make_backend(train_plan(self.plan.topology)))
        self.promises = Promises(self)
        self.pushes = Pushes(
            push_settings(self.plan, context.run_dir, in_memory=context.hub is not None),
            weights=self.trainer.backend.weights,
            send=self.promises.promise,
            record=self._record,
            waits=self.waits,
            side_waits=self.side_waits,
            security=context.key,
            hub=context.hub,
        )
        self.saves = Saves(self, trainer=self.trainer, promises=self.promises)
        self.deliveries = Deliveries(self, prepare=self.trainer.prepare)
        self.showing = Showing(
            log=self.log, metrics=self.metrics, tell=self.tell, total_steps=self.plan.num_rollout
        )
        self.incarnation = 0
        self._over = asyncio.Event()
        """Nothing is left to do once the train loop has said and saved what it has."""
        self._draining = False
        self._last_end = time.monotonic()
        self._at_work = 0
        """Rollout steps in the weights once the batch that is being trained is."""
        self._introduced = self._told = 0
        """Rollout steps that the last hello named, and those that the buffer was told of."""

    def _record(self, row: dict[str, float], version: int) -> None:
        self.metrics.write(row, step=version)

    async def on_welcome(self, welcome: Welcome) -> None:
        start = welcome.trainer
        assert start is not None, "the buffer tells a trainer where to start"
        self.incarnation = start.incarnation
        checkpoint = Path(start.checkpoint) if start.checkpoint else None
        step = await self.compute(lambda: self.trainer.start(checkpoint=checkpoint))
        self._told = step
        self.saves.begin(step)
        await self.pushes.open(start)
        await self.pushes.push(step, self._step)
        await self.deliveries.begin()

    def introduce(self, hello: Hello) -> Hello:
        self._introduced = max(self._at_work, self.trainer.rollout_step)
        return msgspec.structs.replace(hello, batches=self._introduced)

    def restate(self, welcome: Welcome) -> list[Statement]:
        """What it may not have heard, in order, then all the room we have; batches come again as recorded."""
        start = welcome.trainer
        if start is None or start.incarnation != self.incarnation:
            raise ProtocolError(f"{self.name}: another life of the trainer has taken our place")
        # The batch at work gives its room back when it is trained, and is not delivered again.
        room = self.deliveries.room(held=max(0, self._introduced - self._told))
        return [*self.promises.unsaid, (room, ())]

    @property
    def _step(self) -> int:
        return self.trainer.rollout_step * self.plan.num_steps_per_rollout

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self.deliveries.fetch(), self._train(), self.pushes.serve(), self.pushes.write()]

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case BatchPart():
                self.deliveries.put(message, frames)
            case Retire():
                self.pushes.retire(message.below)
            case Committed():
                self.promises.heard(message)

    # Training.

    async def _train(self) -> None:
        """consumes: prepared batches    waits for: "batch"    produces: Trained, versions, checkpoints"""
        while (job := await self.deliveries.next(self.trainer.rollout_step)) is not None:
            await self._train_one(*job)
            if self._draining:
                break
        await self._last_deeds()

    async def _train_one(self, batch: int, recorded: str, prepared: Prepared) -> None:
        waited_s = time.monotonic() - self._last_end
        started = time.time()
        self._at_work = batch + 1
        report, digest = await self.compute(functools.partial(self.trainer.train_prepared, batch, prepared))
        ended = time.time()
        if recorded and recorded != digest:
            self.log.warning("retrained differently", batch=batch, recorded=recorded, digest=digest)
        self._told = batch + 1
        await self.promises.promise(
            Trained(
                batch=batch,
                incarnation=self.incarnation,
                step=report.step,
                digest=digest,
                started=started,
                ended=ended,
                tokens=report.num_tokens,
            ),
            Want(kind=Kind.TRAIN, samples=1),
        )
        await self._after_step(report)
        step = self.trainer.rollout_step
        await self.showing.show(report, step=step, started=started, ended=ended, waited_s=waited_s)
        self._last_end = time.monotonic()

    async def _after_step(self, report: StepReport) -> None:
        step = self.trainer.rollout_step
        last = step == self.plan.num_rollout
        interval = self.plan.topology.rollout.update_weights_interval
        if step % interval == 0 or last:
            await self.pushes.push(step, report.step)
        save_interval = self.plan.topology.trainer.save_interval
        if last or (save_interval is not None and step % save_interval == 0):
            await self.saves.save(step=self._step, incarnation=self.incarnation)

    async def _last_deeds(self) -> None:
        """Publish and save what is not; a drained trainer saves only."""
        step = self.trainer.rollout_step
        if not self._draining:
            await self.pushes.push(step, self._step)
        await self.saves.save(step=self._step, incarnation=self.incarnation)
        what = "the buffer to end the run (its last version and evaluation)"
        async with self.promises.patience("finish", what):
            await self._over.wait()
        self.leave(ExitCode.DRAINED if self._draining else ExitCode.FINISHED)

    async def on_finish(self, message: Finish) -> None:
        """No batch will come; once everything is done, nothing is left to do but to leave."""
        if message.done:
            self._over.set()
        self.deliveries.finish()

    async def drain(self) -> None:
        self._draining = True
        self.deliveries.finish()
        self._over.set()

    async def close(self) -> None:
        await self.pushes.close()
