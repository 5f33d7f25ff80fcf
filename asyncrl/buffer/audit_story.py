"""What happened to a group or a sample, told in time order from the rows.

Rows keep the last state of a thing and every body, lease and training of it, so a story is complete but for
progress reports, which carry no time of their own: they stand at the lease they came under.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from asyncrl.buffer.deaths import cost, deaths
from asyncrl.buffer.records import connect, retries
from asyncrl.errors import DataError, StorageError


class _Event(NamedTuple):
    at: float
    rank: int
    """Orders events of one moment as they must have come."""
    order: int
    text: str


def story(run_dir: Path, group: int, sample: int | None = None) -> list[str]:
    """Lines in time order: issued, leased, progress, done, scored, batched, trained, settled and why.

    Args:
        run_dir: a live or finished run.
        group: the group's ordinal.
        sample: only what concerns this sample of it; None: all of them.

    Raises:
        DataError: there is no such run, group or sample.
        StorageError: the tables cannot be read.
    """
    db = connect(run_dir)
    try:
        row = _group(db, run_dir, group, sample)
        events = [
            *_born(row, db),
            *_leased(db, group, sample),
            *_trained(db, row),
            *_settled(db, row, sample),
        ]
    except sqlite3.Error as error:
        raise StorageError(f"{run_dir}: the story cannot be read: {error}") from error
    finally:
        db.close()
    return [f"{_time(event.at)}  {event.text}" for event in sorted(events)]


def _group(db: sqlite3.Connection, run_dir: Path, group: int, sample: int | None) -> dict[str, Any]:
    cursor = db.execute("select * from groups where group_id = ?", (group,))
    values = cursor.fetchone()
    if values is None:
        count = db.execute("select count(*) from groups").fetchone()[0]
        raise DataError(f"{run_dir}: there is no group {group}; {count} were issued, numbered from 0")
    row = dict(zip((column[0] for column in cursor.description), values, strict=True))
    if sample is not None and not 0 <= sample < row["num_samples"]:
        raise DataError(
            f"{run_dir}: group {group} has no sample {sample}; it has {row['num_samples']}, from 0"
        )
    return row


def _born(row: dict[str, Any], db: sqlite3.Connection) -> list[_Event]:
    lane = f"evaluation of v{row['version']}.{row['incarnation']}" if row["lane"] == "eval" else "training"
    data = f" from {row['dataset']}" if row["dataset"] else ""
    old = next((old for old, new in retries(db) if new == row["group_id"]), None)
    again = "" if old is None else f", which tries group {old} again"
    text = f"group {row['group_id']} handed in for {lane}{data}{again}: {row['num_samples']} samples, "
    born = [_Event(row["created_at"], 0, 0, text + f"prompt of {row['prompt_tokens']} tokens")]
    for new in [new for old, new in retries(db) if old == row["group_id"]]:
        at = db.execute("select created_at from groups where group_id = ?", (new,)).fetchone()[0]
        born.append(_Event(at, 7, new, f"tried again as group {new}"))
    return born


def _leased(db: sqlite3.Connection, group: int, sample: int | None) -> list[_Event]:
    events = []
    for fence, kind, worker, indices, version, granted, ended, outcome in db.execute(
        "select fence, kind, worker, indices, version, granted_at, ended_at, outcome from leases"
        " where group_id = ? order by fence",
        (group,),
    ):
        numbers = [int(index) for index in str(indices).split(",") if index.isdecimal()]
        if sample is not None and sample not in numbers:
            continue
        who = (
            "all samples"
            if sample is None and len(numbers) > 1
            else f"sample {sample if sample is not None else indices}"
        )
        under = f" under version {version} or newer" if kind == "generate" else ""
        events.append(_Event(granted, 1, fence, f"lease {fence}: {who} to {worker} to {kind}{under}"))
        at = granted if ended is None else ended
        events += _handed_in(db, group, sample, fence, at)
        if ended is not None:
            events.append(_Event(ended, 3, fence, f"lease {fence} of {worker} ended: {outcome}"))
            events += _died(db, fence, worker, ended, outcome)
    return events


def _died(db: sqlite3.Connection, fence: int, worker: str, ended: float, outcome: str) -> list[_Event]:
    """What the death cost that ended this lease, if one did."""
    lost = [row for row in deaths(db) if (row.name, row.at, row.reason) == (worker, ended, outcome)]
    return [_Event(ended, 3, fence, f"{worker} was lost: {cost(lost)}")] if lost else []


def _handed_in(db: sqlite3.Connection, group: int, sample: int | None, fence: int, at: float) -> list[_Event]:
    events = []
    for body, kind, index, tokens, spans, worker, dropped in db.execute(
        "select body, kind, idx, num_tokens, spans, worker, dropped from bodies"
        " where group_id = ? and fence = ? and kind <> 'prompt' and (? is null or idx = ?) order by body",
        (group, fence, sample, sample),
    ):
        if kind == "score":
            events.append(_Event(at, 2, body, _score(db, group, index, worker)))
        else:
            gone = ", given up later and generated again" if dropped else ""
            text = f"sample {index}: {tokens} tokens of {_versions(spans)} from {worker}{gone}"
            events.append(_Event(at, 2, body, text))
    return events


def _score(db: sqlite3.Connection, group: int, index: int, worker: str) -> str:
    row = db.execute(
        "select reward, removed from samples where group_id = ? and idx = ?", (group, index)
    ).fetchone()
    reward, removed = row or (None, 0)
    return f"sample {index}: reward {reward} from {worker}{', kept out of the loss' if removed else ''}"


def _versions(spans: str) -> str:
    try:
        return ", ".join(
            f"v{v}.{i} ({n})" for v, i, n in msgspec.json.decode(spans, type=list[tuple[int, int, int]])
        )
    except msgspec.DecodeError:
        return "unreadable spans"


def _trained(db: sqlite3.Connection, row: dict[str, Any]) -> list[_Event]:
    batch = row["batch"]
    if batch < 0:
        return []
    events = [
        _Event(
            at, 4, 0, f"recorded in batch {batch} at position {position} (it was due by batch {row['due']})"
        )
        for at, position in db.execute(
            "select b.cut_at, p.position from batches b join batch_groups p using (batch)"
            " where b.batch = ? and p.group_id = ?",
            (batch, row["group_id"]),
        )
    ]
    return events + [
        _Event(
            ended,
            5,
            incarnation,
            f"trained in batch {batch} by incarnation {incarnation}, weights {digest[:12]}",
        )
        for incarnation, ended, digest in db.execute(
            "select incarnation, ended, digest from trained where batch = ?", (batch,)
        )
    ]


def _settled(db: sqlite3.Connection, row: dict[str, Any], sample: int | None) -> list[_Event]:
    if row["reason"] is not None:
        note = f": {row['note']}" if row["note"] else ""
        return [_Event(row["settled_at"], 6, 0, f"group {row['group_id']} settled as {row['reason']}{note}")]
    states = db.execute(
        "select idx, state, tokens from samples where group_id = ? and (? is null or idx = ?) order by idx",
        (row["group_id"], sample, sample),
    )
    held = "; ".join(f"sample {index} is {state} with {tokens} tokens" for index, state, tokens in states)
    return [_Event(9e9, 6, 0, f"in flight: {held}")]


def _time(at: float) -> str:
    if at >= 9e9:
        return "now".ljust(23)
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:23]
