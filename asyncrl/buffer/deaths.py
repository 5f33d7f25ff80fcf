"""What a death costs: the answers a lost worker had in the making, what of them is kept, what is done again.

Owns the rows of `deaths` and the words about them. Never decides who is dead (`members` does) and changes no
sample. Kept tokens are exact, because they are committed; what a dead generator had sampled beyond them
nobody knows, so its bound is told, never a guess. A worker that hands its work back and leaves has no row.

Bound of one answer, in tokens: min(progress_every_tokens, longest answer - committed). It is handed in at
half of that interval, as one hand-in may be on its way while the next is in the making; the bound holds while
the desk acknowledges a hand-in before another one is full (an answer by a custom generate function is handed
in once, at its end).
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.states import GENERATING, GroupRecord, LeaseRecord, SampleRecord
from asyncrl.messages.control import Kind
from asyncrl.messages.sample import Lane

DETAILED = 3
"""Deaths that words name one by one."""


class Loss(NamedTuple):
    """What one worker held, or several together."""

    samples: int = 0
    """Answers in the making."""
    kept: int = 0
    """Response tokens of them that are committed and resumed from."""
    discarded: int = 0
    """Response tokens of them that are committed and sampled anew all the same (partial_rollout = false)."""
    bound: int = 0
    """Most response tokens that were sampled and not committed."""


class DeathRow(msgspec.Struct, frozen=True):
    """One death as the desk noticed it."""

    name: str
    incarnation: str
    at: float
    """Unix seconds."""
    reason: str
    samples: int
    kept: int
    discarded: int
    bound: int


def loss_of(ledger: Ledger, leases: Sequence[LeaseRecord]) -> Loss:
    """What these leases' worker had in the making; call it before they are released."""
    total = Loss()
    for lease in leases:
        for group, sample in _held(ledger, lease):
            config = ledger.config
            training = group.lane is Lane.TRAIN
            limit = config.max_response_len if training else config.eval_max_response_len
            every = config.progress_every_tokens
            left = max(0, limit - sample.tokens)
            keeps = config.partial_rollout and training
            total = Loss(
                samples=total.samples + 1,
                kept=total.kept + sample.tokens * keeps,
                discarded=total.discarded + sample.tokens * (not keeps),
                bound=total.bound + (min(every, left) if every else left),
            )
    return total


def _held(ledger: Ledger, lease: LeaseRecord) -> Iterator[tuple[GroupRecord, SampleRecord]]:
    group = ledger.book.groups.get(lease.group_id)
    if lease.kind is not Kind.GENERATE or group is None:
        return
    for index in sorted(lease.remaining):
        sample = group.samples[index]
        if sample.fence == lease.fence and sample.state == GENERATING:
            yield group, sample


def record(
    ledger: Ledger,
    identity: tuple[str, str],
    leases: Sequence[LeaseRecord],
    reason: str,
    now: float,
) -> None:
    """A worker is gone with what it held; call it before its leases are released.

    Once the run has finished, whoever goes has nothing to lose, and nothing is written.
    """
    if ledger.finished:
        return
    loss = loss_of(ledger, leases)
    ledger.book.row("death", *identity, now, reason, *loss)
    ledger.book.totals["deaths"] += 1
    for name, number in loss._asdict().items():
        ledger.book.totals[f"deaths.{name}"] += number


def record_all(ledger: Ledger, reason: str, now: float) -> None:
    """Everybody is gone (the run was resumed): a row for each worker that held answers."""
    held: dict[tuple[str, str], list[LeaseRecord]] = {}
    for lease in ledger.fleet.leases.values():
        if lease.kind is Kind.GENERATE:
            held.setdefault((lease.worker, lease.incarnation), []).append(lease)
    for identity, leases in held.items():
        record(ledger, identity, leases, reason, now)


def metrics(totals: Counter[str]) -> dict[str, float]:
    """The gauges behind faults/*, from the ledger's running totals."""
    return {
        "faults/deaths": totals["deaths"],
        "faults/samples_interrupted": totals["deaths.samples"],
        "faults/tokens_kept": totals["deaths.kept"],
        "faults/tokens_lost_bound": totals["deaths.bound"],
    }


def deaths(db: sqlite3.Connection) -> list[DeathRow]:
    """Every death of a run, in order; none for a run that is older than the table."""
    if not db.execute("select 1 from sqlite_master where name = 'deaths'").fetchone():
        return []
    return [DeathRow(*row) for row in db.execute("select * from deaths order by at, name")]


def in_words(rows: Sequence[DeathRow]) -> str:
    """What the deaths of a run came to; empty where nobody died."""
    if not rows:
        return ""
    names = [_who(row) for row in rows[:DETAILED]]
    more = [f"{len(rows) - DETAILED} more"] if len(rows) > DETAILED else []
    noun = "death" if len(rows) == 1 else "deaths"
    return f"{len(rows)} {noun}: {cost(rows)} ({'; '.join(names + more)})"


def _who(row: DeathRow) -> str:
    """Name and reason in a few words; where the supervisor saw it die, the reason begins with the name."""
    reason = row.reason.partition(";")[0]
    return reason if reason.startswith(row.name) else f"{row.name}: {reason}"


def cost(rows: Sequence[DeathRow]) -> str:
    """What these deaths interrupted, in words."""
    samples, kept = sum(row.samples for row in rows), sum(row.kept for row in rows)
    if not samples:
        return "no answer was in the making"
    discarded, bound = sum(row.discarded for row in rows), sum(row.bound for row in rows)
    anew = f", {discarded} sampled anew" if discarded else ""
    answers = "1 answer" if samples == 1 else f"{samples} answers"
    return f"{answers} interrupted, {kept} tokens of them kept{anew}, at most {bound} lost"
