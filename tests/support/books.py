"""What the records of a run say; read only, also while it runs."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from asyncrl.buffer.audit import audit

Row = tuple[Any, ...]


def rows(run_dir: Path, query: str, *values: Any) -> list[Row]:
    """The rows of a query; none as long as the tables are not there."""
    path = run_dir / "buffer.db"
    if not path.exists():
        return []
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)
    try:
        return db.execute(query, values).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
    finally:
        db.close()


def pairs(run_dir: Path, query: str, *values: Any) -> dict[Any, Any]:
    """The rows of a query for two columns, as a dict."""
    return dict(rows(run_dir, query, *values))


def one(run_dir: Path, query: str, *values: Any) -> Any:
    """The first value of the first row; None where there is none."""
    found = rows(run_dir, query, *values)
    return found[0][0] if found else None


def reasons(run_dir: Path) -> dict[str, int]:
    """Groups of the lane train by how they were settled."""
    return pairs(
        run_dir, "select reason, count(*) from groups where lane = 'train' group by reason order by 1"
    )


def due(run_dir: Path, interval: int, last: int) -> list[int]:
    """The versions to evaluate: the first served at or after each multiple of `interval`, and `last`."""
    told = rows(run_dir, "select version from swaps union select version from evaluations order by 1")
    found: list[int] = []
    for (version,) in told:
        if not found or version // interval > found[-1] // interval or version == last:
            found.append(version)
    return found


def assert_closed(run_dir: Path, *, finished: bool = True) -> None:
    """The audit closes; where the run has finished, every group is settled, once."""
    report = audit(run_dir)
    assert report.closes, report.text()
    settled = pairs(run_dir, "select key, value from totals where key like 'settled.%.groups'")
    by_reason = rows(run_dir, "select reason, count(*) from groups where reason is not null group by reason")
    assert {f"settled.{reason}.groups": count for reason, count in by_reason} == {
        key: count for key, count in settled.items() if count
    }
    assert rows(run_dir, "select group_id from batch_groups group by group_id having count(*) > 1") == []
    if finished:
        assert rows(run_dir, "select group_id from groups where reason is null") == []
        assert rows(run_dir, "select fence from leases where ended_at is null") == []
