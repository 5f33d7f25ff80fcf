"""What is written is there, what is not does not count, and a rebuilt ledger is the one that was lost."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ledger_cast import GROUP_SIZE, Desk, frame
from ledger_world import Setup, World

from asyncrl.buffer.config import LedgerConfig
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.pump import Pump
from asyncrl.buffer.restore import restore
from asyncrl.buffer.segments import Location, Segments
from asyncrl.buffer.states import FRESH, GENERATED, READY, SCORED
from asyncrl.buffer.store import Store, batch_digest
from asyncrl.errors import DamagedError, StorageError
from asyncrl.messages.control import Issue, Issued
from asyncrl.messages.sample import Lane

CONFIG = LedgerConfig(batch_size=2, max_staleness=1, tickets=4, num_rollout=4)


# Segments.


def test_bodies_come_back_and_files_roll_over(tmp_path: Path) -> None:
    segments = Segments(tmp_path, segment_bytes=100)
    bodies = [bytes([i]) * (i * 7) for i in range(40)]
    places = [place for body in bodies for place in segments.append([body])]
    assert [segments.read(place) for place in places] == bodies
    assert {place.file for place in places} == set(range(1, places[-1].file + 1))
    assert places[-1].file > 3
    segments.close()
    segments.close()


def test_more_bodies_than_one_writev_takes_lie_in_order(tmp_path: Path) -> None:
    segments = Segments(tmp_path)
    bodies = [b"%d" % i for i in range(2000)]
    assert [segments.read(place) for place in segments.append(bodies)] == bodies
    segments.close()


def test_a_torn_tail_is_never_read_and_never_written_behind(tmp_path: Path) -> None:
    """A life ends in the middle of a write; the next one begins a file of its own."""
    first = Segments(tmp_path)
    (kept,) = first.append([b"kept"])
    first.close()
    with first.path(kept.file).open("ab") as file:
        file.write(b"half a bo")
    second = Segments(tmp_path)
    (place,) = second.append([b"after"])
    assert place == Location(kept.file + 1, 0, 5)
    assert second.read(kept) == b"kept"
    assert second.read(place) == b"after"
    second.close()


def test_after_a_failed_sync_nothing_is_built_on_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync that failed may succeed when tried again, without the data being there."""
    segments = Segments(tmp_path)
    (kept,) = segments.append([b"kept"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", no_space)
        with pytest.raises(OSError, match="No space left"):
            segments.append([b"lost"])
    (place,) = segments.append([b"after"])
    assert place == Location(kept.file + 1, 0, 5)
    assert segments.read(place) == b"after"
    segments.close()


def no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_body_that_was_cut_off_is_an_error_by_name(tmp_path: Path) -> None:
    segments = Segments(tmp_path)
    (place,) = segments.append([b"0123456789"])
    os.truncate(segments.path(place.file), 4)
    with pytest.raises(StorageError, match="4 of 10 bytes"):
        segments.read(place)
    with pytest.raises(StorageError, match="cannot read"):
        segments.read(Location(77, 0, 1))
    segments.close()


# Commits.


def issue(desk: Desk, count: int = 3) -> None:
    """The source hands in `count` prompts."""
    first = desk.ledger.book.next_group
    message = Issue(
        lane=Lane.TRAIN,
        first_group=first,
        prompts=[Issued(GROUP_SIZE, 3)] * count,
        cursor=b"%d" % (first + count),
    )
    desk.ledger.issue(message, [frame(b"p" * 5000)] * count, desk.now)


def test_a_full_database_raises_and_nothing_counts_as_written(tmp_path: Path) -> None:
    desk = Desk(tmp_path, CONFIG)
    issue(desk)
    desk.commit()
    before = dump(desk.ledger, desk.members)
    pages = desk.store.db.execute("pragma page_count").fetchone()[0]
    desk.store.db.execute(f"pragma max_page_count = {pages}")
    issue(desk, count=600)
    with pytest.raises(StorageError, match="nothing of it was acknowledged"):
        desk.commit()
    desk.restart(resumed=False)
    assert dump(desk.ledger, desk.members) == before
    assert desk.ledger.cursor == b"3"
    issue(desk)
    desk.commit()
    assert desk.ledger.book.next_group == 6
    desk.store.close()


def test_a_disk_that_does_not_sync_raises_and_its_file_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, CONFIG)
    issue(desk)
    desk.commit()
    file = desk.store.db.execute("select max(file) from bodies").fetchone()[0]

    issue(desk)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", no_space)
        with pytest.raises(StorageError, match="No space left"):
            desk.commit()
    rows = desk.store.db.execute("select count(*) from groups").fetchone()
    assert rows == (3,)
    desk.restart(resumed=False)
    issue(desk)
    desk.commit()
    files = desk.store.db.execute("select distinct file from bodies order by 1").fetchall()
    assert files[-1][0] > file, "what was not synced is not built upon"
    desk.store.close()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "buffer.db").write_bytes(b"this is no database at all, but some text" * 40)
    with pytest.raises(
        DamagedError, match=r"the ledger is damaged: file is not a database.*hf_checkpoint at"
    ):
        Store(tmp_path)


