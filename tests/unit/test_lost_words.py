"""Who tells of more than was heard is asked for all of it again, in order, and nothing is taken before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.buffer.desk import Desk as DeskTable
from asyncrl.buffer.members import HELLOS_IN_VAIN
from asyncrl.errors import ProtocolError
from asyncrl.messages.control import Committed, HelloAgain, Issue, Issued, Message, Published, Saved, Trained
from asyncrl.messages.sample import Lane
from asyncrl.messages.version import Manifest
from tests.desk import Desk, make_plan


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A desk with a few batches trained and published."""
    desk = Desk(tmp_path, make_plan(num_rollout=9))
    while desk.ledger.batches.num_trained < 3:
        desk.play(rounds=1)
    desk.commit()
    return desk


def answers(desk: Desk, message: Message) -> list[Any]:
    """What the trainer is told when it says this."""
    before = desk.ledger.book.take()
    assert before.empty
    worker = desk.source if isinstance(message, Issue) else desk.trainer
    match message:
        case Issue():
            frames = [b"body" for _ in message.prompts]
            DeskTable(desk.ledger, desk.members).take(worker, message, frames, desk.tick())
        case Trained():
            desk.members.trained(desk.trainer, message, desk.tick())
        case Published():
            desk.members.published(desk.trainer, message, desk.tick())
        case Saved():
            desk.members.saved(desk.trainer, message, desk.tick())
    sends = desk.ledger.book.take().sends
    return [item.message for item in sends if item.peer == worker.peer]


def trained(desk: Desk, batch: int) -> Trained:
    """The trainer's word of a batch."""
    number = desk.members.incarnation
    return Trained(batch=batch, incarnation=number, step=batch + 1, digest="d", started=1.0, ended=2.0)


def published(desk: Desk, version: int) -> Published:
    """The trainer's word of a version."""
    number = desk.members.incarnation
    manifest = Manifest(
        run_id="run", version=version, incarnation=number, num_bytes=8, tensors=[], step=version, digest="d"
    )
    return Published(manifest=manifest)


def test_prompts_after_some_that_did_not_come_are_not_taken(desk: Desk) -> None:
    free = desk.ledger.book.next_group
    late = Issue(lane=Lane.TRAIN, first_group=free + 2, prompts=[Issued(2, 3)], cursor=b"late")
    assert answers(desk, late) == [HelloAgain(desk=desk.members.life)]
    assert (desk.ledger.book.next_group, desk.ledger.cursor != b"late") == (free, True)
    repeat = msgspec.structs.replace(late, first_group=free - 1)
    assert answers(desk, repeat) == []
    assert desk.ledger.book.next_group == free


def test_a_batch_after_one_that_was_not_told_is_not_taken(desk: Desk) -> None:
    known = desk.ledger.batches.num_trained
    assert answers(desk, trained(desk, known + 1)) == [HelloAgain(desk=desk.members.life)]
    assert desk.ledger.batches.num_trained == known
    # A repeat is acknowledged, as ever.
    assert answers(desk, trained(desk, known - 1)) == [Committed(what="trained", number=known - 1)]


def test_a_version_of_batches_that_were_not_told_does_not_exist(desk: Desk) -> None:
    newest = desk.ledger.versions.published
    known = desk.ledger.batches.num_trained
    assert answers(desk, published(desk, known + 1)) == [HelloAgain(desk=desk.members.life)]
    assert desk.ledger.versions.published == newest


def test_a_version_after_one_that_was_left_out_does_not_exist(desk: Desk) -> None:
    newest = desk.ledger.versions.published
    assert newest is not None
    desk.ledger.batches.num_trained += 5  # the weights are far ahead of the newest version
    assert answers(desk, published(desk, newest.version + 2)) == [HelloAgain(desk=desk.members.life)]
    assert desk.ledger.versions.published == newest
    said = answers(desk, published(desk, newest.version + 1))
    assert said == [Committed(what="version", number=newest.version + 1)]


def test_a_trainer_begins_with_its_checkpoint_s_version_even_if_older_ones_were_never_published(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when a restarted trainer may leave out no version: it was asked for those before it for ever.

    Its former life had one version on its way, and one waiting, when the checkpoint after both was committed.
    """
    newest = desk.ledger.versions.published
    assert newest is not None
    start = newest.version + 2
    monkeypatch.setattr(desk, "_publish", lambda *_: None)
    for _ in range(200):
        desk.round()
        if desk.ledger.batches.num_trained == start:
            break
    saved = Saved(rollout_step=start, incarnation=desk.members.incarnation, path="p", step=start)
    desk.members.saved(desk.trainer, saved, desk.tick())
    desk.commit()
    for restart in (desk.start_trainer, desk.crash):
        restart()
        desk.ledger.book.take()
        # Nothing may be left out after it, and nothing that is neither trained nor its checkpoint's exists.
        assert answers(desk, published(desk, start + 1)) == [HelloAgain(desk=desk.members.life)]
        assert desk.ledger.versions.published == newest
    assert answers(desk, published(desk, start)) == [Committed(what="version", number=start)]


def test_who_never_tells_what_is_missed_is_told_so(desk: Desk) -> None:
    """Fails when it is asked without end: 500 times a second, in the run where this was seen."""
    known = desk.ledger.batches.num_trained
    for _ in range(HELLOS_IN_VAIN + 1):
        assert answers(desk, trained(desk, known + 1)) == [HelloAgain(desk=desk.members.life)]
        assert answers(desk, trained(desk, known + 2)) == [HelloAgain(desk=desk.members.life)]
        desk.trainer.hellos += 1
    with pytest.raises(ProtocolError, match=rf"after {HELLOS_IN_VAIN} hellos .* {known} batches trained"):
        answers(desk, trained(desk, known + 1))
    # Once something was told, it is counted anew.
    desk.ledger.batches.num_trained += 1
    assert answers(desk, trained(desk, known + 2)) == [HelloAgain(desk=desk.members.life)]


def test_a_checkpoint_of_batches_that_were_not_told_does_not_exist(desk: Desk) -> None:
    known = desk.ledger.batches.num_trained
    saved = Saved(rollout_step=known + 1, incarnation=desk.members.incarnation, path="p", step=known + 1)
    assert answers(desk, saved) == [HelloAgain(desk=desk.members.life)]
    assert known + 1 not in desk.members.checkpoints
    assert answers(desk, msgspec.structs.replace(saved, rollout_step=known)) == [
        Committed(what="checkpoint", number=known)
    ]
