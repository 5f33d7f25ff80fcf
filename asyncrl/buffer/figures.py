"""What a run did, in numbers taken from its rows alone: overlap, staleness, who finished what.

Pure functions of a read-only connection and the surviving trainings. Times are Unix seconds.
"""

# ruff: noqa: S608 -- queries are put together from words of this module only
from __future__ import annotations

import bisect
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec


class Training(Protocol):
    """What is needed of one surviving training."""

    @property
    def batch(self) -> int:
        """Its number."""

    @property
    def started(self) -> float:
        """Unix seconds."""

    @property
    def ended(self) -> float:
        """Unix seconds."""

    @property
    def tokens(self) -> int:
        """Response tokens that the loss saw."""


class WorkerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one generator finished in the lane train."""

    groups: int
    """Groups whose every sample it finished."""
    samples: int
    tokens: int
    """Tokens of those samples, wherever their prefixes came from."""


class MemberFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one life of a generator finished between joining and leaving."""

    name: str
    incarnation: str
    joined_at: float
    left_at: float | None
    groups: int
    """Groups of the lane train of which it finished samples on a lease that ended in that time."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's docstring."""

    num_trained: int
    """Batches in the surviving lineage."""
    overlap_share: float | None
    """Share of rollout steps after warm-up during whose training some generate lease of the lane train was
    open; None when there is no such step."""
    overlap_steps: int
    """Steps that share is of."""
    achieved_over_bound: float | None
    """Mean time from one step's end to the next one's, over the slower side's busy time per step: training
    from batch to weights, or generation while any lease of the lane train was open."""
    staleness_mean: float | None
    """Rollout steps between the weights that sampled a token and those that it trained, mean over tokens."""
    staleness_max: int | None
    mixed_samples: int
    """Samples of the lane train whose tokens are of more than one version."""
    resumed_samples: int
    """Samples of the lane train with tokens from more than one lease."""
    workers: dict[str, WorkerFigures]
    """By generator."""
    members: list[MemberFigures]
    """By life of a generator, in the order they came."""
    trained_tokens: int
    received_tokens: int
    regenerated_tokens: int
    wall_s: float
    """From the first prompt to the last event that left a time."""
    reward_by_batch: dict[int, float]
    """Mean reward of each trained batch."""


def compute(db: sqlite3.Connection, lineage: Sequence[Training], *, warmup: int) -> Figures:
    """The figures of a run; the first `warmup` rollout steps are left out of the overlap."""
    steps = [row for row in lineage if row.batch >= warmup]
    generating = _merged(_generation(db))
    overlapping = sum(_overlaps(row, generating) for row in steps)
    mean, most = _staleness(db, lineage)
    return Figures(
        num_trained=len(lineage),
        overlap_share=overlapping / len(steps) if steps else None,
        overlap_steps=len(steps),
        achieved_over_bound=_achieved_over_bound(steps, generating),
        staleness_mean=mean,
        staleness_max=most,
        mixed_samples=_one(
            db,
            "select count(*) from samples s join groups g using (group_id)"
            " where g.lane = 'train' and s.oldest <> s.newest",
        ),
        resumed_samples=_one(
            db,
            "select count(*) from (select 1 from bodies b join groups g using (group_id) where g.lane ="
            " 'train'"
            " and b.kind = 'segment' and b.dropped = 0 group by b.group_id, b.idx"
            " having count(distinct b.fence) > 1)",
        ),
        workers=_workers(db),
        members=_members(db),
        trained_tokens=sum(row.tokens for row in lineage),
        received_tokens=_one(db, "select coalesce(sum(num_tokens), 0) from bodies where kind = 'segment'"),
        regenerated_tokens=_one(db, "select coalesce(sum(num_tokens), 0) from bodies where dropped"),
        wall_s=_wall_s(db),
        reward_by_batch=dict(
            db.execute(
                "select g.batch, avg(s.reward) from groups g join samples s using (group_id)"
                " where g.reason = 'trained' group by 1 order by 1"
            )
        ),
    )


