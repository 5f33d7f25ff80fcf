"""Groups and samples of a run as they were recorded, whatever became of them: for lists, `show` and dumps.

Reads through a `Records` snapshot only: no row is judged, and no body leaves without its digest checked.
Groups that were never finished are here as far as they came.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from asyncrl.buffer.records import Records
from asyncrl.buffer.store import DATABASE
from asyncrl.errors import StorageError
from asyncrl.messages.sample import Lane, Prompt, Sample, Score, Segment, Status, assemble

IN_FLIGHT = "open"
"""What `groups` calls a group that has not settled; the other words are those of `Settled`."""

T = TypeVar("T", Prompt, Segment, Score)


class GroupRow(NamedTuple):
    """One group, in numbers."""

    group_id: int
    lane: str
    dataset: str
    state: str
    reason: str | None
    """Why it settled; None in flight."""
    version: int
    """Issue version; -1 before the first lease, and where nobody said."""
    batch: int
    """-1 where it is in none."""
    prompt_body: int
    num_samples: int
    num_tokens: int
    """Response tokens."""
    mean_reward: float | None
    oldest: int | None
    """Smallest version among its tokens."""
    newest: int | None
    note: str


def groups(
    records: Records, *, settled: Sequence[str] = (), batches: range | None = None
) -> Iterator[GroupRow]:
    """Groups in the order they were trained in, then those of no batch by ordinal.

    Args:
        records: the run.
        settled: only groups that settled so (`IN_FLIGHT`: not yet); none: the groups of recorded batches.
        batches: only groups of these batches.
    """
    where, values = ["1"], []
    if settled:
        where.append(f"coalesce(g.reason, '{IN_FLIGHT}') in ({','.join('?' * len(settled))})")
        values += list(settled)
    if batches is not None:
        where.append("g.batch between ? and ?")
        values += [str(batches.start), str(batches.stop - 1)]
    elif not settled:
        where.append("g.batch >= 0")
    return map(GroupRow._make, _rows(records, _QUERY.format(" and ".join(where)), *values))


def group(records: Records, group_id: int) -> GroupRow | None:
    """One group; None when there is none of this number."""
    return next(map(GroupRow._make, _rows(records, _QUERY.format("g.group_id = ?"), group_id)), None)


_QUERY = """
select g.group_id, g.lane, g.dataset, g.state, g.reason, g.version, g.batch, g.prompt_body, g.num_samples,
       sum(s.tokens), avg(s.reward), min(s.oldest), max(s.newest), g.note
from groups g left join samples s using (group_id) left join batch_groups p using (group_id)
where {} group by g.group_id order by g.batch < 0, g.batch, max(p.position), g.group_id
"""


def samples(records: Records, row: GroupRow) -> list[Sample]:
    """The samples of a group, as far as they came; unscored ones have no score.

    Raises StorageError for a body that is gone or was altered, or that is not what its row says.
    """
    prompt = _decode(records, row.prompt_body, Prompt)
    segments: dict[int, list[int]] = {}
    for body, index in _rows(
        records,
        "select body, idx from bodies where group_id = ? and kind = 'segment' and dropped = 0 order by body",
        row.group_id,
    ):
        segments.setdefault(index, []).append(body)
    found = []
    for index, status, removed, score_body in _rows(
        records,
        "select idx, status, removed, score_body from samples where group_id = ? order by idx",
        row.group_id,
    ):
        score = _decode(records, score_body, Score) if score_body else None
        if score is not None and removed:
            score = msgspec.structs.replace(score, remove_sample=True)
        found.append(
            assemble(
                group_id=row.group_id,
                index=index,
                prompt=prompt,
                segments=[_decode(records, body, Segment) for body in segments.get(index, [])],
                score=score,
                status=Status(status),
                lane=Lane(row.lane),
            )
        )
    return found


def _decode(records: Records, body: int, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(records.body(body), type=kind)
    except msgspec.DecodeError as error:
        raise StorageError(
            f"{records.run_dir / DATABASE}: body {body} is not a {kind.__name__}: {error}"
        ) from error


def _rows(records: Records, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    try:
        return records.db.execute(sql, values).fetchall()
    except sqlite3.Error as error:
        raise StorageError(f"{records.run_dir / DATABASE}: cannot be read: {error}") from error
