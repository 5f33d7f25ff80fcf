"""What the equations of an audit look at, and the form of what they find.

A `View` is one snapshot of a run's tables with the facts of its plan. Nothing here judges.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from asyncrl.buffer.records import SURVIVING, TrainedRow
from asyncrl.buffer.tables import IMPORTED
from asyncrl.messages.sample import Span
from asyncrl.topology.plan import Plan

Side = int | str


class Finding(NamedTuple):
    """What became of one equation; it holds when the sides are equal and nothing is broken."""

    left: Side
    right: Side
    broken: str = ""
    """The first broken item, in words."""
    skipped: str = ""
    """Not empty: the equation does not apply, and why."""
    sides: str = ""
    """The equation with its numbers, where two sides alone say too little."""


class Check(NamedTuple):
    """An equation: its name, what it says, and how to find out."""

    name: str
    says: str
    find: Callable[[View], Finding]


class SpanRow(NamedTuple):
    """A segment's row with its spans decoded; None where they cannot be."""

    body: int
    group_id: int
    idx: int
    num_tokens: int
    dropped: int
    spans: list[Span] | None

    @property
    def where(self) -> str:
        """The segment in words."""
        return f"group {self.group_id} sample {self.idx}, body {self.body}"


@dataclass
class View:
    """See the module's docstring."""

    db: sqlite3.Connection
    run_dir: Path
    plan: Plan | None
    deep: bool = False
    """Whether bodies are read and compared with their rows."""

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Every row of a query."""
        return self.db.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> int:
        """The one number of a query; 0 for null."""
        return int(self.db.execute(sql, values).fetchone()[0] or 0)

    def counted(self, total: str, bad: str, words: str, *values: Any) -> Finding:
        """Items against sound items.

        Args:
            total: query for the number of items.
            bad: query for the unsound ones.
            words: format string for the first of them, given its columns.
            values: parameters of `bad`.
        """
        count, found = self.one(total), self.rows(bad, *values)
        return Finding(count, count - len(found), words.format(*found[0]) if found else "")

    @cached_property
    def segments(self) -> list[SpanRow]:
        """Every segment with its spans."""
        rows = self.rows(
            "select body, group_id, idx, num_tokens, dropped, spans from bodies where kind = 'segment' order"
            " by body"
        )
        return [SpanRow._make((*row[:5], _spans(row[5]))) for row in rows]

    @cached_property
    def lineage(self) -> list[TrainedRow]:
        """Trainings that the surviving weights rest on."""
        return [TrainedRow(*row) for row in self.rows(SURVIVING)]

    @cached_property
    def imported(self) -> str:
        """Where an imported run came from; empty for a run that was made here, whatever its `meta` claims."""
        rows = self.rows(
            "select value from meta where key = ? and not exists (select 1 from leases)"
            " and not exists (select 1 from versions) and not exists (select 1 from trained)",
            IMPORTED,
        )
        return str(rows[0][0]) if rows else ""

    @cached_property
    def finished(self) -> bool:
        """Whether the run has done all it was to do: trained, published, saved and evaluated."""
        target = self.rows("select value from meta where key = 'target'")
        steps = int(target[0][0]) if target else self.plan.num_rollout if self.plan is not None else None
        if steps is None or len(self.lineage) < steps:
            return False
        if self.one("select coalesce(max(version), -1) from versions") < steps:
            return False
        if self.one("select coalesce(max(rollout_step), 0) from checkpoints") < steps:
            return False
        if self.plan is None or not self.plan.eval_sets:
            return True
        return self.one("select count(*) from evaluations where version >= ? and seen", steps) > 0


def _spans(text: str) -> list[Span] | None:
    try:
        return msgspec.json.decode(text, type=list[Span])
    except (msgspec.DecodeError, TypeError):
        return None
