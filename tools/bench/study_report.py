"""What the staleness study says: a table for the README, sentences, plots.

Owns the verdicts. It reads results and runs nothing; a method that does not help is reported as such.

A method *holds* at a lag when its median final accuracy over seeds is at most MARGIN below that of lag 0
without correction. It *helps* when it is more than MARGIN above no correction at the same lag.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tools.bench.study_plan import METHODS, MIN_SHARE, NONE, NUM_FINAL, NUM_STEPS_PER_ROLLOUT, ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN = 0.05
"""Difference in held-out accuracy that counts."""
COLORS = dict(zip(METHODS, ("#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e"), strict=True))
DPI = 130


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One lag under one method, over its seeds that count."""

    lag: int
    method: str
    realised: float
    """Mean realised lag of all its arms, counted or not."""
    finals: list[float]
    """Final accuracy of each seed that counts."""
    mean: float | None
    """Median over seeds of the mean over all evaluations."""
    acted: float | None
    """Share of tokens or sequences the method changed; None where it does not say."""
    broken: int
    """Seeds whose training ended in NaN or Inf."""
    uncounted: int
    """Seeds whose realised lag fell short."""

    @property
    def final(self) -> float | None:
        """Median over seeds; None when no seed counts."""
        return statistics.median(self.finals) if self.finals else None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a row says."""

    holds: bool | None
    """None: nothing to compare, or nothing that counts."""
    every_seed: bool
    """Whether each seed alone says the same."""
    gain: float | None
    """Final accuracy above no correction at the same lag."""

    @property
    def words(self) -> str:
        """For the table's cell."""
        if self.holds is None:
            return "-"
        word = "holds" if self.holds else "does not hold"
        return word if self.every_seed else f"{word} (not in every seed)"


def make_rows(results: Iterable[ArmResult]) -> list[Row]:
    """Rows by lag, then in the order of METHODS."""
    groups: dict[tuple[int, str], list[ArmResult]] = {}
    for result in results:
        groups.setdefault((result.arm.lag, result.arm.method), []).append(result)
    order = list(METHODS)
    keys = sorted(groups, key=lambda key: (key[0], order.index(key[1])))
    return [_row(*key, groups[key]) for key in keys]


def _row(lag: int, method: str, results: Sequence[ArmResult]) -> Row:
    counted = [result for result in results if result.counts]
    name = METHODS[method].acted
    shares = [result.metrics[name] for result in counted if name in result.metrics]
    return Row(
        lag=lag,
        method=method,
        realised=statistics.fmean(result.lag for result in results),
        finals=[result.final for result in counted],
        mean=statistics.median(result.mean for result in counted) if counted else None,
        acted=statistics.fmean(shares) if shares else None,
        broken=sum(result.failure is not None for result in counted),
        uncounted=len(results) - len(counted),
    )


def verdicts(rows: Sequence[Row]) -> dict[tuple[int, str], Verdict]:
    """By (lag, method)."""
    finals = {(row.lag, row.method): row.final for row in rows}
    base = finals.get((0, NONE))
    return {(row.lag, row.method): _verdict(row, base, finals.get((row.lag, NONE))) for row in rows}


def _verdict(row: Row, base: float | None, uncorrected: float | None) -> Verdict:
    gain = None if row.final is None or uncorrected is None else row.final - uncorrected
    if row.final is None or base is None:
        return Verdict(holds=None, every_seed=True, gain=gain)
    holds = _reaches(row.final, base)
    same = all(_reaches(final, base) == holds for final in row.finals)
    return Verdict(holds=holds, every_seed=same, gain=gain)


def _reaches(final: float, base: float) -> bool:
    # Accuracies are sums of 1/256: an exact difference must not fail by a rounding of floats.
    return final >= base - MARGIN - 1e-9


