"""The carrier for receivers elsewhere: chunks of the publisher's file, asked for one by one.

The receiver asks and the publisher answers; nothing is sent unasked, so a slow receiver slows nobody down and
the requests under way (`MAX_OUTSTANDING`) are all that either side holds for it. The publisher keeps no state
per receiver. What arrives is verified as a whole before anybody sees a tensor.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from asyncrl.errors import ProtocolError, StalledError, WeightsError
from asyncrl.link import ClientLink, Delivery, Hub, Key, Limits, PeerGone, ServerLink, bind, connect
from asyncrl.messages.version import Manifest
from asyncrl.weights.manifest import tensors_of, verify
from asyncrl.weights.protocol import (
    MAX_CHUNK_BYTES,
    MAX_OUTSTANDING,
    Chunk,
    ChunkRequest,
    Refusal,
    ToPublisher,
    ToReceiver,
)
from asyncrl.weights.publisher import Publisher

STREAM_LIMITS = Limits(max_frame_bytes=MAX_CHUNK_BYTES, max_frames=1, max_unread=4 * MAX_OUTSTANDING)
"""For both ends. A peer that asks and does not read has at most `max_unread` chunks waiting for it."""


def bind_stream(address: str, *, security: Key | None = None, hub: Hub | None = None) -> ServerLink:
    """The link that a `StreamServer` needs; its address belongs into the manifests. Raises ConfigError."""
    return bind(address, receives=ToPublisher, limits=STREAM_LIMITS, security=security, hub=hub)


class StreamStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint did so far."""

    chunks: int
    num_bytes: int
    refusals: int
    gone: int
    """Answers nobody was there to take any more."""


class StreamServer:
    """Answers requests for chunks of what a publisher has. The link stays the caller's to close."""

    def __init__(self, link: ServerLink, publisher: Publisher) -> None:
        self._link = link
        self._publisher = publisher
        self._chunks = self._num_bytes = self._refusals = self._gone = 0

    async def serve(self) -> None:
        """consumes: chunk requests. waits for: requests. produces: chunks and refusals.

        Runs until it is cancelled. Raises LinkClosed, RunError when the link fails.
        """
        while True:
            delivery = await self._link.recv()
            try:
                await self._answer(delivery)
            except PeerGone:
                self._gone += 1

    def statistics(self) -> StreamStatistics:
        """A snapshot."""
        return StreamStatistics(
            chunks=self._chunks, num_bytes=self._num_bytes, refusals=self._refusals, gone=self._gone
        )

    async def _answer(self, delivery: Delivery) -> None:
        request: ChunkRequest = delivery.message
        try:
            data = await asyncio.to_thread(_read, self._publisher.path_of(request.digest), request)
        except WeightsError as error:
            self._refusals += 1
            answer = Refusal(digest=request.digest, offset=request.offset, reason=str(error))
            await self._link.send(delivery.peer, answer)
            return
        await self._link.send(delivery.peer, Chunk(digest=request.digest, offset=request.offset), [data])
        self._chunks += 1
        self._num_bytes += len(data)


