"""A generator's credit: every sample and every byte that was charged comes back once, whatever happens."""

from __future__ import annotations

import pytest

from asyncrl.actor.leased import Job, Leased
from asyncrl.messages.control import Kind, Lease, Leases
from asyncrl.messages.parts import GroupParts, encode_body
from asyncrl.messages.sample import Lane, Prompt, Status

CAPACITY, MAX_BYTES = 8, 1000
VERSION = (3, 1)


@pytest.fixture
def leased() -> Leased:
    return Leased(capacity=CAPACITY, max_bytes=MAX_BYTES)


def leases(*fences: int, samples: int = 2) -> tuple[Leases, list[bytes]]:
    """One group per fence, each with one body: its prompt."""
    parts = [
        GroupParts(
            group_id=fence, lane=Lane.TRAIN, issue_version=0, indices=list(range(samples)),
            statuses=[Status.PENDING] * samples, segments=[0] * samples,
        )
        for fence in fences
    ]  # fmt: skip
    bodies = [encode_body(Prompt(tokens=b"", text="?" * fence)) for fence in fences]
    given = [Lease(fence=f, kind=Kind.GENERATE, parts=p) for f, p in zip(fences, parts, strict=True)]
    return Leases(leases=given), bodies


def take(leased: Leased, *fences: int, known: tuple[int, ...] = ()) -> list[Job]:
    message, bodies = leases(*fences)
    return list(leased.take(message, bodies, known=known))


def test_what_is_done_comes_back_once_and_sums_up_to_what_was_charged(leased: Leased) -> None:
    jobs = take(leased, 1, 2)
    charged = sum(len(body) for body in leases(1, 2)[1])
    assert (leased.held, leased.busy.is_set(), leased.idle.is_set()) == (4, True, False)
    assert leased.all_room(VERSION).samples == CAPACITY - 4
    assert leased.all_room(VERSION).num_bytes == MAX_BYTES - charged
    back = []
    for job in jobs:
        leased.done(job)
        assert leased.room.is_set()
        back.append(leased.want(VERSION))
        assert not leased.room.is_set()
    assert [want.samples for want in back] == [1] * 4
    assert sum(want.num_bytes for want in back) == charged
    assert (leased.held, leased.busy.is_set(), leased.idle.is_set()) == (0, False, True)
    assert not leased.fences
    assert (leased.want(VERSION).samples, leased.want(VERSION).num_bytes) == (0, 0)


@pytest.mark.parametrize("known", [(), (1,)], ids=["still worked on", "handed in, not acknowledged"])
def test_a_lease_that_comes_again_is_not_worked_on_twice_and_gives_its_charge_back(
    leased: Leased, known: tuple[int, ...]
) -> None:
    jobs = take(leased, 1)
    if known:
        for job in jobs:
            leased.done(job)
        leased.want(VERSION)
    assert take(leased, 1, known=known) == []
    want = leased.want(VERSION)
    assert (want.samples, want.num_bytes) == (2, len(leases(1)[1][0]))


def test_all_room_to_a_new_desk_is_given_instead_of_what_became_free(leased: Leased) -> None:
    """Fails when the samples handed in since the last credit are counted twice."""
    first, second = take(leased, 1)
    leased.done(first)
    assert leased.all_room(VERSION).samples == CAPACITY - 1
    assert leased.want(VERSION).samples == 0
    leased.done(second)
    assert leased.want(VERSION).samples == 1


def test_who_drains_gives_no_credit_and_still_names_its_version(leased: Leased) -> None:
    for job in take(leased, 1):
        leased.done(job)
    leased.draining = True
    want = leased.want(VERSION)
    assert (want.samples, want.num_bytes, want.version, want.incarnation) == (0, 0, 3, 1)
