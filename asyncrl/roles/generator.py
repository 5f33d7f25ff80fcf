"""A generator: samples answers on leases, hands in what it has, and serves only weights it has verified.

leases -> one task per sample -> engine -> reports -> buffer
NewVersion -> receive, verify -> engine.load_weights -> Swapped, credit under the new version
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor, Statement
from asyncrl.actor.reports import Outbox, SampleReports
from asyncrl.actor.waiting import awaiting, deadline_of
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.engines import session
from asyncrl.engines.base import Engine, GenerateRequest, OnNewWeights
from asyncrl.engines.make import make_engine
from asyncrl.engines.swap import Swapper, push_metrics
from asyncrl.errors import AsyncrlError, ExitCode, WeightsError
from asyncrl.messages.control import Acks, Hello, Kind, Lease, Leases, NewVersion, Want, Welcome
from asyncrl.messages.hooks import Args
from asyncrl.messages.parts import leased_bytes, unpack
from asyncrl.messages.sample import Sample, Segment, Status
from asyncrl.messages.version import Manifest
from asyncrl.obs.log import version_line
from asyncrl.obs.view import MemberUpdate, NoteUpdate
from asyncrl.obs.vitals import Facts
from asyncrl.topology.flat import flat_options
from asyncrl.topology.plan import generator_credit
from asyncrl.topology.plugins import load_checked

FETCH_AGAIN_S = 5.0
"""How long a version whose bytes are bad is left alone before it is fetched again."""


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
        self.outbox = Outbox(
            self.send,
            max_bytes=self.table.max_bytes,
            name=self.name,
            deadline_s=deadline_of(self.plan.topology.run),
            waits=self.side_waits,
        )
        self.swapper = Swapper(
            mode=OnNewWeights(self.table.on_new_weights),
            deadline_s=self.plan.topology.weights.push_timeout_s,
            security=context.key,
            hub=context.hub,
        )
        self._jobs: asyncio.Queue[tuple[Lease, Sample, int]] = asyncio.Queue()
        self._announced: Manifest | None = None
        self._announced_at = 0.0
        self._news = asyncio.Event()
        self._moved = asyncio.Event()
        """The version that is being fetched is announced again, or by another publisher."""
        self._engine: Engine | None = None
        self._custom: Callable[..., Any] | None = None
        self._args: Args | None = None
        self._draining = False
        self._held = 0
        self._leases: Counter[int] = Counter()
        """Of those, by fence."""
        self._held_bytes = 0
        """Bytes of leases of which the first sample is not handed in: credit that is not given back."""
        self._busy, self._idle = asyncio.Event(), asyncio.Event()
        """Samples leased to us and not handed in."""
        self._freed = (0, 0)
        """Samples and bytes handed in since the last credit."""
        self._room = asyncio.Event()
        self._pause_s: float | None = None
        self._load_s: float | None = None
        self._digest = ""
        """Of the version it serves."""
        self._refused = ""
        """Why it does not serve the announced version."""
        self._failures = 0
        """Versions that could not be served, each attempt counted."""

    @property
    def engine(self) -> Engine:
        """The engine, once `open` has made it."""
        assert self._engine is not None
        return self._engine

    async def open(self) -> None:
        topology = self.plan.topology
        tokenizer = await self.compute(lambda: Tokenizer.load(topology.trainer.hf_checkpoint))
        skip = topology.rollout.rollout_skip_special_tokens
        self._engine = make_engine(
            self.plan,
            self.context.index or 0,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=skip),
        )
        path = topology.rollout.custom_generate_function_path
        if path is not None:
            option = "rollout.custom_generate_function_path"
            self._custom, _ = load_checked(path, kind="generate", option=option)
            options = flat_options(self.plan.topology, generator=self.context.index)
            self._args = Args(options, custom_config_path=topology.run.custom_config_path)
        await self.engine.start()

    async def on_welcome(self, welcome: Welcome) -> None:
        if welcome.announced is not None:
            self._announce(welcome.announced)

    def introduce(self, hello: Hello) -> Hello:
        return msgspec.structs.replace(hello, leases=self._fences())

    def _fences(self) -> list[int]:
        """Leases that we work on, or whose last report is not acknowledged."""
        return sorted({*self._leases, *self.outbox.fences})

    def restate(self, welcome: Welcome) -> list[Statement]:
        """Running answers go on; those that have gone to others end, and their reports will be refused."""
        held = set(welcome.held)
        for uid in list(self.outbox.open_uids()):
            if int(uid.partition(".")[0]) not in held:
                self.engine.abort(uid)
        if welcome.announced is not None:
            self._announce(welcome.announced)
        self._freed = (0, 0)
        room = self._credit_message(self.capacity - self._held, self.table.max_bytes - self._held_bytes)
        # Without weights there is nothing to ask for yet.
        return [*self.outbox.again(), *([(room, ())] if self.version[0] >= 0 else [])]

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._swap(), self._sample_all(), self.outbox.write(), self._credit(), self._count_idle()]

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case Leases():
                self._take(message, frames)
            case Acks():
                self.outbox.acknowledged(message.acks)
                for ack in message.acks:
                    if not ack.accepted:  # it belongs to somebody else now
                        self.engine.abort(f"{ack.fence}.{ack.index}")
            case NewVersion():
                self._announce(message.manifest)

    def _announce(self, manifest: Manifest) -> None:
        old = self._announced
        if old is not None and (old.version == manifest.version or old.address != manifest.address):
            self._moved.set()
        self._announced, self._announced_at = manifest, time.monotonic()
        self._news.set()

    # Work.

    def _take(self, message: Leases, frames: list[bytes]) -> None:
        groups = unpack([lease.parts for lease in message.leases], frames)
        sizes = iter(frames)
        for lease, samples in zip(message.leases, groups, strict=True):
            num_bytes = leased_bytes(lease.parts, sizes)
            if lease.fence in self._leases or lease.fence in self.outbox.fences:
                # Sent again by a desk that could not know it arrived: only its charge is to be given back.
                self._freed = (self._freed[0] + len(samples), self._freed[1] + num_bytes)
                self._room.set()
                continue
            self._held += len(samples)
            self._held_bytes += num_bytes
            self._leases[lease.fence] += len(samples)
            self._idle.clear()
            self._busy.set()
            for number, sample in enumerate(samples):
                # Bytes are given back with the first sample: their sum has to come out even.
                self._jobs.put_nowait((lease, sample, 0 if number else num_bytes))

    async def _sample_all(self) -> None:
        """consumes: leased samples    waits for: leases    produces: one task per sample"""
        async with asyncio.TaskGroup() as tasks:
            while True:
                with self.idle("sample", beside=True):
                    job = await self._jobs.get()
                tasks.create_task(self._sample(*job))

    async def _count_idle(self) -> None:
        """Charge the time in which nothing is leased to us to "lease"."""
        while True:
            with self.idle("lease"):
                await self._busy.wait()
            await self._idle.wait()

    async def _sample(self, lease: Lease, sample: Sample, num_bytes: int) -> None:
        """One sample from lease to last report; its room is free again when that report is on its way."""
        out = self.outbox.open(lease.fence, sample.group_id, sample.index, sample.num_tokens)
        uid = f"{lease.fence}.{sample.index}"
        wrong_version = sample.lane == "eval" and lease.version != self.engine.version[0]
        if self._draining or wrong_version:
            await out.report(Segment(), Status.ABORTED, "not started")
        else:
            request = session.request_for(self.plan, sample, uid=uid)
            try:
                await self._run(out, request, sample)
            except (AsyncrlError, ValueError) as error:
                if self._custom is None and not isinstance(error, ValueError):
                    raise  # the engine's own failure ends the generator
                await out.report(Segment(), Status.FAILED, str(error))
        self._held -= 1
        self._held_bytes -= num_bytes
        self._leases -= Counter([lease.fence])
        if not self._held:
            self._busy.clear()
            self._idle.set()
        self._freed = (self._freed[0] + 1, self._freed[1] + num_bytes)
        self._room.set()

    async def _run(self, out: SampleReports, request: GenerateRequest, sample: Sample) -> None:
        if self._custom is not None and self._args is not None:
            piece = await session.generate_custom(self._custom, self.engine, request, sample, self._args)
            await out.report(*piece)
            return
        async for segment, status in session.generate(self.engine, request):
            await out.report(segment, status)
            if out.failed:
                self.engine.abort(request.uid)

    async def _credit(self) -> None:
        """consumes: freed room    waits for: samples to end    produces: one Want for all of it"""
        while True:
            with self.side_waits("room"):
                await self._room.wait()
            self._room.clear()
            samples, num_bytes = self._freed
            self._freed = (0, 0)
            await self.send(self._credit_message(samples, num_bytes))

    def _credit_message(self, samples: int, num_bytes: int) -> Want:
        version, incarnation = self.version
        if self._draining:
            samples = num_bytes = 0  # else what it hands back would come again
        return Want(
            kind=Kind.GENERATE,
            samples=samples,
            num_bytes=num_bytes,
            version=version,
            incarnation=incarnation,
            capacity=self.capacity,
        )

    # Versions.

    async def _swap(self) -> None:
        """consumes: announced versions    waits for: the trainer's pushes    produces: Swapped, credit"""
        while True:
            with self.idle("version", beside=True):
                await self._news.wait()
            self._news.clear()
            manifest = self._announced
            assert manifest is not None, "news name a version"
            if (manifest.version, manifest.incarnation) == self.version:
                continue
            self._moved.clear()
            try:
                with self.side_waits("weights"):  # its deadline is weights.push_timeout_s
                    swapped = await self.swapper.swap(
                        self.engine, manifest, is_newest=lambda m: m is self._announced, moved=self._moved
                    )
            except WeightsError as error:
                await self._refuse(error)
                continue
            if swapped is None:
                continue  # retired while we were fetching it, or to be had elsewhere: there is news
            self._refused = ""
            first = self.version[0] < 0
            if first:
                await self._warm_up()
            self.version = (manifest.version, manifest.incarnation)
            self._digest = manifest.digest
            self._pause_s, self._load_s = swapped.pause_s, time.monotonic() - self._announced_at
            room = (self.capacity, self.table.max_bytes) if first else (0, 0)
            await self.say((swapped, ()), (self._credit_message(*room), ()))
            self.metrics.write(push_metrics(swapped, manifest))
            version_line(
                self.log,
                version=manifest.version,
                incarnation=manifest.incarnation,
                step=manifest.step,
                digest=manifest.digest,
                num_bytes=manifest.num_bytes,
                seconds=swapped.transfer_s,
                pause_s=swapped.pause_s,
            )

    async def _refuse(self, error: WeightsError) -> None:
        """Bytes that are not what was announced: what it serves stays, and the version is fetched again.

        Dying would not mend them: they stay bad until they are fetched well, or the next version is there.
        """
        if self._refused != str(error):
            self._refused = str(error)
            self.log.error("version refused", reason=self._refused)
            await self.tell(NoteUpdate(text=f"{self.name} does not serve what it was sent: {self._refused}"))
        self._failures += 1
        self.metrics.write({"push/failures": self._failures})
        with contextlib.suppress(TimeoutError), self.side_waits("version"):
            async with asyncio.timeout(FETCH_AGAIN_S):
                await self._news.wait()
        self._news.set()

    async def _warm_up(self) -> None:
        async with awaiting(
            self.side_waits,
            "engine",
            who=self.name,
            what="the first token of its engine",
            deadline_s=self.plan.topology.run.stall_s,
            advice="look at the engine's own log, or raise run.stall_s",
        ):
            await session.warm_up(self.engine)

    # The end.

    async def drain(self) -> None:
        self._draining = True
        while not self._jobs.empty():  # noqa: ASYNC110 - one turn of the loop is what is waited for
            await asyncio.sleep(0)  # let leases that have just arrived become samples to hand back
        for uid in list(self.outbox.open_uids()):
            self.engine.abort(uid)
        await self.outbox.drained()
        self.leave(ExitCode.DRAINED)

    def member(self) -> MemberUpdate:
        tokens = self._engine.statistics().generated_tokens if self._engine is not None else 0
        return msgspec.structs.replace(
            super().member(),
            version=self.version[0],
            generated_tokens=tokens,
            push_pause_s=self._pause_s,
            digest=self._digest,
            held=self._held,
            load_s=self._load_s,
            loading_s=self._loading_s(),
            problem=self._refused,
        )

    def _loading_s(self) -> float:
        """Since a version was announced that it does not serve yet."""
        news = self._announced
        if news is None or (news.version, news.incarnation) == self.version:
            return 0.0
        return time.monotonic() - self._announced_at

    def vitals(self) -> Facts:
        facts = msgspec.structs.replace(
            super().vitals(), held=self._held, capacity=self.capacity, version=self.version[0]
        )
        news = self._announced
        if news is None or (news.version, news.incarnation) == self.version:
            return facts
        return msgspec.structs.replace(facts, announced=news.version, announced_s=self._loading_s())

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()