def test_a_damaged_page_is_named_and_not_tried_again(tmp_path: Path) -> None:
    """Fails when what SQLite finds while the tables are read is not told by path, with what to do."""
    path = tmp_path / "buffer.db"
    Store(tmp_path).close()
    page = 4096
    path.write_bytes(path.read_bytes()[:page] + b"\xff" * (path.stat().st_size - page))

    def look() -> None:
        store = Store(tmp_path)
        with store.reading(), closing(store):
            store.db.execute("select count(*) from groups").fetchall()

    with pytest.raises(DamagedError, match=rf"{path}: the ledger is damaged: .* malformed") as caught:
        look()
    assert caught.value.final


def test_the_default_survives_a_power_cut(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.db.execute("pragma synchronous").fetchone() == (2,)
    assert store.db.execute("pragma journal_mode").fetchone() == ("wal",)
    store.close()
    store.close()


# Restore.


def lease_rows(ledger: Ledger) -> list[Any]:
    return [
        (
            x.fence,
            x.kind,
            x.worker,
            x.incarnation,
            x.group_id,
            x.indices,
            x.remaining,
            x.version,
            x.progressed,
        )
        for x in sorted(ledger.fleet.leases.values(), key=lambda x: x.fence)
    ]


def group_rows(ledger: Ledger) -> list[Any]:
    rows = []
    for g in sorted(ledger.book.groups.values(), key=lambda g: g.group_id):
        samples = [
            (
                s.index, s.state, s.status, s.tokens, s.bodies, s.body_bytes, s.score_bytes, s.fence,
                s.attempts, s.worker, s.oldest, s.newest, s.reward, s.removed, s.score_body,
            )
            for s in g.samples
        ]  # fmt: skip
        rows.append(
            (g.group_id, g.lane, g.dataset, g.state, g.version, g.incarnation, g.due, g.batch, g.prompt_body,
             g.prompt_tokens, g.prompt_bytes, g.fence, g.issued_seq, g.created_at, samples)
        )  # fmt: skip
    return rows


def waiting(ledger: Ledger) -> dict[str, Any]:
    """Who waits where; entries that have moved on since are no more than clutter."""
    groups, queues = ledger.book.groups, ledger.queues

    def samples(entries: Any, state: str) -> list[Any]:
        return sorted({(g, i) for g, i in entries if g in groups and groups[g].samples[i].state == state})

    def complete(number: int) -> bool:
        group = groups.get(number)
        if group is None or group.state == READY or group.fence in ledger.fleet.leases:
            return False
        return all(sample.state == SCORED for sample in group.samples)

    return {
        "fresh": [number for number in queues.fresh if number in groups],
        "partial": samples(queues.partial, FRESH),
        "evaluation": samples(queues.evaluation, FRESH),
        "to_score": samples(queues.to_score, GENERATED),
        "to_filter": sorted({number for number in queues.to_filter if complete(number)}),
    }


def dump(ledger: Ledger, members: Members) -> dict[str, Any]:
    """The ledger without what a restart may forget: who is connected, and what they were told."""
    batches, book, evaluation = ledger.batches, ledger.book, ledger.versions.evaluation
    return {
        "groups": group_rows(ledger),
        "leases": lease_rows(ledger),
        "waiting": waiting(ledger),
        "batches": (
            batches.records,
            batches.next_batch,
            batches.published,
            batches.num_trained,
            batches.target,
        ),
        "dues": dict(batches.dues),
        "ready": batches.ready,
        "totals": {name: value for name, value in book.totals.items() if value},
        "next": (book.next_group, book.next_fence, book.next_body),
        "source": (ledger.cursor, ledger.source_ended),
        "saved": (ledger.saved, members.checkpoints, members.incarnation, members.trainer_life),
        "published": ledger.versions.published,
        "evaluation": evaluation,
        "previous": ledger.versions.previous if evaluation is not None else None,
    }


def restored(desk: Desk) -> dict[str, Any]:
    """What another process makes of the same tables."""
    store = Store(desk.run_dir, synchronous="off")
    ledger = Ledger(desk.config)
    members = Members(ledger, run_id="run")
    Pump(ledger)
    restore(ledger, members, store)
    store.close()
    return dump(ledger, members)


@pytest.mark.parametrize("seed", range(6))
def test_a_rebuilt_ledger_is_the_one_that_was_lost(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    config = LedgerConfig(
        batch_size=1 + seed % 2,
        max_staleness=2,
        tickets=3 * (1 + seed % 2),
        num_rollout=8,
        filters=seed % 2 == 1,
        group_rm=seed == 4,
        evaluates=seed > 1,
        eval_interval=1,
        partial_rollout=seed != 3,
    )
    world = World(tmp_path, Setup(ledger=config, save_interval=3, exact=seed != 2))
    compared = 0
    for _ in range(140):
        world.join_all()
        kind = draw.random()
        if kind < 0.5:
            world.generate(draw.randrange(100), draw.choice([0, 1, 1, 1, 3, 4, 5]))
        elif kind < 0.75:
            world.judge(draw.randrange(100), good=draw.random() < 0.8)
        elif kind < 0.96:
            world.act(draw.choice(["trainer", "source", "evaluator"]))
        else:
            world.die(draw.choice(sorted(world.peers)), seen=True)
        world.commit()
        if draw.random() < 0.25:
            assert restored(world.desk) == dump(world.desk.ledger, world.desk.members)
            compared += 1
    assert compared > 10
    world.finish()
    assert restored(world.desk) == dump(world.desk.ledger, world.desk.members)
    world.desk.store.close()


def test_a_batch_has_the_digest_of_its_bodies(tmp_path: Path) -> None:
    """The digest recorded with the cut is that of the bodies, and one altered body changes it."""
    world = World(tmp_path, Setup(ledger=CONFIG))
    world.finish()
    db = world.desk.store.db
    recorded = dict(db.execute("select batch, digest from batches").fetchall())
    assert recorded == {batch: batch_digest(db, batch) for batch in range(4)}
    group = db.execute("select group_id from batch_groups where batch = 1 and position = 1").fetchone()[0]
    db.execute("update bodies set digest = 'another' where group_id = ? and kind = 'segment'", (group,))
    assert [b for b in range(4) if batch_digest(db, b) != recorded[b]] == [1]
    world.desk.store.close()


def test_prune_deletes_only_files_that_no_kept_checkpoint_needs(tmp_path: Path) -> None:
    """Fails when pruning ignores the checkpoint (too much goes) or the settled groups (nothing goes)."""
    store = Store(tmp_path, segment_bytes=1)
    db = store.db
    for batch in range(4):
        location = store.segments.append([b"body-%d" % batch])[0]
        db.execute(
            "insert into groups values"
            " (?, 'train', '', 1, 'trained', 'trained', 0, 1, 0, ?, 0, 1, 0, 0, 0, 0, 0, '')",
            (batch, batch),
        )
        row = (batch, "prompt", batch, -1, 1, "[]", 0, "source", *location, "digest")
        db.execute("insert into bodies values (?,?,?,?,?,?,?,?,?,?,?,?,0)", row)
    assert store.prune(2) == [1, 2]
    assert store.segments.files() == [3, 4]
    assert store.read([2, 3]) == [b"body-2", b"body-3"]
    store.close()
