"""`asyncrl buffer ls | show | export | import`: names, options and help.

Owns no behaviour: `contents` prints, `run.dump` and `run.dump_import` do the work; they are imported when a
command runs.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from asyncrl.errors import ConfigError

app = typer.Typer(
    help="What a run recorded: look at it, write it to a file, make a run of such a file.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Settled(StrEnum):
    """How a group ended; open: not yet."""

    TRAINED = "trained"
    FILTERED = "filtered"
    STALE = "stale"
    SURPLUS = "surplus"
    FAILED = "failed"
    EVALUATED = "evaluated"
    UNNEEDED = "unneeded"
    OPEN = "open"


class Format(StrEnum):
    """Of an exported file."""

    JSONL = "jsonl"
    PARQUET = "parquet"


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Batches = Annotated[
    str | None, typer.Option(metavar="A:B", help="Only batches A to B-1; A or B may be left out, or N alone.")
]
HowSettled = Annotated[
    list[Settled] | None, typer.Option("--settled", help="Only groups that ended so; may be repeated.")
]


@app.command("ls")
def list_(
    run: Run,
    *,
    batches: Batches = None,
    settled: HowSettled = None,
    all_groups: Annotated[bool, typer.Option("--groups", help="A line a group, not a line a batch.")] = False,
) -> None:
    """List recorded batches, or groups."""
    from asyncrl.cli import contents

    contents.list_(run, batches=span(batches), settled=_words(settled), all_groups=all_groups)


@app.command()
def show(
    run: Run,
    uid: Annotated[str, typer.Argument(metavar="GROUP[.SAMPLE]", help="A group, or one sample of it.")],
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the lines that export writes, with tokens and log-probs.")
    ] = False,
) -> None:
    """Print a group's prompt, answers and rewards."""
    from asyncrl.cli import contents

    contents.show(run, uid, as_json=as_json)


@app.command()
def export(
    run: Run,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; it must not exist.")],
    *,
    format: Annotated[  # noqa: A002 -- the option's name
        Format | None, typer.Option(help="Default: by the file's suffix, else jsonl.")
    ] = None,
    batches: Batches = None,
    settled: HowSettled = None,
) -> None:
    """Write samples to a file, one a line.

    Without --settled: the samples of the recorded batches, in the order the trainer got them; a run can be
    made of those again with `asyncrl buffer import`. parquet needs pyarrow (asyncrl[parquet]).
    """
    from asyncrl.cli import contents

    contents.export(run, file, format=format, batches=span(batches), settled=_words(settled))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines, as export writes them.")],
    *,
    topology: Annotated[Path, typer.Option(metavar="FILE", help="What to train with.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run directory to make; it must not exist.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override an option; may be repeated."),
    ] = None,
) -> None:
    """Make a run of samples that were generated elsewhere.

    `asyncrl replay RUN` then trains on its batches. A line needs group_id, prompt_tokens, tokens, logprobs
    and reward; lines of a group stand together. Where no line names a batch, batches are cut in the order
    of the file, rollout_batch_size groups each.
    """
    from asyncrl.cli import contents

    contents.import_(file, topology=topology, out=out, overrides=overrides or [])


def span(text: str | None) -> range | None:
    """The batches in A:B, A:, :B or N. Raises ConfigError."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    try:
        start = int(first or (0 if colon else ""))
        stop = int(last) if last else (2**62 if colon else start + 1)
    except ValueError:
        start = stop = -1
    if not 0 <= start < stop:
        raise ConfigError(f"--batches {text}: write A:B with A below B, such as 0:10, or one number")
    return range(start, stop)


def _words(settled: list[Settled] | None) -> list[str]:
    return [str(one) for one in settled or []]
