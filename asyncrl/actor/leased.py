"""Samples leased to a generator: what it holds, and the credit that it has to give.

    take -> busy ... done (one sample) -> room -> want

Credit is given once for each sample and each byte: with the first message or after a new hello all there is,
later what became free since then. It neither speaks to the buffer nor waits.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from asyncrl.messages.control import Kind, Lease, Leases, Want
from asyncrl.messages.parts import leased_bytes, unpack
from asyncrl.messages.sample import Sample
from asyncrl.obs.vitals import Part


class Job(NamedTuple):
    """One leased sample."""

    lease: Lease
    sample: Sample
    num_bytes: int
    """Given back with it: all bytes of a lease with its first sample, as their sum has to come out even."""


class Leased(Part):
    """See the module's docstring."""

    def __init__(self, *, capacity: int, max_bytes: int) -> None:
        """`capacity` samples of at most `max_bytes` may be leased to us at once."""
        self.capacity = capacity
        self.held = 0
        """Samples leased to us and not handed in."""
        self.draining = False
        """Whether no credit is given any more."""
        self.busy, self.idle = asyncio.Event(), asyncio.Event()
        """Whether there are any; `idle` is set when the last one is done."""
        self.room = asyncio.Event()
        """Whether there is credit to give."""
        self._max_bytes = max_bytes
        self._leases: Counter[int] = Counter()
        """Of the samples held, by fence."""
        self._held_bytes = 0
        """Bytes of leases of which the first sample is not handed in: credit that is not given back."""
        self._freed = (0, 0)
        """Samples and bytes handed in since the last credit."""

    @property
    def fences(self) -> Collection[int]:
        """Of the leases that are not handed in."""
        return self._leases.keys()

    def take(self, message: Leases, frames: list[bytes], *, known: Collection[int]) -> Iterator[Job]:
        """Leases have come; `known` are fences of those that are handed in and not acknowledged yet."""
        groups = unpack([lease.parts for lease in message.leases], frames)
        sizes = iter(frames)
        for lease, samples in zip(message.leases, groups, strict=True):
            num_bytes = leased_bytes(lease.parts, sizes)
            if lease.fence in self._leases or lease.fence in known:
                # Sent again by a desk that could not know it arrived: only its charge is to be given back.
                self._free(len(samples), num_bytes)
                continue
            self.held += len(samples)
            self._held_bytes += num_bytes
            self._leases[lease.fence] += len(samples)
            self.idle.clear()
            self.busy.set()
            for number, sample in enumerate(samples):
                yield Job(lease, sample, 0 if number else num_bytes)

    def done(self, job: Job) -> None:
        """The last report of a sample is on its way."""
        self.held -= 1
        self._held_bytes -= job.num_bytes
        self._leases -= Counter([job.lease.fence])
        if not self.held:
            self.busy.clear()
            self.idle.set()
        self._free(1, job.num_bytes)

    def _free(self, samples: int, num_bytes: int) -> None:
        self._freed = (self._freed[0] + samples, self._freed[1] + num_bytes)
        self.room.set()

    def want(self, version: tuple[int, int]) -> Want:
        """Credit for what became free since the last one, under a (version, incarnation)."""
        self.room.clear()
        freed, self._freed = self._freed, (0, 0)
        return self.credit(*freed, version=version)

    def all_room(self, version: tuple[int, int]) -> Want:
        """Credit for all the room there is, to a desk that has forgotten what it was given."""
        self._freed = (0, 0)
        return self.credit(self.capacity - self.held, self._max_bytes - self._held_bytes, version=version)

    def credit(self, samples: int, num_bytes: int, *, version: tuple[int, int]) -> Want:
        """So much credit; none while we drain."""
        if self.draining:
            samples = num_bytes = 0  # else what is handed back would come again
        return Want(
            kind=Kind.GENERATE,
            samples=samples,
            num_bytes=num_bytes,
            version=version[0],
            incarnation=version[1],
            capacity=self.capacity,
        )
