"""The live view: `Frame` draws a `RunView` once, `Top` keeps it on a terminal, or prints lines elsewhere.

Never runs a thread or a timer of its own: the supervisor calls `apply` with each update and `refresh` on its
own beat. A frame fits the width and height it is given, from 60 columns and 16 rows up; what does not fit is
summed up, never scrolled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from asyncrl.obs.catalogue import STATES
from asyncrl.obs.diagnosis import NOTICEABLE
from asyncrl.obs.lines import eval_text, step_text, waiting_text
from asyncrl.obs.text import (
    MISSING,
    THICK,
    THIN,
    ascii_of,
    decimal,
    duration,
    percent,
    printable,
    short,
    sparkline,
)
from asyncrl.obs.view import EvalUpdate, Member, NoteUpdate, PhaseUpdate, RunView, StepUpdate, Update

REFRESH_S = 0.25
"""A frame is drawn at most this often."""
QUIET_S = 30.0
"""Without a terminal, a line says what is waited for after this long without one."""
FIXED_ROWS = 15
"""Rows of a frame besides the members."""
LABEL = 11
"""Columns of a label in the upper part."""
STUCK_S = 5.0
"""A wait that has run for this long is shown by its length instead of its share."""
WIDE = 100
"""From this width on the member table shows every column."""

_STATES = {
    "running": "green",
    "loading": "cyan",
    "stale": "cyan",
    "draining": "yellow",
    "suspect": "bold yellow",
    "dead": "bold red",
    "restarting": "bold red",
}


class Frame:
    """One picture of a run; a rich renderable."""

    def __init__(self, view: RunView, *, now: float) -> None:
        self._view = view
        self._now = now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.height
        parts = Group(*self._parts(options.max_width, height))
        yield from drawable(console.render(parts, options.update(height=None)), options)

    def _parts(self, width: int, height: int) -> Iterator[RenderableType]:
        view = self._view
        yield _head(view, self._now)
        yield _progress(view, width)
        yield Text()
        yield _numbers(view, width)
        yield Text()
        yield _queue(view, width)
        yield _tickets(view, min(width - 36, 40))
        yield Text()
        yield _members(view.present, rows=max(height - FIXED_ROWS, 2), wide=width >= WIDE)
        yield Text(THIN * width, style="dim")
        yield _sentence(view.bottleneck, style="bold")
        yield _sentence(view.note, style="dim")


def drawable(segments: Iterable[Segment], options: ConsoleOptions) -> Iterator[Segment]:
    """The same segments for this console: one that cannot encode a character must not end the run."""
    for segment in segments:
        text = ascii_of(segment.text) if options.ascii_only else segment.text
        yield Segment(text, segment.style, segment.control)


class Top:
    """Shows a run on a console for as long as the `with` block lasts."""

    def __init__(self, view: RunView, *, console: Console) -> None:
        self.view = view
        self._console = console
        self._drawn_at: float | None = None
        self._said_at: float | None = None
        self._live = (
            Live(console=console, auto_refresh=False, vertical_overflow="crop")
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def apply(self, update: Update, *, now: float) -> None:
        """Take an update into the view and show what it changes."""
        self.view.apply(update, now=now)
        if self._live is None:
            self._say(self._line(update, now), now)
        else:
            self.refresh(now=now)

    def refresh(self, *, now: float, force: bool = False) -> None:
        """Draw again if the last frame is old enough; call it a few times a second, forced at the end."""
        if self._live is None:
            self._say(self._overdue(now), now)
        elif force or self._drawn_at is None or now - self._drawn_at >= REFRESH_S:
            self._drawn_at = now
            self._live.update(Frame(self.view, now=now), refresh=True)

    def _line(self, update: Update, now: float) -> str:
        match update:
            case StepUpdate():
                return step_text(self.view, now=now)
            case EvalUpdate():
                return eval_text(update)
            case NoteUpdate():
                return update.text
            case PhaseUpdate():
                return f"phase {update.phase}"
            case _:
                return ""

    def _overdue(self, now: float) -> str:
        if self._said_at is None:
            self._said_at = now
        return waiting_text(self.view, now=now) if now - self._said_at >= QUIET_S else ""

    def _say(self, line: str, now: float) -> None:
        if line:
            self._said_at = now
            text = printable(line)
            if self._console.options.ascii_only:
                text = ascii_of(text)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _head(view: RunView, now: float) -> Table:
    left = Text.assemble(("asyncrl ", "bold cyan"), (view.plan.run, "bold"))
    eta = view.eta_s(now=now)
    rest = f", about {duration(eta)} left" if eta else ""
    right = Text(f"{view.phase}, {duration(max(now - view.began, 1.0))}{rest}", style="dim")
    return _both_sides(left, right)


def _progress(view: RunView, width: int) -> Table:
    total = view.plan.total_steps
    label = Text(f"step {view.step}" + (f" of {total}" if total is not None else ""))
    bar = _bar(view.step, total or 0, width - len(label) - 2)
    return _both_sides(bar, label)


def _numbers(view: RunView, width: int) -> Table:
    last = view.last
    grid = Table.grid(expand=True, padding=(0, 1))
    for ratio in (3, 2):
        grid.add_column(width=LABEL, no_wrap=True, style="dim")
        grid.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
    room = (width - 2 * LABEL) * 3 // 5 - 10
    line = sparkline(view.rewards, width=max(room, 4))
    reward = Text.assemble((decimal(last.reward if last else None), "bold"), "  ", (line, "cyan"))
    grid.add_row("reward", reward, "generated", _rate(view.generated_per_s))
    grid.add_row("accuracy", _accuracy(view), "trained", _rate(view.trained_per_s))
    grid.add_row("staleness", _staleness(view), "response", _response(view))
    return grid


def _rate(tokens_per_s: float | None) -> str:
    return MISSING if tokens_per_s is None else f"{short(tokens_per_s)} tok/s"


def _accuracy(view: RunView) -> Text:
    first, newest = view.first_accuracy, view.accuracy
    if first is None or newest is None:
        return Text(MISSING)
    if first[0] == newest[0]:
        return Text.assemble((decimal(newest[1]), "bold"), (f"  at version {newest[0]}", "dim"))
    start = (f"from {decimal(first[1])} ", "dim")
    return Text.assemble((decimal(newest[1]), "bold"), "  ", start, (f"at version {newest[0]}", "dim"))


def _staleness(view: RunView) -> Text:
    if view.last is None:
        return Text(MISSING)
    limit = view.plan.max_staleness
    bound = f", bound {limit}" if limit is not None else ""
    mean = decimal(view.last.staleness_mean, digits=1)
    return Text.assemble((mean, "bold"), (f"  max {view.last.staleness_max:.0f}{bound}", "dim"))


def _response(view: RunView) -> str:
    if view.last is None or view.last.response_len is None:
        return MISSING
    cut = view.last.truncated_ratio
    return f"{short(view.last.response_len)} tok" + (f", {percent(cut)} cut" if cut is not None else "")


def _queue(view: RunView, width: int) -> Table:
    """States side by side with their counts below, so that nothing moves when a number grows."""
    states = [state for state in STATES if state != "filtering" or view.queue.counts.get(state)]
    for state in ("filtering", "fresh", "scored", "batched"):
        if sum(len(name) + 1 for name in states) > width - LABEL - 1 and state in states:
            states.remove(state)
    gap = 2 if sum(len(name) + 2 for name in states) <= width - LABEL - 1 else 1
    grid = Table.grid(padding=(0, gap))
    grid.add_column(width=LABEL - gap + 1, no_wrap=True, style="dim")
    for state in states:
        grid.add_column(width=len(state), justify="right", no_wrap=True)
    grid.add_row("samples", *(Text(state, style="dim") for state in states))
    grid.add_row("", *(short(view.queue.counts.get(state, 0)) for state in states))
    return grid


def _tickets(view: RunView, width: int) -> Text:
    used, total = view.queue.tickets_used, view.queue.tickets_total
    line = Text(f"{'tickets':<{LABEL + 1}}", style="dim", no_wrap=True, overflow="ellipsis")
    line.append_text(_bar(used, total, width))
    return line.append(f"  {used} of {total} used" if total else "", style="none")


def _members(members: list[Member], *, rows: int, wide: bool) -> Group:
    shown, hidden = _fit(members, rows - 1)
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("member", min_width=12, no_wrap=True, overflow="ellipsis")
    table.add_column("state", min_width=8, no_wrap=True)
    for name in ("version", " busy", "tok/s", *(("tokens", "push pause") if wide else ())):
        table.add_column(name, min_width=len(name), justify="right", no_wrap=True)
    table.add_column("waits for", ratio=1, no_wrap=True, overflow="ellipsis")
    for member in shown:
        table.add_row(*_cells(member, wide=wide))
    more = Text(_more(hidden), style="dim", no_wrap=True, overflow="ellipsis")
    return Group(table, more) if hidden else Group(table)


def _cells(member: Member, *, wide: bool) -> Iterator[Text | str]:
    report = member.report
    generates = report.role == "generator" and report.state != "dead"
    yield Text(printable(report.name))
    yield Text(printable(report.word), style=_STATES.get(report.word, "none"))
    yield "" if report.version is None else str(report.version)
    yield percent(member.busy) if report.state != "dead" else ""
    yield short(member.tokens_per_s) if generates else ""
    if wide:
        yield short(report.generated_tokens) if generates else ""
        yield duration(report.push_pause_s) if generates else ""
    yield _waits(member)


def _waits(member: Member) -> Text:
    report = member.report
    if report.state == "dead":
        return Text()
    if report.waits_for and report.waits_for_s >= STUCK_S:
        return Text(f"{report.waits_for}, for {duration(report.waits_for_s)} now", style="yellow")
    name, share = max(member.waits.items(), key=lambda pair: pair[1], default=("", 0.0))
    return Text(f"{name} {percent(share)}" if share >= NOTICEABLE else "")


def _fit(members: list[Member], rows: int) -> tuple[list[Member], list[Member]]:
    """Those that get a row, in order, and those that are summed up.

    Whoever does not run comes first, then the first of every role, then the second of every role.
    """
    if len(members) <= rows:
        return members, []
    seen: Counter[str] = Counter()
    ranked = []
    for position, member in enumerate(members):
        ranked.append((member.report.word == "running", seen[member.report.role], position))
        seen[member.report.role] += 1
    kept = {position for _, _, position in sorted(ranked)[: rows - 1]}
    shown = [member for position, member in enumerate(members) if position in kept]
    return shown, [member for position, member in enumerate(members) if position not in kept]


def _more(hidden: list[Member]) -> str:
    counts = Counter((member.report.role, member.report.word) for member in hidden)
    parts = [f"{count} {role} {state}" for (role, state), count in counts.items()]
    return f"and {len(hidden)} more: {', '.join(parts)}"


def _bar(done: float, total: float, width: int) -> Text:
    share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
    filled = round(share * max(width, 1))
    return Text.assemble((THICK * filled, "cyan"), (THIN * (max(width, 1) - filled), "dim"))


def _sentence(text: str, *, style: str) -> Text:
    return Text(printable(text.replace("\n", " ")), style=style, no_wrap=True, overflow="ellipsis")


def _both_sides(left: Text, right: Text) -> Table:
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(left, right)
    return grid
