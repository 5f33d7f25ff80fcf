"""The live groups, the running totals, and what has changed since the last transaction.

Primitive moves only: every rule about who may do what is in `ledger` and its helpers. Settling is the one
way out of the book, and it happens once for each group.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from asyncrl.buffer.states import (
    BATCHED,
    PROMPT_INDEX,
    READY,
    BodyRow,
    GroupRecord,
    Outgoing,
    SampleRecord,
    Transaction,
    group_row,
    sample_row,
)
from asyncrl.messages.control import Ack, Acks, Issued, Message, Report
from asyncrl.messages.sample import Lane, Settled


class Frame:
    """A body as it arrived: its bytes and their digest."""

    __slots__ = ("data", "digest")

    def __init__(self, data: bytes, digest: str) -> None:
        self.data = data
        self.digest = digest


class Book:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.groups: dict[int, GroupRecord] = {}
        """Unsettled groups that are in no recorded batch."""
        self.totals: Counter[str] = Counter()
        """Running sums, kept apart from the rows so that an audit can hold one against the other."""
        self.next_group = 0
        self.next_fence = 1
        self.next_body = 1
        self.seq = 0
        """Counts ledger events: orders issue, cut and settle against each other."""
        self._dirty_groups: dict[int, GroupRecord] = {}
        self._dirty_samples: dict[tuple[int, int], tuple[int, SampleRecord]] = {}
        self._bodies: list[BodyRow] = []
        self._rows: list[tuple[str, tuple[Any, ...]]] = []
        self._sends: list[Outgoing] = []
        self._acks: dict[bytes, list[Ack]] = {}
        self._deliver: list[tuple[bytes, int]] = []
        self._evaluated: list[tuple[int, int]] = []
        self._forget: list[int] = []
        self._totals_written: Counter[str] = Counter()

    def add_group(self, lane: Lane, issued: Issued, frame: Frame, now: float) -> GroupRecord:
        """A new group under the next ordinal."""
        group = GroupRecord(
            group_id=self.next_group,
            lane=lane,
            dataset=issued.dataset,
            prompt_body=self._append(
                "prompt", self.next_group, PROMPT_INDEX, issued.num_tokens, [], 0, "source", frame
            ),
            prompt_tokens=issued.num_tokens,
            prompt_bytes=len(frame.data),
            samples=[SampleRecord(index=i) for i in range(issued.num_samples)],
            created_at=now,
        )
        self.next_group += 1
        self.groups[group.group_id] = group
        self.totals["issued.groups"] += 1
        self.totals["issued.samples"] += issued.num_samples
        if issued.retry_of >= 0:
            self.row("retry", group.group_id, issued.retry_of)
        self.touch(group, *group.samples)
        return group

    def add_tokens(
        self, group: GroupRecord, sample: SampleRecord, report: Report, worker: str, frame: Frame
    ) -> None:
        """Append a segment to a sample."""
        body = self._append(
            "segment", group.group_id, sample.index, report.num_tokens, list(report.spans), report.fence,
            worker, frame,
        )  # fmt: skip
        sample.bodies.append(body)
        sample.body_bytes += len(frame.data)
        sample.tokens += report.num_tokens
        sample.worker = worker
        for span in report.spans:
            sample.oldest = span.version if sample.oldest is None else min(sample.oldest, span.version)
            sample.newest = span.version if sample.newest is None else max(sample.newest, span.version)
        self.totals["received.tokens"] += report.num_tokens
        self.totals["received.segments"] += 1
        self.touch(group, sample)

    def add_score(
        self, group: GroupRecord, sample: SampleRecord, fence: int, worker: str, frame: Frame
    ) -> None:
        """Append a score to a sample."""
        sample.score_body = self._append("score", group.group_id, sample.index, 0, [], fence, worker, frame)
        sample.score_bytes = len(frame.data)
        self.totals["received.scores"] += 1
        self.touch(group, sample)

    def discard_tokens(self, group: GroupRecord, sample: SampleRecord) -> None:
        """Forget what a sample has: it will be generated again from its prompt."""
        if not sample.bodies:
            return
        self.totals["regenerated.tokens"] += sample.tokens
        self._rows.append(("drop_bodies", (group.group_id, sample.index)))
        self._forget += sample.bodies
        sample.bodies = []
        sample.body_bytes = sample.tokens = 0
        sample.oldest = sample.newest = None
        self.touch(group, sample)

    def settle(self, group: GroupRecord, reason: Settled, now: float, note: str = "") -> None:
        """A group's last event, whatever it is but being batched."""
        assert group.reason is None, f"group {group.group_id} settles twice: {group.reason}, {reason}"
        group.reason, group.state, group.note = reason, str(reason), note
        group.settled_at, group.settled_seq = now, self.seq
        self.count_settled(reason, groups=1, samples=len(group.samples), tokens=group.tokens)
        self._leave(group, str(reason))

    def batch(self, group: GroupRecord, batch: int) -> None:
        """A group enters a recorded batch; from then on the tables alone know it."""
        group.state, group.batch = BATCHED, batch
        self._leave(group, BATCHED)

    def count_settled(self, reason: Settled, *, groups: int, samples: int, tokens: int) -> None:
        """Add to the totals of a reason (negative to take back)."""
        self.totals[f"settled.{reason}.groups"] += groups
        self.totals[f"settled.{reason}.samples"] += samples
        self.totals[f"settled.{reason}.tokens"] += tokens

    def _leave(self, group: GroupRecord, state: str) -> None:
        for sample in group.samples:
            sample.state = state
        self.touch(group, *group.samples)
        self._forget += group.body_ids
        del self.groups[group.group_id]

    def oldest_unfinished(self) -> GroupRecord | None:
        """The group of the lane train that was issued first and is not complete yet."""
        open_ = (
            group
            for group in self.groups.values()
            if group.lane is Lane.TRAIN and group.version >= 0 and group.state != READY
        )
        return min(open_, key=lambda group: (group.version, group.group_id), default=None)

    def touch(self, group: GroupRecord, *samples: SampleRecord) -> None:
        """These rows have changed."""
        self._dirty_groups[group.group_id] = group
        for sample in samples:
            self._dirty_samples[(group.group_id, sample.index)] = (group.group_id, sample)

    def row(self, statement: str, *values: Any) -> None:
        """A row for another table, by the store's statement name."""
        self._rows.append((statement, values))

    def send(self, peer: bytes, message: Message, bodies: list[int] | None = None) -> None:
        """A message that leaves after the commit."""
        self._sends.append(Outgoing(peer, message, bodies or []))

    def acknowledge(self, peer: bytes, ack: Ack) -> None:
        """An acknowledgement that leaves after the commit, together with the peer's others."""
        self._acks.setdefault(peer, []).append(ack)

    def deliver(self, peer: bytes, batch: int) -> None:
        """Hand a recorded batch to the trainer, after the commit."""
        self._deliver.append((peer, batch))

    def deliver_evaluation(self, version: int, incarnation: int) -> None:
        """Hand a finished evaluation to the evaluator, after the commit."""
        self._evaluated.append((version, incarnation))

    def fence(self) -> int:
        """The next fencing number."""
        self.next_fence += 1
        return self.next_fence - 1

    def take(self) -> Transaction:
        """Everything since the last call."""
        for name, value in self.totals.items():
            if self._totals_written[name] != value:
                self._rows.append(("total", (name, value)))
                self._totals_written[name] = value
        sends = [Outgoing(peer, Acks(acks=acks)) for peer, acks in self._acks.items()] + self._sends
        transaction = Transaction(
            groups=[group_row(group) for group in self._dirty_groups.values()],
            samples=[sample_row(*item) for item in self._dirty_samples.values()],
            bodies=self._bodies,
            rows=self._rows,
            sends=sends,
            deliver=self._deliver,
            evaluated=self._evaluated,
            forget=self._forget,
        )
        self._dirty_groups, self._dirty_samples, self._bodies, self._rows = {}, {}, [], []
        self._sends, self._acks, self._deliver, self._evaluated, self._forget = [], {}, [], [], []
        return transaction

    def _append(
        self, kind: str, group_id: int, index: int, num_tokens: int, spans: list[Any], fence: int,
        worker: str, frame: Frame,
    ) -> int:  # fmt: skip
        body = self.next_body
        self.next_body += 1
        self._bodies.append(
            BodyRow(body, kind, group_id, index, num_tokens, spans, fence, worker, frame.data, frame.digest)
        )
        self.totals["received.bodies"] += 1
        return body
