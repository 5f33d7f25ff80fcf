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
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor, Statement
from asyncrl.actor.pieces import Pieces
from asyncrl.actor.waiting import awaiting, deadline_of
from asyncrl.errors import ExitCode, ProtocolError
from asyncrl.messages.control import (
    BatchPart,
    Committed,
    Finish,
    Hello,
    Kind,
    Published,
    Retire,
    Saved,
    Trained,
    Want,
    Welcome,
)
from asyncrl.messages.parts import unpack
from asyncrl.messages.sample import Sample
from asyncrl.obs.log import step_line
from asyncrl.obs.view import NoteUpdate
from asyncrl.train.backend import Prepared, StepReport, train_plan
from asyncrl.train.checkpoint import prune
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend
from asyncrl.train.report import concerns, step_metrics, step_update
from asyncrl.weights.pushes import Pushes, push_settings

CHECKPOINTS = "checkpoints"


class TrainerRole(DeskActor):
    """See the module's docstring.

    consumes: batches    waits for: a batch    unblocked by: generators and rewards, through the buffer
    produces: trained, versions, checkpoints
    """

    role = "trainer"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.trainer = Trainer(make_backend(train_plan(self.plan.topology)))
        self.pushes = Pushes(
            push_settings(self.plan, context.run_dir, in_memory=context.hub is not None),
            weights=self.trainer.backend.weights,
            send=self._promise,
            record=self._record,
            waits=self.waits,
            side_waits=self.side_waits,
            security=context.key,
            hub=context.hub,
        )
        self.incarnation = 0
        self._parts: asyncio.Queue[tuple[BatchPart, list[bytes]]] = asyncio.Queue()
        self._prepared: asyncio.Queue[tuple[int, str, Prepared]] = asyncio.Queue(
            maxsize=max(1, self.plan.topology.trainer.prefetch_batches)
        )
        self._finish = asyncio.Event()
        self._over = asyncio.Event()
        """Nothing is left to do once the train loop has said and saved what it has."""
        self._draining = False
        self._saved = -1
        self._last_end = time.monotonic()
        self._unsaid: dict[tuple[str, int], Statement] = {}
        """Trained batches, versions and checkpoints that are not committed, in the order they were told."""
        self._at_work = 0
        """Rollout steps in the weights once the batch that is being trained is."""
        self._introduced = self._told = 0
        """Rollout steps that the last hello named, and those that the buffer was told of."""
        self._committed: dict[tuple[str, int], asyncio.Event] = {}
        self._concerns: set[str] = set()

    def _record(self, row: dict[str, float], version: int) -> None:
        self.metrics.write(row, step=version)

    async def on_welcome(self, welcome: Welcome) -> None:
        start = welcome.trainer
        assert start is not None, "the buffer tells a trainer where to start"
        self.incarnation = start.incarnation
        checkpoint = Path(start.checkpoint) if start.checkpoint else None
        step = await self.compute(lambda: self.trainer.start(checkpoint=checkpoint))
        self._saved = self._told = step
        await self.pushes.open(start)
        await self.pushes.push(step, self._step)
        await self._want(
            1 + self.plan.topology.trainer.prefetch_batches, self.plan.topology.buffer.window_bytes
        )

    def introduce(self, hello: Hello) -> Hello:
        self._introduced = max(self._at_work, self.trainer.rollout_step)
        return msgspec.structs.replace(hello, batches=self._introduced)

    def restate(self, welcome: Welcome) -> list[Statement]:
        """What it may not have heard, in order, then all the room we have; batches come again as recorded."""
        start = welcome.trainer
        if start is None or start.incarnation != self.incarnation:
            raise ProtocolError(f"{self.name}: another life of the trainer has taken our place")
        prefetch = self.plan.topology.trainer.prefetch_batches
        # The batch at work gives its room back when it is trained, and is not delivered again.
        free = 1 + prefetch - max(0, self._introduced - self._told)
        room = Want(kind=Kind.TRAIN, samples=free, num_bytes=self.plan.topology.buffer.window_bytes)
        return [*self._unsaid.values(), (room, ())]

    async def _promise(self, message: Trained | Published | Saved, *more: msgspec.Struct) -> None:
        """Tell what has to be committed; it is said again until it is."""
        match message:
            case Trained():
                key = ("trained", message.batch)
                self._told = message.batch + 1
            case Published():
                key = ("version", message.manifest.version)
            case Saved():
                key = ("checkpoint", message.rollout_step)
        self._unsaid[key] = (message, ())
        await self.say((message, ()), *((other, ()) for other in more))

    @property
    def _step(self) -> int:
        return self.trainer.rollout_step * self.plan.num_steps_per_rollout

    async def _want(self, batches: int, num_bytes: int) -> None:
        await self.send(Want(kind=Kind.TRAIN, samples=batches, num_bytes=num_bytes))

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._fetch(), self._train(), self.pushes.serve(), self.pushes.write()]

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case BatchPart():
                self._parts.put_nowait((message, frames))
            case Retire():
                self.pushes.retire(message.below)
            case Committed():
                self._unsaid.pop((message.what, message.number), None)
                self._event(message.what, message.number).set()

    def _event(self, what: str, number: int) -> asyncio.Event:
        return self._committed.setdefault((what, number), asyncio.Event())

    # Batches.

    async def _fetch(self) -> None:
        """consumes: pieces of batches    waits for: the buffer    produces: prepared batches, one ahead"""
        groups: list[list[Sample]] = []
        pieces, rest = Pieces(), ""
        while True:
            part, frames = await self.take_piece(self._parts, "part", rest=rest, beside=True)
            if not pieces.follows(part.batch, part.part):
                await self._want(0, part.num_bytes)
                continue
            rest = pieces.rest(f"batch {part.batch}", part.num_parts)
            if part.part == 0:
                groups = []
            groups += await asyncio.to_thread(unpack, part.groups, frames)
            await self._want(0, part.num_bytes)
            if part.part + 1 == part.num_parts:
                prepared = await asyncio.to_thread(self.trainer.prepare, groups)
                with self.side_waits("training"):
                    await self._prepared.put((part.batch, part.recorded_digest, prepared))

    async def _train(self) -> None:
        """consumes: prepared batches    waits for: "batch"    produces: Trained, versions, checkpoints"""
        early: dict[int, tuple[str, Prepared]] = {}
        while True:
            due = self.trainer.rollout_step
            if due in early:
                await self._train_one(due, *early.pop(due))
                if self._draining:
                    break
                continue
            job = await self._next()
            if job is None:
                break
            batch, recorded, prepared = job
            # One that has overtaken the batch before it waits; one that we have trained came again.
            if batch >= due:
                early[batch] = (recorded, prepared)
        await self._last_deeds()

    async def _next(self) -> tuple[int, str, Prepared] | None:
        """The next batch; None once the run ends or drains."""
        waiters = [asyncio.create_task(self._prepared.get()), asyncio.create_task(self._finish.wait())]
        try:
            with self.idle("batch"):
                await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiters:
                task.cancel()
        job = waiters[0]
        return job.result() if job.done() else None  # type: ignore[return-value]

    async def _train_one(self, batch: int, recorded: str, prepared: Prepared) -> None:
        waited_s = time.monotonic() - self._last_end
        started = time.time()
        self._at_work = batch + 1
        report, digest = await self.compute(functools.partial(self.trainer.train_prepared, batch, prepared))
        ended = time.time()
        if recorded and recorded != digest:
            self.log.warning("retrained differently", batch=batch, recorded=recorded, digest=digest)
        await self._promise(
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
        await self._show(report, started=started, ended=ended, waited_s=waited_s)
        self._last_end = time.monotonic()

    async def _after_step(self, report: StepReport) -> None:
        step = self.trainer.rollout_step
        last = step == self.plan.num_rollout
        interval = self.plan.topology.rollout.update_weights_interval
        if step % interval == 0 or last:
            await self.pushes.push(step, report.step)
        save_interval = self.plan.topology.trainer.save_interval
        if last or (save_interval is not None and step % save_interval == 0):
            await self._save()

    async def _save(self) -> None:
        step = self.trainer.rollout_step
        if step <= self._saved:
            return
        began = time.monotonic()
        with self.waits("checkpoint"):
            path = await self.compute(lambda: self.trainer.save(self.context.run_dir / CHECKPOINTS))
            message = Saved(rollout_step=step, incarnation=self.incarnation, path=str(path), step=self._step)
            await self._promise(message)
        async with self._patience("checkpoint", f"the buffer to commit checkpoint {step}"):
            await self._event("checkpoint", step).wait()
        self._saved = step
        # Older ones go only now that the buffer knows the new one.
        keep = self.plan.topology.trainer.keep_checkpoints
        await self.compute(lambda: prune(self.context.run_dir / CHECKPOINTS, keep=keep))
        self.metrics.write({"perf/save_model_time": time.monotonic() - began}, step=step)
        await self.tell(NoteUpdate(text=f"checkpoint of rollout step {step} in {path}"))

    async def _last_deeds(self) -> None:
        """Publish and save what is not; a drained trainer saves only."""
        step = self.trainer.rollout_step
        if not self._draining:
            await self.pushes.push(step, self._step)
        await self._save()
        async with self._patience("finish", "the buffer to end the run (its last version and evaluation)"):
            await self._over.wait()
        self.leave(ExitCode.DRAINED if self._draining else ExitCode.FINISHED)

    def _patience(self, name: str, what: str) -> AbstractAsyncContextManager[None]:
        """A wait of the train loop for the buffer; one that restarts meanwhile hears what it has to know."""
        return awaiting(
            self.waits,
            name,
            who=self.name,
            what=what,
            deadline_s=deadline_of(self.plan.topology.run),
            advice="see the buffer's log, or raise run.stall_s; `asyncrl launch --resume RUN` goes on",
        )

    async def on_finish(self, message: Finish) -> None:
        """No batch will come; once everything is done, nothing is left to do but to leave."""
        if message.done:
            self._over.set()
        self._finish.set()

    async def drain(self) -> None:
        self._draining = True
        self._finish.set()
        self._over.set()

    async def _show(self, report: StepReport, *, started: float, ended: float, waited_s: float) -> None:
        step = self.trainer.rollout_step
        metrics = step_metrics(report, train_s=ended - started, waited_s=waited_s)
        self.metrics.write(metrics, step=step)
        update = step_update(report, step=step)
        step_line(
            self.log,
            step=step,
            total_steps=self.plan.num_rollout,
            version=step,
            reward=update.reward,
            loss=metrics.get("train/loss", 0.0),
            num_samples=report.num_samples,
            num_tokens=report.num_tokens,
            step_s=ended - started,
            wait_s=waited_s,
            staleness_mean=update.staleness_mean,
            staleness_max=update.staleness_max,
        )
        await self.tell(update)
        await self._warn(metrics, step=step)

    async def _warn(self, metrics: dict[str, float], *, step: int) -> None:
        """Say what is new among the concerns; one that lasts is said once."""
        found = concerns(metrics)
        for name in found.keys() - self._concerns:
            self.log.warning(found[name], step=step, metric=name, value=metrics[name])
            await self.tell(NoteUpdate(text=f"step {step}: {found[name]}"))
        self._concerns |= found.keys()

    async def close(self) -> None:
        await self.pushes.close()
