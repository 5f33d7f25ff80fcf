"""Recorded batches and finished evaluations on their way out: in pieces, within each receiver's byte window.

A piece larger than the window passes when nothing is under way. What is sent is read from the tables, so a
batch that is delivered again is the same to the byte. Leases, which have credits of their own, leave in
messages of bounded size, too.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from asyncrl.buffer.segments import Location
from asyncrl.buffer.states import Outgoing
from asyncrl.buffer.store import RecordedGroup, Store, evaluation_groups
from asyncrl.messages.codec import num_bytes as bytes_in
from asyncrl.messages.control import BatchPart, Evaluated, Lease, Leases, Message
from asyncrl.messages.parts import GroupParts

MAX_FRAMES = 4096
"""Frames of one piece; well below the link's limit."""
PIECE_BYTES = 8 << 20
"""Bytes of one piece, unless one group alone is larger."""


@dataclass(slots=True)
class Piece:
    """A message with its bodies, not read yet."""

    peer: bytes
    message: Message
    places: list[Location]
    num_bytes: int


class Courier:
    """Used on the store's thread, but for `credit` and `has_work`, which the event loop calls."""

    def __init__(self, store: Store, *, window_bytes: int, piece_bytes: int | None = None) -> None:
        self._store = store
        self._piece_bytes = PIECE_BYTES if piece_bytes is None else piece_bytes
        self._window_bytes = window_bytes
        self._lock = threading.Lock()
        """Around `_under_way`: an update lost between the two threads would be credit lost for ever."""
        self._under_way: Counter[bytes] = Counter()
        """Receiver -> bytes that it has not taken in."""
        self._trainer = self._evaluator = b""
        self._pieces: dict[bytes, deque[Piece]] = {}
        """By receiver: one that is slow keeps nobody else waiting."""

    @property
    def has_work(self) -> bool:
        """Whether `take` would return something."""
        return any(pieces and self._fits(pieces[0]) for pieces in self._pieces.values())

    def credit(self, num_bytes: int, *, peer: bytes | None = None) -> None:
        """A receiver (the trainer, where none is named) has taken in so many bytes."""
        with self._lock:
            who = self._trainer if peer is None else peer
            self._under_way[who] = max(0, self._under_way[who] - num_bytes)

    def forget(self, peer: bytes) -> None:
        """A receiver is gone: what was for it is dropped."""
        self._pieces.pop(peer, None)
        with self._lock:
            self._under_way.pop(peer, None)

    def queue_batch(self, peer: bytes, batch: int) -> None:
        """A recorded batch for the trainer; what was for another life of it is dropped."""
        if peer != self._trainer:
            self.forget(self._trainer)
            self._trainer = peer
        row = self._store.db.execute(
            "select digest from trained where batch = ? order by incarnation desc limit 1", (batch,)
        ).fetchone()
        pieces = self._split(self._store.batch(batch))
        for part, (groups, places, num_bytes) in enumerate(pieces):
            message = BatchPart(
                batch=batch,
                part=part,
                num_parts=len(pieces),
                groups=groups,
                num_bytes=num_bytes,
                recorded_digest=row[0] if row else "",
            )
            self._pieces.setdefault(peer, deque()).append(Piece(peer, message, places, num_bytes))

    def queue_evaluation(self, peer: bytes, version: int, incarnation: int) -> None:
        """A finished evaluation for the evaluator; what was for another life of it is dropped."""
        if peer != self._evaluator:
            self.forget(self._evaluator)
            self._evaluator = peer
        if not self._pieces.get(peer):
            # The one before has left whole; what was not given back by now was lost with a connection.
            self.forget(peer)
        pieces = self._split(evaluation_groups(self._store.db, version, incarnation)) or [([], [], 0)]
        for part, (groups, places, num_bytes) in enumerate(pieces):
            message = Evaluated(
                version=version, incarnation=incarnation, part=part, num_parts=len(pieces), groups=groups
            )
            self._pieces.setdefault(peer, deque()).append(Piece(peer, message, places, num_bytes))

    def take(self) -> list[tuple[Outgoing, list[bytes]]]:
        """What may leave now, with its frames."""
        ready = []
        for pieces in self._pieces.values():
            while pieces and self._fits(pieces[0]):
                piece = pieces.popleft()
                with self._lock:
                    self._under_way[piece.peer] += piece.num_bytes
                ready.append((Outgoing(piece.peer, piece.message), self._store.read_last(piece.places)))
        return ready

    def _fits(self, piece: Piece) -> bool:
        under_way = self._under_way[piece.peer]
        return not under_way or under_way + piece.num_bytes <= self._window_bytes

    def _split(self, groups: list[RecordedGroup]) -> list[tuple[list[GroupParts], list[Location], int]]:
        pieces: list[tuple[list[GroupParts], list[Location], int]] = []
        for group in groups:
            places = self._store.places(group)
            size = sum(place.length for place in places)
            if pieces:
                last_parts, last_places, last_size = pieces[-1]
                if last_size + size <= self._piece_bytes and len(last_places) + len(places) <= MAX_FRAMES:
                    last_parts.append(group.parts)
                    last_places.extend(places)
                    pieces[-1] = (last_parts, last_places, last_size + size)
                    continue
            pieces.append(([group.parts], places, size))
        return pieces


def in_pieces(item: Outgoing, frames: list[bytes]) -> Iterator[tuple[Outgoing, list[bytes]]]:
    """A message as one or, where it is many leases, several within MAX_FRAMES and PIECE_BYTES.

    A worker's credit may be for more frames than a message may have. A lease is never split.
    """
    if not isinstance(item.message, Leases) or (
        len(frames) <= MAX_FRAMES and bytes_in(*frames) <= PIECE_BYTES
    ):
        yield item, frames
        return
    leases: list[Lease] = []
    begin = end = size = 0
    for lease in item.message.leases:
        own = frames[end : end + lease.parts.num_frames]
        if leases and (end - begin + len(own) > MAX_FRAMES or size + bytes_in(*own) > PIECE_BYTES):
            yield Outgoing(item.peer, Leases(leases=leases)), frames[begin:end]
            leases, begin, size = [], end, 0
        leases.append(lease)
        end, size = end + len(own), size + bytes_in(*own)
    yield Outgoing(item.peer, Leases(leases=leases)), frames[begin:end]
