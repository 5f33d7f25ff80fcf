"""Links over ZeroMQ: a ROUTER that is dialled and DEALERs that dial, on tcp and ipc.

Each socket has exactly one reader task, which no caller ever cancels: cancelling a ZeroMQ receive in the loop
turn after arrival loses the message. There is no writer task: pyzmq hands a whole multipart message over in
one call, so messages cannot interleave, and a cancelled `send` leaves nothing half sent. Every link has a
context of its own, so that closing one can wait for its own unsent messages and for nobody else's.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket as sockets
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec
import zmq
from zmq.asyncio import Context

from asyncrl.errors import ConfigError, ProtocolError, RunError
from asyncrl.link.base import Delivery, Limits, LinkClosed, LinkStatistics, OnMalformed, PeerGone
from asyncrl.link.inbox import Inbox
from asyncrl.link.screen import Screen
from asyncrl.link.security import Doorkeeper, Key, arm_client, arm_server
from asyncrl.messages.codec import Body, num_bytes

_HEARTBEAT_INTERVAL_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 10_000
"""A connection that is silent for longer is cut. Actors' own heartbeats declare a peer dead earlier."""
_KEEPALIVE_IDLE_S = 30
"""NATs forget idle connections after a minute or more."""
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 500
"""A desk that is started again is found within this time: well before its workers' leases are given up."""

_NO_INTERFACE = "this machine has no such interface; use one of its own addresses, or 0.0.0.0 for all"
_ADVICE = {
    errno.EADDRINUSE: "another process listens there; stop it or choose another port (0 takes a free one)",
    errno.EADDRNOTAVAIL: _NO_INTERFACE,
    errno.ENODEV: _NO_INTERFACE,
    errno.EACCES: "not allowed; ports below 1024 belong to root",
    errno.ENAMETOOLONG: "the path of an ipc socket has at most 107 characters; choose a shorter directory",
    errno.ENOENT: "its directory does not exist; create it first",
    errno.EINVAL: "allowed are tcp://HOST:PORT, ipc://PATH and memory://NAME",
}


