"""A generator's way to the buffer: many reports per message, one unacknowledged per sample.

While a report of a sample is unacknowledged, what it generates further gathers; so a slow disk bounds what is
on its way without slowing the engine down.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from asyncrl.messages.control import Ack, Report, Reports
from asyncrl.messages.sample import Segment, Status, join_routing, merge_spans

MAX_REPORTS = 256
"""Reports in one message."""
DRAIN_S = 20.0
"""How long a leaving generator waits for acknowledgements."""


class _Item(NamedTuple):
    report: Report
    frame: bytes


class Outbox:
    """All samples of one generator."""

    def __init__(self, send: Callable[[msgspec.Struct, Sequence[bytes]], Awaitable[None]]) -> None:
        self._send = send
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        """Bounded by the leased samples, as one report of each may be on its way."""
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

    def put(self, item: _Item) -> None:
        """Queue a report."""
        self._queue.put_nowait(item)

    def again(self) -> list[tuple[Reports, list[bytes]]]:
        """Messages with every report that is not acknowledged; none of them is queued any more."""
        while not self._queue.empty():
            self._queue.get_nowait()
        items = [item for reports in self._open.values() if (item := reports.in_flight) is not None]
        return [_message(items[at : at + MAX_REPORTS]) for at in range(0, len(items), MAX_REPORTS)]

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
        """consumes: queued reports    waits for: samples    produces: messages of many reports"""
        while True:
            items = [await self._queue.get()]
            while len(items) < MAX_REPORTS and not self._queue.empty():
                items.append(self._queue.get_nowait())
            await self._send(*_message(items))

    async def drained(self) -> None:
        """Wait until everything is acknowledged, for at most DRAIN_S."""
        # What is not acknowledged then counts as lost with us, as after a kill.
        with contextlib.suppress(TimeoutError):
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

    async def report(self, segment: Segment, status: Status, reason: str = "") -> None:
        """Hand in tokens; progress waits for its turn without holding the engine up."""
        if segment.num_tokens or segment.metadata:
            self._gathered.append(segment)
        if status is Status.PENDING:
            if self._gathered and self.in_flight is None and not self._refused:
                self._put(status, "")
            return
        await self._free.wait()
        if not self._refused:
            self._put(status, reason)

    def _put(self, status: Status, reason: str) -> None:
        segment = _join(self._gathered)
        self._gathered = []
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
        frame = msgspec.msgpack.encode(segment) if segment.num_tokens else b""
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
