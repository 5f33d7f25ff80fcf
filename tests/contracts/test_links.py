"""One contract over the links: tcp, ipc, memory, and under orders. Every wait here has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import socket as sockets
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from asyncrl.chaos import Life, Order, tapped_client, tapped_server
from asyncrl.errors import ConfigError, ProtocolError, RunError
from asyncrl.link import (
    ClientLink,
    Delivery,
    Hub,
    Key,
    Limits,
    LinkClosed,
    PeerGone,
    ServerLink,
    bind,
    check_private,
    connect,
    is_private,
    make_key,
    read_key,
)

DEADLINE_S = 10.0


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    name: str


class Work(msgspec.Struct, frozen=True, tag="work"):
    number: int


class Foreign(msgspec.Struct, frozen=True, tag="foreign"):
    number: int


Any_ = Hello | Work


ELSEWHERE = [
    Order(actor="anybody", at=f"{moment}:Work", where={"number": -99}, action=action)
    for moment, action in (("send", "drop"), ("sent", "exit"), ("receive", "delay"), ("received", "cut"))
]
"""Orders that no message here is about."""


class Bench:
    """Opens links of one scheme, and closes all of them at the end."""

    def __init__(self, scheme: str, tmp_path: Path) -> None:
        tapped, _, scheme = scheme.rpartition("-")
        self.life = Life("anybody", orders=ELSEWHERE, run_dir=tmp_path, incarnation="") if tapped else None
        self.hub = Hub()
        self.fresh = {
            "tcp": "tcp://127.0.0.1:0",
            "ipc": f"ipc://{tmp_path}/link",
            "memory": "memory://link",
        }[scheme]
        self.opened: list[Any] = []

    def bind(self, address: str | None = None, **options: Any) -> ServerLink:
        link = tapped_server(bind(address or self.fresh, receives=Any_, hub=self.hub, **options), self.life)
        self.opened.append(link)
        return link

    def connect(
        self, address: str, identity: bytes = b"client", receives: Any = Any_, **options: Any
    ) -> ClientLink:
        dial = functools.partial(
            connect, address, identity=identity, receives=receives, hub=self.hub, **options
        )
        link = tapped_client(dial, self.life)
        self.opened.append(link)
        return link

    async def close(self) -> None:
        for link in self.opened:
            await within(link.close(linger_s=0))


async def within(work: Any, seconds: float = DEADLINE_S) -> Any:
    async with asyncio.timeout(seconds):
        return await work


async def send_for_ever(server: ServerLink, *bodies: bytes) -> None:
    while True:
        await server.send(b"client", Work(1), bodies)
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - a counter has no event
            await asyncio.sleep(0)


@pytest.fixture(params=["tcp", "ipc", "memory", "tapped-tcp", "tapped-memory"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    threads = threading.active_count()
    made = Bench(request.param, tmp_path)
    yield made
    await made.close()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert threading.active_count() <= threads
    assert not [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "_guard" in repr(t)]


@pytest.fixture(params=["tcp", "ipc", "tapped-tcp"])
async def wire(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(request.param, tmp_path)
    yield made
    await made.close()


async def met(bench: Bench, **options: Any) -> tuple[ServerLink, ClientLink]:
    """A server and a client that it knows."""
    server = bench.bind(**options)
    client = bench.connect(server.address, **options)
    await within(client.send(Hello("client")))
    assert (await within(server.recv())).message == Hello("client")
    return server, client


async def test_messages_and_bodies_arrive_whole_and_in_order_both_ways(bench: Bench) -> None:
    server, client = await met(bench)
    bodies = [b"", b"a" * 300_000, bytes(range(256))]
    for number in range(50):
        await within(client.send(Work(number), bodies))
        await within(server.send(b"client", Work(number), bodies))
    for number in range(50):
        assert await within(server.recv()) == Delivery(b"client", Work(number), bodies)
        assert await within(client.recv()) == Delivery(b"", Work(number), bodies)


async def test_concurrent_sends_never_interleave(bench: Bench) -> None:
    server, client = await met(bench)
    sends = [client.send(Work(n), [bytes([n])] * 20) for n in range(100)]
    await within(asyncio.gather(*sends))
    for _ in range(100):
        delivery = await within(server.recv())
        assert delivery.frames == [bytes([delivery.message.number])] * 20


async def test_an_answer_goes_to_the_peer_it_is_for(bench: Bench) -> None:
    server = bench.bind()
    clients = {bytes([65 + n]): bench.connect(server.address, bytes([65 + n])) for n in range(5)}
    for identity, client in clients.items():
        await within(client.send(Hello(identity.decode())))
    for _ in clients:
        delivery = await within(server.recv())
        await server.send(delivery.peer, delivery.message)
    for identity, client in clients.items():
        assert (await within(client.recv())).message == Hello(identity.decode())


async def test_a_client_may_connect_and_send_before_the_server_is_there(bench: Bench) -> None:
    first = bench.bind()
    address = first.address
    await within(first.close())
    client = bench.connect(address)
    await within(client.send(Work(7)))
    server = bench.bind(address)
    assert (await within(server.recv())).message == Work(7)


async def test_a_client_survives_the_restart_of_its_server(bench: Bench) -> None:
    server, client = await met(bench)
    await within(server.close(linger_s=0))
    again = bench.bind(server.address)
    await within(client.send(Work(1)))
    assert await within(again.recv()) == Delivery(b"client", Work(1), [])
    await within(again.send(b"client", Work(2)))
    assert (await within(client.recv())).message == Work(2)


async def test_sending_to_a_peer_that_was_never_there_raises_peer_gone(bench: Bench) -> None:
    server = bench.bind()
    with pytest.raises(PeerGone, match="nobody"):
        await within(server.send(b"nobody", Work(1)))


async def test_a_peer_that_closed_is_gone(bench: Bench) -> None:
    server, client = await met(bench)
    await within(client.close())
    with pytest.raises(PeerGone):
        await within(send_for_ever(server))


async def test_an_identity_that_connects_again_takes_over(bench: Bench) -> None:
    server, old = await met(bench)
    new = bench.connect(server.address)
    await within(new.send(Hello("new")))
    assert (await within(server.recv())).message == Hello("new")
    await within(server.send(b"client", Work(3)))
    assert (await within(new.recv())).message == Work(3)
    assert old.statistics().received == 0


async def test_a_cancelled_recv_loses_nothing(bench: Bench) -> None:
    server, client = await met(bench)
    got: list[int] = []
    for number in range(60):
        waiting = asyncio.ensure_future(server.recv())
        await within(client.send(Work(number)))
        for _ in range(number % 4):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            got.append((await waiting).message.number)
    while len(got) < 60:
        got.append((await within(server.recv())).message.number)
    assert got == list(range(60))


async def test_a_client_is_held_back_while_the_server_does_not_read(bench: Bench) -> None:
    limits = Limits(max_queued=4, max_unread=4)
    server, client = await met(bench, limits=limits)
    body = b"x" * 1_000_000
    total = 100

    async def send_all() -> None:
        for number in range(total):
            await client.send(Work(number), [body])

    sending = asyncio.ensure_future(send_all())
    # The kernel's buffers take some megabytes; 100 MB have to get stuck.
    await asyncio.wait({sending}, timeout=0.5)
    assert not sending.done()
    assert server.statistics().queued <= 4
    assert client.statistics().sent < total
    for number in range(total):
        assert (await within(server.recv())).message == Work(number)
    await within(sending)
    assert server.statistics().peak_queued <= 4


async def test_a_suspended_send_can_be_cancelled_and_was_then_not_sent(bench: Bench) -> None:
    server, client = await met(bench, limits=Limits(max_queued=1, max_unread=1))
    body = b"x" * 4_000_000
    sent = 0
    while True:
        sending = asyncio.ensure_future(client.send(Work(sent), [body]))
        await asyncio.wait({sending}, timeout=0.3)
        if not sending.done():
            break
        sent += 1
        assert sent < 50
    sending.cancel()
    await asyncio.wait({sending}, timeout=DEADLINE_S)
    assert sending.cancelled()
    for number in range(sent):
        assert (await within(server.recv())).message == Work(number)
    await within(client.send(Work(-1)))
    assert (await within(server.recv())).message == Work(-1)


async def test_a_peer_that_does_not_read_blows_its_fuse_and_nobody_else_notices(bench: Bench) -> None:
    server, _lazy = await met(bench, limits=Limits(max_queued=2, max_unread=2))
    reader = bench.connect(server.address, b"reader")
    await within(reader.send(Hello("reader")))
    await within(server.recv())
    with pytest.raises(PeerGone, match="unread"):
        await within(send_for_ever(server, b"x" * 1_000_000))
    await within(server.send(b"reader", Work(2)))
    assert (await within(reader.recv())).message == Work(2)


async def test_a_message_of_another_type_is_counted_reported_and_dropped(bench: Bench) -> None:
    reports: list[tuple[bytes, str]] = []
    server = bench.bind(on_malformed=lambda peer, reason: reports.append((peer, reason)))
    client = bench.connect(server.address)
    await within(client.send(Foreign(1)))
    await within(client.send(Work(2)))
    assert (await within(server.recv())).message == Work(2)
    assert [peer for peer, _ in reports] == [b"client"]
    assert "Hello, Work" in reports[0][1]
    assert server.statistics().malformed == 1


async def test_a_peer_that_keeps_sending_rubbish_is_ignored_and_the_others_are_not(bench: Bench) -> None:
    limits = Limits(max_malformed=3)
    server, client = await met(bench, limits=limits)
    for number in range(3):
        await within(client.send(Foreign(number)))
    for number in range(5):
        await within(client.send(Work(number)))
    other = bench.connect(server.address, b"other")
    receiving = asyncio.ensure_future(server.recv())
    await until(lambda: server.statistics().ignored == 5)
    await within(other.send(Work(9)))
    assert await within(receiving) == Delivery(b"other", Work(9), [])
    assert server.statistics().malformed == 3
    with pytest.raises(PeerGone):
        await server.send(b"client", Work(1))


async def test_a_dropped_peer_is_ignored_and_gone(bench: Bench) -> None:
    server, client = await met(bench)
    server.drop(b"client")
    receiving = asyncio.ensure_future(server.recv())
    await within(client.send(Work(1)))
    await until(lambda: server.statistics().ignored == 1)
    assert not receiving.done()
    receiving.cancel()
    with pytest.raises(PeerGone):
        await server.send(b"client", Work(1))


async def test_a_client_gives_up_on_a_server_that_sends_rubbish(bench: Bench) -> None:
    server = bench.bind()
    client = bench.connect(server.address, receives=Hello, limits=Limits(max_malformed=2))
    await within(client.send(Hello("client")))
    await within(server.recv())
    await server.send(b"client", Work(1))
    await server.send(b"client", Hello("good"))
    await server.send(b"client", Work(2))
    assert (await within(client.recv())).message == Hello("good")
    with pytest.raises(ProtocolError, match="2 malformed"):
        await within(client.recv())


async def test_what_no_peer_would_accept_is_refused_by_the_sender(bench: Bench) -> None:
    limits = Limits(max_frame_bytes=100, max_frames=2)
    server, client = await met(bench, limits=limits)
    with pytest.raises(ValueError, match="101 bytes; at most 100"):
        await client.send(Work(1), [b"x" * 101])
    with pytest.raises(ValueError, match="3 body frames; at most 2"):
        await server.send(b"client", Work(1), [b""] * 3)


async def test_an_address_in_use_is_named_with_what_to_do(bench: Bench) -> None:
    server = bench.bind()
    with pytest.raises(ConfigError) as caught:
        bench.bind(server.address)
    assert server.address in str(caught.value)
    assert "choose another" in str(caught.value)
    client = bench.connect(server.address)
    await within(client.send(Work(1)))
    assert (await within(server.recv())).message == Work(1)


async def test_close_is_idempotent_and_ends_everybody_who_waits(bench: Bench) -> None:
    server, client = await met(bench)
    waiting = [asyncio.ensure_future(server.recv()), asyncio.ensure_future(client.recv())]
    await asyncio.sleep(0)
    for link in (server, client, server, client):
        await within(link.close(linger_s=0))
    for task in waiting:
        with pytest.raises(LinkClosed):
            await within(task)
    with pytest.raises(LinkClosed):
        await within(server.send(b"client", Work(1)))
    with pytest.raises(LinkClosed):
        await within(client.send(Work(1)))


async def test_close_ends_a_suspended_send_with_link_closed(bench: Bench) -> None:
    _, client = await met(bench, limits=Limits(max_queued=1, max_unread=1))

    async def flood() -> None:
        for number in itertools.count():
            await client.send(Work(number), [b"x" * 4_000_000])

    flooding = asyncio.ensure_future(flood())
    await asyncio.wait({flooding}, timeout=0.3)
    assert not flooding.done()
    await within(client.close(linger_s=0))
    with pytest.raises(LinkClosed):
        await within(flooding)


async def test_close_flushes_what_was_sent(bench: Bench) -> None:
    server, client = await met(bench)
    for number in range(100):
        await within(client.send(Work(number), [b"x" * 10_000]))
    await within(client.close(linger_s=5))
    for number in range(100):
        assert (await within(server.recv())).message == Work(number)


async def test_close_does_not_wait_longer_than_its_linger(wire: Bench) -> None:
    server = wire.bind()
    await within(server.close())
    client = wire.connect(server.address)
    await within(client.send(Work(1)))
    await within(client.close(linger_s=0.05), seconds=2)


async def test_the_failure_of_a_reader_surfaces_in_recv_and_send(wire: Bench) -> None:
    def explode(peer: bytes, reason: str) -> None:
        raise ZeroDivisionError(reason)

    server = wire.bind(on_malformed=explode)
    client = wire.connect(server.address)
    await within(client.send(Foreign(1)))
    with pytest.raises(RunError, match="ZeroDivisionError"):
        await within(server.recv())
    with pytest.raises(RunError, match="ZeroDivisionError"):
        await within(server.send(b"client", Work(1)))


@pytest.mark.parametrize(
    "frames",
    [[b""], [b"\xc1"], [b"\x81\xa4type\xa5hello"], [b"x" * 300], [b"", *[b""] * 5], [b"\x91" * 200]],
)
async def test_rubbish_off_the_wire_is_dropped_and_the_link_goes_on(wire: Bench, frames: list[bytes]) -> None:
    reports: list[bytes] = []
    limits = Limits(max_header_bytes=250, max_frames=4)
    server = wire.bind(limits=limits, on_malformed=lambda peer, _: reports.append(peer))
    raw = zmq.asyncio.Context().socket(zmq.DEALER)
    raw.routing_id = b"vandal"
    raw.connect(server.address)
    await within(raw.send_multipart(frames))
    await until(lambda: server.statistics().malformed == 1)
    assert reports == [b"vandal"]
    await within(raw.send(msgspec.msgpack.encode(Work(1))))
    assert (await within(server.recv())).message == Work(1)
    raw.context.destroy(linger=0)


async def test_an_oversized_frame_never_reaches_the_process(wire: Bench) -> None:
    server = wire.bind(limits=Limits(max_frame_bytes=1000, max_header_bytes=1000))
    raw = zmq.asyncio.Context().socket(zmq.DEALER)
    raw.connect(server.address)
    await within(raw.send_multipart([msgspec.msgpack.encode(Work(1)), b"x" * 100_000]))
    client = wire.connect(server.address)
    await within(client.send(Work(2)))
    assert (await within(server.recv())).message == Work(2)
    assert server.statistics().received == 1
    # Not even counted: libzmq cuts the connection before it allocates.
    assert server.statistics().malformed == 0
    raw.context.destroy(linger=0)


# Keys


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return make_key(tmp_path / "run.key")


async def test_members_with_the_same_key_talk(wire: Bench, key: Key, tmp_path: Path) -> None:
    server = wire.bind(security=key)
    client = wire.connect(server.address, security=read_key(tmp_path / "run.key"))
    await within(client.send(Work(1), [b"body"]))
    assert await within(server.recv()) == Delivery(b"client", Work(1), [b"body"])
    await within(server.send(b"client", Work(2)))
    assert (await within(client.recv())).message == Work(2)


async def assert_shut_out(wire: Bench, server: ServerLink, key: Key, stranger: ClientLink) -> None:
    await within(stranger.send(Work(13)))
    # A member that comes later gets through, while the stranger had a second more than a handshake takes.
    await asyncio.wait({asyncio.ensure_future(stranger.recv())}, timeout=0.5)
    member = wire.connect(server.address, b"member", security=key)
    await within(member.send(Work(1)))
    assert (await within(server.recv())).peer == b"member"
    assert server.statistics().received == 1
    with pytest.raises(PeerGone):
        await server.send(b"client", Work(1))


async def test_a_client_with_another_key_does_not_get_through(wire: Bench, key: Key, tmp_path: Path) -> None:
    server = wire.bind(security=key)
    other = make_key(tmp_path / "other.key")
    await assert_shut_out(wire, server, key, wire.connect(server.address, security=other))


async def test_a_plaintext_client_does_not_get_through(wire: Bench, key: Key) -> None:
    server = wire.bind(security=key)
    await assert_shut_out(wire, server, key, wire.connect(server.address))


async def test_knowing_the_public_half_is_not_membership(wire: Bench, key: Key) -> None:
    server = wire.bind(security=key)
    raw = zmq.asyncio.Context().socket(zmq.DEALER)
    raw.routing_id = b"client"
    raw.curve_serverkey = key.public.encode()
    raw.curve_publickey, raw.curve_secretkey = zmq.curve_keypair()
    raw.connect(server.address)
    await within(raw.send(msgspec.msgpack.encode(Work(1))))
    await asyncio.wait({asyncio.ensure_future(raw.recv())}, timeout=0.5)
    member = wire.connect(server.address, b"member", security=key)
    await within(member.send(Work(1)))
    assert (await within(server.recv())).peer == b"member"
    assert server.statistics().received == 1
    raw.context.destroy(linger=0)


async def test_a_keyed_client_does_not_talk_to_a_server_without_the_key(wire: Bench, key: Key) -> None:
    server = wire.bind()
    client = wire.connect(server.address, security=key)
    await within(client.send(Work(1)))
    receiving = asyncio.ensure_future(server.recv())
    await asyncio.wait({receiving}, timeout=0.5)
    assert not receiving.done()
    receiving.cancel()


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.key"
    key = make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path) == key
    assert key.secret not in repr(key)
    with pytest.raises(ConfigError, match="exists already"):
        make_key(path)
    assert read_key(path) == key


@pytest.mark.parametrize("content", [b"", b"{}", b'{"public":"x","secret":"y"}', b"\xff\xfe"])
def test_a_file_that_is_no_key_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"bad\.key"):
        read_key(path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.key"
    make_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(path)


@pytest.mark.parametrize(
    "address", ["ipc:///tmp/x", "memory://x", "tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://localhost:0"]
)
def test_private_addresses_need_no_key(address: str) -> None:
    assert is_private(address)
    check_private(address, security=None)


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:0", "tcp://*:5", "tcp://10.0.0.1:7", "tcp://head:7777", "tcp://[::]:5", "tcp://:5"],
)
async def test_public_addresses_are_refused_without_a_key(address: str) -> None:
    assert not is_private(address)
    with pytest.raises(ConfigError, match="asyncrl keys"):
        bind(address, receives=Hello)
    with pytest.raises(ConfigError, match="asyncrl keys"):
        connect(address, identity=b"x", receives=Hello)


def test_ipv6_loopback_is_private() -> None:
    assert is_private("tcp://[::1]:5")
    assert not is_private("tcp://[fe80::1]:5")


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:1", "tcp:/x", "memory://", "tcp://127.0.0.1:notaport", "ipc:///no/such/dir/x"],
)
async def test_unusable_addresses_are_named(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(address, receives=Hello, hub=Hub())
    assert address in str(caught.value)


async def test_a_stale_ipc_file_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    with sockets.socket(sockets.AF_UNIX) as left:
        left.bind(str(tmp_path / "link"))
    server = bind(f"ipc://{tmp_path}/link", receives=Hello)
    await server.close()
