"""The console script `asyncrl`: names, options and help of every command; errors and exit codes.

Owns no behaviour: each command hands plain arguments to a sibling module, imported when the command runs, so
that `asyncrl --help` loads neither torch nor transformers nor zmq. An `AsyncrlError` becomes its text on
stderr and its exit code, never a traceback.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from asyncrl.cli import buffer, quarantine
from asyncrl.errors import AsyncrlError

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended and that does not drain: 128 + SIGINT, as shells have it."""

EXIT_CODES = (
    "Exit codes: 0 finished, 1 failed, 2 configuration or usage, 3 drained on request and resumable, "
    "130 interrupted."
)


class WorkerRole(StrEnum):
    """What can be added to a live run."""

    GENERATOR = "generator"
    REWARD = "reward"


class Order(StrEnum):
    """Order of the groups inside each replayed batch."""

    RECORDED = "recorded"
    SHUFFLED = "shuffled"


class Commands(TyperGroup):
    """The command group: the one place where errors become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen command; never lets an operator's error through as a traceback."""
        try:
            return super().invoke(ctx)
        except AsyncrlError as error:
            typer.echo(f"asyncrl: {error}", err=True)
            raise typer.Exit(int(error.exit_code)) from None
        except KeyboardInterrupt:
            typer.echo("asyncrl: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="asyncrl",
    cls=Commands,
    help="Fully asynchronous reinforcement learning for language models.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: importing rich for a box around it would double the time it takes.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(buffer.app, name="buffer")
app.add_typer(quarantine.app, name="quarantine")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override an option; may be repeated."),
]
KeyFile = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="CURVE key file made by `asyncrl keys`.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
LiveRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[ADDRESS_OR_RUN]", help="The run's address or directory; default: the newest below runs/."
    ),
]


def main() -> None:
    """Entry point of the console script; leaves by SystemExit with one of the exit codes."""
    app()


def _leave(code: int | None) -> None:
    if code:
        raise typer.Exit(int(code))


@app.command(epilog=EXIT_CODES)
def launch(
    *,
    topology: Annotated[Path | None, typer.Option(metavar="FILE", help="The topology file.")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue this run where it stopped.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="All actors in one process, on a memory link.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run; instead of run.name.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Log lines instead of the live view.")] = False,
) -> None:
    """Start everything a topology names, and stay until it is done."""
    from asyncrl.cli import run

    _leave(
        run.launch(
            topology, overrides=overrides or [], resume=resume, in_process=in_process, name=name, plain=plain
        )
    )


@app.command()
def attach(
    role: Annotated[WorkerRole, typer.Argument(help="What to add.")],
    address: Annotated[
        str,
        typer.Argument(metavar="ADDRESS_OR_RUN", help="The run's address, or its directory on this host."),
    ],
    *,
    key: KeyFile = None,
    name: Annotated[str | None, typer.Option(help="Name of the new process.")] = None,
    overrides: Overrides = None,
) -> None:
    """Add a generator or a reward worker to a live run."""
    from asyncrl.cli import live

    _leave(live.attach(str(role), address, key=key, name=name, overrides=overrides or []))


@app.command()
def detach(
    name: Annotated[str, typer.Argument(help="Name of the process to take out.")],
    *,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS_OR_RUN", help="The run's address or directory; default: the newest live run."
        ),
    ] = None,
    drain: Annotated[
        bool, typer.Option("--drain/--now", help="Let it finish or hand back its work, or stop it at once.")
    ] = True,
    key: KeyFile = None,
) -> None:
    """Take a worker out of a live run."""
    from asyncrl.cli import live

    _leave(live.detach(name, run=run, drain=drain, key=key))


@app.command()
def status(run: LiveRun = None, *, as_json: AsJson = False, key: KeyFile = None) -> None:
    """Show how a run stands: members, versions, leases.

    Of a live run also its queues and who waits for what; of a finished one how it ended.
    """
    from asyncrl.cli import live

    _leave(live.status(run, as_json=as_json, key=key))


@app.command()
def doctor(run: LiveRun = None, *, as_json: AsJson = False, key: KeyFile = None) -> None:
    """Say why nothing moves: the most likely cause in one sentence.

    Below it stacks, waits, queues, credits and leases of every process. Of a run that has ended, what its
    records tell. The report is kept below RUN/doctor.
    """
    from asyncrl.cli import doctor as command

    _leave(command.doctor(run, as_json=as_json, key=key))


@app.command()
def replay(
    run: Run,
    *,
    overrides: Overrides = None,
    from_step: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Begin where the weights hold N batches; default: as early as records allow."
        ),
    ] = None,
    order: Annotated[
        Order, typer.Option(help="Order of the groups inside each batch; batches stay in theirs.")
    ] = Order.RECORDED,
    order_seed: Annotated[int, typer.Option(metavar="N", help="Which shuffled order.")] = 0,
    rescore: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="A reward, as [[reward]] use, instead of the recorded ones."
        ),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write a checkpoint after the last step, below RUN/replays.")
    ] = False,
    num_threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads; default: as recorded.")
    ] = None,
) -> None:
    """Train again on a run's records; compare the weights.

    The trainer alone, no generators. Unchanged, the weights must come out equal to the bit. With --set,
    --order shuffled or --rescore it is a counterfactual: the same samples otherwise trained, and a table of
    recorded and replayed metrics. What lies before --from-step is trained as it was recorded.
    """
    from asyncrl.cli import records

    _leave(
        records.replay(
            run, overrides=overrides or [], num_threads=num_threads, from_step=from_step, order=order,
            order_seed=order_seed, rescore=rescore, save=save,
        )
    )  # fmt: skip


@app.command()
def audit(run: Run, *, as_json: AsJson = False) -> None:
    """Prove from the records that nothing was lost.

    Nor trained twice: every equation of the ledger is checked from the rows alone.
    """
    from asyncrl.cli import records

    _leave(records.audit(run, as_json=as_json))


@app.command()
def story(
    run: Run,
    uid: Annotated[str, typer.Argument(metavar="GROUP[.SAMPLE]", help="A group, or one sample of it.")],
) -> None:
    """Tell everything that happened to a group or a sample."""
    from asyncrl.cli import records

    records.story(run, uid)


@app.command()
def keys(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="The file to write.")] = Path("asyncrl.key"),
) -> None:
    """Make a CURVE key file, for runs that span hosts."""
    from asyncrl.cli import live

    _leave(live.keys(path))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A topology file.")],
    *,
    overrides: Overrides = None,
) -> None:
    """Compile a topology, and say in words what it will do."""
    from asyncrl.cli import check as command

    command.check(file, overrides=overrides or [])


@app.command()
def explain(
    name: Annotated[
        str | None,
        typer.Argument(help="A table, a table.key, a key, or a flag of slime or Miles; default: all tables."),
    ] = None,
) -> None:
    """Print the documentation of an option."""
    from asyncrl.cli import explain as command

    command.explain(name)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="The file to write.")] = Path(
        "topology.toml"
    ),
) -> None:
    """Write a commented topology to start from."""
    from asyncrl.cli import init as command

    command.init(path)


if __name__ == "__main__":
    main()