def sentences(rows: Sequence[Row]) -> list[str]:
    """What stands and what does not, a few sentences for each lag above 0."""
    known = verdicts(rows)
    base = next((row.final for row in rows if (row.lag, row.method) == (0, NONE)), None)
    if base is None:
        return ["No verdict: the arms of lag 0 without correction are what the others are compared with."]
    least = f"{base - MARGIN:.3f}"
    said = [
        f"Lag 0 without correction ends at {base:.3f}; a method holds when its median is at least {least}."
    ]
    for lag in sorted({row.lag for row in rows} - {0}):
        said += _about(lag, [row for row in rows if row.lag == lag], known)
    return said


def _about(lag: int, rows: Sequence[Row], known: Mapping[tuple[int, str], Verdict]) -> list[str]:
    def names(*, holds: bool | None) -> str:
        chosen = [row for row in rows if known[lag, row.method].holds is holds]
        return ", ".join(_name(row, known[lag, row.method]) for row in chosen) or "nothing"

    said = [
        f"At lag {lag}, holds: {names(holds=True)}.",
        f"At lag {lag}, does not hold: {names(holds=False)}.",
    ]
    if any(known[lag, row.method].holds is None for row in rows):
        said.append(
            f"At lag {lag}, without a verdict, for want of a seed with {MIN_SHARE:.0%} of the lag: "
            f"{names(holds=None)}."
        )
    plain = known.get((lag, NONE))
    if plain is not None and plain.holds:
        said.append(f"At lag {lag} no correction is needed: none holds, and there is nothing to mend.")
    for row in rows:
        gain = known[lag, row.method].gain
        if row.method == NONE or gain is None:
            continue
        if gain < -MARGIN:
            said.append(f"At lag {lag}, {row.method} is worse than no correction, by {-gain:.3f}.")
        elif gain <= MARGIN and not (plain is not None and plain.holds):
            said.append(
                f"At lag {lag}, {row.method} does not help: {gain:+.3f} against no correction, "
                f"which is within {MARGIN}."
            )
        elif gain > MARGIN:
            said.append(f"At lag {lag}, {row.method} helps: {gain:+.3f} against no correction.")
    return said


