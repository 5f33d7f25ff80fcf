"""Deliveries that come in numbered pieces: which piece follows on the one before it.

A connection that is lost takes messages with it, and what is sent after that may arrive before its loss is
noticed: then a batch would begin in the middle, or have a hole. What does not follow on is for nobody; after
the next hello the buffer delivers all of it anew.

Invariant: between a piece 0 and the last piece of a delivery every piece was taken, in order.
"""

from __future__ import annotations

from collections.abc import Hashable


class Pieces:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._next: tuple[Hashable, int] | None = None
        """The piece that would follow on; None: only a piece 0 can."""

    def follows(self, delivery: Hashable, part: int) -> bool:
        """Whether this piece is to be taken. Piece 0 begins a delivery, whatever came before it.

        Args:
            delivery: names what is delivered (a batch, a version).
            part: number of the piece, from 0.
        """
        if part and (delivery, part) != self._next:
            self._next = None
            return False
        self._next = (delivery, part + 1)
        return True

    def rest(self, what: str, num_parts: int) -> str:
        """What is still to come of the delivery under way, in words; empty when nothing is.

        Args:
            what: names the delivery for people.
            num_parts: pieces that it has.
        """
        taken = self._next[1] if self._next is not None else num_parts
        return f"piece {taken + 1} of {num_parts} of {what}" if taken < num_parts else ""
