"""Waits end: at their deadline, or when a peer that has to speak has been silent for too long."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from asyncrl.actor.pieces import Pieces
from asyncrl.actor.reports import Outbox
from asyncrl.actor.waiting import WATCHDOG_S, Looks, Peers, awaiting, deadline_of, silence_of
from asyncrl.errors import StalledError
from asyncrl.messages.sample import Segment, Span, Status, pack_logprobs, pack_tokens
from asyncrl.obs.metrics import Waits
from tests.desk import make_plan

LIMIT_S = 10.0


def peers(*names: str) -> Peers:
    """Watched once a second from 100 s on, and heard there."""
    made = Peers("r", limit_s=LIMIT_S, every_s=1.0)
    made.look(100.0)
    for name in names:
        made.heard(name)
    return made


def test_a_peer_is_silent_once_the_limit_has_passed_and_not_before() -> None:
    watched = peers("the buffer", "the supervisor")
    for second in range(1, 11):
        watched.look(100.0 + second)
        watched.heard("the supervisor")
    with pytest.raises(
        StalledError, match=r"^r: the buffer was silent for 11 s.*allowed are 10 s: run.stall_s"
    ):
        watched.look(111.0)


def test_nobody_has_to_speak_before_being_met() -> None:
    watched = peers()
    for second in range(100):
        watched.look(100.0 + second)


def test_a_word_now_and_then_is_enough() -> None:
    watched = peers("the buffer")
    for second in range(1, 1000):
        watched.look(100.0 + second)
        if second % 10 == 0:
            watched.heard("the buffer")


def test_time_in_which_we_stood_still_is_charged_to_nobody() -> None:
    """Fails when silence is the time since the last word: who wakes up first would blame the others."""
    watched = peers("the buffer")
    for stop in range(1, 6):
        watched.look(100.0 + 3600.0 * stop)
    with pytest.raises(StalledError, match="silent for 11 s"):
        watched.look(100.0 + 3600.0 * 5 + 1.0)


@pytest.mark.parametrize(
    ("stood_still", "since"), [(-0.5, 1.0), (1.5, 2.5), (4.75, 5.75), (5.0, 11.0), (3600.0, 3606.0)]
)
def test_a_looker_that_stood_still_moves_the_start_of_silences(stood_still: float, since: float) -> None:
    """Half the limit or more: they all begin anew, for what was said meanwhile may be lost."""
    looks = Looks()
    for second in (0.0, 1.0, 2.0, 3.0, 4.0):
        looks.look(second, every_s=1.0, limit_s=10.0)
    assert looks.since(1.0) == 1.0
    looks.look(4.0 + 2.0 + stood_still, every_s=1.0, limit_s=10.0)
    assert looks.since(1.0) == since
    assert looks.since(3700.0) == 3700.0, "heard of after the look"


def test_silences_begin_with_the_first_look() -> None:
    """Fails when one that was stopped before it ever looked blames the others for it."""
    looks = Looks()
    looks.look(100.0, every_s=1.0, limit_s=10.0)
    assert looks.since(1.0) == 100.0


def test_a_peer_that_answers_heartbeats_is_never_silent_by_their_interval() -> None:
    run = make_plan().topology.run
    assert deadline_of(run) == silence_of(run) == run.stall_s + WATCHDOG_S
    assert silence_of(msgspec.structs.replace(run, stall_s=1.0, heartbeat_s=40.0)) == 120.0


async def test_whoever_idles_is_ended_by_the_watch_and_has_a_name_meanwhile() -> None:
    watched, waits = Peers("r", limit_s=0.05, every_s=0.01), Waits()

    async def work() -> None:
        with watched.idle(waits, "lease"):
            await asyncio.Event().wait()

    watching = asyncio.create_task(watched.watch())
    await asyncio.sleep(0)
    watched.heard("the buffer")
    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    assert [name for name, _ in waits.now()] == ["lease"]
    with pytest.raises(StalledError, match="the buffer was silent"):
        async with asyncio.timeout(10):
            await watching
    working.cancel()
    await asyncio.wait([working])
    assert waits.now() == []


def test_nobody_idles_unwatched() -> None:
    """Fails when the watch is left out of an actor's loops: its idle waits would be without an end."""
    with pytest.raises(AssertionError, match="nobody notices"), peers("x").idle(Waits(), "lease"):
        pass


async def test_a_deadline_ends_a_wait_by_name_and_only_its_own() -> None:
    waits = Waits()
    with pytest.raises(StalledError, match=r"r: waited 0.01 s for rain; look up") as caught:
        async with awaiting(waits, "rain", who="r", what="rain", deadline_s=0.01, advice="look up"):
            await asyncio.Event().wait()
    assert not caught.value.final
    assert waits.snapshot()["rain"] > 0
    with pytest.raises(TimeoutError, match="somebody else"):
        async with awaiting(waits, "rain", who="r", what="rain", deadline_s=10, advice="look up"):
            raise TimeoutError("somebody else's")


def test_the_rest_of_a_delivery_is_told_in_words() -> None:
    pieces = Pieces()
    assert pieces.follows(7, 0)
    assert pieces.rest("batch 7", 3) == "piece 2 of 3 of batch 7"
    assert pieces.follows(7, 1)
    assert pieces.follows(7, 2)
    assert pieces.rest("batch 7", 3) == ""
    assert pieces.follows(8, 0)
    assert pieces.rest("batch 8", 1) == ""


async def test_room_for_reports_is_owed_and_samples_are_not() -> None:
    """Fails when the writer waits for acknowledgements as it waits for samples: without an end."""
    text = Segment(tokens=pack_tokens([1] * 9), logprobs=pack_logprobs([-1.0] * 9), spans=[Span(0, 1, 9)])

    async def send(*_: object) -> None: ...

    outbox = Outbox(send, max_bytes=1, name="g", deadline_s=0.02)
    writing = asyncio.create_task(outbox.write())
    assert not (await asyncio.wait([writing], timeout=0.1))[0], "no sample is no stall"
    await outbox.open(1, 0, 0, 0).report(text, Status.PENDING)
    assert not (await asyncio.wait([writing], timeout=0.1))[0], "all of it is on its way"
    await outbox.open(2, 1, 0, 0).report(text, Status.PENDING)
    with pytest.raises(StalledError, match=r"g: waited 0.02 s for the buffer to acknowledge \d+ bytes"):
        async with asyncio.timeout(10):
            await writing
