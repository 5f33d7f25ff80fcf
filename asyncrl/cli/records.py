"""`asyncrl audit`, `story` and `replay`: a run's records, told to people. Owns words, no judgement."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asyncrl.buffer import audit as auditor
from asyncrl.buffer.audit_story import story as tell
from asyncrl.buffer.store import BODIES
from asyncrl.errors import ConfigError, ExitCode
from asyncrl.run.replay import Comparison, Order, Outcome, Replay, compare

DEEP_BYTES = 1 << 30
"""Bodies up to this size are read and compared with their rows, too; that takes a second or two."""


def audit(run: Path, *, as_json: bool) -> int:
    """Print the audit of a run; returns 1 when its ledger does not close.

    Raises:
        DataError: there is no such run.
        StorageError: its ledger cannot be read.
    """
    size = sum(path.stat().st_size for path in (run / BODIES).glob("bodies-*.bin"))
    report = auditor.audit(run, deep=size <= DEEP_BYTES)
    text = report.to_json().decode() if as_json else report.text()
    _console().print(text, markup=False, highlight=False)
    return ExitCode.FINISHED if report.closes else ExitCode.FAILED


def story(run: Path, uid: str) -> None:
    """Print what happened to GROUP or GROUP.SAMPLE.

    Raises:
        ConfigError: `uid` is neither.
        DataError: there is no such run, group or sample.
    """
    group, sample = group_and_sample(uid, command="story")
    for line in tell(run, group, sample):
        _console().print(line, markup=False, highlight=False)


def group_and_sample(uid: str, *, command: str) -> tuple[int, int | None]:
    """The numbers in GROUP or GROUP.SAMPLE. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?", uid)
    if match is None:
        raise ConfigError(
            f"{command}: {uid!r} names no group; write GROUP or GROUP.SAMPLE, such as 17 or 17.3"
        )
    group, sample = match.groups()
    return int(group), None if sample is None else int(sample)


def replay(
    run: Path, *, overrides: Sequence[str], num_threads: int | None, from_step: int | None = None,
    order: str = Order.RECORDED, order_seed: int = 0, rescore: str | None = None, save: bool = False,
) -> int:  # fmt: skip
    """Train again on what a run recorded; returns 1 at the first weights that differ.

    Raises:
        DataError: there is no such run, or nothing to replay in it.
        ConfigError: an override is wrong, there is no such step, or the new reward cannot be loaded.
        RewardError: the new reward failed on a sample.
        StorageError: a recorded body was altered.
    """
    console = _console()
    job = Replay(
        run, overrides=overrides, num_threads=num_threads, from_step=from_step, order=Order(order),
        order_seed=order_seed, rescore=rescore,
    )  # fmt: skip
    try:
        _say(console, f"replay of {run}, {job.start()}")
        outcomes = _train(job, console)
        exact = not (job.counterfactual or job.imported)
        different = next((o for o in outcomes if not o.equal), None) if exact else None
        if different is not None:
            _say(console, difference(different))
            return ExitCode.FAILED
        _conclude(job, outcomes, console)
        if save:
            _say(console, f"checkpoint: {job.save()}")
        _say(console, f"metrics of the replay: {job.directory / 'metrics.jsonl'}")
        return ExitCode.FINISHED
    finally:
        job.close()


def _conclude(job: Replay, outcomes: Sequence[Outcome], console: Console) -> None:
    """What came of a replay that went to its end."""
    last = outcomes[-1].replayed
    if job.counterfactual:
        rows = compare(job.recorded_metrics(), outcomes)
        if rows:
            console.print(table(rows), markup=False)
        _say(console, _counted(job, outcomes))
    elif job.imported:
        _say(console, f"{len(outcomes)} steps trained; the weights are {last}. This run was {job.imported}")
    else:
        _say(console, f"all {len(outcomes)} steps end in the recorded weights, to the bit: {last}")


def _counted(job: Replay, outcomes: Sequence[Outcome]) -> str:
    """The sentence under the table of a counterfactual."""
    words = f"{len(outcomes)} steps with {', '.join(job.changes)}"
    if job.imported:
        return f"{words}; the weights are {outcomes[-1].replayed}"
    equal = sum(outcome.equal for outcome in outcomes)
    words = f"{words}; {equal} of them end in the recorded weights"
    if job.approach:
        equal = sum(outcome.equal for outcome in job.approach)
        words += f"; of {len(job.approach)} steps before them, as recorded, {equal} do"
    return words


def difference(outcome: Outcome) -> str:
    """The sentence about the first weights that differ."""
    return (
        f"batch {outcome.batch}: the weights differ from the recorded run. recorded digest"
        f" {outcome.recorded}, "
        f"replayed {outcome.replayed}. The batch before it was equal, so a stored token, reward or log-prob"
        f" of this "
        "batch was altered, or the machine, the build of torch or the number of threads is another one "
        "(trainer.deterministic = true is needed, too)."
    )


def _train(job: Replay, console: Console) -> list[Outcome]:
    """Train to the end, or to the first difference that matters."""
    total = len(job.lineage)
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("replaying", total=total, completed=job.first)
        for outcome in job.steps():
            outcomes.append(outcome)
            line = f"step {outcome.batch + 1}/{total} {_came_out(outcome)}"
            progress.update(task, advance=1, description=line)
            if not console.is_terminal:
                _say(console, line)
            if not (outcome.equal or job.counterfactual or job.imported):
                break
    return outcomes


def _came_out(outcome: Outcome) -> str:
    """A step's weights, and its rewards where they are new, in words."""
    words = f"digest {'equal' if outcome.equal else 'different'}"
    if not outcome.recorded:
        words = f"digest {outcome.replayed}"
    if outcome.rewards is None:
        return words
    old, new, changed, samples = outcome.rewards
    return f"{words}, reward {old.mean:.4g} -> {new.mean:.4g} ({changed} of {samples} samples changed)"


def table(rows: Sequence[Comparison]) -> str:
    """Metrics that differ, a line each, and how many do not."""
    different = [row for row in rows if row[1::2] != row[2::2]]
    width = max((len(row.name) for row in different), default=0)
    heads = ("recorded mean", "replayed mean", "recorded last", "replayed last")
    lines = [" " * width + "".join(head.rjust(16) for head in heads)]
    lines += [row.name.ljust(width) + "".join(f"{value:16.6g}" for value in row[1:]) for row in different]
    return "\n".join([*lines, f"{len(rows) - len(different)} other metrics are the same in both"])


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
