"""Scripted peers of a real buffer: they speak the real messages over real links and do no work of their own.

Source, generator, reward worker and trainer of one run, on one event loop. Bodies are made beforehand, so
that what is measured is the buffer. Results go back at once, for everything that a message brought.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from asyncrl.actor.base import SCHEMA
from asyncrl.link import ClientLink, connect
from asyncrl.messages.control import (
    PROTOCOL,
    Acks,
    BatchPart,
    Committed,
    FromBuffer,
    Hello,
    Issue,
    Issued,
    Kind,
    Leases,
    Need,
    NewVersion,
    Published,
    Refused,
    Report,
    Reports,
    Scored,
    Scores,
    Trained,
    Want,
    Welcome,
)
from asyncrl.messages.parts import encode_body
from asyncrl.messages.sample import Lane, Prompt, Score, Segment, Span, Status, pack_logprobs, pack_tokens
from asyncrl.messages.version import Manifest

PROMPT_TOKENS = 32
WINDOW_BYTES = 64 << 20
CAPACITY = 1024
"""Samples the generator and the reward worker have room for, where their bodies fit the window."""
PREFETCH = 3
"""Batches the trainer has asked for."""


@dataclass(kw_only=True)
class Bodies:
    """What the peers send; every sample has the same bytes, which the buffer does not know."""

    tokens: int
    group_size: int
    prompt: bytes = field(init=False)
    segment: bytes = field(init=False)
    score: bytes = field(init=False)

    def __post_init__(self) -> None:
        noise = os.urandom(8 * self.tokens)
        self.prompt = encode_body(Prompt(tokens=pack_tokens(range(PROMPT_TOKENS)), label="42"))
        self.segment = encode_body(
            Segment(
                tokens=noise[: 4 * self.tokens],
                logprobs=pack_logprobs([-0.5] * self.tokens),
                spans=[Span(0, 1, self.tokens)],
            )
        )
        self.score = encode_body(Score(reward=1.0))

    @property
    def capacity(self) -> int:
        """Samples that a worker holds: no more bytes than a window are handed in and not acknowledged."""
        groups = min(CAPACITY, WINDOW_BYTES // len(self.segment)) // self.group_size
        return groups * self.group_size

    @property
    def bytes_per_sample(self) -> float:
        """Bodies the buffer stores for a sample, its share of the prompt included."""
        return len(self.segment) + len(self.score) + len(self.prompt) / self.group_size


class Peer:
    """One actor's side of the desk link."""

    role = ""

    def __init__(self, bodies: Bodies) -> None:
        self.bodies = bodies
        self._link: ClientLink | None = None

    async def join(self, address: str) -> None:
        """Dial and say hello."""
        # The desk knows the source and the trainer of a run by name, and everybody by connection.
        name = self.role if self.role in {"source", "trainer"} else f"bench-{self.role}"
        self._link = connect(address, identity=f"{name}.1".encode(), receives=FromBuffer)
        hello = Hello(name=name, role=self.role, incarnation="1", protocol=PROTOCOL, schema=SCHEMA)
        await self.send(hello)
        answer = (await self._link.recv()).message
        assert isinstance(answer, Welcome), f"the buffer answered {answer}"
        await self.welcome(answer)

    async def send(self, message: msgspec.Struct, frames: Sequence[bytes] = ()) -> None:
        """To the buffer."""
        assert self._link is not None
        await self._link.send(message, frames)

    async def run(self) -> None:
        """consumes: what the buffer says    waits for: the buffer, until cancelled"""
        assert self._link is not None
        while True:
            delivery = await self._link.recv()
            assert not isinstance(delivery.message, Refused), delivery.message.reason
            await self.take(delivery.message, delivery.frames)

    async def welcome(self, welcome: Welcome) -> None:
        """The buffer has answered the hello."""

    async def take(self, message: Any, frames: list[bytes]) -> None:
        """A message from the buffer."""

    async def close(self) -> None:
        """Hang up."""
        if self._link is not None:
            await self._link.close(linger_s=0)


class Source(Peer):
    """As many prompts as are asked for."""

    role = "source"

    def __init__(self, bodies: Bodies) -> None:
        super().__init__(bodies)
        self._next = 0

    async def take(self, message: Any, frames: list[bytes]) -> None:
        del frames
        if isinstance(message, Need):
            count = message.groups
            prompts = [Issued(self.bodies.group_size, PROMPT_TOKENS)] * count
            issue = Issue(lane=Lane.TRAIN, first_group=self._next, prompts=prompts)
            self._next += count
            await self.send(issue, [self.bodies.prompt] * count)


