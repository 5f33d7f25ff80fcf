"""What a link lets through: sizes, types, and patience with each peer.

It owns the counters of a link and the memory of who misbehaved. It touches no socket. A malformed message is
counted, reported and dropped; after `max_malformed` of them everything else from that identity is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from asyncrl.errors import ProtocolError
from asyncrl.link.base import Delivery, Limits, LinkStatistics, OnMalformed
from asyncrl.link.inbox import Inbox
from asyncrl.messages.codec import Body, Codec, check_bodies, check_sizes, encode, num_bytes

_MAX_REMEMBERED_PEERS = 4096
"""Identities with strikes that are remembered, so that inventing identities cannot fill the memory."""


class Screen:
    """The counters and the doorkeeper of one end of a link."""

    def __init__(self, receives: Any, *, limits: Limits, on_malformed: OnMalformed | None) -> None:
        self.limits = limits
        self._codec = Codec(receives, limits=limits)
        self._on_malformed = on_malformed
        self._strikes: dict[bytes, int] = {}
        self._sent = self._sent_bytes = self._received = self._received_bytes = 0
        self._malformed = self._ignored = 0

    def admit(self, peer: bytes, frames: list[bytes]) -> Delivery | None:
        """A message off the wire, or None where it has to be dropped."""
        if self.is_dropped(peer):
            self._ignored += 1
            return None
        try:
            check_sizes(frames, limits=self.limits)
            message = self._codec.decode(frames[0])
        except ProtocolError as error:
            self._strike(peer, str(error))
            return None
        return self._pass(Delivery(peer, message, frames[1:]), size=num_bytes(*frames))

    def admit_object(self, raw: Delivery) -> Delivery | None:
        """A message that was never encoded, or None where it has to be dropped."""
        if self.is_dropped(raw.peer):
            self._ignored += 1
            return None
        try:
            check_bodies(raw.frames, limits=self.limits)
            self._codec.check(raw.message)
        except ProtocolError as error:
            self._strike(raw.peer, str(error))
            return None
        return self._pass(raw, size=num_bytes(*raw.frames))

    def is_dropped(self, peer: bytes) -> bool:
        """Whether everything from this identity is ignored."""
        return self._strikes.get(peer, 0) >= self.limits.max_malformed

    def drop(self, peer: bytes) -> None:
        """Ignore this identity from now on."""
        self._remember(peer, self.limits.max_malformed)

    def write(self, message: msgspec.Struct, frames: Sequence[Body]) -> list[Body]:
        """The frames of an outgoing message. Raises ValueError where no peer would accept them."""
        self.check_outgoing(message, frames)
        header = encode(message)
        if len(header) > self.limits.max_header_bytes:
            raise ValueError(
                f"{type(message).__name__} cannot be sent: header of {len(header)} bytes; at most "
                f"{self.limits.max_header_bytes} are allowed"
            )
        return [header, *frames]

    def check_outgoing(self, message: msgspec.Struct, frames: Sequence[Body]) -> None:
        """Raises ValueError for bodies that no peer would accept.

        The receiving side would cut the connection, and neither end would know why.
        """
        try:
            check_bodies(frames, limits=self.limits)
        except ProtocolError as error:
            raise ValueError(f"{type(message).__name__} cannot be sent: {error}") from error

    def too_many(self, address: str) -> str:
        """What a client says that gives up on its server."""
        return (
            f"{address}: the server sent {self.limits.max_malformed} malformed messages; "
            "is it of the same version of asyncrl?"
        )

    def count_sent(self, frames: Sequence[Body]) -> None:
        """Count one message that the transport took."""
        self._sent += 1
        self._sent_bytes += num_bytes(*frames)

    def statistics(self, inbox: Inbox) -> LinkStatistics:
        """A snapshot of the counters and of the queue behind them."""
        return LinkStatistics(
            sent=self._sent,
            sent_bytes=self._sent_bytes,
            received=self._received,
            received_bytes=self._received_bytes,
            malformed=self._malformed,
            ignored=self._ignored,
            queued=len(inbox),
            peak_queued=inbox.peak,
            max_queued=inbox.capacity,
        )

    def _pass(self, delivery: Delivery, *, size: int) -> Delivery:
        self._received += 1
        self._received_bytes += size
        return delivery

    def _strike(self, peer: bytes, reason: str) -> None:
        self._malformed += 1
        self._remember(peer, self._strikes.get(peer, 0) + 1)
        if self._on_malformed is not None:
            self._on_malformed(peer, reason)

    def _remember(self, peer: bytes, strikes: int) -> None:
        self._strikes[peer] = strikes
        if len(self._strikes) > _MAX_REMEMBERED_PEERS:
            del self._strikes[next(iter(self._strikes))]
