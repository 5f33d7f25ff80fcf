"""Batches leave in pieces, in order, within the trainer's byte window, and again exactly as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ledger_cast import check_tokens
from ledger_world import Setup, World

from asyncrl.buffer import delivery
from asyncrl.buffer.config import LedgerConfig
from asyncrl.buffer.delivery import Courier, in_pieces
from asyncrl.buffer.states import Outgoing
from asyncrl.buffer.store import Store
from asyncrl.messages.control import BatchPart, Evaluated, Kind, Lease, Leases
from asyncrl.messages.parts import GroupParts, leased_bytes, unpack
from asyncrl.messages.sample import Status

CONFIG = LedgerConfig(batch_size=3, max_staleness=1, tickets=6, num_rollout=2, evaluates=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A finished run: two batches of three groups, evaluations of versions 0 and 2."""
    world = World(tmp_path_factory.mktemp("run"), Setup(ledger=CONFIG))
    world.finish()
    yield world.desk.store
    world.desk.store.close()


@pytest.fixture
def one_group_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one group."""
    monkeypatch.setattr(delivery, "PIECE_BYTES", 1)


def parts(courier: Courier) -> list[tuple[bytes, BatchPart, list[bytes]]]:
    taken = [(item.peer, item.message, frames) for item, frames in courier.take()]
    return [(peer, part, frames) for peer, part, frames in taken if isinstance(part, BatchPart)]


def test_a_batch_arrives_whole_in_one_piece_where_it_fits(store: Store) -> None:
    courier = Courier(store, window_bytes=1 << 20)
    courier.queue_batch(b"t", 1)
    ((peer, part, frames),) = parts(courier)
    assert (peer, part.batch, part.part, part.num_parts) == (b"t", 1, 0, 1)
    assert part.num_bytes == sum(map(len, frames))
    groups = unpack(part.groups, frames)
    rows = store.db.execute("select group_id from batch_groups where batch = 1 order by position").fetchall()
    assert [(group[0].group_id,) for group in groups] == rows
    for group in groups:
        for sample in group:
            check_tokens(sample)
            assert sample.score is not None


@pytest.mark.usefixtures("one_group_each")
def test_pieces_leave_as_the_window_has_room(store: Store) -> None:
    """A piece larger than the window passes when nothing is under way; the next waits for the credit."""
    courier = Courier(store, window_bytes=1)
    courier.queue_batch(b"t", 0)
    order = []
    for _ in range(3):
        ((_, part, _),) = parts(courier)
        order.append((part.part, part.num_parts))
        assert not courier.has_work
        assert parts(courier) == []
        courier.credit(part.num_bytes)
    assert order == [(0, 3), (1, 3), (2, 3)]
    assert not courier.has_work


@pytest.mark.usefixtures("one_group_each")
def test_credit_lets_exactly_as_much_out_as_came_back(store: Store) -> None:
    sizes = piece_sizes(store)
    courier = Courier(store, window_bytes=sizes[0] + sizes[1])
    courier.queue_batch(b"t", 0)
    assert len(parts(courier)) == 2
    courier.credit(sizes[2] - 1)
    assert parts(courier) == []
    courier.credit(1)
    assert len(parts(courier)) == 1


def piece_sizes(store: Store) -> list[int]:
    courier = Courier(store, window_bytes=1 << 20)
    courier.queue_batch(b"t", 0)
    return [part.num_bytes for _, part, _ in parts(courier)]


@pytest.mark.usefixtures("one_group_each")
def test_another_life_of_the_trainer_gets_nothing_of_the_old_ones_pieces(store: Store) -> None:
    """Nor does it wait for credit that the old one will never give back."""
    courier = Courier(store, window_bytes=1)
    courier.queue_batch(b"old", 0)
    assert len(parts(courier)) == 1
    courier.queue_batch(b"new", 0)
    ((peer, part, _),) = parts(courier)
    assert (peer, part.part) == (b"new", 0)


def test_a_batch_is_the_same_to_the_byte_when_it_is_delivered_again(store: Store) -> None:
    first, second = Courier(store, window_bytes=1 << 20), Courier(store, window_bytes=1 << 20)
    first.queue_batch(b"t", 0)
    second.queue_batch(b"u", 0)
    ((_, once, frames),) = parts(first)
    ((_, again, more),) = parts(second)
    assert (once, frames) == (again, more)
    assert once.recorded_digest == "digest1", "of the weights after it, for it was trained before"


@pytest.mark.usefixtures("one_group_each")
def test_an_evaluation_leaves_within_its_own_window_and_an_empty_one_is_told_too(store: Store) -> None:
    """An evaluator that takes nothing in is sent no more than its window, and keeps no batch waiting."""
    courier = Courier(store, window_bytes=1)
    courier.queue_evaluation(b"e", 2, 1)
    ((item, frames),) = courier.take()
    assert isinstance(item.message, Evaluated)
    assert (item.message.part, item.message.num_parts) == (0, 2)
    assert not courier.has_work
    courier.queue_batch(b"t", 0)
    assert [part.part for _, part, _ in parts(courier)] == [0]
    courier.credit(sum(map(len, frames)), peer=b"e")
    ((item, frames),) = courier.take()
    assert isinstance(item.message, Evaluated)
    assert item.message.part == 1
    # What was not given back when the next one is due was lost with a connection.
    courier.queue_evaluation(b"e", 77, 1)
    ((item, frames),) = courier.take()
    assert isinstance(item.message, Evaluated)
    assert (item.message.groups, frames, item.message.num_parts) == ([], [], 1)


def test_forget_frees_the_window_of_the_one_who_left(store: Store) -> None:
    courier = Courier(store, window_bytes=1)
    courier.queue_batch(b"t", 0)
    courier.queue_batch(b"t", 1)
    assert len(parts(courier)) == 1
    courier.forget(b"t")
    assert not courier.has_work
    courier.queue_batch(b"t", 1)
    assert len(parts(courier)) == 1


def lease(fence: int, *, segments: int) -> Lease:
    """Work on one sample that has so many segments."""
    parts = GroupParts(group_id=fence, indices=[0], statuses=[Status.PENDING], segments=[segments])
    return Lease(fence=fence, kind=Kind.GENERATE, parts=parts)


def test_leases_with_many_frames_leave_as_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a worker's credit may exceed what a link takes: the desk would end by its own message."""
    monkeypatch.setattr(delivery, "MAX_FRAMES", 6)
    monkeypatch.setattr(delivery, "PIECE_BYTES", 100)
    counts = [2, 1, 0, 9, 1]
    leases = [lease(fence, segments=count) for fence, count in enumerate(counts)]
    frames = [f"{fence}.{n}".encode() for fence, count in enumerate(counts) for n in range(1 + count)]
    pieces = list(in_pieces(Outgoing(b"g", Leases(leases=leases), []), frames))
    fences = [[x.fence for x in item.message.leases] for item, _ in pieces]  # type: ignore[attr-defined]
    assert fences == [[0, 1, 2], [3], [4]], "a lease is never split"
    assert [frame for _, own in pieces for frame in own] == frames
    assert [len(own) for _, own in pieces] == [6, 10, 2]
    large = [b"x" * 60, b"", b"x" * 60, b""]
    two = Outgoing(b"g", Leases(leases=[lease(0, segments=1), lease(1, segments=1)]), [])
    assert [len(own) for _, own in in_pieces(two, large)] == [2, 2]
    assert list(in_pieces(two, [b""] * 4)) == [(two, [b""] * 4)]


def test_a_lease_is_given_back_as_it_is_charged(store: Store) -> None:
    """With the scores it carries: else a filter's worker would lose some of its window with every group."""
    groups = {group.parts.group_id: group for group in store.batch(0)}
    assert groups
    for group in groups.values():
        frames = store.read(group.bodies)
        assert group.parts.scored
        assert leased_bytes(group.parts, iter(frames)) == sum(map(len, frames))
