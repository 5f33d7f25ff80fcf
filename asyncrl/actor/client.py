"""An actor that dials the buffer: hello, heartbeats, one reader loop, and the way to say something."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from asyncrl.actor.base import LAST_WORDS_S, Actor, Context
from asyncrl.errors import ProtocolError, StalledError
from asyncrl.link import ClientLink, Delivery, LinkClosed, ServerLink, connect
from asyncrl.messages.codec import Body
from asyncrl.messages.control import Finish, FromBuffer, Goodbye, Heartbeat, Refused, Welcome

WELCOME_DEADLINE_S = 60.0
"""How long an actor waits for the buffer's answer to its hello."""


class DeskActor(Actor):
    """An actor that dials the buffer."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._desk: ClientLink | None = None
        self._welcome: Welcome | None = None
        self.version: tuple[int, int] = (-1, 0)
        """(version, incarnation) it serves; named in every heartbeat."""

    async def on_welcome(self, welcome: Welcome) -> None:
        """The buffer has answered the hello."""

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        """A message from the buffer other than Welcome, Refused and Finish. Must not block."""

    async def on_finish(self, message: Finish) -> None:
        """The run is over."""
        del message
        self.leave()

    async def begin(self) -> None:
        self._desk = connect(
            self.context.desk_address,
            identity=f"{self.name}.{self.context.incarnation}".encode(),
            receives=FromBuffer,
            security=self.context.key,
            hub=self.context.hub,
        )
        await self._desk.send(self.hello())
        with self.waits("welcome"):
            delivery = await self._first_answer(self._desk)
        if isinstance(delivery.message, Refused):
            raise ProtocolError(f"{self.name}: the buffer refused us: {delivery.message.reason}")
        assert isinstance(delivery.message, Welcome)
        self._welcome = delivery.message

    async def ready(self) -> None:
        assert self._welcome is not None, "the buffer has answered"
        await self.on_welcome(self._welcome)

    async def _first_answer(self, desk: ClientLink) -> Delivery:
        try:
            async with asyncio.timeout(WELCOME_DEADLINE_S):
                return await desk.recv()
        except TimeoutError:
            raise StalledError(
                f"{self.name}: the buffer at {self.context.desk_address} did not answer in "
                f"{WELCOME_DEADLINE_S:.0f} s"
            ) from None

    def loops(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._read_desk(), *self.work()]

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        """The role's own loops."""
        return []

    async def send(self, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """Say something to the buffer. Raises StalledError when it has not read for `run.stall_s`."""
        assert self._desk is not None, "not connected yet"
        stall_s = self.plan.topology.run.stall_s
        try:
            async with asyncio.timeout(stall_s):
                await self._desk.send(message, frames)
        except TimeoutError:
            what = type(message).__name__
            raise StalledError(
                f"{self.name}: {what} could not be sent; the buffer has not read for {stall_s:g} s (stall_s)"
            ) from None
        self.traffic.said(message)

    def links(self) -> dict[str, ClientLink | ServerLink]:
        return super().links() | ({} if self._desk is None else {"desk": self._desk})

    async def _read_desk(self) -> None:
        """consumes: everything the buffer says    waits for: the buffer    produces: calls of `handle`"""
        assert self._desk is not None
        while True:
            delivery = await self._desk.recv()
            self.traffic.heard(delivery.message)
            match delivery.message:
                case Finish():
                    await self.on_finish(delivery.message)
                case Refused():
                    raise ProtocolError(f"{self.name}: the buffer refused us: {delivery.message.reason}")
                case _:
                    await self.handle(delivery.message, delivery.frames)

    async def beat(self) -> None:
        await self.send(Heartbeat(version=self.version[0], incarnation=self.version[1]))

    async def _end(self) -> None:
        if self._desk is not None:
            with contextlib.suppress(LinkClosed, OSError):
                await self._desk.send(Goodbye(reason=self.state))
            await self._desk.close(linger_s=LAST_WORDS_S)
        await super()._end()