def _name(row: Row, verdict: Verdict) -> str:
    if row.final is None:
        return row.method
    return f"{row.method} ({row.final:.3f}{'' if verdict.every_seed else ', not in every seed'})"


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table."""
    known = verdicts(rows)
    head = ["lag", "method", "realised lag", "final accuracy", "mean over the run", "acted on", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|--:|---|--:|--:|--:|--:|---|"]
    for row in rows:
        cells = [
            str(row.lag),
            row.method,
            f"{row.realised:.2f}",
            _spread(row),
            "-" if row.mean is None else f"{row.mean:.3f}",
            "-" if row.acted is None else f"{row.acted:.2%}",
            known[row.lag, row.method].words,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(row: Row) -> str:
    if row.final is None:
        return f"not counted ({row.uncounted} short of {MIN_SHARE:.0%})"
    text = f"{row.final:.3f}"
    if len(row.finals) > 1:
        text += f" ({min(row.finals):.3f}-{max(row.finals):.3f})"
    if row.broken:
        text += f", {row.broken} broke (NaN)"
    return text + (f", {row.uncounted} not counted" if row.uncounted else "")


def document(results: Sequence[ArmResult], *, command: str, machine: Mapping[str, Any]) -> list[str]:
    """The whole report as Markdown: settings, table, legend, sentences, cost."""
    rows = make_rows(results)
    used = dict.fromkeys(row.method for row in rows)
    return [
        f"`{command}`",
        "",
        _setting(results),
        "",
        *table(rows),
        "",
        *(f"- {name}: {METHODS[name].says}." for name in used),
        "",
        *(f"- {said}" for said in sentences(rows)),
        "",
        _cost(results, machine),
    ]


def _setting(results: Sequence[ArmResult]) -> str:
    settings, num_seeds = results[0].settings, len({result.arm.seed for result in results})
    return (
        f"{settings.steps} rollout steps of {settings.prompts} prompts x {settings.answers} answers, "
        f"{NUM_STEPS_PER_ROLLOUT} optimizer steps each, Adam at a constant {settings.lr:g}; greedy accuracy "
        f"on the held-out prompts every {settings.eval_every} steps. Final accuracy is the mean of the last "
        f"{NUM_FINAL}: median over {num_seeds} seeds (least-greatest). The lag is imposed exactly; the "
        "first steps have less, and an arm counts when its mean over tokens is at least "
        f"{MIN_SHARE:.0%} of nominal."
    )


def _cost(results: Sequence[ArmResult], machine: Mapping[str, Any]) -> str:
    cpu_s = sum(result.cpu_s for result in results)
    return (
        f"{len(results)} arms, {cpu_s:,.0f} core-seconds ({cpu_s / len(results):.0f} an arm); commit "
        f"{', '.join(sorted({result.commit for result in results}))}; {machine.get('cpu')}, "
        f"{machine.get('cores')} cores, torch {machine.get('torch')}."
    )


def plot(results: Sequence[ArmResult], directory: Path) -> list[Path]:
    """accuracy.png: a panel for each lag; final.png: final accuracy against the lag. Returns the files."""
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    counted = [result for result in results if result.counts]
    lags = sorted({result.arm.lag for result in counted})
    if not lags:
        return []
    figure = Figure(figsize=(4 * len(lags), 3.6), layout="constrained")
    panels = figure.subplots(1, len(lags), sharey=True, squeeze=False)[0]
    for panel, lag in zip(panels, lags, strict=True):
        _curves(panel, lag, counted)
    panels[0].set_ylabel("greedy held-out accuracy")
    return [
        _saved(figure, directory / "accuracy.png"),
        _saved(_final_figure(counted, lags), directory / "final.png"),
    ]


def _curves(panel: Axes, lag: int, results: Sequence[ArmResult]) -> None:
    base = next((row.final for row in make_rows(results) if (row.lag, row.method) == (0, NONE)), None)
    if base is not None:
        panel.axhline(base, color="#999999", linestyle=":", linewidth=1)
    for method in METHODS:
        curves = [result.curve for result in results if (result.arm.lag, result.arm.method) == (lag, method)]
        # An arm that broke is shorter; the line goes as far as all seeds do.
        points = list(zip(*curves, strict=False))
        if not points:
            continue
        steps = [at[0].step for at in points]
        values = [[point.accuracy for point in at] for at in points]
        middle = [statistics.median(at) for at in values]
        panel.plot(steps, middle, label=method, color=COLORS[method], linewidth=1.5)
        low, high = [min(at) for at in values], [max(at) for at in values]
        panel.fill_between(steps, low, high, color=COLORS[method], alpha=0.15, linewidth=0)
    panel.set_title(f"lag {lag}")
    panel.set_xlabel("rollout steps")
    panel.set_ylim(0, 1)
    panel.legend(loc="lower right", fontsize=8)


def _final_figure(results: Sequence[ArmResult], lags: Sequence[int]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    panel = figure.subplots()
    rows = make_rows(results)
    places = {lag: place for place, lag in enumerate(lags)}
    methods = list(dict.fromkeys(row.method for row in rows))
    for index, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        # Side by side, so that whiskers can be told apart.
        x = [places[row.lag] + 0.06 * (index - (len(methods) - 1) / 2) for row in own]
        y = [statistics.median(row.finals) for row in own]
        below = [at - min(row.finals) for at, row in zip(y, own, strict=True)]
        above = [max(row.finals) - at for at, row in zip(y, own, strict=True)]
        panel.errorbar(
            x, y, yerr=[below, above], label=method, color=COLORS[method], marker="o", markersize=4, capsize=3
        )
    panel.set_xticks(range(len(lags)), [str(lag) for lag in lags])
    panel.set_xlabel("lag in rollout steps")
    panel.set_ylabel("final held-out accuracy")
    panel.set_ylim(0, 1)
    panel.legend(fontsize=8)
    return figure


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
