"""The groups a transaction has settled, read back from the rows it wrote: one line each for the log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from asyncrl.buffer.states import Transaction
from asyncrl.messages.sample import Lane, Settled

REASON = 5
"""Column of a group's row."""

QUERY = (
    "select g.group_id, g.lane, g.reason, g.version, g.batch, g.num_samples, sum(s.tokens), g.note"
    " from groups g join samples s using (group_id)"
)


class SettledGroup(NamedTuple):
    """A group's last event."""

    group_id: int
    lane: Lane
    reason: Settled
    version: int
    batch: int
    num_samples: int
    num_tokens: int
    note: str


def settled(db: sqlite3.Connection, transaction: Transaction) -> Iterator[SettledGroup]:
    """Groups that this committed transaction settled, whatever the reason."""
    for row in transaction.groups:
        if row[REASON] is not None:
            yield from _read(db, "g.group_id = ?", row[0])
    for name, values in transaction.rows:
        if name == "trained_groups":
            yield from _read(db, "g.batch = ?", values[-1])


def _read(db: sqlite3.Connection, where: str, value: int) -> Iterator[SettledGroup]:
    sql = f"{QUERY} where {where} and g.reason is not null group by g.group_id order by g.group_id"
    rows = db.execute(sql, (value,)).fetchall()
    for group_id, lane, reason, version, batch, samples, tokens, note in rows:
        yield SettledGroup(group_id, Lane(lane), Settled(reason), version, batch, samples, tokens, note)
