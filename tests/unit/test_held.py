"""What a reward worker holds: room comes back once, and it is idle only when the last result is said."""

from __future__ import annotations

import pytest

from asyncrl.messages.control import Kind, Lease, Scores
from asyncrl.messages.parts import GroupParts
from asyncrl.rewards.held import Held

BATCH, WINDOW = 10, 1000
RESULT = (Scores(scores=[]), ())


@pytest.fixture
def held() -> Held:
    return Held(batch=BATCH, window_bytes=WINDOW)


def lease(fence: int, kind: Kind = Kind.SCORE) -> Lease:
    return Lease(
        fence=fence, kind=kind, parts=GroupParts(group_id=fence, indices=[], statuses=[], segments=[])
    )


def room(held: Held) -> list[tuple[Kind, int, int]]:
    return [(want.kind, want.samples, want.num_bytes) for want in held.wants()]


def test_room_is_what_is_not_held(held: Held) -> None:
    assert room(held) == [(Kind.SCORE, BATCH, WINDOW), (Kind.FILTER, BATCH, 0)]
    assert held.take(lease(1), samples=3, num_bytes=100)
    assert held.take(lease(2, Kind.FILTER), samples=4, num_bytes=50)
    assert room(held) == [(Kind.SCORE, 7, 850), (Kind.FILTER, 6, 0)]
    held.done(1, RESULT)
    assert room(held) == [(Kind.SCORE, BATCH, 950), (Kind.FILTER, 6, 0)]


def test_a_lease_is_known_until_its_result_is_acknowledged(held: Held) -> None:
    """Fails when one that is sent again is scored twice, or is not named in a further hello."""
    assert held.take(lease(1), samples=1, num_bytes=1)
    assert not held.take(lease(1), samples=1, num_bytes=1)
    held.done(1, RESULT)
    assert not held.take(lease(1), samples=1, num_bytes=1)
    assert (held.fences, held.unsaid, len(held)) == ([1], [RESULT], 0)
    held.acknowledged(1)
    assert (held.fences, held.unsaid) == ([], [])
    assert held.take(lease(1), samples=1, num_bytes=1), "another life of the desk may give the number again"


def test_it_is_idle_when_the_last_result_is_said(held: Held) -> None:
    """Fails when a draining worker leaves between a result and its way out."""
    assert held.idle.is_set()
    for fence in (1, 2):
        held.take(lease(fence), samples=1, num_bytes=1)
    held.done(1, RESULT)
    held.said()
    assert not held.idle.is_set()
    held.done(2, RESULT)
    assert not held.idle.is_set(), "it is not on its way yet"
    held.said()
    assert held.idle.is_set()
    assert held.oldest_s == 0
