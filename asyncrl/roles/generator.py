"""A generator: samples answers on leases, hands in what it has, and serves only weights it has verified.

leases -> one task per sample -> engine -> reports -> buffer
NewVersion -> receive, verify -> engine.load_weights -> Swapped, credit under the new version
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor, Statement
from asyncrl.actor.leased import Job, Leased
from asyncrl.actor.reports import Outbox, SampleReports
from asyncrl.actor.waiting import deadline_of
from asyncrl.engines import session
from asyncrl.engines.answering import Answering
from asyncrl.engines.base import GenerateRequest, OnNewWeights
from asyncrl.engines.serving import Serving
from asyncrl.errors import AsyncrlError, ExitCode
from asyncrl.messages.control import Acks, Hello, Leases, NewVersion, Swapped, Welcome
from asyncrl.messages.sample import Sample, Segment, Status
from asyncrl.messages.version import Manifest
from asyncrl.obs.view import MemberUpdate
from asyncrl.obs.vitals import Facts
from asyncrl.topology.plan import generator_credit


class GeneratorRole(DeskActor):
    """See the module's docstring.

    consumes: leases            waits for: work       unblocked by: source, trainer (tickets)
    produces: reports           waits for: acknowledgements of progress    unblocked by: the buffer
    """

    role = "generator"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        assert context.index is not None, "a generator has a table"
        self.table = self.plan.topology.generator[context.index]
        self.capacity = generator_credit(self.table)
        self.answering = Answering()
        self.leased = Leased(capacity=self.capacity, max_bytes=self.table.max_bytes)
        self.outbox = Outbox(
            self.send,
            max_bytes=self.table.max_bytes,
            name=self.name,
            deadline_s=deadline_of(self.plan.topology.run),
            waits=self.side_waits,
        )
        mode = OnNewWeights(self.table.on_new_weights)
        self.serving = Serving(self, mode=mode, swapped=self._swapped)
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()

    async def open(self) -> None:
        await self.answering.open(self, index=self.context.index or 0)

    async def on_welcome(self, welcome: Welcome) -> None:
        if welcome.announced is not None:
            self.serving.announce(welcome.announced)

    def introduce(self, hello: Hello) -> Hello:
        """With the leases that we work on, or whose last report is not acknowledged."""
        return msgspec.structs.replace(hello, leases=sorted({*self.leased.fences, *self.outbox.fences}))

    def restate(self, welcome: Welcome) -> list[Statement]:
        """Running answers go on; those that have gone to others end, and their reports will be refused."""
        held = set(welcome.held)
        for uid in list(self.outbox.open_uids()):
            if int(uid.partition(".")[0]) not in held:
                self.answering.engine.abort(uid)
        if welcome.announced is not None:
            self.serving.announce(welcome.announced)
        room = self.leased.all_room(self.version)
        # Without weights there is nothing to ask for yet.
        return [*self.outbox.again(), *([(room, ())] if self.version[0] >= 0 else [])]

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        swaps = self.serving.follow(self.answering.engine)
        return [swaps, self._sample_all(), self.outbox.write(), self._credit(), self._count_idle()]

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case Leases():
                for job in self.leased.take(message, frames, known=self.outbox.fences):
                    self._jobs.put_nowait(job)
            case Acks():
                self.outbox.acknowledged(message.acks)
                for ack in message.acks:
                    if not ack.accepted:  # it belongs to somebody else now
                        self.answering.engine.abort(f"{ack.fence}.{ack.index}")
            case NewVersion():
                self.serving.announce(message.manifest)

    # Work.

    async def _sample_all(self) -> None:
        """consumes: leased samples    waits for: leases    produces: one task per sample"""
        async with asyncio.TaskGroup() as tasks:
            while True:
                with self.idle("sample", beside=True):
                    job = await self._jobs.get()
                tasks.create_task(self._sample(job))

    async def _count_idle(self) -> None:
        """Charge the time in which nothing is leased to us to "lease"."""
        while True:
            with self.idle("lease"):
                await self.leased.busy.wait()
            await self.leased.idle.wait()

    async def _sample(self, job: Job) -> None:
        """One sample from lease to last report; its room is free again when that report is on its way."""
        lease, sample = job.lease, job.sample
        out = self.outbox.open(lease.fence, sample.group_id, sample.index, sample.num_tokens)
        uid = f"{lease.fence}.{sample.index}"
        wrong_version = sample.lane == "eval" and lease.version != self.answering.engine.version[0]
        if self.leased.draining or wrong_version:
            await out.report(Segment(), Status.ABORTED, "not started")
        else:
            request = session.request_for(self.plan, sample, uid=uid)
            try:
                await self._run(out, request, sample)
            except (AsyncrlError, ValueError) as error:
                if not self.answering.runs_user_code and not isinstance(error, ValueError):
                    raise  # the engine's own failure ends the generator
                await out.report(Segment(), Status.FAILED, str(error))
        self.leased.done(job)

    async def _run(self, out: SampleReports, request: GenerateRequest, sample: Sample) -> None:
        if self.answering.runs_user_code:
            await out.report(*await self.answering.by_user(request, sample))
            return
        async for segment, status in session.generate(self.answering.engine, request):
            await out.report(segment, status)
            if out.failed:
                self.answering.engine.abort(request.uid)

    async def _credit(self) -> None:
        """consumes: freed room    waits for: samples to end    produces: one Want for all of it"""
        while True:
            with self.side_waits("room"):
                await self.leased.room.wait()
            await self.send(self.leased.want(self.version))

    async def _swapped(self, manifest: Manifest, swapped: Swapped) -> None:
        """It serves a version; under the first one it asks for work."""
        first = self.version[0] < 0
        self.version = (manifest.version, manifest.incarnation)
        room = (self.capacity, self.table.max_bytes) if first else (0, 0)
        await self.say((swapped, ()), (self.leased.credit(*room, version=self.version), ()))

    # The end.

    async def drain(self) -> None:
        self.leased.draining = True
        while not self._jobs.empty():  # noqa: ASYNC110 - one turn of the loop is what is waited for
            await asyncio.sleep(0)  # let leases that have just arrived become samples to hand back
        for uid in list(self.outbox.open_uids()):
            self.answering.engine.abort(uid)
        await self.outbox.drained()
        self.leave(ExitCode.DRAINED)

    def member(self) -> MemberUpdate:
        serving = self.serving
        return msgspec.structs.replace(
            super().member(),
            version=self.version[0],
            generated_tokens=self.answering.generated_tokens,
            push_pause_s=serving.pause_s,
            digest=serving.digest,
            held=self.leased.held,
            load_s=serving.load_s,
            loading_s=serving.loading_s,
            problem=serving.refused,
        )

    def vitals(self) -> Facts:
        news = self.serving.missing
        return msgspec.structs.replace(
            super().vitals(),
            held=self.leased.held,
            capacity=self.capacity,
            version=self.version[0],
            announced=None if news is None else news.version,
            announced_s=self.serving.loading_s,
        )

    async def close(self) -> None:
        await self.answering.close()
