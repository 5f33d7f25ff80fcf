"""Rebuilds the ledger from the tables: what an interrupted run's desk knew, nothing more and nothing less.

Live groups come back with their samples; leases come back with their full time, so that workers which
survived may go on; a run that is started anew releases them at once (`release_all`).
"""

from __future__ import annotations

import sqlite3

import msgspec

from asyncrl.buffer import deaths
from asyncrl.buffer.batches import BatchRecord
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.segments import Location
from asyncrl.buffer.states import (
    FRESH,
    GENERATED,
    GENERATING,
    READY,
    SCORED,
    SCORING,
    GroupRecord,
    LeaseRecord,
    SampleRecord,
)
from asyncrl.buffer.store import Store
from asyncrl.buffer.versions import Evaluation
from asyncrl.messages.control import Kind
from asyncrl.messages.sample import Lane, Status
from asyncrl.messages.version import Manifest


def restore(ledger: Ledger, members: Members, store: Store) -> None:
    """Fill a new ledger from the store's tables."""
    db = store.db
    book = ledger.book
    book.totals.update(dict(db.execute("select key, value from totals").fetchall()))
    book.take()  # totals read back are not news
    book.next_group = _next(db, "groups", "group_id", 0)
    book.next_body = _next(db, "bodies", "body", 1)
    book.next_fence = _next(db, "leases", "fence", 1)
    book.seq = (
        db.execute(
            "select max(m) from (select max(max(issued_seq, settled_seq)) m from groups"
            " union select max(seq) from batches)"
        ).fetchone()[0]
        or 0
    )
    meta = dict(db.execute("select key, value from meta").fetchall())
    ledger.cursor = meta.get("cursor", b"")
    ledger.source_ended = bool(meta.get("source_ended", 0))
    if "target" in meta:
        ledger.batches.target = int(meta["target"])
    for name, incarnation in db.execute("select name, incarnation from members order by joined_at"):
        members.live(name, incarnation)
    _restore_training(ledger, members, db)
    _restore_evaluation(ledger, db)
    groups = _restore_groups(store)
    _restore_leases(ledger, db, groups)
    for group in groups:
        _place(ledger, group)


def release_all(ledger: Ledger, reason: str, now: float) -> None:
    """Nobody of the former life is left: every lease goes back without counting as a failed attempt."""
    ledger.book.row("everyone_left", now, reason)
    deaths.record_all(ledger, reason, now)
    ledger.release(list(ledger.fleet.leases.values()), reason, now, ours=True)


def _next(db: sqlite3.Connection, table: str, column: str, first: int) -> int:
    newest = db.execute(f"select max({column}) from {table}").fetchone()[0]  # noqa: S608 - our own names
    return first if newest is None else int(newest) + 1


def _restore_training(ledger: Ledger, members: Members, db: sqlite3.Connection) -> None:
    batches = ledger.batches
    row = db.execute("select max(incarnation) from incarnations").fetchone()
    members.incarnation = row[0] or 0
    if members.incarnation:
        members.trainer_life, members.trainer_start = db.execute(
            "select process, rollout_step from incarnations where incarnation = ?", (members.incarnation,)
        ).fetchone()
    # The groups of a batch are trained all at once: the first one tells.
    for batch, groups, samples, tokens, trained in db.execute(
        "select b.batch, b.num_groups, b.num_samples, b.num_tokens, g.reason = 'trained' from batches b"
        " left join batch_groups c on c.batch = b.batch and c.position = 0"
        " left join groups g on g.group_id = c.group_id order by b.batch"
    ):
        batches.records[batch] = BatchRecord(groups, samples, tokens, trained=bool(trained))
        batches.next_batch = batch + 1
    while batches.num_trained in batches.records and batches.records[batches.num_trained].trained:
        batches.num_trained += 1
    for step, path in db.execute(
        "select rollout_step, path from checkpoints order by rollout_step, incarnation"
    ):
        members.checkpoints[step] = path
        ledger.saved = max(ledger.saved, step)
    row = db.execute(
        "select manifest from versions order by version desc, incarnation desc limit 1"
    ).fetchone()
    if row is not None:
        ledger.versions.published = msgspec.json.decode(row[0], type=Manifest)
        batches.published = ledger.versions.published.version


def _restore_evaluation(ledger: Ledger, db: sqlite3.Connection) -> None:
    versions = ledger.versions
    rows = db.execute(
        "select version, incarnation, done_at, seen from evaluations where seen >= 0"
        " order by version desc, incarnation desc limit 2"
    ).fetchall()
    found = [_evaluation(db, *row) for row in rows] + [None, None]
    versions.evaluation, versions.previous = found[:2]
    if versions.evaluation is None or versions.evaluation.done:
        return
    # A running evaluation was holding newer versions back: generators that survived still serve its version.
    row = db.execute(
        "select manifest from versions where version = ? and incarnation = ?", versions.evaluation.key
    ).fetchone()
    if row is not None:
        versions.announced = msgspec.json.decode(row[0], type=Manifest)


