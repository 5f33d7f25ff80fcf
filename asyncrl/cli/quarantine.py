"""`asyncrl quarantine ls | show | retry | try`: names, options, help, and words. Owns no judgement.

`run.quarantine` does the work; it is imported when a command runs.
"""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asyncrl.errors import AsyncrlError, ConfigError, ExitCode

if TYPE_CHECKING:
    from rich.console import Console

    from asyncrl.messages.sample import Score
    from asyncrl.rewards.base import RewardFailure, Verdict
    from asyncrl.run.quarantine import Failed

MAX_ERROR = 100
"""Characters of an error in a list."""

app = typer.Typer(
    help="Groups that failed for good: why, how to see it fail here, how to try them again.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Uid = Annotated[str, typer.Argument(metavar="GROUP[.SAMPLE]", help="A group, or one sample of it.")]


@app.command("ls")
def list_(run: Run, *, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the groups that failed for good, and what became of them."""
    import msgspec
    from rich.table import Table

    from asyncrl.buffer.records import Records
    from asyncrl.run import quarantine

    with Records(run) as records:
        found = quarantine.failed(records)
    if as_json:
        rows = [quarantine.as_json(one) for one in found]
        _console().out(msgspec.json.format(msgspec.json.encode(rows), indent=1).decode(), highlight=False)
        return
    if not found:
        _console().print(f"{run}: no group has failed", markup=False)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("failed", "lane", "at", "attempts", "tokens", "again", "error"):
        table.add_column(column, no_wrap=True)
    for one in found:
        error = one.error if len(one.error) <= MAX_ERROR else one.error[: MAX_ERROR - 3] + "..."
        table.add_row(
            one.uid, f"{one.row.lane} {one.row.dataset}".strip(), str(one.stage or ""),
            str(one.attempts or ""), str(one.row.num_tokens), _again(one), " ".join(error.split()),
        )  # fmt: skip
    _console().print(table)


def _again(one: Failed) -> str:
    if one.tried_as:
        return f"as {', '.join(map(str, one.tried_as))}"
    return "asked for" if one.pending else ""


@app.command()
def show(run: Run, uid: Uid) -> None:
    """Print why a group failed, its prompt and answers, and the command that shows the failure here."""
    from asyncrl.buffer.contents import samples
    from asyncrl.buffer.records import Records
    from asyncrl.cli.contents import described
    from asyncrl.cli.records import group_and_sample
    from asyncrl.run import quarantine

    group_id, index = group_and_sample(uid, command="quarantine show")
    console = _console()
    with Records(run) as records:
        one = quarantine.find(records, group_id)
        for line in _facts(one, run):
            console.out(line, highlight=False)
        found = [s for s in samples(records, one.row) if index in {None, s.index}]
        if not found:
            raise ConfigError(f"{run}: group {group_id} has no sample {index}; it has {one.row.num_samples}")
        console.out("", highlight=False)
        for line in described(one.row, found):
            console.out(line, highlight=False)


def _facts(one: Failed, run: Path) -> list[str]:
    where = shlex.quote(str(run))
    blamed = "" if one.sample < 0 else f" of sample {one.sample}"
    tries = {0: "", 1: ", 1 attempt"}.get(one.attempts, f", {one.attempts} attempts")
    lines = [f"group {one.row.group_id} failed at: {one.stage or 'unknown'}{blamed}{tries}"]
    lines += [f"error: {one.error}"]
    if _again(one):
        lines.append(f"tried again: {_again(one)}")
    if one.stage in {"score", "filter"}:
        lines.append(f"see it fail here: asyncrl quarantine try {where} {one.uid} --here")
    if not _again(one) and one.row.lane == "train":
        lines.append(f"try it again: asyncrl quarantine retry {where} {one.row.group_id}")
    lines.append(f"what happened when: asyncrl story {where} {one.row.group_id}")
    return lines


@app.command()
def retry(
    run: Run, groups: Annotated[list[int], typer.Argument(metavar="GROUP...", help="Groups that failed.")]
) -> None:
    """Have failed groups tried again, each as a new group with the same prompt.

    A live run takes them up with the next prompts it needs; a stopped one keeps the request for `asyncrl
    launch --resume`.
    """
    from asyncrl.run import quarantine

    live = quarantine.ask_again(run, groups)
    when = (
        "with the next prompts it needs" if live else f"on: asyncrl launch --resume {shlex.quote(str(run))}"
    )
    names = ", ".join(map(str, dict.fromkeys(groups)))
    noun = "group" if len(set(groups)) == 1 else "groups"
    _console().print(f"{noun} {names}: the run issues a new group for each {when}", markup=False)


@app.command("try")
def try_(
    run: Run,
    uid: Uid,
    *,
    here: Annotated[
        bool,
        typer.Option(
            "--here", help="In this process and without a deadline: full traceback, breakpoints work."
        ),
    ] = False,
) -> None:
    """Run the reward, or the filters, that a group failed in over its recorded answers.

    By default in a sandbox with the run's deadline, as a reward worker does; start it where the run was
    started, so that the function is found. Exits with 1 when it fails.
    """
    from asyncrl.cli.records import group_and_sample
    from asyncrl.run import quarantine

    group_id, index = group_and_sample(uid, command="quarantine try")
    try:
        outcome = quarantine.run_reward(run, group_id, index, here=here, on_output=_say)
    except AsyncrlError as error:
        if here and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        raise
    except Exception:  # noqa: BLE001 - user code, here on request: its traceback is what was asked for
        traceback.print_exc()
        raise typer.Exit(int(ExitCode.FAILED)) from None
    _say(f"{outcome.what}, {'in this process' if here else 'in a sandbox'}:")
    for name, result in outcome.results:
        _say(f"  {name}: {_result(result)}")
    if _failures(outcome.results):
        raise typer.Exit(int(ExitCode.FAILED))


def _failures(results: Sequence[tuple[str, Score | Verdict | RewardFailure]]) -> int:
    from asyncrl.rewards.base import RewardFailure

    return sum(isinstance(result, RewardFailure) for _, result in results)


def _result(result: Score | Verdict | RewardFailure) -> str:
    from asyncrl.rewards.base import RewardFailure, Verdict

    if isinstance(result, RewardFailure):
        return f"{result.kind}: {result.message}\n{result.traceback}".rstrip()
    if isinstance(result, Verdict):
        return "kept" if result.keep else f"refused: {result.reason or 'no reason given'}"
    detail = "" if result.detail is None else f", detail {result.detail}"
    return f"reward {result.reward:g}{detail}"


def _say(text: str) -> None:
    _console().out(text, highlight=False)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)
