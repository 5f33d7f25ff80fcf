"""The state of a run in a few lines, from its records alone: for `status`, live or long after."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from asyncrl.buffer.deaths import deaths
from asyncrl.buffer.deaths import in_words as in_words_deaths
from asyncrl.buffer.lengths import in_words, of_records, tokens_dropped


def overview(run_dir: Path) -> dict[str, Any]:
    """Steps, versions, samples by state, open leases, tokens, deaths and so on; empty without records."""
    path = run_dir / "buffer.db"
    if not path.exists():
        return {}
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        try:
            return {
                "steps": _steps(db),
                "versions": _versions(db),
                "evaluations": _evaluations(db),
                "samples": _pairs(db, "select state, count(*) from samples group by state order by 2 desc"),
                "leases": _pairs(
                    db, "select worker, count(*) from leases where ended_at is null group by worker"
                ),
                "tokens": _tokens(db),
                "lengths": in_words(of_records(db)),
                "dropped": _dropped(db),
                "quarantine": _quarantine(db, run_dir),
                "deaths": in_words_deaths(deaths(db)),
            }
        except sqlite3.OperationalError:
            return {}  # the tables are being made


def _pairs(db: sqlite3.Connection, query: str) -> str:
    return ", ".join(f"{number} {name}" for name, number in db.execute(query))


def _steps(db: sqlite3.Connection) -> str:
    trained, recorded = db.execute(
        "select (select count(distinct batch) from trained), (select count(*) from batches)"
    ).fetchone()
    saved = db.execute("select max(rollout_step) from checkpoints").fetchone()[0]
    return f"{trained} trained, {recorded} recorded" + (
        f", checkpoint at {saved}" if saved is not None else ""
    )


def _versions(db: sqlite3.Connection) -> str:
    row = db.execute(
        "select version, incarnation, digest from versions order by version desc, incarnation desc limit 1"
    ).fetchone()
    return f"v{row[0]}.{row[1]} {row[2]}" if row else ""


def _evaluations(db: sqlite3.Connection) -> str:
    rows = db.execute(
        "select g.version, avg(s.reward) from samples s join groups g using (group_id)"
        " where g.reason = 'evaluated' group by g.version order by g.version"
    )
    return ", ".join(f"v{version} {mean:.3f}" for version, mean in rows)


def _dropped(db: sqlite3.Connection) -> str:
    """Tokens thrown away, by reason."""
    dropped = tokens_dropped(dict(db.execute("select key, value from totals").fetchall()))
    return ", ".join(f"{tokens} {reason}" for reason, tokens in dropped.items() if tokens)


def _quarantine(db: sqlite3.Connection, run_dir: Path) -> str:
    (failed,) = db.execute("select count(*) from groups where reason = 'failed'").fetchone()
    return f"{failed} failed; asyncrl quarantine ls {run_dir}" if failed else ""


def _tokens(db: sqlite3.Connection) -> str:
    totals = dict(db.execute("select key, value from totals").fetchall())
    return f"{totals.get('received.tokens', 0)} received, {totals.get('settled.trained.tokens', 0)} trained"