def _evaluation(
    db: sqlite3.Connection, version: int, incarnation: int, done_at: float | None, seen: int
) -> Evaluation:
    total, open_groups = db.execute(
        "select count(*), coalesce(sum(reason is null), 0) from groups where lane = 'eval' and version = ?"
        " and incarnation = ?",
        (version, incarnation),
    ).fetchone()
    # Prompts of one evaluation are handed in with one message, so some of them means all of them.
    issued = total > 0 or done_at is not None
    return Evaluation(
        version,
        incarnation,
        issued=issued,
        open_groups=open_groups,
        done=done_at is not None,
        seen=bool(seen),
    )


def _restore_leases(ledger: Ledger, db: sqlite3.Connection, groups: list[GroupRecord]) -> None:
    """Leases that have not ended: every one is named by a live group or by a sample of one."""
    fences = {sample.fence for group in groups for sample in group.samples}
    for fence in sorted(fences | {group.fence for group in groups}):
        row = db.execute(
            "select kind, worker, incarnation, group_id, indices, version, granted_at from leases"
            " where fence = ? and ended_at is null",
            (fence,),
        ).fetchone()
        if row is None:
            continue
        kind, worker, incarnation, group_id, indices, version, granted = row
        numbers = [int(index) for index in indices.split(",") if index]
        progressed = db.execute(
            "select exists (select 1 from bodies where group_id = ? and fence = ? and kind = 'segment')",
            (group_id, fence),
        ).fetchone()[0]
        remaining = set(numbers) if kind == Kind.FILTER else set()
        ledger.fleet.leases[fence] = LeaseRecord(
            fence, Kind(kind), worker, incarnation, group_id, numbers, remaining, version, granted, 0,
            progressed=bool(progressed),
        )  # fmt: skip


def _restore_groups(store: Store) -> list[GroupRecord]:
    found = []
    for row in store.db.execute(
        "select group_id, lane, dataset, state, version, incarnation, due, prompt_body, prompt_tokens, fence,"
        " issued_seq, created_at from groups indexed by groups_open where reason is null and batch < 0"
        " order by group_id"
    ).fetchall():
        group_id, lane, dataset, state, version, incarnation, due, prompt, tokens, fence, issued, created = (
            row
        )
        group = GroupRecord(
            group_id, Lane(lane), dataset, prompt, tokens, 0, [], created, state=state, version=version,
            incarnation=incarnation, due=due, fence=fence, issued_seq=issued,
        )  # fmt: skip
        _restore_samples(group, store.db)
        _restore_bodies(group, store)
        found.append(group)
    return found


def _restore_samples(group: GroupRecord, db: sqlite3.Connection) -> None:
    for row in db.execute(
        "select idx, state, status, tokens, fence, attempts, worker, oldest, newest, reward, removed,"
        " score_body from samples where group_id = ? order by idx",
        (group.group_id,),
    ):
        idx, state, status, tokens, fence, attempts, worker, oldest, newest, reward, removed, score = row
        group.samples.append(
            SampleRecord(
                idx, state, Status(status), tokens, fence=fence, attempts=attempts, worker=worker,
                oldest=oldest, newest=newest, reward=reward, removed=bool(removed), score_body=score,
            )
        )  # fmt: skip


def _restore_bodies(group: GroupRecord, store: Store) -> None:
    for body, kind, idx, file, offset, length in store.db.execute(
        "select body, kind, idx, file, offset, length from bodies"
        " where group_id = ? and dropped = 0 order by body",
        (group.group_id,),
    ):
        store.remember(body, Location(file, offset, length))
        if kind == "prompt":
            group.prompt_bytes = length
        elif kind == "segment":
            group.samples[idx].bodies.append(body)
            group.samples[idx].body_bytes += length
        elif body == group.samples[idx].score_body:
            group.samples[idx].score_bytes = length


def _place(ledger: Ledger, group: GroupRecord) -> None:
    """Put a live group back where it waits."""
    ledger.book.groups[group.group_id] = group
    if group.due >= 0:
        ledger.batches.dues[group.due] += 1
    for sample in group.samples:
        if sample.state in {GENERATING, SCORING}:
            ledger.fleet.leases[sample.fence].remaining.add(sample.index)
    if group.lane is Lane.TRAIN and group.state == FRESH:
        ledger.queues.fresh.append(group.group_id)
        return
    if group.state == READY:
        ledger.batches.complete(group)
        return
    for sample in group.samples:
        if sample.state == FRESH:
            ledger.queues.return_sample(group, sample)
        elif sample.state == GENERATED:
            ledger.queues.generated(group, sample)
    if all(sample.state == SCORED for sample in group.samples):
        ledger.queues.to_filter.append(group.group_id)