class Generator(Peer):
    """Every leased sample is finished at once."""

    role = "generator"

    def __init__(self, bodies: Bodies) -> None:
        super().__init__(bodies)
        self.version = -1
        self.commits: list[int] = []
        """Samples in each message of acknowledgements: those that one commit of the buffer made durable."""

    async def welcome(self, welcome: Welcome) -> None:
        if welcome.announced is not None:
            await self._serve(welcome.announced.version)

    async def take(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case NewVersion():
                await self._serve(message.manifest.version)
            case Leases():
                await self._finish(message, sum(map(len, frames)))
            case Acks():
                self.commits.append(len(message.acks))

    async def _serve(self, version: int) -> None:
        first, self.version = self.version < 0, version
        await self._want(self.bodies.capacity if first else 0, WINDOW_BYTES if first else 0)

    async def _finish(self, message: Leases, num_bytes: int) -> None:
        tokens, spans = self.bodies.tokens, [Span(self.version, 1, self.bodies.tokens)]
        reports = [
            Report(
                fence=lease.fence, group_id=lease.parts.group_id, index=index, status=Status.COMPLETED,
                offset=0, num_tokens=tokens, spans=spans,
            )
            for lease in message.leases
            for index in lease.parts.indices
        ]  # fmt: skip
        await self.send(Reports(reports=reports), [self.bodies.segment] * len(reports))
        await self._want(len(reports), num_bytes)

    async def _want(self, samples: int, num_bytes: int) -> None:
        await self.send(
            Want(
                kind=Kind.GENERATE, samples=samples, num_bytes=num_bytes, version=self.version, incarnation=1,
                capacity=self.bodies.capacity,
            )
        )  # fmt: skip


class Reward(Peer):
    """Every answer is right."""

    role = "reward"

    async def welcome(self, welcome: Welcome) -> None:
        del welcome
        await self._want(self.bodies.capacity, WINDOW_BYTES)

    async def take(self, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, Leases):
            scores = [
                Scored(fence=lease.fence, group_id=lease.parts.group_id, index=index, reward=1.0)
                for lease in message.leases
                for index in lease.parts.indices
            ]
            await self.send(Scores(scores=scores), [self.bodies.score] * len(scores))
            await self._want(len(scores), sum(map(len, frames)))

    async def _want(self, samples: int, num_bytes: int) -> None:
        await self.send(
            Want(kind=Kind.SCORE, samples=samples, num_bytes=num_bytes, capacity=self.bodies.capacity)
        )


class Trainer(Peer):
    """Trains in no time, publishes every step; remembers when each batch was committed as trained."""

    role = "trainer"

    def __init__(self, bodies: Bodies) -> None:
        super().__init__(bodies)
        self.trained: list[float] = []
        """Monotonic time at which the buffer had committed each batch as trained."""
        self.changed = asyncio.Event()

    async def welcome(self, welcome: Welcome) -> None:
        del welcome
        await self._publish(0)
        await self.send(Want(kind=Kind.TRAIN, samples=PREFETCH, num_bytes=WINDOW_BYTES))

    async def take(self, message: Any, frames: list[bytes]) -> None:
        del frames
        match message:
            case BatchPart():
                await self._train(message)
            case Committed(what="trained"):
                self.trained.append(time.perf_counter())
                self.changed.set()

    async def _train(self, part: BatchPart) -> None:
        last = part.part + 1 == part.num_parts
        await self.send(Want(kind=Kind.TRAIN, samples=int(last), num_bytes=part.num_bytes))
        if not last:
            return
        now = time.time()
        step = part.batch + 1
        await self.send(
            Trained(batch=part.batch, incarnation=1, step=step, digest=f"{step:032x}", started=now, ended=now)
        )
        await self._publish(step)

    async def _publish(self, version: int) -> None:
        digest = f"{version:032x}"
        manifest = Manifest(
            run_id="bench",
            version=version,
            incarnation=1,
            step=version,
            digest=digest,
            num_bytes=0,
            tensors=[],
        )
        await self.send(Published(manifest=manifest))

    async def reached(self, batches: int) -> None:
        """Waits for: so many batches trained    unblocked by: the buffer; the caller has the deadline"""
        while len(self.trained) < batches:
            self.changed.clear()
            await self.changed.wait()
