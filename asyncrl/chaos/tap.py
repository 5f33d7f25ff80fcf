"""Links under orders: like any other, but they lose, repeat, delay or reorder messages as they are told.

Owns nothing of the transport: it is the wrapped link's, and so are limits, screening and statistics. As long
as no order is about a message, it goes straight through. Invariants: `recv` may be cancelled and loses
nothing, also while messages are on a detour; what was sent on a detour is lost when the link closes before it
is due.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from asyncrl.chaos.detour import Detour
from asyncrl.chaos.life import Life
from asyncrl.chaos.orders import Order
from asyncrl.errors import RunError
from asyncrl.link import ClientLink, Delivery, LinkClosed, LinkStatistics, ServerLink
from asyncrl.messages.codec import Body


class _Letter(NamedTuple):
    """A message on its way out."""

    message: msgspec.Struct
    frames: Sequence[Body]


LinkT = TypeVar("LinkT", bound=ClientLink | ServerLink)


class _Tap(Generic[LinkT]):
    """What both ends share: the way in, and the detours."""

    def __init__(self, link: LinkT, life: Life) -> None:
        self._life = life
        self._current: LinkT = link
        """The link underneath; another one after a cut."""
        self._ready: deque[Delivery] = deque()
        """Taken from the link, for the next calls of `recv`."""
        self._handed: Delivery | None = None
        """What `recv` gave last, as long as the actor may be at work on it."""
        self._reading: asyncio.Task[Delivery | None] | None = None
        """A receive that goes on when a caller of `recv` is cancelled; only while something is delayed."""
        self._arrived = asyncio.Event()
        self._inward: Detour[Delivery] = Detour(self._arrive)
        self._outward: Detour[_Letter] = Detour(self._send_late)
        self._tasks: set[asyncio.Task[None]] = set()

    async def recv(self) -> Delivery:
        """See `asyncrl.link.base`."""
        handed, self._handed = self._handed, None
        if handed is not None:
            self._reach("received", handed.message, handed.peer)
        while not self._ready:
            delivery = await self._next()
            # No await from here on: what was taken is ready when a cancellation comes.
            if delivery is not None:
                self._take(delivery)
        self._handed = self._ready.popleft()
        return self._handed

    def _take(self, delivery: Delivery) -> None:
        order = self._reach("receive", delivery.message, delivery.peer)
        routed = self._inward.route(order, delivery.peer, delivery)
        # One that comes twice may not share its list of bodies.
        self._ready.extend(Delivery(peer, message, [*frames]) for peer, message, frames in routed)

    async def _next(self) -> Delivery | None:
        """The link's next message; None when there is reason to look again."""
        if self._reading is None and not self._inward.pending:
            return await self._receive()
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._receive())
        reading = self._reading
        arrived = asyncio.ensure_future(self._arrived.wait())
        try:
            await asyncio.wait((reading, arrived), return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrived.cancel()
        self._arrived.clear()
        if not reading.done() or reading is not self._reading:
            return None
        self._reading = None
        return reading.result()

    async def _receive(self) -> Delivery | None:
        return await self._current.recv()

    def _arrive(self, peer: bytes, delivery: Delivery) -> None:
        """A delayed message is there."""
        del peer
        self._ready.append(delivery)
        self._arrived.set()

    def _reach(self, kind: str, message: msgspec.Struct, peer: bytes = b"") -> Order | None:
        return self._life.at(kind, message, peer)

    async def _hand(self, peer: bytes, letter: _Letter) -> None:
        """Give a message to the transport."""
        raise NotImplementedError

    async def _post(self, peer: bytes, letter: _Letter) -> None:
        order = self._reach("send", letter.message, peer)
        for item in self._outward.route(order, peer, letter):
            await self._hand(peer, item)
            self._reach("sent", item.message, peer)

    def _send_late(self, peer: bytes, letter: _Letter) -> None:
        self._keep(self._hand_late(peer, letter))

    async def _hand_late(self, peer: bytes, letter: _Letter) -> None:
        # Its sender is told nothing any more: a message may be lost with a connection.
        with contextlib.suppress(RunError):
            await self._hand(peer, letter)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def statistics(self) -> LinkStatistics:
        """See `asyncrl.link.base`."""
        return self._current.statistics()

    async def close(self, *, linger_s: float = 1.0) -> None:
        """See `asyncrl.link.base`."""
        self._inward.close()
        self._outward.close()
        await self._current.close(linger_s=linger_s)
        left = {*self._tasks, *([self._reading] if self._reading is not None else [])}
        if left:
            await asyncio.gather(*left, return_exceptions=True)


class TappedClient(_Tap[ClientLink]):
    """The end that dials, under orders: see `asyncrl.link.base.ClientLink`."""

    def __init__(self, dial: Callable[[], ClientLink], life: Life) -> None:
        super().__init__(dial(), life)
        self._dial = dial
        self._former_cuts = 0
        self._dialled = asyncio.Event()
        """Clear while the connection is cut; what is sent meanwhile waits, as in a socket that reconnects."""
        self._dialled.set()
        self._closing = False

    @property
    def cuts(self) -> int:
        """See `asyncrl.link.base`."""
        return self._former_cuts + self._current.cuts

    async def send(self, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """See `asyncrl.link.base`."""
        await self._post(b"", _Letter(message, frames))

    async def _hand(self, peer: bytes, letter: _Letter) -> None:
        del peer
        await self._dialled.wait()
        link = self._current
        try:
            await link.send(letter.message, letter.frames)
        except LinkClosed:
            # Lost with the connection that was cut meanwhile; only an end of the link itself is told.
            if self._dialled.is_set() and link is self._current:
                raise

    async def _receive(self) -> Delivery | None:
        await self._dialled.wait()
        link = self._current
        try:
            return await link.recv()
        except LinkClosed:
            if self._dialled.is_set() and link is self._current:
                raise
            return None

    def _reach(self, kind: str, message: msgspec.Struct, peer: bytes = b"") -> Order | None:
        return self._life.at(kind, message, peer, cut=self._cut)

    def _cut(self) -> None:
        """Lose the connection, with what is on its way in it, and dial again under the same identity."""
        if self._dialled.is_set():
            self._dialled.clear()
            self._former_cuts += 1
            self._keep(self._redial())

    async def _redial(self) -> None:
        old = self._current
        # Two connections of one identity at a time are no reconnection: the other end may keep the dead one.
        try:
            await old.close(linger_s=0.0)
            if not self._closing:
                self._former_cuts += old.cuts
                self._current = self._dial()
        finally:
            self._dialled.set()

    async def close(self, *, linger_s: float = 1.0) -> None:
        """See `asyncrl.link.base`."""
        self._closing = True
        await super().close(linger_s=linger_s)


class TappedServer(_Tap[ServerLink]):
    """The end that is dialled, under orders: see `asyncrl.link.base.ServerLink`."""

    @property
    def address(self) -> str:
        """See `asyncrl.link.base`."""
        return self._current.address

    async def send(self, peer: bytes, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """See `asyncrl.link.base`."""
        await self._post(peer, _Letter(message, frames))

    async def _hand(self, peer: bytes, letter: _Letter) -> None:
        await self._current.send(peer, letter.message, letter.frames)

    def drop(self, peer: bytes) -> None:
        """See `asyncrl.link.base`."""
        self._current.drop(peer)
        self._ready = deque(delivery for delivery in self._ready if delivery.peer != peer)


def tapped_client(dial: Callable[[], ClientLink], life: Life | None) -> ClientLink:
    """Dial; the link obeys the orders of this life, where there are any."""
    return dial() if life is None else TappedClient(dial, life)


def tapped_server(link: ServerLink, life: Life | None) -> ServerLink:
    """The same link, under the orders of this life where there are any."""
    return link if life is None else TappedServer(link, life)
