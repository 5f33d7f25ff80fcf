"""An actor that dials the buffer: hello, heartbeats, one reader loop, and the way to say something.

The desk may die and come back, or give this actor up for dead; both show when it answers with HelloAgain. A
lost connection, with which messages may be lost, shows in the link's count of them. Then:

    talking -> greeting (Hello with what we hold; `send` waits) -Welcome-> `restate` -> talking

Nothing is lost that way, because a role keeps whatever is not acknowledged and says it again in `restate`;
nothing is taken twice, because the desk knows results by fence and offset, batches and versions by number.

Whoever waits for work here waits as long as the desk answers heartbeats; see `waiting`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from asyncrl.actor.base import LAST_WORDS_S, Actor, Context
from asyncrl.actor.waiting import awaiting, deadline_of
from asyncrl.errors import ProtocolError
from asyncrl.link import ClientLink, LinkClosed, ServerLink
from asyncrl.messages.codec import Body
from asyncrl.messages.control import (
    Finish,
    FromBuffer,
    Goodbye,
    Heartbeat,
    Hello,
    HelloAgain,
    Refused,
    Welcome,
)

WELCOME_DEADLINE_S = 60.0
"""How long an actor waits for the buffer's answer to its first hello."""
HELLO_AGAIN_S = 5.0
"""A hello that has no answer by then is said again: it may have been lost with a connection."""
UNKNOWN = "unknown"
"""A life of the desk of which we know nothing yet."""

BUFFER = "the buffer"
"""What it is called where its silence is told."""

T = TypeVar("T")

Statement = tuple[msgspec.Struct, Sequence[Body]]
"""A message with its bodies."""


