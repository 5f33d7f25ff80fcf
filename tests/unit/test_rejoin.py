"""Hello to a desk that has come back, or that has a newer life of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.buffer.restore import restore
from asyncrl.buffer.states import WorkerRecord
from asyncrl.messages.control import Hello, Kind, Leases, Refused, Want, Welcome
from tests.desk import Desk, make_plan


class Reborn(Desk):
    """A desk that dies alone: its workers live."""

    def restart(self) -> None:
        """Another life of the desk, from the tables; nobody has said hello to it."""
        self.store.close()
        self._open()
        restore(self.ledger, self.members, self.store)

    def hello(self, worker: WorkerRecord, **facts: Any) -> dict[type, Any]:
        """A worker says hello again; the messages it gets, by type."""
        hello = Hello(
            name=worker.name, role=worker.role, incarnation=worker.incarnation, protocol=1, schema="", **facts
        )
        self.members.join(worker.peer, hello, self.tick())
        sends = [item.message for item in self.ledger.book.take().sends if item.peer == worker.peer]
        assert len({type(message) for message in sends}) == len(sends)
        return {type(message): message for message in sends}


@pytest.fixture
def desk(tmp_path: Path) -> Reborn:
    """A desk whose generators are at work, with a batch or two trained."""
    desk = Reborn(tmp_path, make_plan(num_rollout=8))
    while desk.ledger.batches.num_trained < 3:
        desk.play(rounds=1)
    return desk


def busy(desk: Reborn) -> tuple[WorkerRecord, list[int]]:
    """A generator with several leases, and their fences."""
    worker = max((g.worker for g in desk.generators.values()), key=lambda worker: len(worker.leases))
    assert len(worker.leases) >= 2
    return worker, sorted(worker.leases)


def test_known_leases_stay_and_cost_no_credit(desk: Reborn) -> None:
    worker, fences = busy(desk)
    desk.restart()
    got = desk.hello(worker, leases=fences)
    assert got[Welcome].held == fences
    assert Leases not in got
    again = desk.ledger.fleet.workers[worker.peer]
    assert again.leases == set(fences)
    assert again.credit.get(Kind.GENERATE, 0) == 0
    assert again.credit_bytes == 0


def test_a_hello_that_a_later_one_has_overtaken_changes_nothing(desk: Reborn) -> None:
    """Fails when the hello that comes last begins a conversation: its sender listens to its newest alone."""
    worker, fences = busy(desk)
    assert desk.hello(worker, leases=fences, number=2)[Welcome].number == 2
    again = desk.ledger.fleet.workers[worker.peer]
    desk.ledger.fleet.want(again, Want(kind=Kind.GENERATE, samples=3, num_bytes=1 << 20))
    assert desk.hello(worker, number=1) == {}
    assert desk.ledger.fleet.workers[worker.peer] is again
    assert (again.credit[Kind.GENERATE], again.leases) == (3, set(fences))
    assert desk.hello(worker, leases=fences, number=2)[Welcome].number == 2, "said twice"


def test_a_lease_that_was_lost_on_the_way_is_sent_again_and_charged(desk: Reborn) -> None:
    worker, fences = busy(desk)
    desk.restart()
    lost = fences[0]
    got = desk.hello(worker, leases=fences[1:])
    assert got[Welcome].held == fences
    (lease,) = got[Leases].leases
    assert lease.fence == lost
    again = desk.ledger.fleet.workers[worker.peer]
    assert again.credit[Kind.GENERATE] == -len(lease.parts.indices)
    assert again.credit_bytes < 0


def test_a_lease_that_went_to_others_is_not_among_those_held(desk: Reborn) -> None:
    worker, fences = busy(desk)
    desk.members.leave(worker, "fell silent", desk.tick())
    got = desk.hello(worker, leases=fences)
    assert got[Welcome].held == []


@pytest.mark.parametrize("restarted", [False, True])
def test_a_life_that_was_replaced_changes_nothing(desk: Reborn, restarted: bool) -> None:
    """Fails when `Members.join` takes anybody: the successor would be thrown out, its batches untrained."""
    old = desk.trainer
    desk.start_trainer()
    desk.play(rounds=2)
    while desk.commit():
        pass
    if restarted:
        desk.restart()
        desk.hello(desk.trainer, batches=desk.ledger.batches.num_trained)
    before = (desk.members.incarnation, desk.members.trainer_life, desk.ledger.batches.num_trained)
    got = desk.hello(old)
    assert set(got) == {Refused}
    assert "newer life of trainer" in got[Refused].reason
    now = (desk.members.incarnation, desk.members.trainer_life, desk.ledger.batches.num_trained)
    assert now == before
    assert desk.ledger.fleet.only("trainer").incarnation == desk.trainer.incarnation  # type: ignore[union-attr]


def test_a_trainer_goes_on_at_its_place(desk: Reborn) -> None:
    trained, life = desk.ledger.batches.num_trained, desk.members.incarnation
    desk.restart()
    got = desk.hello(desk.trainer, batches=trained)
    assert got[Welcome].trainer.incarnation == life
    # What it has trained is not delivered again, though no checkpoint covers it.
    assert max(desk.members.checkpoints, default=0) < trained
    assert desk.ledger.batches.on_delivery == trained


def test_a_new_trainer_begins_at_the_checkpoint_whatever_it_says(desk: Reborn) -> None:
    desk.restart()
    worker = WorkerRecord(b"trainer.new", "trainer", "trainer", "new", desk.tick())
    desk.hello(worker, batches=desk.ledger.batches.num_trained)
    assert desk.ledger.batches.on_delivery == max(desk.members.checkpoints, default=0)


def test_room_below_zero_is_a_word_that_the_desk_takes(desk: Reborn) -> None:
    """Fails when a `Want` may not be below zero: a worker that holds a body larger than its window would lose
    all the room that it names after a further welcome, and with it its work.
    """
    want = Want(kind=Kind.GENERATE, samples=-2, num_bytes=-700, capacity=4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(want), type=Want) == want
    worker, fences = busy(desk)
    desk.restart()
    desk.hello(worker, leases=fences)
    again = desk.ledger.fleet.workers[worker.peer]
    desk.ledger.fleet.want(again, want)
    desk.ledger.fleet.want(again, Want(kind=Kind.GENERATE, samples=3, num_bytes=900))
    assert (again.credit[Kind.GENERATE], again.credit_bytes) == (1, 200)
