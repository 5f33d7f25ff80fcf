"""Leases in the hands of a reward worker, from their coming to the acknowledgement of their results.

    take -> held -> done -> unsaid -> acknowledged

And the room that is left: a window of leases for each kind of work, and one of bytes. It neither speaks to
the buffer nor waits.
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from asyncrl.actor.client import Statement
from asyncrl.messages.control import Kind, Lease, Want
from asyncrl.obs.vitals import Part


class _Lease(NamedTuple):
    kind: Kind
    samples: int
    num_bytes: int
    since: float
    """When it came, on the monotonic clock."""


class Held(Part):
    """See the module's docstring."""

    def __init__(self, *, batch: int, window_bytes: int) -> None:
        """`batch` samples of each kind of work and `window_bytes` in all may be leased to us at once."""
        self._batch = batch
        self._window_bytes = window_bytes
        self._leases: dict[int, _Lease] = {}
        """By fence."""
        self._unsaid: dict[int, Statement] = {}
        """By fence: results that are not acknowledged."""
        self.idle = asyncio.Event()
        """Whether nothing is held, and the last result is on its way."""
        self.idle.set()

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def fences(self) -> list[int]:
        """Of the leases that are held, or whose results are not acknowledged."""
        return sorted({*self._leases, *self._unsaid})

    @property
    def unsaid(self) -> list[Statement]:
        """Results that are not acknowledged, in order."""
        return list(self._unsaid.values())

    @property
    def oldest_s(self) -> float:
        """Age of the oldest lease in hand; 0 without one."""
        return time.monotonic() - min(lease.since for lease in self._leases.values()) if self._leases else 0.0

    def take(self, lease: Lease, *, samples: int, num_bytes: int) -> bool:
        """A lease has come. False when we have it: a desk that could not know that has sent it again."""
        if lease.fence in self._leases or lease.fence in self._unsaid:
            return False
        self._leases[lease.fence] = _Lease(lease.kind, samples, num_bytes, time.monotonic())
        self.idle.clear()
        return True

    def done(self, fence: int, result: Statement) -> None:
        """There is a result; it is to be said until it is acknowledged."""
        self._unsaid[fence] = result
        del self._leases[fence]

    def said(self) -> None:
        """A result is on its way."""
        if not self._leases:
            self.idle.set()

    def acknowledged(self, fence: int) -> None:
        """The buffer has committed a result, or refused it: then the work belongs to somebody else now."""
        self._unsaid.pop(fence, None)

    def wants(self) -> list[Want]:
        """All the room there is, to a desk that knows of none."""
        room = {Kind.SCORE: self._batch, Kind.FILTER: self._batch}
        num_bytes = self._window_bytes
        for lease in self._leases.values():
            room[lease.kind] -= lease.samples
            num_bytes -= lease.num_bytes
        return [
            self.credit(Kind.SCORE, room[Kind.SCORE], num_bytes),
            self.credit(Kind.FILTER, room[Kind.FILTER], 0),
        ]

    def credit(self, kind: Kind, samples: int, num_bytes: int) -> Want:
        """So much room for a kind of work."""
        return Want(kind=kind, samples=samples, num_bytes=num_bytes, capacity=self._batch)
