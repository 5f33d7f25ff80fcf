"""Equations over sums: the ledger's running totals against the rows, and nothing lost between the two."""

from __future__ import annotations

from functools import partial

from asyncrl.buffer.audit_view import Check, Finding, View
from asyncrl.messages.sample import Settled

COUNTS = {
    "issued.groups": ("every prompt issued is a group", "select count(*) from groups"),
    "issued.samples": ("every sample issued has its row", "select count(*) from samples"),
    "received.bodies": ("every body received has its row", "select count(*) from bodies"),
    "received.segments": (
        "every segment received has its row",
        "select count(*) from bodies where kind = 'segment'",
    ),
    "received.scores": (
        "every score received has its row",
        "select count(*) from bodies where kind = 'score'",
    ),
    "received.tokens": (
        "every token received is in a segment",
        "select sum(num_tokens) from bodies where kind = 'segment'",
    ),
    "regenerated.tokens": (
        "every token given up is in a dropped segment",
        "select sum(num_tokens) from bodies where dropped",
    ),
}
"""Running total -> what it says, and the same from the rows."""
UNITS = {
    "groups": "select reason, count(*) from groups group by 1",
    "samples": "select g.reason, count(*) from samples s join groups g using (group_id) group by 1",
    "tokens": "select g.reason, sum(s.tokens) from samples s join groups g using (group_id) group by 1",
}
"""Sums of the rows by reason; null is in flight."""


def _total(view: View, name: str) -> int:
    return view.one("select coalesce((select value from totals where key = ?), 0)", name)


def _count(name: str, sql: str, view: View) -> Finding:
    total, rows = _total(view, name), view.one(sql)
    return Finding(total, rows, "" if total == rows else f"the total says {total}, the rows {rows}")


def _settled(reason: Settled, view: View) -> Finding:
    totals = {unit: _total(view, f"settled.{reason}.{unit}") for unit in UNITS}
    rows = {unit: int(dict(view.rows(sql)).get(reason) or 0) for unit, sql in UNITS.items()}
    wrong = [f"the total says {totals[u]} {u}, the rows {rows[u]}" for u in UNITS if totals[u] != rows[u]]
    return Finding(_words(totals), _words(rows), wrong[0] if wrong else "")


def _words(sums: dict[str, int]) -> str:
    return ", ".join(f"{number} {unit}" for unit, number in sums.items())


def _conserved(unit: str, view: View) -> Finding:
    """What came in against where it is now."""
    came = _total(view, "received.tokens" if unit == "tokens" else f"issued.{unit}")
    by_reason = dict(view.rows(UNITS[unit]))
    parts = {str(reason): int(by_reason.get(reason) or 0) for reason in Settled}
    if unit == "tokens":
        parts["regenerated"] = view.one("select sum(num_tokens) from bodies where dropped")
    parts["in flight"] = int(by_reason.get(None) or 0)
    right = sum(parts.values())
    sides = f"{came} = " + " + ".join(f"{number} {name}" for name, number in parts.items())
    broken = (
        "" if came == right else f"{abs(came - right)} {unit} are {'missing' if came > right else 'too many'}"
    )
    return Finding(came, right, broken, sides=sides)


def _conservation(unit: str) -> Check:
    came = "received" if unit == "tokens" else "issued"
    again = " + regenerated" if unit == "tokens" else ""
    says = f"{unit} {came} = " + " + ".join(Settled) + f"{again} + in flight"
    return Check(f"conserved.{unit}", says, partial(_conserved, unit))


CHECKS = (
    *(_conservation(unit) for unit in ("groups", "samples", "tokens")),
    *(Check(f"totals.{name}", says, partial(_count, name, sql)) for name, (says, sql) in COUNTS.items()),
    *(
        Check(f"totals.settled.{reason}", f"what settled as {reason} has its rows", partial(_settled, reason))
        for reason in Settled
    ),
)
