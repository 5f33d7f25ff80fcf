"""The last thing a run prints: what came out, whether the books close, where it lies, what to try next.

A pure function of `RunSummary`; every number comes from the run's records. A number nobody has is "-".
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from asyncrl.errors import ExitCode
from asyncrl.obs.text import MISSING, THIN, decimal, duration, percent, printable, short
from asyncrl.obs.top import drawable

_LABEL = 11
"""Columns of a label, as in the live view."""
_RESULT = {
    ExitCode.FINISHED: ("finished", "bold green"),
    ExitCode.DRAINED: ("drained, can be resumed", "bold yellow"),
    ExitCode.FAILED: ("failed", "bold red"),
    ExitCode.CONFIG: ("not started", "bold red"),
}


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. None is a number that nobody took."""

    run: str
    run_dir: str
    exit_code: ExitCode
    detail: str = ""
    """Why it ended as it did, where that needs a word."""
    steps: int
    """Rollout steps trained."""
    total_steps: int | None = None
    wall_s: float
    num_samples: int
    """Samples trained."""
    generated_tokens: int
    """Response tokens the buffer received."""
    trained_tokens: int
    """Response tokens trained."""
    fleet: str = ""
    """Processes that died and were started again, in words."""
    lengths: str = ""
    """Lengths generated and trained, in words."""
    tokens_dropped: dict[str, int] = {}
    """Response tokens thrown away, by reason."""
    deaths: str = ""
    """Workers that were lost and what that cost, in words."""
    num_failed: int = 0
    """Groups that failed for good."""
    reward_first: float | None = None
    """Mean raw reward of the first batch."""
    reward_last: float | None = None
    """Mean raw reward of the last batch."""
    accuracy_before: float | None = None
    """Held-out accuracy of version 0."""
    accuracy_after: float | None = None
    """Held-out accuracy of the last version, sampled by the run's own engine."""
    accuracy_exported: float | None = None
    """The same, taken by transformers from the exported checkpoint."""
    export_dir: str = ""
    """The exported Hugging Face directory."""
    overlap: float | None = None
    """Share of steps in which generation and training ran at once."""
    achieved_over_bound: float | None = None
    """Step time over the slower of generation and training alone."""
    staleness_mean: float | None = None
    """Rollout steps, over trained tokens."""
    staleness_max: float | None = None
    max_staleness: int | None = None
    """The bound; None is unbounded."""
    audit_closes: bool | None = None
    """None: the audit did not run."""
    audit: str = ""
    """The audit's verdict in a few words."""

    @property
    def result(self) -> str:
        """The result in words."""
        return _RESULT[self.exit_code][0]


def next_steps(summary: RunSummary) -> list[tuple[str, str]]:
    """(what for, command): what to try next, the most useful first."""
    run_dir = shlex.quote(summary.run_dir)
    if summary.exit_code is ExitCode.DRAINED:
        return [("go on", f"asyncrl launch --resume {run_dir}")]
    steps = [("check the books", f"asyncrl audit {run_dir}")]
    trained_all = summary.total_steps is not None and summary.steps >= summary.total_steps
    if summary.exit_code is ExitCode.FINISHED or trained_all:
        steps.append(("train it again", f"asyncrl replay {run_dir}"))
        steps.append(("look inside", f"asyncrl status {run_dir}"))
    else:
        steps.insert(0, ("go on", f"asyncrl launch --resume {run_dir}"))
    if summary.num_failed:
        steps.append(("what failed", f"asyncrl quarantine ls {run_dir}"))
    return steps


class SummaryTable:
    """A `RunSummary` as a rich renderable."""

    def __init__(self, summary: RunSummary) -> None:
        self._summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = Group(*self._parts(options.max_width))
        yield from drawable(console.render(parts, options), options)

    def _parts(self, width: int) -> Iterator[RenderableType]:
        word, style = _RESULT[self._summary.exit_code]
        title = Text.assemble(("asyncrl ", "bold cyan"), (self._summary.run, "bold"), "  ", (word, style))
        yield title.append(" " + THIN * max(width - title.cell_len - 1, 0), style="dim")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=_LABEL, style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in _rows(self._summary):
            grid.add_row(label, value)
        yield Text()
        yield grid
        yield Text()
        yield _commands(self._summary)
        yield Text(THIN * width, style="dim")


