"""Lines, the table and the JSON of a chaos run."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence

import msgspec

from tools.chaos.checks import Outcome, Recovery

ROLES = ("source", "evaluator", "generator", "reward", "buffer", "trainer", "supervisor", "all", "random")
SEVERAL = ("all", "random")
"""Rows of cases in which several roles are hit."""
_HEAD = (
    "role", "cases", "kills", "lost", "twice", "differently", "recovered in s (median)", "worst",
    "trained again in s (median)", "worst",
)  # fmt: skip


def line(number: int, total: int, outcome: Outcome) -> str:
    """One case in one line; a case that is not ok, with how to repeat it."""
    lives = [r.life_s for r in outcome.recoveries if r.life_s is not None]
    steps = [r.progress_s for r in outcome.recoveries if r.progress_s is not None]
    back = f"back {max(lives):4.1f}s" if lives else " " * 10
    on = f"on {max(steps):4.1f}s" if steps else " " * 8
    text = f"{number + 1:4d}/{total} {outcome.verdict:7s} {outcome.seconds:5.1f}s {back} {on}  {outcome.name}"
    if outcome.verdict == "ok":
        return text
    words = [f"      {problem}" for problem in outcome.problems]
    if outcome.verdict != "skipped":
        words += [f"      kept: {outcome.place}", f"      repeat: {repeat(outcome)}"]
    return "\n".join([text, *words])


def repeat(outcome: Outcome) -> str:
    """The command that runs a case again."""
    return f"python -m tools.chaos --case {shlex.quote(outcome.spec)}"


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A row per role, as Markdown."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for role in ROLES:
        mine = [outcome for outcome in outcomes if outcome.role == role]
        if mine:
            rows.append(_row(role, mine, outcomes))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]


def _row(role: str, mine: Sequence[Outcome], everyone: Sequence[Outcome]) -> tuple[str, ...]:
    # Cases that hit several roles have rows of their own.
    single = mine if role in SEVERAL else [outcome for outcome in everyone if outcome.role not in SEVERAL]
    kills = sum(
        number for outcome in single for who, number in outcome.deaths.items() if role in {who, *SEVERAL}
    )
    recoveries = [r for outcome in single for r in outcome.recoveries if role in {r.role, *SEVERAL}]
    return (
        role,
        str(len(mine)),
        str(kills),
        str(sum(outcome.lost for outcome in mine)),
        str(sum(outcome.twice for outcome in mine)),
        str(sum(outcome.differently for outcome in mine)),
        *_spread(r.life_s for r in recoveries),
        *_spread(r.progress_s for r in recoveries),
    )


def _spread(values: Iterable[float | None]) -> tuple[str, str]:
    known = [value for value in values if value is not None]
    return (f"{statistics.median(known):.1f}", f"{max(known):.1f}") if known else ("-", "-")


def totals(outcomes: Sequence[Outcome], *, wall_s: float) -> str:
    """The sums, in one line."""
    count = {
        verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("failed", "missed", "skipped")
    }
    starts = [outcome.start_s for outcome in outcomes if outcome.start_s is not None]
    start = f"; a case starts in {statistics.median(starts):.2f} s (median)" if starts else ""
    rate = 3600 * len(outcomes) / max(wall_s, 1e-9)
    return (
        f"{len(outcomes)} cases, {count['failed']} failed, {count['missed']} missed, "
        f"{count['skipped']} skipped, in {wall_s / 60:.1f} min ({rate:.0f} an hour){start}"
    )


def to_json(outcomes: Sequence[Outcome], *, seed: int, wall_s: float) -> bytes:
    """Everything, for other programs."""
    document = {"seed": seed, "wall_s": wall_s, "outcomes": outcomes}
    return msgspec.json.format(msgspec.json.encode(document), indent=1)


__all__ = ["Recovery", "line", "repeat", "table", "to_json", "totals"]
