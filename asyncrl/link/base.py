"""The interface of a link: typed messages with opaque bodies between one server and its clients.

A link owns the transport, the size limits and the screening of peers. It knows no leases, credits or roles,
retries nothing and acknowledges nothing: a message may be lost with a connection, and the conversations above
are built for that.

Invariants, of every implementation:
- messages of one peer arrive in the order in which they were sent, whole or not at all;
- `recv` may be cancelled at any moment and loses nothing;
- a client's `send` suspends while the server does not read; a server's `send` never waits for one peer: a
  peer that leaves `max_unread` messages unread is gone (`PeerGone`), and the others do not notice;
- a link that failed says so in the next `recv` and `send`; it is never silent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from asyncrl.errors import RunError
from asyncrl.messages.codec import Body, MiB, SizeLimits

OnMalformed = Callable[[bytes, str], None]
"""Called on the loop with a peer's identity and what was wrong with its message."""


class Limits(SizeLimits, frozen=True, kw_only=True):
    """What a link takes in: sizes of messages, lengths of queues, patience with a peer."""

    max_queued: int = 256
    """Received messages that wait for `recv`; then the reader stops reading."""
    max_queued_bytes: int = 64 * MiB
    """And how much they weigh at most; one that is larger passes when nothing else waits."""
    max_unread: int = 1000
    """Sent messages that one peer has not read (ZeroMQ's high-water mark): a fuse, as credits bound it."""
    max_malformed: int = 8
    """Malformed messages after which everything else from that peer is ignored."""


class LinkStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a link's counters, since it was opened."""

    sent: int
    """Messages."""
    sent_bytes: int
    """Bodies only on a memory link, headers too elsewhere."""
    received: int
    """Messages that passed the screen."""
    received_bytes: int
    malformed: int
    """Messages that were dropped because they were not what they should be."""
    ignored: int
    """Messages dropped unread because their sender had been dropped before."""
    queued: int
    """Messages that wait for `recv` now."""
    peak_queued: int
    max_queued: int


class PeerGone(RunError):  # noqa: N818 - an event the sender handles, not a mistake
    """The peer a message was for is not connected, does not read, or was dropped."""


class LinkClosed(RunError):  # noqa: N818 - as above
    """This end of the link was closed."""


class Delivery(NamedTuple):
    """One message as it arrives."""

    peer: bytes
    """Identity of the sender; empty at a client, which has one peer."""
    message: Any
    """An instance of one of the types that the link receives."""
    frames: list[bytes]
    """The bodies, opaque (on a memory link the very objects that were sent)."""


class ServerLink(Protocol):
    """The end that is dialled. It addresses clients by the identity they chose."""

    @property
    def address(self) -> str:
        """Where clients find it: the real port where port 0 was asked for."""

    async def recv(self) -> Delivery:
        """The next message. May be cancelled. Raises LinkClosed, RunError."""

    async def send(self, peer: bytes, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """Hand a message to the transport, without waiting. Raises PeerGone, LinkClosed, RunError."""

    def drop(self, peer: bytes) -> None:
        """Ignore everything further from this identity and refuse to send to it.

        It stays dropped: an identity names one life of a process, a restarted process takes another.
        """

    def statistics(self) -> LinkStatistics:
        """A snapshot; never blocks."""

    async def close(self, *, linger_s: float = 1.0) -> None:
        """Flush what was sent for at most `linger_s`, then let go of everything. May be called twice."""


class ClientLink(Protocol):
    """The end that dials."""

    @property
    def cuts(self) -> int:
        """How often the connection was lost, and with it what was on its way in either direction."""

    async def recv(self) -> Delivery:
        """The next message. May be cancelled. Raises LinkClosed, RunError.

        Raises:
            ProtocolError: the server sent too many malformed messages.
        """

    async def send(self, message: msgspec.Struct, frames: Sequence[Body] = ()) -> None:
        """Hand a message to the transport; suspends while too many are unread. Raises LinkClosed, RunError.

        Cancelling it before it returns means that the message was not sent.
        """

    def statistics(self) -> LinkStatistics:
        """A snapshot; never blocks."""

    async def close(self, *, linger_s: float = 1.0) -> None:
        """Flush what was sent for at most `linger_s`, then let go of everything. May be called twice."""