def _rows(summary: RunSummary) -> list[tuple[str, Text]]:
    rows = [
        ("reason", Text(printable(summary.detail))),
        ("steps", _steps(summary)),
        ("samples", Text(f"{summary.num_samples:,} trained")),
        ("tokens", _tokens(summary)),
        ("dropped", _dropped(summary)),
        ("quarantine", _quarantine(summary)),
        ("deaths", Text(printable(summary.deaths))),
        ("lengths", Text(summary.lengths)),
        ("fleet", Text(summary.fleet)),
        ("reward", _change(summary.reward_first, summary.reward_last)),
        ("accuracy", _change(summary.accuracy_before, summary.accuracy_after)),
        ("exported", _exported(summary)),
        ("overlap", _overlap(summary)),
        ("staleness", _staleness(summary)),
        ("audit", _audit(summary)),
        ("checkpoint", Text(summary.export_dir)),
        ("run", Text(summary.run_dir)),
    ]
    return [(label, value) for label, value in rows if value.plain]


def _steps(summary: RunSummary) -> Text:
    total = f" of {summary.total_steps}" if summary.total_steps is not None else ""
    each = f", {duration(summary.wall_s / summary.steps)} each" if summary.steps else ""
    return Text.assemble(f"{summary.steps}{total}", (f"  in {duration(summary.wall_s)}{each}", "dim"))


def _tokens(summary: RunSummary) -> Text:
    rate = summary.generated_tokens / summary.wall_s if summary.wall_s > 0 else None
    words = f"{short(summary.generated_tokens)} generated, {short(summary.trained_tokens)} trained"
    return Text.assemble(words, (f"  {short(rate)} tok/s", "dim"))


def _dropped(summary: RunSummary) -> Text:
    parts = [f"{short(tokens)} {reason}" for reason, tokens in summary.tokens_dropped.items() if tokens]
    return Text(f"{', '.join(parts)} tokens" if parts else "")


def _quarantine(summary: RunSummary) -> Text:
    failed = summary.num_failed
    return Text(f"{failed} {'group' if failed == 1 else 'groups'} failed" if failed else "", style="yellow")


def _change(before: float | None, after: float | None) -> Text:
    if before is None and after is None:
        return Text(MISSING)
    return Text.assemble((f"{decimal(before, digits=3)} to ", "dim"), (decimal(after, digits=3), "bold"))


def _exported(summary: RunSummary) -> Text:
    if summary.accuracy_exported is None:
        return Text(MISSING)
    value = decimal(summary.accuracy_exported, digits=3)
    points = ""
    if summary.accuracy_after is not None:
        points = f", {abs(summary.accuracy_exported - summary.accuracy_after) * 100:.1f} points apart"
    return Text.assemble((value, "bold"), (f"  by transformers from the checkpoint{points}", "dim"))


def _overlap(summary: RunSummary) -> Text:
    if summary.overlap is None:
        return Text(MISSING)
    bound = summary.achieved_over_bound
    text = f"  step time {decimal(bound)} x the slower side" if bound is not None else ""
    return Text.assemble(f"{percent(summary.overlap)} of steps", (text, "dim"))


def _staleness(summary: RunSummary) -> Text:
    if summary.staleness_mean is None:
        return Text(MISSING)
    bound = "unbounded" if summary.max_staleness is None else f"bound {summary.max_staleness}"
    largest = decimal(summary.staleness_max, digits=0)
    mean = decimal(summary.staleness_mean)
    return Text.assemble(f"mean {mean}, max {largest}", (f"  {bound}, in rollout steps", "dim"))


def _audit(summary: RunSummary) -> Text:
    if summary.audit_closes is None:
        return Text(summary.audit or "not run", style="yellow")
    word, style = ("closes", "green") if summary.audit_closes else ("DOES NOT CLOSE", "bold red")
    return Text.assemble((word, style), (f"  {summary.audit}" if summary.audit else "", "dim"))


def _commands(summary: RunSummary) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=_LABEL, style="dim", no_wrap=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for i, (purpose, command) in enumerate(next_steps(summary)):
        grid.add_row("" if i else "next", purpose, Text(command, style="cyan"))
    return grid
