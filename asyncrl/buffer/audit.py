"""The proof, from a run's rows alone, that nothing was lost and nothing trained twice.

An audit is a list of named equations. Each has two sides and either holds or names the first item that
breaks it. Damage to rows, of whatever kind, becomes a broken equation and never an exception; only a
directory without a run is an error. The equations stand in `audit_rows`, `audit_work`, `audit_sums` and
`audit_training`.

What rows cannot show: that the newest row of a table was removed together with everything that names it.
"""

# ruff: noqa: S608 -- queries are put together from words of this module only
from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.buffer import audit_rows, audit_sums, audit_training, audit_work
from asyncrl.buffer.audit_view import Check, Finding, View
from asyncrl.buffer.records import connect
from asyncrl.topology.plan import Plan

CHECKS: tuple[Check, ...] = (
    *audit_sums.CHECKS,
    *audit_rows.CHECKS,
    *audit_work.CHECKS,
    *audit_training.CHECKS,
)
"""Every equation, in the order it is reported."""
COUNTED = (
    "groups",
    "samples",
    "bodies",
    "leases",
    "batches",
    "trained",
    "versions",
    "checkpoints",
    "members",
)
"""Tables whose sizes a report tells."""
NEED_HISTORY = frozenset(
    {
        "groups.ordinals",
        "leases.results",
        "versions.known",
        "staleness.tokens",
        "staleness.due",
        "staleness.issue",
        "staleness.feasible",
    }
)
"""Equations about what happened before a dump was written: an imported run has no rows of that."""


class Equation(msgspec.Struct, frozen=True, kw_only=True):
    """One equation and what became of it."""

    name: str
    says: str
    """The equation in words."""
    left: int | str
    right: int | str
    holds: bool
    """Also when it does not apply."""
    broken: str = ""
    """The first item that breaks it."""
    skipped: str = ""
    """Why it does not apply."""
    sides: str = ""
    """The equation with its numbers, where two sides alone say too little."""


class AuditReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit found."""

    run: str
    closes: bool
    """Whether every equation holds."""
    finished: bool
    """Whether the run had done all it was to do; otherwise some of it is in flight."""
    deep: bool
    counts: dict[str, int]
    """Rows by table; -1 for a table that cannot be read."""
    equations: list[Equation]
    imported: str = ""
    """Where an imported run came from; empty for a run that was made here."""

    @property
    def broken(self) -> list[Equation]:
        """The equations that do not hold."""
        return [equation for equation in self.equations if not equation.holds]

    def to_json(self) -> bytes:
        """The whole report as JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    def text(self) -> str:
        """The report as lines for people."""
        width = max(len(equation.name) for equation in self.equations)
        lines = [_line(equation, width) for equation in self.equations]
        rows = ", ".join(f"{count} {table}" for table, count in self.counts.items())
        state = "finished" if self.finished else "not finished: some of it is in flight"
        verdict = f"the ledger closes: {len(self.equations)} equations hold"
        if self.imported:
            skipped = sum(bool(equation.skipped) for equation in self.equations)
            verdict = (
                f"the ledger closes: {len(self.equations) - skipped} equations hold, {skipped} do not apply"
            )
        if not self.closes:
            names = ", ".join(equation.name for equation in self.broken)
            verdict = (
                f"the ledger does NOT close: {len(self.broken)} of {len(self.equations)} are broken: {names}"
            )
        head = [f"audit of {self.run} ({state})"]
        if self.imported:
            head = [
                f"audit of {self.run} ({self.imported})",
                "equations about leases, versions and staleness are skipped: they happened elsewhere",
            ]
        return "\n".join([*head, rows, "", *lines, "", verdict])


def _line(equation: Equation, width: int) -> str:
    name = equation.name.ljust(width)
    if equation.skipped:
        return f"  --  {name}  {equation.says} (skipped: {equation.skipped})"
    sides = equation.sides or f"{equation.left} = {equation.right}"
    if equation.holds:
        return f"  ok  {name}  {equation.says}: {sides}"
    sides = equation.sides or f"{equation.left} and {equation.right}"
    return f"BROKEN {name}  {equation.says}: {equation.broken or 'the sides differ'} ({sides})"


def audit(run_dir: Path, *, deep: bool = False) -> AuditReport:
    """Check every equation on one snapshot of a run's records.

    Args:
        run_dir: a live or finished run.
        deep: read every body, and compare its digest and contents with its row.

    Raises:
        DataError: there is no run in this directory.
        StorageError: its ledger is not a database.
    """
    db = connect(run_dir)
    try:
        view = View(db, run_dir, _plan(run_dir), deep=deep)
        equations = [_equation(check, view) for check in CHECKS]
        return AuditReport(
            run=str(run_dir),
            closes=all(equation.holds for equation in equations),
            finished=_attempt(lambda: view.finished) is True,
            deep=deep,
            counts={table: _size(view, table) for table in COUNTED},
            equations=equations,
            imported=_imported(view),
        )
    finally:
        db.close()


def _equation(check: Check, view: View) -> Equation:
    if check.name in NEED_HISTORY and _imported(view):
        found: Any = Finding(0, 0, skipped="the run was imported")
    else:
        found = _attempt(lambda: check.find(view))
    if not isinstance(found, Finding):
        found = Finding("?", "?", f"the rows are too damaged to tell: {found}")
    return Equation(
        name=check.name,
        says=check.says,
        left=found.left,
        right=found.right,
        holds=bool(found.skipped) or (found.left == found.right and not found.broken),
        broken=found.broken,
        skipped=found.skipped,
        sides=found.sides,
    )


def _imported(view: View) -> str:
    """Rows that are too damaged to tell make no run an imported one."""
    try:
        return view.imported
    except sqlite3.Error:
        return ""


def _attempt(work: Any) -> Any:
    """What `work` returns, or the words of what it raised."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - rows may be damaged in any way, and each is a finding
        return f"{type(error).__name__}: {error}"


def _size(view: View, table: str) -> int:
    count = _attempt(lambda: view.one(f"select count(*) from {table}"))
    return count if isinstance(count, int) else -1


def _plan(run_dir: Path) -> Plan | None:
    try:
        return msgspec.json.decode((run_dir / "plan.json").read_bytes(), type=Plan)
    except (OSError, msgspec.DecodeError):
        return None
