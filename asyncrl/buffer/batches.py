"""Tickets, due dates and recorded batches: how far generation may run ahead, and what a step trains on.

At most `tickets` groups are outstanding. A ticket is taken by a group's first lease and freed when the group
settles untrained, or when the version its batch leads to is published; a ticket freed once stays freed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from asyncrl.buffer.select import after, choose, feasible, first_overdue
from asyncrl.buffer.states import GroupRecord


@dataclass(slots=True)
class BatchRecord:
    """A recorded batch, in numbers."""

    groups: int
    samples: int
    tokens: int
    trained: bool = False


class Batches:
    """See the module's docstring."""

    def __init__(
        self, *, batch_size: int, max_staleness: int, tickets: int, target: int | None, on_straggler: str
    ) -> None:
        self.batch_size = batch_size
        self.max_staleness = max_staleness
        self.tickets = tickets
        self.target = target
        """Rollout steps of the run; None: until the source ends."""
        self.on_straggler = on_straggler
        self.records: dict[int, BatchRecord] = {}
        self.next_batch = 0
        self.on_delivery = 0
        """The next batch to hand to the trainer."""
        self.published = 0
        """Rollout steps the newest published version has trained."""
        self.dues: Counter[int] = Counter()
        """Due batch -> outstanding groups that are in no recorded batch."""
        self.ready: dict[int, int] = {}
        """Complete groups -> their due batch."""
        self.num_trained = 0
        """Batches trained by the trainer's present lineage."""
        self.refused = 0
        """Groups the filters refused since the last batch."""

    @property
    def outstanding(self) -> int:
        """Groups that hold a ticket."""
        unpublished = sum(
            self.records[batch].groups
            for batch in range(self.published, self.next_batch)
            if batch in self.records
        )
        return self.dues.total() + unpublished

    def may_issue(self, version: int, *, newest: bool) -> bool:
        """Whether a fresh group may be issued under `version` now.

        Args:
            version: the version its generator serves.
            newest: whether that is the newest published one; under an older one the rule must still hold.
        """
        if not self.has_ticket:
            return False
        due = version + self.max_staleness
        if newest:
            # Over-sampling leaves tickets when all the batches that a version's groups may be in are cut.
            return due >= self.next_batch
        return feasible(self.dues + Counter({due: 1}), self.next_batch, self.batch_size)

    @property
    def has_ticket(self) -> bool:
        """Whether a fresh group may be issued under any version, and the run needs one."""
        if self.outstanding >= self.tickets:
            return False
        if self.target is None:
            return True
        planned = self.next_batch * self.batch_size + self.dues.total()
        return planned < self.target * self.batch_size + self.surplus

    @property
    def surplus(self) -> int:
        """Groups beyond a batch that over-sampling keeps outstanding."""
        return max(0, self.tickets - (self.max_staleness + 1) * self.batch_size)

    def issue(self, group: GroupRecord, version: int, seq: int) -> None:
        """A group's first lease is given under `version`."""
        group.version = version
        group.due = version + self.max_staleness
        group.issued_seq = seq
        self.dues[group.due] += 1

    def complete(self, group: GroupRecord) -> None:
        """A group is scored and passed the filters."""
        self.ready[group.group_id] = group.due

    def drop(self, group: GroupRecord) -> None:
        """A group settles without being trained: its ticket is free."""
        self.ready.pop(group.group_id, None)
        if group.due >= 0:
            self.dues[group.due] -= 1
            if not self.dues[group.due]:
                del self.dues[group.due]

    def choose(self, size: int) -> list[int] | None:
        """The next batch's groups, or None when there is no batch to cut now."""
        if len(self.ready) < size or (self.target is not None and self.next_batch >= self.target):
            return None
        if size != self.batch_size or self.on_straggler == "train":
            chosen = sorted((due, group_id) for group_id, due in self.ready.items())[:size]
            return [group_id for _, group_id in chosen] if len(chosen) == size and size else None
        ready = [(due, group_id) for group_id, due in self.ready.items()]
        return choose(ready, self.dues, self.next_batch, size)

    def overdue(self) -> int | None:
        """The due batch up to which too much would be outstanding after the next cut, were it made now."""
        ready = sorted((due, group_id) for group_id, due in self.ready.items())
        if len(ready) < self.batch_size:
            return None
        rest = after(self.dues, [due for due, _ in ready[: self.batch_size]])
        return first_overdue(rest, self.next_batch + 1, self.batch_size)

    def record(self, groups: list[GroupRecord]) -> int:
        """These groups are the next batch; returns its number."""
        for group in groups:
            self.drop(group)
        self.records[self.next_batch] = BatchRecord(
            groups=len(groups),
            samples=sum(len(group.samples) for group in groups),
            tokens=sum(group.tokens for group in groups),
        )
        self.next_batch += 1
        self.refused = 0
        return self.next_batch - 1

    def rewind(self, first: int) -> list[BatchRecord]:
        """A trainer starts again at batch `first`: the batches from there on are untrained. Returns those
        that had been trained.
        """
        undone = [r for b, r in self.records.items() if b >= first and r.trained]
        for record in undone:
            record.trained = False
        self.num_trained = min(self.num_trained, first)
        return undone

    def mark_trained(self, batch: int) -> BatchRecord | None:
        """The trainer's present life has trained `batch`; None when it had said so before."""
        record = self.records[batch]
        if record.trained:
            return None
        record.trained = True
        self.num_trained = batch + 1
        return record
