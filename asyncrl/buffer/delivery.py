"""Recorded batches and finished evaluations on their way out: in pieces, within the receiver's byte window.

A piece larger than the window passes when nothing is under way. What is sent is read from the tables, so a
batch that is delivered again is the same to the byte.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from asyncrl.buffer.segments import Location
from asyncrl.buffer.states import Outgoing
from asyncrl.buffer.store import RecordedGroup, Store, evaluation_groups
from asyncrl.messages.control import BatchPart, Evaluated, Message
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
    windowed: bool


class Courier:
    """Used on the store's thread, but for `credit` and `has_work`, which the event loop calls."""

    def __init__(self, store: Store, *, window_bytes: int, piece_bytes: int | None = None) -> None:
        self._store = store
        self._piece_bytes = PIECE_BYTES if piece_bytes is None else piece_bytes
        self._window_bytes = window_bytes
        self._lock = threading.Lock()
        """Around `_under_way`: an update lost between the two threads would be credit lost for ever."""
        self._under_way = 0
        self._trainer = b""
        self._pieces: deque[Piece] = deque()

    @property
    def has_work(self) -> bool:
        """Whether `take` would return something."""
        return bool(self._pieces) and self._fits(self._pieces[0])

    def credit(self, num_bytes: int) -> None:
        """The trainer has taken in so many bytes."""
        with self._lock:
            self._under_way = max(0, self._under_way - num_bytes)

    def forget(self, peer: bytes) -> None:
        """A receiver is gone: what was for it is dropped."""
        self._pieces = deque(piece for piece in self._pieces if piece.peer != peer)
        if peer == self._trainer:
            with self._lock:
                self._under_way = 0

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
            self._pieces.append(Piece(peer, message, places, num_bytes, windowed=True))

    def queue_evaluation(self, peer: bytes, version: int, incarnation: int) -> None:
        """A finished evaluation for the evaluator."""
        pieces = self._split(evaluation_groups(self._store.db, version, incarnation)) or [([], [], 0)]
        for part, (groups, places, num_bytes) in enumerate(pieces):
            message = Evaluated(
                version=version, incarnation=incarnation, part=part, num_parts=len(pieces), groups=groups
            )
            self._pieces.append(Piece(peer, message, places, num_bytes, windowed=False))

    def take(self) -> list[tuple[Outgoing, list[bytes]]]:
        """What may leave now, with its frames."""
        ready = []
        while self._pieces and self._fits(self._pieces[0]):
            piece = self._pieces.popleft()
            if piece.windowed:
                with self._lock:
                    self._under_way += piece.num_bytes
            ready.append((Outgoing(piece.peer, piece.message), self._store.read_last(piece.places)))
        return ready

    def _fits(self, piece: Piece) -> bool:
        return (
            not piece.windowed
            or not self._under_way
            or self._under_way + piece.num_bytes <= self._window_bytes
        )

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
