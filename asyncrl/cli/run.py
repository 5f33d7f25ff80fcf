"""`asyncrl launch`: from a topology file (or an interrupted run) to a summary and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console

from asyncrl.errors import ConfigError, ExitCode
from asyncrl.run.ending import conclude
from asyncrl.run.preflight import preflight
from asyncrl.run.rundir import RunDir, free_name
from asyncrl.run.session import Session, resumable
from asyncrl.topology.load import load, override
from asyncrl.topology.paths import absolute
from asyncrl.topology.plan import Plan, compile_plan
from asyncrl.topology.words import schedule_in_words, warnings


def launch(
    topology: Path | None, *, overrides: list[str], resume: Path | None, in_process: bool, name: str | None,
    plain: bool, make_session: Callable[..., Session] = Session,
) -> int:  # fmt: skip
    """Run to the end; returns the exit code. `make_session` is called as `Session` is."""
    if (topology is None) == (resume is None):
        raise ConfigError(
            "launch needs either --topology FILE, for a new run, or --resume RUN, to continue one"
        )
    if resume is not None:
        run = RunDir.resume(resume)
        plan = _resumed_plan(run, overrides)
    else:
        assert topology is not None
        plan, run = _new_run(topology, overrides, name)
    try:
        session = make_session(plan, run, in_process=in_process, resumed=resume is not None, plain=plain)
        return _live(session)
    finally:
        run.close()


def _new_run(topology: Path, overrides: list[str], name: str | None) -> tuple[Plan, RunDir]:
    loaded = load(topology, overrides)
    names = loaded.run
    chosen = free_name(Path(names.dir), name or names.name)
    loaded = msgspec.structs.replace(loaded, run=msgspec.structs.replace(names, name=chosen))
    plan = compile_plan(absolute(loaded), source=str(topology))
    plan = preflight(plan, Path(names.dir) / chosen)
    run = RunDir.create(names.dir, chosen)
    run.write_plan(plan, source=topology.read_text())
    return plan, run


def _resumed_plan(run: RunDir, overrides: list[str]) -> Plan:
    plan = run.read_plan()
    if overrides:
        changed = compile_plan(override(plan.topology, overrides, source=str(run.path)))
        _check_unchanged(plan, changed)
        plan = changed
        run.write_plan(plan)
    return preflight(plan, run.path)


def _check_unchanged(plan: Plan, changed: Plan) -> None:
    """What recorded batches were trained with stays as it is: replay and audit read it from the plan."""
    problems = [
        f"--set {table}...: a resumed run keeps its [{table}] table, as its records were made with it; "
        f"start a new run with trainer.hf_checkpoint set to a checkpoint of this one"
        for table in ("trainer", "algorithm", "rollout", "source")
        if getattr(plan.topology, table) != getattr(changed.topology, table)
    ]
    if problems:
        raise ConfigError(*problems)


def _live(session: Session) -> int:
    console = Console(highlight=False)
    for line in schedule_in_words(session.plan):
        console.print(f"  {line}", soft_wrap=True)
    for line in warnings(session.plan):
        console.print(f"  warning: {line}", soft_wrap=True)
    code = session.live()
    code = conclude(session, code, console=console)
    if code is ExitCode.DRAINED:
        console.print(f"resume with: {resumable(session.run_dir)}", soft_wrap=True)
    return int(code)
