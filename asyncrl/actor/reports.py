"""A generator's way to the buffer: many reports per message, one unacknowledged per sample.

While a report of a sample is unacknowledged, what it generates further gathers; so a slow disk bounds what is
on its way without slowing the engine down. Of all samples together at most `max_bytes` are on their way (a
report that is larger goes alone). What no message can carry ends its sample by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

import msgspec

from asyncrl.actor.waiting import awaiting
from asyncrl.messages.codec import MiB, SizeLimits
from asyncrl.messages.control import Ack, Report, Reports
from asyncrl.messages.sample import Segment, Status, join_routing, merge_spans
from asyncrl.obs.metrics import Waits

MAX_REPORTS = 256
"""Reports in one message."""
MAX_REPORT_BYTES = 8 * MiB
"""Of what has gathered, as much as goes into one report, unless a single piece is larger."""
DRAIN_S = 20.0
"""How long a leaving generator waits for acknowledgements."""


class _Item(NamedTuple):
    report: Report
    frame: bytes


class Outbox:
    """All samples of one generator."""

    def __init__(
        self,
        send: Callable[[msgspec.Struct, Sequence[bytes]], Awaitable[None]],
        *,
        max_bytes: int = 64 * MiB,
        max_frame_bytes: int = SizeLimits().max_frame_bytes,
        name: str = "generator",
        deadline_s: float = math.inf,
        waits: Waits | None = None,
    ) -> None:
        """`max_bytes` bounds what is not acknowledged, `max_frame_bytes` one report.

        `deadline_s` bounds every wait for an acknowledgement, which is charged to `waits`.
        """
        self._send = send
        self._max_bytes = max_bytes
        self.max_frame_bytes = max_frame_bytes
        self.name, self.deadline_s, self.waits = name, deadline_s, waits or Waits()
        self._queue: deque[_Item] = deque()
        """Bounded by the leased samples, as one report of each may be on its way."""
        self._on_the_way: dict[tuple[int, int], int] = {}
        """(fence, index) -> bytes of its report that is sent and not acknowledged."""
        self._changed = asyncio.Event()
        self._open: dict[tuple[int, int], SampleReports] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def open(self, fence: int, group_id: int, index: int, offset: int) -> SampleReports:
        """Start reporting on a leased sample that has `offset` tokens already."""
        reports = SampleReports(self, fence, group_id, index, offset)
        self._open[(fence, index)] = reports
        self._empty.clear()
        return reports

    def open_uids(self) -> Iterator[str]:
        """Engine uids of the samples that are not handed in yet."""
        return (f"{fence}.{index}" for fence, index in self._open)

    def acknowledged(self, acks: Sequence[Ack]) -> None:
        """The buffer has committed or refused reports."""
        for ack in acks:
            reports = self._open.get((ack.fence, ack.index))
            if reports is not None:
                reports.acknowledged(ack)
            if reports is None or reports.in_flight is None:
                self._on_the_way.pop((ack.fence, ack.index), None)
        self._changed.set()

    def put(self, item: _Item) -> None:
        """Queue a report."""
        self._queue.append(item)
        self._changed.set()

    def again(self) -> list[tuple[Reports, list[bytes]]]:
        """Messages with the reports that are not acknowledged, within `max_bytes`; the others are queued."""
        self._on_the_way.clear()
        self._queue = deque(
            item for reports in self._open.values() if (item := reports.in_flight) is not None
        )
        messages = []
        while items := self._take():
            messages.append(_message(items))
        return messages

    @property
    def on_the_way_bytes(self) -> int:
        """Bytes of reports that are sent and not acknowledged."""
        return sum(self._on_the_way.values())

    def _take(self) -> list[_Item]:
        """The queued reports that may go now, for one message, in order."""
        items: list[_Item] = []
        size, under_way = 0, self.on_the_way_bytes
        while self._queue and len(items) < MAX_REPORTS and size < MAX_REPORT_BYTES:
            item = self._queue[0]
            if under_way and under_way + len(item.frame) > self._max_bytes:
                break
            items.append(self._queue.popleft())
            self._on_the_way[(item.report.fence, item.report.index)] = len(item.frame)
            size, under_way = size + len(item.frame), under_way + len(item.frame)
        return items

    @property
    def fences(self) -> list[int]:
        """Of the leases whose samples are not handed in yet."""
        return sorted({fence for fence, _ in self._open})

    def forget(self, fence: int, index: int) -> None:
        """The last report of a sample is acknowledged."""
        self._open.pop((fence, index), None)
        if not self._open:
            self._empty.set()

    async def write(self) -> None:
        """consumes: queued reports    waits for: samples, room    produces: messages of many reports"""
        while True:
            while items := self._take():
                await self._send(*_message(items))
            self._changed.clear()
            if self._queue:
                async with self.patience("room", f"the buffer to acknowledge {self.on_the_way_bytes} bytes"):
                    await self._changed.wait()
                continue
            with self.waits("report"):
                await self._changed.wait()

    def patience(self, name: str, what: str) -> AbstractAsyncContextManager[None]:
        """A wait for acknowledgements. Raises StalledError when they do not come."""
        return awaiting(
            self.waits, name, who=self.name, what=what, deadline_s=self.deadline_s,
            advice="see the buffer's log and its disk",
        )  # fmt: skip

    async def drained(self) -> None:
        """Wait until everything is acknowledged, for at most DRAIN_S."""
        # What is not acknowledged then counts as lost with us, as after a kill.
        with contextlib.suppress(TimeoutError), self.waits("acknowledgement"):
            async with asyncio.timeout(DRAIN_S):
                await self._empty.wait()


class SampleReports:
    """The reports of one leased sample, in order."""

    def __init__(self, outbox: Outbox, fence: int, group_id: int, index: int, offset: int) -> None:
        self._outbox = outbox
        self._fence, self._group_id, self._index = fence, group_id, index
        self._offset = offset
        self._gathered: list[Segment] = []
        self.in_flight: _Item | None = None
        """The report that is not acknowledged."""
        self._free = asyncio.Event()
        self._free.set()
        self._refused = False
        """The lease is not ours any more: nothing further is handed in."""
        self.failed = False
        """No message can carry what came: nothing further is handed in, and whoever generates may stop."""

    async def report(self, segment: Segment, status: Status, reason: str = "") -> None:
        """Hand in tokens; progress waits for its turn without holding the engine up."""
        if self.failed:
            return
        if segment.num_tokens or segment.metadata:
            self._gathered.append(segment)
        if status is Status.PENDING:
            if self._gathered and self.in_flight is None and not self._refused:
                self._put(status, "")
            return
        while not (self._refused or self.failed):
            await self._acknowledgement()
            if self._refused or self._put(status, reason):
                return

    async def _acknowledgement(self) -> None:
        """Raises StalledError when the buffer does not say whether the last report is committed."""
        what = f"the buffer to acknowledge tokens of sample {self._group_id}.{self._index}"
        async with self._outbox.patience("acknowledgement", what):
            await self._free.wait()

    def _put(self, status: Status, reason: str) -> bool:
        """Queue a report with as much of what has gathered as it takes; whether that was all of it."""
        count = _fitting(self._gathered)
        segment = _join(self._gathered[:count])
        del self._gathered[:count]
        if self._gathered:
            status, reason = Status.PENDING, ""
        frame = msgspec.msgpack.encode(segment) if segment.num_tokens else b""
        if len(frame) > self._outbox.max_frame_bytes:
            reason = (
                f"sample {self._group_id}.{self._index}: {segment.num_tokens} tokens handed in at once have "
                f"{len(frame)} bytes with their metadata and routing; at most "
                f"{self._outbox.max_frame_bytes} fit a message; lower rollout.progress_every_tokens, or put "
                "less into the metadata"
            )
            segment, frame, status, self.failed = Segment(), b"", Status.FAILED, True
            self._gathered.clear()
        self._queue_report(segment, frame, status, reason)
        return not self._gathered

    def _queue_report(self, segment: Segment, frame: bytes, status: Status, reason: str) -> None:
        self._free.clear()
        report = Report(
            fence=self._fence,
            group_id=self._group_id,
            index=self._index,
            status=status,
            offset=self._offset,
            num_tokens=segment.num_tokens,
            spans=segment.spans,
            reason=reason,
        )
        self._offset += segment.num_tokens
        self.in_flight = _Item(report, frame)
        self._outbox.put(self.in_flight)

    def acknowledged(self, ack: Ack) -> None:
        """The report in flight is committed (or refused: then the lease is not ours any more).

        The acknowledgement of an earlier report, which came twice because the report did, changes nothing.
        Its offset may be that of the last report, which can be without tokens; and tokens of a sample that
        was handed back may have been thrown away. So that `ack.last` alone tells of the last report.
        """
        last = self.in_flight is not None and self.in_flight.report.status is not Status.PENDING
        committed = ack.last if last else ack.offset >= self._offset
        if ack.accepted and (self.in_flight is None or not committed):
            return
        self.in_flight = None
        self._refused = not ack.accepted
        self._free.set()
        if last or not ack.accepted:
            self._outbox.forget(self._fence, self._index)


def _message(items: Sequence[_Item]) -> tuple[Reports, list[bytes]]:
    return Reports(reports=[item.report for item in items]), [item.frame for item in items]


def _fitting(segments: list[Segment]) -> int:
    """How many of these go into one report: at least one."""
    size = 0
    for count, segment in enumerate(segments):
        routing = len(segment.routed_experts)
        size += len(segment.tokens) + len(segment.logprobs) + len(segment.text) + routing
        if count and size > MAX_REPORT_BYTES:
            return count
    return len(segments)


def _join(segments: list[Segment]) -> Segment:
    if len(segments) == 1:
        return segments[0]
    metadata: dict[str, object] = {}
    for segment in segments:
        metadata.update(segment.metadata)
    routed_experts, routed_top_k = join_routing(segments)
    return Segment(
        tokens=b"".join(s.tokens for s in segments),
        logprobs=b"".join(s.logprobs for s in segments),
        loss_mask=b"".join(s.loss_mask or b"\x01" * s.num_tokens for s in segments)
        if any(s.loss_mask for s in segments)
        else b"",
        spans=merge_spans([span for s in segments for span in s.spans]),
        text="".join(s.text for s in segments),
        metadata=metadata,
        routed_experts=routed_experts,
        routed_top_k=routed_top_k,
    )
