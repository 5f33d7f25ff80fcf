"""One contract over the carriers: verified tensors, equal to the bit, or a clear error in good time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from asyncrl.errors import ProtocolError, StalledError, WeightsError
from asyncrl.link import Delivery, Hub, Key, ServerLink, connect, make_key
from asyncrl.messages.version import Manifest
from asyncrl.weights.carriers import chosen, receive
from asyncrl.weights.carriers.stream import STREAM_LIMITS, StreamServer, bind_stream, fetch
from asyncrl.weights.host import host_identity
from asyncrl.weights.protocol import Chunk, ChunkRequest, Refusal, ToReceiver
from asyncrl.weights.publisher import Publisher

DEADLINE_S = 20.0
ELSEWHERE = "another host"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "embed": torch.randn(1000, 1500, generator=generator),
        "layer": torch.randn(700, 1001, generator=generator).bfloat16(),
        "scalar": torch.tensor(1.5, dtype=torch.float16),
        "steps": torch.arange(5),
        "empty": torch.empty(0, 3),
    }
    return {**tensors, "head": tensors["embed"]}


class Desk:
    """A publisher with an endpoint, and a receiver of one kind."""

    def __init__(self, carrier: str, directory: Path, link: ServerLink, hub: Hub, key: Key | None) -> None:
        self.publisher = Publisher(directory, run_id="run", incarnation=1, keep=1, address=link.address)
        self.server = StreamServer(link, self.publisher)
        self.link = link
        self.serving = asyncio.ensure_future(self.server.serve())
        self.hub = hub
        self.key = key
        self.host = host_identity() if carrier == "shm" else ELSEWHERE

    def publish(self, version: int = 1, tensors: dict[str, torch.Tensor] | None = None) -> Manifest:
        snapshot = self.publisher.snapshot(weights(version) if tensors is None else tensors)
        return self.publisher.write(snapshot, version=version, step=version)

    async def receive(self, manifest: Manifest, deadline_s: float = DEADLINE_S) -> dict[str, torch.Tensor]:
        async with asyncio.timeout(DEADLINE_S + 5):
            return await receive(
                manifest, host=self.host, security=self.key, hub=self.hub, deadline_s=deadline_s
            )

    async def close(self) -> None:
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        await self.link.close(linger_s=0)
        self.publisher.close()


@pytest.fixture(params=["shm", "stream-tcp", "stream-ipc", "stream-memory", "stream-tcp-key"])
async def desk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Desk]:
    hub = Hub()
    carrier, _, scheme = request.param.partition("-")
    key = make_key(tmp_path / "key") if scheme == "tcp-key" else None
    address = {"ipc": f"ipc://{tmp_path}/stream", "memory": "memory://stream"}.get(
        scheme, "tcp://127.0.0.1:0"
    )
    made = Desk(carrier, tmp_path / "weights", bind_stream(address, security=key, hub=hub), hub, key)
    yield made
    await made.close()


@pytest.fixture
async def streaming(tmp_path: Path) -> AsyncIterator[Desk]:
    made = Desk("stream", tmp_path / "weights", bind_stream("tcp://127.0.0.1:0"), Hub(), None)
    yield made
    await made.close()


def damage(manifest: Manifest, *, at: int) -> None:
    with Path(manifest.path).open("r+b") as file:
        file.seek(at)
        file.write(b"damage")


def assert_equal(received: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> None:
    assert received.keys() == sent.keys()
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor), name


async def test_what_arrives_is_equal_to_the_bit(desk: Desk) -> None:
    assert_equal(await desk.receive(desk.publish(1)), weights(1))
    assert_equal(await desk.receive(desk.publish(2)), weights(2))


async def test_several_receivers_at_once_each_get_all(desk: Desk) -> None:
    manifest = desk.publish(1)
    for received in await asyncio.gather(*(desk.receive(manifest) for _ in range(3))):
        assert_equal(received, weights(1))


async def test_a_version_without_bytes_arrives_too(desk: Desk) -> None:
    tensors = {"empty": torch.empty(0, 3)}
    assert_equal(await desk.receive(desk.publish(1, tensors)), tensors)


async def test_damage_is_noticed_and_named(desk: Desk) -> None:
    manifest = desk.publish(1)
    entry = next(e for e in manifest.tensors if e.name == "layer")
    damage(manifest, at=entry.offset + 1000)
    with pytest.raises(WeightsError, match="'layer'"):
        await desk.receive(manifest)


async def test_a_truncated_file_is_noticed(desk: Desk) -> None:
    manifest = desk.publish(1)
    os.truncate(manifest.path, manifest.num_bytes - 1)
    with pytest.raises(WeightsError, match=r"bytes instead of|ends before"):
        await desk.receive(manifest)


async def test_a_retired_version_is_a_clear_error(desk: Desk) -> None:
    old = desk.publish(1)
    desk.publish(2)
    assert desk.publisher.retire(1)
    with pytest.raises(WeightsError, match="retired"):
        await desk.receive(old)


async def test_tensors_outlive_their_version_and_writing_to_them_harms_nobody(desk: Desk) -> None:
    manifest = desk.publish(1)
    mine, theirs = await desk.receive(manifest), await desk.receive(manifest)
    mine["embed"].zero_()
    desk.publish(2)
    desk.publisher.retire(1)
    assert_equal(theirs, weights(1))


async def test_the_shortest_way_is_taken(desk: Desk) -> None:
    manifest = desk.publish(1)
    assert chosen(manifest, host=host_identity()) == "shm"
    assert chosen(manifest, host=ELSEWHERE) == "stream"
    os.unlink(manifest.path)  # noqa: PTH108 - pathlib's is taken for slow here
    assert chosen(manifest, host=host_identity()) == "stream"


# The stream alone


async def test_a_version_retired_in_the_middle_of_a_stream_is_a_clear_error(streaming: Desk) -> None:
    manifest = streaming.publish(1)
    streaming.publish(2)
    link = Retiring(streaming, manifest)
    with pytest.raises(WeightsError, match="retired"):
        await fetch(manifest, link=link, deadline_s=DEADLINE_S)
    assert link.num_chunks >= 1
    await link.close()


class Retiring:
    """A link that sends only the first request, and the others when that was answered and all is retired."""

    def __init__(self, desk: Desk, manifest: Manifest) -> None:
        self._desk = desk
        self._manifest = manifest
        self._link = connect(manifest.address, identity=b"r", receives=ToReceiver, limits=STREAM_LIMITS)
        self.num_chunks = 0
        self._held: list[ChunkRequest] = []
        self.statistics = self._link.statistics
        self.close = self._link.close

    async def send(self, message: Any, frames: Any = ()) -> None:
        if message.offset == 0:
            await self._link.send(message, frames)
        else:
            self._held.append(message)

    async def recv(self) -> Delivery:
        delivery = await self._link.recv()
        self.num_chunks += isinstance(delivery.message, Chunk)
        self._desk.publisher.retire(self._manifest.version)
        while self._held:
            await self._link.send(self._held.pop())
        return delivery


async def test_a_publisher_that_does_not_answer_is_a_stall_that_says_what_was_waited_for(
    streaming: Desk,
) -> None:
    manifest = streaming.publish(1)
    streaming.serving.cancel()
    with pytest.raises(StalledError) as caught:
        await streaming.receive(manifest, deadline_s=0.2)
    for word in ("v1.1", "0.2 s", manifest.address, f"0 of {manifest.num_bytes} bytes"):
        assert word in str(caught.value)


async def test_without_an_endpoint_there_is_nothing_to_wait_for(streaming: Desk) -> None:
    manifest = msgspec.structs.replace(streaming.publish(1), address="")
    with pytest.raises(WeightsError, match="no stream endpoint"):
        await streaming.receive(manifest)


async def test_requests_nobody_may_make_are_refused(streaming: Desk) -> None:
    manifest = streaming.publish(1)
    link = connect(manifest.address, identity=b"r", receives=ToReceiver, limits=STREAM_LIMITS)
    bad = [
        ChunkRequest(digest=manifest.digest, offset=0, num_bytes=(1 << 20) + 1),
        ChunkRequest(digest=manifest.digest, offset=0, num_bytes=0),
        ChunkRequest(digest=manifest.digest, offset=-1, num_bytes=1),
        ChunkRequest(digest=manifest.digest, offset=manifest.num_bytes, num_bytes=1),
        ChunkRequest(digest=manifest.digest, offset=1 << 62, num_bytes=1),
        ChunkRequest(digest="../../etc/passwd", offset=0, num_bytes=1),
    ]
    async with asyncio.timeout(DEADLINE_S):
        for request in bad:
            await link.send(request)
            assert isinstance((await link.recv()).message, Refusal)
    assert streaming.server.statistics().refusals == len(bad)
    await link.close()


async def test_an_asker_that_does_not_read_stops_nobody(streaming: Desk) -> None:
    manifest = streaming.publish(1)
    lazy = connect(
        manifest.address,
        identity=b"lazy",
        receives=ToReceiver,
        limits=msgspec.structs.replace(STREAM_LIMITS, max_queued=1, max_unread=1),
    )
    request = ChunkRequest(digest=manifest.digest, offset=0, num_bytes=1 << 20)
    asking = asyncio.ensure_future(ask_for_ever(lazy, request))
    async with asyncio.timeout(DEADLINE_S):
        while not streaming.server.statistics().gone:  # noqa: ASYNC110 - a counter has no event
            await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert_equal(await streaming.receive(manifest), weights(1))
    await lazy.close(linger_s=0)


async def ask_for_ever(link: Any, request: ChunkRequest) -> None:
    while True:
        await link.send(request)


async def test_an_endpoint_that_answers_something_else_is_a_protocol_error(tmp_path: Path) -> None:
    hub = Hub()
    link = bind_stream("memory://liar", hub=hub)
    publisher = Publisher(tmp_path, run_id="run", incarnation=1, address=link.address)
    manifest = publisher.write(publisher.snapshot(weights()), version=1, step=1)
    fetching = asyncio.ensure_future(fetch(manifest, hub=hub, deadline_s=DEADLINE_S))
    async with asyncio.timeout(DEADLINE_S):
        peer, request, _ = await link.recv()
        await link.send(peer, Chunk(digest=request.digest, offset=request.offset), [b"too short"])
        with pytest.raises(ProtocolError, match=r"asked for 1048576 bytes at 0, got \[9\]"):
            await fetching
    await link.close()
    publisher.close()