def _achieved_over_bound(
    steps: Sequence[Training], generating: Sequence[tuple[float, float]]
) -> float | None:
    if len(steps) < 2:
        return None
    begin, end = steps[0].ended, steps[-1].ended
    trained = sum(row.ended - row.started for row in steps[1:])
    generated = sum(max(0.0, min(last, end) - max(first, begin)) for first, last in generating)
    slower = max(trained, generated)
    return (end - begin) / slower if slower > 0 else None


def _one(db: sqlite3.Connection, sql: str) -> int:
    return int(db.execute(sql).fetchone()[0])


def _generation(db: sqlite3.Connection) -> Iterator[tuple[float, float]]:
    """[granted, ended] of the generate leases of the lane train, by start; an open one has no end yet."""
    yield from db.execute(
        "select l.granted_at, coalesce(l.ended_at, 9e99) from leases l join groups g using (group_id)"
        " where l.kind = 'generate' and g.lane = 'train' order by 1"
    )


def _merged(intervals: Iterator[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time as intervals that do not touch."""
    merged: list[tuple[float, float]] = []
    for start, end in intervals:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _overlaps(row: Training, intervals: list[tuple[float, float]]) -> bool:
    before = bisect.bisect_right(intervals, (row.ended, 9e99))
    return before > 0 and intervals[before - 1][1] >= row.started


def _staleness(db: sqlite3.Connection, lineage: Sequence[Training]) -> tuple[float | None, int | None]:
    """Mean over tokens, and maximum."""
    tokens = weighted = 0
    most: int | None = None
    trained = {row.batch for row in lineage}
    for batch, spans in db.execute(
        "select g.batch, b.spans from groups g join bodies b using (group_id)"
        " where g.batch >= 0 and b.kind = 'segment' and b.dropped = 0"
    ):
        for version, _, count in msgspec.json.decode(spans) if batch in trained else ():
            tokens += count
            weighted += count * (batch - version)
            most = batch - version if most is None else max(most, batch - version)
    return (weighted / tokens if tokens else None), most


def _workers(db: sqlite3.Connection) -> dict[str, WorkerFigures]:
    finished = "s.status in ('completed', 'truncated') and g.lane = 'train'"
    groups = dict(
        db.execute(
            "select worker, count(*) from (select min(s.worker) worker from samples s join groups g using"
            " (group_id)"
            f" group by group_id having min({finished}) and min(s.worker) = max(s.worker)) group by 1"
        )
    )
    return {
        worker: WorkerFigures(groups=groups.get(worker, 0), samples=samples, tokens=tokens)
        for worker, samples, tokens in db.execute(
            "select s.worker, count(*), sum(s.tokens) from samples s join groups g using (group_id)"
            f" where {finished} and s.worker <> '' group by 1 order by 1"
        )
    }


def _members(db: sqlite3.Connection) -> list[MemberFigures]:
    rows = db.execute(
        "select m.name, m.incarnation, m.joined_at, m.left_at, count(distinct g.group_id)"
        " from members m left join leases l on l.worker = m.name and l.incarnation = m.incarnation"
        " and l.kind = 'generate' and l.outcome in ('completed', 'truncated') and l.ended_at >= m.joined_at"
        " and l.ended_at <= coalesce(m.left_at, 9e99)"
        " left join groups g on g.group_id = l.group_id and g.lane = 'train'"
        " where m.role = 'generator' group by 1, 2 order by m.joined_at, m.name"
    )
    return [
        MemberFigures(name=name, incarnation=incarnation, joined_at=joined, left_at=left, groups=groups)
        for name, incarnation, joined, left, groups in rows
    ]


def _wall_s(db: sqlite3.Connection) -> float:
    first, last = db.execute(
        "select (select min(created_at) from groups),"
        " max(coalesce((select max(ended) from trained), 0), coalesce((select max(settled_at) from groups),"
        " 0),"
        " coalesce((select max(ended_at) from leases), 0), coalesce((select max(published_at) from"
        " versions), 0))"
    ).fetchone()
    return max(0.0, last - first) if first is not None else 0.0