class _SocketLink:
    """What both ends share: the socket, its reader, its screen and its end."""

    def __init__(
        self,
        kind: int,
        *,
        address: str,
        receives: Any,
        limits: Limits,
        on_malformed: OnMalformed | None,
    ) -> None:
        self.address = address
        self._limits = limits
        self._screen = Screen(receives, limits=limits, on_malformed=on_malformed)
        self._inbox = Inbox(capacity=limits.max_queued, max_bytes=limits.max_queued_bytes)
        self._tasks: list[asyncio.Task[None]] = []
        self._closed: asyncio.Future[None] | None = None
        self._doorkeeper: Doorkeeper | None = None
        self._context = Context()
        self._socket = self._context.socket(kind)
        self._set_options()

    async def recv(self) -> Delivery:
        """See `asyncrl.link.base`."""
        return await self._inbox.get()

    def statistics(self) -> LinkStatistics:
        """See `asyncrl.link.base`."""
        return self._screen.statistics(self._inbox)

    async def close(self, *, linger_s: float = 1.0) -> None:
        """See `asyncrl.link.base`."""
        if self._closed is None:
            self._closed = asyncio.ensure_future(self._close(linger_s))
        await asyncio.shield(self._closed)

    async def _close(self, linger_s: float) -> None:
        self._inbox.fail(LinkClosed(f"{self.address}: this end of the link is closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._let_go()
        self._socket.close(linger=max(0, round(linger_s * 1000)))
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        # Blocks until all is flushed or the linger is over, so it may not run on the loop.
        await asyncio.to_thread(self._context.term)

    def _let_go(self) -> None:
        """Close what hangs on the socket; its readers have ended."""

    def _abandon(self) -> None:
        """Let go at once: the link could not be opened."""
        self._context.destroy(linger=0)

    def _set_options(self) -> None:
        options = {
            zmq.LINGER: 0,
            zmq.SNDHWM: self._limits.max_unread,
            zmq.RCVHWM: self._limits.max_unread,
            zmq.MAXMSGSIZE: max(self._limits.max_frame_bytes, self._limits.max_header_bytes),
            zmq.HEARTBEAT_IVL: _HEARTBEAT_INTERVAL_MS,
            zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS,
            zmq.RECONNECT_IVL: _RECONNECT_MS,
            zmq.RECONNECT_IVL_MAX: _RECONNECT_MAX_MS,
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: _KEEPALIVE_IDLE_S,
            # With IPv6 on, libzmq names its IPv4 endpoints in IPv6 notation.
            zmq.IPV6: int("[" in self.address),
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)

    def _start(self, work: Awaitable[None], *, name: str) -> None:
        task = asyncio.ensure_future(self._guard(work, name=name))
        self._tasks.append(task)

    async def _guard(self, work: Awaitable[None], *, name: str) -> None:
        try:
            await work
        # Whatever ends the reader ends the link: recv and send raise it, there is no silent hang.
        except Exception as error:  # noqa: BLE001
            failure = RunError(f"{self.address}: the link's {name} failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._inbox.fail(error if isinstance(error, RunError) else failure)

    async def _read(self) -> None:
        """consumes: the socket. waits for: messages, room in the inbox. unblocked by: `recv`."""
        while True:
            frames = await self._socket.recv_multipart()
            delivery = self._screened(frames)
            if delivery is not None:
                await self._inbox.put(delivery, size=num_bytes(*frames))
            else:
                # A receive that is ready does not yield: a flood of rubbish would stop the loop.
                await asyncio.sleep(0)

    def _screened(self, frames: list[bytes]) -> Delivery | None:
        raise NotImplementedError


class SocketServer(_SocketLink):
    """The ROUTER end: see `asyncrl.link.base.ServerLink`."""

    def __init__(
        self,
        address: str,
        *,
        receives: Any,
        limits: Limits,
        security: Key | None,
        on_malformed: OnMalformed | None,
    ) -> None:
        super().__init__(
            zmq.ROUTER, address=address, receives=receives, limits=limits, on_malformed=on_malformed
        )
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            if security is not None:
                self._doorkeeper = Doorkeeper(self._context, key=security)
                arm_server(self._socket, key=security)
            self._bind(address)
        except BaseException:
            # Whatever it was: nobody else would know of the socket.
            self._abandon()
            raise
        if self._doorkeeper is not None:
            self._start(self._doorkeeper.serve(), name="doorkeeper")
        self._start(self._read(), name="reader")

    async def send(self, peer: bytes, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """See `asyncrl.link.base`."""
        self._inbox.check()
        if self._screen.is_dropped(peer):
            raise PeerGone(f"{self.address}: {_shown(peer)} was dropped")
        wire = self._screen.write(message, frames)
        try:
            await self._socket.send_multipart([peer, *wire], flags=zmq.NOBLOCK)
        except zmq.Again:
            raise PeerGone(
                f"{self.address}: {_shown(peer)} left {self._limits.max_unread} messages unread"
            ) from None
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise RunError(
                    f"{self.address}: sending to {_shown(peer)} failed: {error.strerror}"
                ) from error
            raise PeerGone(f"{self.address}: {_shown(peer)} is not connected") from None
        self._screen.count_sent(wire)

    def drop(self, peer: bytes) -> None:
        """See `asyncrl.link.base`."""
        self._screen.drop(peer)

    def _bind(self, address: str) -> None:
        # libzmq takes interface names and numbers here, no host names.
        target = address.replace("tcp://localhost:", "tcp://127.0.0.1:")
        if target.startswith("ipc://"):
            _check_ipc_is_free(target)
        try:
            self._socket.bind(target)
        except zmq.ZMQError as error:
            raise _address_error(address, error, verb="bind") from error
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def _screened(self, frames: list[bytes]) -> Delivery | None:
        return self._screen.admit(frames[0], frames[1:])


class SocketClient(_SocketLink):
    """The DEALER end: see `asyncrl.link.base.ClientLink`."""

    def __init__(
        self,
        address: str,
        *,
        identity: bytes,
        receives: Any,
        limits: Limits,
        security: Key | None,
        on_malformed: OnMalformed | None,
    ) -> None:
        super().__init__(
            zmq.DEALER, address=address, receives=receives, limits=limits, on_malformed=on_malformed
        )
        try:
            self._socket.setsockopt(zmq.ROUTING_ID, identity)
            if security is not None:
                arm_client(self._socket, key=security)
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._abandon()
            raise _address_error(address, error, verb="connect to") from error
        self.cuts = 0
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._start(self._read(), name="reader")
        self._start(self._count_cuts(), name="monitor")

    async def _count_cuts(self) -> None:
        """consumes: the transport's events    waits for: the end of a connection"""
        while True:
            await self._monitor.recv_multipart()
            self.cuts += 1

    def _let_go(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)

    async def send(self, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """See `asyncrl.link.base`."""
        self._inbox.check()
        wire = self._screen.write(message, frames)
        try:
            await self._socket.send_multipart(wire)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                # pyzmq cancels the sends that wait on a socket it closes; nobody cancelled the caller.
                self._inbox.check()
            raise
        except zmq.ZMQError as error:
            self._inbox.check()
            raise RunError(f"{self.address}: sending failed: {error.strerror}") from error
        self._screen.count_sent(wire)

    def _screened(self, frames: list[bytes]) -> Delivery | None:
        delivery = self._screen.admit(b"", frames)
        if self._screen.is_dropped(b""):
            raise ProtocolError(self._screen.too_many(self.address))
        return delivery


def _shown(peer: bytes) -> str:
    return f"peer {peer.decode('ascii', 'backslashreplace')!r}"


def _check_ipc_is_free(address: str) -> None:
    """Raises ConfigError where somebody listens: libzmq would take the path away from them without a word."""
    path = address.removeprefix("ipc://")
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise _address_error(address, OSError(errno.EADDRINUSE, ""), verb="bind")


def _address_error(address: str, error: OSError | zmq.ZMQError, *, verb: str) -> ConfigError:
    code = error.errno or 0
    reason = os.strerror(code) if code < zmq.EFSM else str(error)
    advice = _ADVICE.get(code)
    return ConfigError(f"{address}: cannot {verb} this address: {reason}{f'; {advice}' if advice else ''}")
