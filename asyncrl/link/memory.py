"""Links inside one process: the same promises as `sockets`, with nothing encoded and nothing copied.

A `Hub` holds the endpoints of one process; two hubs do not see each other. Messages are handed over as they
are, so their senders may not change them afterwards (structs are frozen). As over a socket, a client may
connect before the server is there and survives its restart; what a closed end had not read is lost.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from asyncrl.errors import ConfigError, ProtocolError
from asyncrl.link.base import Delivery, Limits, LinkClosed, LinkStatistics, OnMalformed, PeerGone
from asyncrl.link.inbox import Inbox
from asyncrl.link.screen import Screen
from asyncrl.messages.codec import Body, num_bytes


class Hub:
    """The addresses memory://NAME of one process."""

    def __init__(self) -> None:
        self._endpoints: dict[str, _Endpoint] = {}

    def endpoint(self, address: str, *, limits: Limits) -> _Endpoint:
        """The meeting point behind an address, made by whoever comes first."""
        return self._endpoints.setdefault(address, _Endpoint(limits))


class _Endpoint:
    """Where a server and its clients meet."""

    def __init__(self, limits: Limits) -> None:
        self.mail = _inbox(limits)
        self.is_bound = False
        self.clients: dict[bytes, MemoryClient] = {}


def _inbox(limits: Limits) -> Inbox:
    return Inbox(capacity=limits.max_queued, max_bytes=limits.max_queued_bytes)


class MemoryServer:
    """The end that is dialled: see `asyncrl.link.base.ServerLink`."""

    def __init__(
        self, address: str, *, hub: Hub, receives: Any, limits: Limits, on_malformed: OnMalformed | None
    ) -> None:
        self.address = address
        self._limits = limits
        self._screen = Screen(receives, limits=limits, on_malformed=on_malformed)
        self._endpoint = hub.endpoint(address, limits=limits)
        if self._endpoint.is_bound:
            raise ConfigError(
                f"{address}: cannot bind this address: another link of this process listens there; "
                "choose another name"
            )
        self._endpoint.is_bound = True
        self._mail = self._endpoint.mail
        self._mail.capacity, self._mail.max_bytes = limits.max_queued, limits.max_queued_bytes

    async def recv(self) -> Delivery:
        """See `asyncrl.link.base`."""
        while True:
            raw = await self._mail.get()
            delivery = self._screen.admit_object(raw)
            if delivery is not None:
                return delivery

    async def send(self, peer: bytes, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """See `asyncrl.link.base`."""
        self._mail.check()
        client = self._endpoint.clients.get(peer)
        if client is None or self._screen.is_dropped(peer):
            raise PeerGone(f"{self.address}: peer {peer!r} is not connected")
        self._screen.check_outgoing(message, frames)
        client.hand_over(Delivery(b"", message, [*frames]))  # type: ignore[list-item]
        self._screen.count_sent(frames)

    def drop(self, peer: bytes) -> None:
        """See `asyncrl.link.base`."""
        self._screen.drop(peer)

    def statistics(self) -> LinkStatistics:
        """See `asyncrl.link.base`."""
        return self._screen.statistics(self._mail)

    async def close(self, *, linger_s: float = 1.0) -> None:  # noqa: ARG002 - nothing is ever under way here
        """See `asyncrl.link.base`."""
        if self._endpoint.mail is self._mail:
            self._endpoint.mail = _inbox(self._limits)
            self._endpoint.is_bound = False
        self._mail.fail(LinkClosed(f"{self.address}: this end of the link is closed"))


class MemoryClient:
    """The end that dials: see `asyncrl.link.base.ClientLink`."""

    def __init__(
        self,
        address: str,
        *,
        identity: bytes,
        hub: Hub,
        receives: Any,
        limits: Limits,
        on_malformed: OnMalformed | None,
    ) -> None:
        self.address = address
        self.cuts = 0
        self._identity = identity
        self._screen = Screen(receives, limits=limits, on_malformed=on_malformed)
        self._endpoint = hub.endpoint(address, limits=limits)
        # An identity that connects again takes over, as with ROUTER_HANDOVER.
        self._endpoint.clients[identity] = self
        # Bounded in messages alone, as a server's send never waits: what it sends is bounded by credits.
        self._inbox = Inbox(capacity=limits.max_unread, max_bytes=sys.maxsize)

    def hand_over(self, delivery: Delivery) -> None:
        """Take a message from the server. Raises PeerGone where too many are unread."""
        size = num_bytes(*delivery.frames)
        if not self._inbox.takes(size):
            raise PeerGone(
                f"{self.address}: peer {self._identity!r} left {self._inbox.capacity} messages unread"
            )
        self._inbox.put_nowait(delivery, size=size)

    async def recv(self) -> Delivery:
        """See `asyncrl.link.base`."""
        while True:
            raw = await self._inbox.get()
            delivery = self._screen.admit_object(raw)
            if delivery is not None:
                return delivery
            if self._screen.is_dropped(b""):
                self._inbox.fail(ProtocolError(self._screen.too_many(self.address)))
                self._inbox.check()

    async def send(self, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """See `asyncrl.link.base`."""
        self._screen.check_outgoing(message, frames)
        self._inbox.check()
        size = num_bytes(*frames)
        while not self._endpoint.mail.takes(size):
            await self._endpoint.mail.change()
            self._inbox.check()
        # The mail is looked up after every wait: a restarted server has a new one.
        mail = self._endpoint.mail
        mail.put_nowait(Delivery(self._identity, message, [*frames]), size=size)  # type: ignore[list-item]
        self._screen.count_sent(frames)

    def statistics(self) -> LinkStatistics:
        """See `asyncrl.link.base`."""
        return self._screen.statistics(self._inbox)

    async def close(self, *, linger_s: float = 1.0) -> None:  # noqa: ARG002 - nothing is ever under way here
        """See `asyncrl.link.base`."""
        if self._endpoint.clients.get(self._identity) is self:
            del self._endpoint.clients[self._identity]
        self._inbox.fail(LinkClosed(f"{self.address}: this end of the link is closed"))
        self._endpoint.mail.wake()
        # Whoever waits in `recv` or `send` gets to run before this returns, as when a socket closes.
        await asyncio.sleep(0)
