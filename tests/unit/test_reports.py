"""The outbox: one unacknowledged report per sample, said again to a desk that did not commit it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from asyncrl.actor.reports import Outbox
from asyncrl.messages.control import Ack, Report, Reports
from asyncrl.messages.sample import Segment, Span, Status, pack_logprobs, pack_tokens


def segment(count: int) -> Segment:
    """So many tokens of version 0."""
    return Segment(
        tokens=pack_tokens([1] * count), logprobs=pack_logprobs([-1.0] * count), spans=[Span(0, 1, count)]
    )


class Wire:
    """An outbox whose messages are kept."""

    def __init__(self) -> None:
        self.sent: list[Report] = []
        self.outbox = Outbox(self._send)

    async def _send(self, message: msgspec.Struct, frames: Sequence[bytes]) -> None:
        assert isinstance(message, Reports)
        assert len(message.reports) == len(frames)
        self.sent += message.reports

    async def write(self) -> None:
        """Let the writer send what is queued."""
        task = asyncio.create_task(self.outbox.write())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])


def again(outbox: Outbox) -> list[tuple[int, int, int]]:
    """(fence, offset, tokens) of what is said again."""
    return [(r.fence, r.offset, r.num_tokens) for message, _ in outbox.again() for r in message.reports]


async def test_whatever_is_not_acknowledged_is_said_again_once() -> None:
    wire = Wire()
    first, second = wire.outbox.open(7, 0, 0, 0), wire.outbox.open(8, 1, 0, 5)
    await first.report(segment(3), Status.PENDING)
    await wire.write()
    await second.report(segment(2), Status.COMPLETED)  # queued, not written
    await first.report(segment(4), Status.PENDING)  # gathers behind the first report
    assert again(wire.outbox) == [(7, 0, 3), (8, 5, 2)]
    assert wire.outbox.fences == [7, 8]
    await wire.write()
    assert [r.fence for r in wire.sent] == [7], "what was said again was queued as well"
    wire.outbox.acknowledged([Ack(7, 0, 0, 3, True), Ack(8, 1, 0, 7, True, last=True)])
    assert again(wire.outbox) == []
    assert wire.outbox.fences == [7]
    await first.report(Segment(), Status.COMPLETED)
    assert again(wire.outbox) == [(7, 3, 4)]


async def test_an_acknowledgement_of_an_earlier_report_changes_nothing() -> None:
    wire = Wire()
    out = wire.outbox.open(7, 0, 0, 0)
    await out.report(segment(3), Status.PENDING)
    wire.outbox.acknowledged([Ack(7, 0, 0, 3, True)])
    await out.report(segment(2), Status.COMPLETED)
    wire.outbox.acknowledged([Ack(7, 0, 0, 3, True)])
    assert again(wire.outbox) == [(7, 3, 2)], "the last report was taken for acknowledged"
    wire.outbox.acknowledged([Ack(7, 0, 0, 5, True, last=True)])
    assert wire.outbox.fences == []


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.ABORTED, Status.FAILED])
async def test_a_last_report_without_tokens_waits_for_its_own_acknowledgement(status: Status) -> None:
    """Fails when offsets alone decide: a repeat of the progress before it has the same one."""
    wire = Wire()
    out = wire.outbox.open(7, 0, 0, 0)
    await out.report(segment(3), Status.PENDING)
    wire.outbox.acknowledged([Ack(7, 0, 0, 3, True)])
    await out.report(Segment(), status)
    wire.outbox.acknowledged([Ack(7, 0, 0, 3, True)])
    assert again(wire.outbox) == [(7, 3, 0)], "the last report was taken for acknowledged"
    wire.outbox.acknowledged([Ack(7, 0, 0, 3, True, last=True)])
    assert again(wire.outbox) == []
    await asyncio.wait_for(wire.outbox.drained(), 1)


async def test_a_sample_whose_tokens_are_thrown_away_on_its_return_is_acknowledged() -> None:
    """Fails when the offset, 0 then, has to be that of the report: its lease stayed open for ever."""
    wire = Wire()
    out = wire.outbox.open(7, 0, 0, 0)
    await out.report(segment(3), Status.ABORTED)
    wire.outbox.acknowledged([Ack(7, 0, 0, 0, True, last=True)])
    assert wire.outbox.fences == []


async def test_a_refused_sample_ends_without_waiting_for_anybody() -> None:
    wire = Wire()
    out = wire.outbox.open(7, 0, 0, 0)
    await out.report(segment(3), Status.PENDING)
    wire.outbox.acknowledged([Ack(7, 0, 0, 0, False, "the lease is not valid any more")])
    await out.report(segment(3), Status.PENDING)
    async with asyncio.timeout(1):
        await out.report(segment(1), Status.COMPLETED)
        await wire.outbox.drained()
    assert again(wire.outbox) == []
    await out.report(segment(1), Status.COMPLETED)
    await wire.write()
    assert wire.sent == [], "more was handed in under a lease that is gone"