async def fetch(
    manifest: Manifest,
    *,
    deadline_s: float,
    link: ClientLink | None = None,
    address: str | None = None,
    security: Key | None = None,
    hub: Hub | None = None,
) -> dict[str, torch.Tensor]:
    """The verified tensors of a version, from its publisher.

    Args:
        manifest: of the version.
        deadline_s: seconds the whole transfer may take.
        link: a link to the endpoint that nobody else receives on; without one, one is opened and closed.
        address: of the endpoint, where it is not the manifest's.
        security: the run's key, where the endpoint needs it.
        hub: for memory:// endpoints.

    Raises:
        WeightsError: the version was retired meanwhile, or the bytes do not have their digest.
        StalledError: the deadline passed; names the endpoint and the bytes that are missing.
        ProtocolError: the endpoint answers something else than it was asked for.
    """
    target = address or manifest.address
    if link is None and not target:
        raise WeightsError(
            f"weights {manifest.name}: the publisher has no stream endpoint to fetch them from"
        )
    transfer = _Transfer(manifest)
    opened = link or connect(
        target,
        identity=_fresh_identity(),
        receives=ToReceiver,
        limits=STREAM_LIMITS,
        security=security,
        hub=hub,
    )
    try:
        async with asyncio.timeout(deadline_s):
            await transfer.run(opened)
    except TimeoutError:
        raise StalledError(
            f"weights {manifest.name}: waited {deadline_s:g} s for {target or 'the publisher'}; "
            f"{transfer.num_received} of {manifest.num_bytes} bytes have come"
        ) from None
    finally:
        if link is None:
            await opened.close(linger_s=0)
    await asyncio.to_thread(verify, manifest, transfer.buffer)
    return tensors_of(manifest, transfer.buffer)


class _Transfer:
    """One version on its way: what is asked for, what has come."""

    def __init__(self, manifest: Manifest) -> None:
        self.buffer = bytearray(manifest.num_bytes)
        self.num_received = 0
        self._manifest = manifest
        self._to_ask = self._requests()
        self._outstanding: dict[int, int] = {}

    async def run(self, link: ClientLink) -> None:
        """consumes: chunks. waits for: the publisher. unblocked by: its answers."""
        for _ in range(MAX_OUTSTANDING):
            await self._ask(link)
        while self._outstanding:
            delivery = await link.recv()
            if self._accept(delivery):
                await self._ask(link)

    def _requests(self) -> Iterator[ChunkRequest]:
        total = self._manifest.num_bytes
        for offset in range(0, total, MAX_CHUNK_BYTES):
            num_bytes = min(MAX_CHUNK_BYTES, total - offset)
            yield ChunkRequest(digest=self._manifest.digest, offset=offset, num_bytes=num_bytes)

    async def _ask(self, link: ClientLink) -> None:
        request = next(self._to_ask, None)
        if request is not None:
            self._outstanding[request.offset] = request.num_bytes
            await link.send(request)

    def _accept(self, delivery: Delivery) -> bool:
        """Store a chunk; whether it was one that was waited for."""
        answer: Chunk | Refusal = delivery.message
        if answer.digest != self._manifest.digest or answer.offset not in self._outstanding:
            # Of an earlier transfer on the same link, or a repetition.
            return False
        if isinstance(answer, Refusal):
            raise WeightsError(f"weights {self._manifest.name}: {answer.reason}")
        expected = self._outstanding.pop(answer.offset)
        sizes = [len(body) for body in delivery.frames]
        if sizes != [expected]:
            raise ProtocolError(
                f"weights {self._manifest.name}: asked for {expected} bytes at {answer.offset}, got {sizes}"
            )
        self.buffer[answer.offset : answer.offset + expected] = delivery.frames[0]
        self.num_received += expected
        return True


def _read(path: Path | None, request: ChunkRequest) -> bytes:
    """The bytes asked for. Blocks; raises WeightsError where there are none."""
    if not 1 <= request.num_bytes <= MAX_CHUNK_BYTES or request.offset < 0:
        raise WeightsError(
            f"{request.num_bytes} bytes at {request.offset} are not 1 to {MAX_CHUNK_BYTES} bytes"
        )
    if path is None:
        raise WeightsError("the version was retired, take the newest one")
    try:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), request.num_bytes, request.offset)
    except FileNotFoundError:
        raise WeightsError("the version was retired, take the newest one") from None
    except OSError as error:
        raise WeightsError(f"the publisher cannot read {path}: {error.strerror}") from error
    if len(data) != request.num_bytes:
        raise WeightsError(f"{path} ends before {request.offset + request.num_bytes} bytes")
    return data


def _fresh_identity() -> bytes:
    return f"weights-{uuid.uuid4().hex}".encode()
