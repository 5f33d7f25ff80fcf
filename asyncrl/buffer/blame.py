"""Whose fault the death of a worker was, as far as that can be known: the worker's own, or a sample's.

A worker that dies takes every sample with it that it held, and each of them may have been the cause. A sample
that was held by several workers that died is a suspect and is leased alone; if that worker dies, too, the
sample is proven guilty: its group fails, and all the deaths it was there at are its doing. Such deaths do not
count against a worker's restarts.

Where nearly every sample seems to end its worker, it is the workers that are broken: after `MAX_PROVEN`
groups without a batch nobody is acquitted any more, and the restarts run out.
"""

from __future__ import annotations

from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.states import GroupRecord, LeaseRecord, SampleRecord
from asyncrl.messages.control import Kind
from asyncrl.messages.sample import Settled
from asyncrl.messages.supervision import Acquitted

MAX_PROVEN = 4
"""Groups in a row without a batch (`Batches.refused`) up to which samples are found guilty."""


class Blame:
    """Remembers who died with which sample. What a restart of the buffer forgets stays the workers' fault."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._deaths: dict[tuple[int, int], list[str]] = {}
        """(group, sample) -> incarnations of the workers whose deaths count as its attempts."""
        self._proven: list[Acquitted] = []

    def release(self, leases: list[LeaseRecord], reason: str, now: float, *, ours: bool) -> None:
        """`Ledger.release` for the leases of one worker that is gone, and what follows from it."""
        held = [(lease, *found) for lease in leases for found in self._held(lease)]
        self._ledger.release(leases, reason, now, ours=ours)
        for lease, group, sample, attempts in held:
            if sample.attempts > attempts:
                self._deaths.setdefault((group.group_id, sample.index), []).append(lease.incarnation)
        if len(held) == 1 and held[0][0].kind is Kind.GENERATE:
            self._judge(held[0][1], held[0][2], attempts=held[0][3])
        for key in [key for key in self._deaths if key[0] not in self._ledger.book.groups]:
            del self._deaths[key]

    def _held(self, lease: LeaseRecord) -> list[tuple[GroupRecord, SampleRecord, int]]:
        group = self._ledger.book.groups.get(lease.group_id)
        if group is None or lease.kind is Kind.FILTER:
            return []
        samples = [group.samples[index] for index in sorted(lease.remaining)]
        return [(group, sample, sample.attempts) for sample in samples if sample.fence == lease.fence]

    def _judge(self, group: GroupRecord, sample: SampleRecord, *, attempts: int) -> None:
        """It was alone with its worker; whether it had failed before, and failed for good now."""
        again = 0 < attempts < sample.attempts
        if not again or group.reason is not Settled.FAILED or self._ledger.batches.refused > MAX_PROVEN:
            return
        dead = self._deaths[group.group_id, sample.index]
        reason = (
            f"sample {sample.index} of group {group.group_id} ended {len(dead)} workers, the last one alone "
            "with it, and its group has failed"
        )
        self._proven.append(Acquitted(incarnations=dead, reason=reason))

    def take(self) -> list[Acquitted]:
        """What was proven since the last call; true once the ledger's next transaction is committed."""
        proven, self._proven = self._proven, []
        return proven