class DeskActor(Actor):
    """An actor that dials the buffer."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._desk: ClientLink | None = None
        self._welcome: Welcome | None = None
        self._talking = asyncio.Event()
        self._conversation = 0
        """Counts welcomes; what waits to be said when another one comes has been said by `restate`."""
        self._said_hello = False
        self._greeted = ""
        """The desk's life that we have said hello to and that has not answered; empty while talking."""
        self._greeted_at = 0.0
        self._patience_s = HELLO_AGAIN_S
        """How long the last hello may go without an answer."""
        self._hellos = 0
        """Hellos said; a welcome to any but the last one is not for now."""
        self._cuts = 0
        """Lost connections that we know of."""
        self._reading = False
        """Whether the reader loop runs: before that nobody would take a further welcome."""
        self.version: tuple[int, int] = (-1, 0)
        """(version, incarnation) it serves; named in every heartbeat."""

    # What a role overrides.

    async def on_welcome(self, welcome: Welcome) -> None:
        """The buffer has answered the first hello."""

    def introduce(self, hello: Hello) -> Hello:
        """The hello to a desk that does not know us (any more): with the leases we hold, our place."""
        return hello

    def restate(self, welcome: Welcome) -> list[Statement]:
        """What to say after a further welcome: all credit there is, and whatever is not acknowledged.

        The desk has forgotten former credit, and charges for nothing that the hello named. Must not wait;
        what the role was about to send at this moment is not sent.
        """
        del welcome
        return []

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        """A message from the buffer other than Welcome, Refused and Finish. Must neither block nor `send`."""

    async def on_finish(self, message: Finish) -> None:
        """The run is over."""
        del message
        self.leave()

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        """The role's own loops."""
        return []

    # The conversation.

    async def begin(self) -> None:
        self._desk = self.context.connect(self.context.desk_address, receives=FromBuffer)
        self._greeted, self._greeted_at = UNKNOWN, time.monotonic()
        await self._hand(self.hello())
        self._said_hello = True
        async with awaiting(
            self.waits, "welcome", who=self.name,
            what=f"the buffer at {self.context.desk_address} to answer a hello",
            deadline_s=WELCOME_DEADLINE_S, advice="see the buffer's log",
        ):  # fmt: skip
            self._welcome = await self._first_answer(self._desk)
        self._talking.set()

    async def ready(self) -> None:
        assert self._welcome is not None, "the buffer has answered"
        await self.on_welcome(self._welcome)

    async def _first_answer(self, desk: ClientLink) -> Welcome:
        """The welcome; a desk that dies meanwhile, or that does not answer, is greeted again."""
        receiving = asyncio.ensure_future(desk.recv())
        every_s = self.plan.topology.run.heartbeat_s
        try:
            while True:
                if not (await asyncio.wait([receiving], timeout=every_s))[0]:
                    await self._greet_again(desk, UNKNOWN)
                    continue
                message = receiving.result().message
                receiving = asyncio.ensure_future(desk.recv())
                match message:
                    case Welcome() if message.number == self._hellos:
                        self._answered()
                        return message
                    case Refused():
                        raise self._refusal(message)
                    case HelloAgain():
                        await self._greet(message.desk)
        finally:
            receiving.cancel()

    def loops(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._read_desk(), *self.work()]

    async def send(self, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """Say something to the buffer.

        While the desk is greeted again this waits, and then drops the message: `restate` has said it.
        """
        await self.say((message, frames))

    async def say(self, *statements: Statement) -> None:
        """Several messages of which `restate` says all or none: once it has run, the rest is dropped."""
        assert self._desk is not None, "not connected yet"
        conversation = self._conversation
        for message, frames in statements:
            if not self._talking.is_set():
                async with awaiting(
                    self.waits, "desk", who=self.name, what="the buffer to answer a further hello",
                    deadline_s=deadline_of(self.plan.topology.run), advice="see the buffer's log",
                ):  # fmt: skip
                    await self._talking.wait()
            if conversation != self._conversation:
                return
            await self._hand(message, frames)

    async def _hand(self, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """Raises StalledError when the buffer has not read for `run.stall_s`."""
        assert self._desk is not None, "not connected yet"
        what = f"the buffer to read, so that {type(message).__name__} can be sent"
        async with awaiting(
            self.side_waits, "reader", who=self.name, what=what,
            deadline_s=self.plan.topology.run.stall_s, advice="see the buffer's log",
        ):  # fmt: skip
            await self._desk.send(message, frames)
        self.traffic.said(message)

    async def take_piece(self, queue: asyncio.Queue[T], name: str, *, rest: str, beside: bool = False) -> T:
        """The next piece of a delivery, of which the buffer owes all once it has sent one.

        Args:
            queue: what the reader loop puts pieces into.
            name: what is waited for, in a word.
            rest: what is still to come, for people; empty between two deliveries.
            beside: as in `idle`.

        Raises:
            StalledError: the rest did not come in time.
        """
        if not rest:
            with self.idle(name, beside=beside):
                return await queue.get()
        async with awaiting(
            self.side_waits if beside else self.waits, name, who=self.name, what=f"the buffer to send {rest}",
            deadline_s=deadline_of(self.plan.topology.run), advice="it may be lost: see the buffer's log",
        ):  # fmt: skip
            return await queue.get()

    def links(self) -> dict[str, ClientLink | ServerLink]:
        return super().links() | ({} if self._desk is None else {"desk": self._desk})

    async def _read_desk(self) -> None:
        """consumes: everything the buffer says    waits for: the buffer    produces: calls of `handle`"""
        assert self._desk is not None
        self._reading = True
        while True:
            self.peers.heard(BUFFER)
            delivery = await self._desk.recv()
            self.traffic.heard(delivery.message)
            match delivery.message:
                case Welcome():
                    if delivery.message.number == self._hellos:
                        await self._resume(delivery.message)
                case HelloAgain():
                    await self._greet(delivery.message.desk)
                case Finish():
                    await self.on_finish(delivery.message)
                case Refused():
                    raise self._refusal(delivery.message)
                case _:
                    await self.handle(delivery.message, delivery.frames)

    def _refusal(self, message: Refused) -> ProtocolError:
        return ProtocolError(f"{self.name}: the buffer refused us: {message.reason}")

    async def _greet(self, life: str) -> None:
        """Say hello to this life of the desk, unless it has our hello already."""
        if life == self._greeted:
            return
        self._talking.clear()
        self._greeted, self._greeted_at = life, time.monotonic()
        self._hellos += 1
        self.log.info("hello again", desk=life)
        await self._hand(self.introduce(msgspec.structs.replace(self.hello(), number=self._hellos)))

    async def _greet_again(self, desk: ClientLink, life: str) -> None:
        """Greet this life of the desk anew if our hello, or its answer, may be lost.

        A desk that has the hello will not ask for it. Only the last hello's answer counts, so that to a slow
        desk the next one is said later and later.
        """
        late = self._greeted and time.monotonic() - self._greeted_at > self._patience_s
        if late:
            self._patience_s *= 2
        if late or desk.cuts > self._cuts:
            # Whether anything was lost, nobody knows; the desk may even be the one we know.
            self._greeted, self._cuts = "", desk.cuts
            await self._greet(life)

    def _answered(self) -> None:
        self._greeted, self._patience_s = "", HELLO_AGAIN_S

    async def _resume(self, welcome: Welcome) -> None:
        """Welcome again: state everything anew, then go on."""
        self._talking.clear()
        self._conversation += 1
        self._answered()
        self._welcome = welcome
        for message, frames in self.restate(welcome):
            await self._hand(message, frames)
        self._talking.set()

    async def beat(self) -> None:
        """A heartbeat, also to a desk that does not know us: its answer is how we notice."""
        if self._desk is None or not self._said_hello:
            return
        every_s = self.plan.topology.run.heartbeat_s
        # A desk that does not read may not keep us from reporting to the supervisor.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                if self._reading and self._welcome is not None:
                    await self._greet_again(self._desk, self._welcome.desk)
                version, incarnation = self.version
                await self._hand(Heartbeat(version=version, incarnation=incarnation, asks=self._reading))

    async def _end(self) -> None:
        if self._desk is not None:
            # A desk that does not read hears no goodbye; it will notice our silence.
            with contextlib.suppress(LinkClosed, OSError, TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await self._hand(Goodbye(reason=self.state))
            await self._desk.close(linger_s=LAST_WORDS_S)
        await super()._end()
