"""The process of one or several actors: reads the plan, lives, and tells the truth with its exit code.

    python -m asyncrl.actor.host RUN_DIR PROCESS --control ADDRESS --buffer ADDRESS ...

It dies with the supervisor that started it: the kernel is asked to send SIGKILL when the parent is gone, and
the parent is checked once after that, so that a supervisor that died in between is noticed too.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog

from asyncrl.actor.base import LAST_WORDS_S, Actor, Context, first_error
from asyncrl.chaos import begin_life
from asyncrl.errors import AsyncrlError, ExitCode
from asyncrl.link import Hub, read_key
from asyncrl.obs import log
from asyncrl.obs.stacks import answering
from asyncrl.topology.plan import Plan

ROLES = {
    "buffer": "asyncrl.roles.buffer:BufferRole",
    "source": "asyncrl.roles.source:SourceRole",
    "evaluator": "asyncrl.roles.evaluator:EvaluatorRole",
    "generator": "asyncrl.roles.generator:GeneratorRole",
    "reward": "asyncrl.roles.reward:RewardRole",
    "trainer": "asyncrl.roles.trainer:TrainerRole",
}
"""Roles by dotted path: hosting one imports only that one (and its torch, if it needs it)."""

PR_SET_PDEATHSIG = 1


def load_role(role: str) -> type[Actor]:
    """The class behind a role's name."""
    module, _, name = ROLES[role].partition(":")
    found: type[Actor] = getattr(importlib.import_module(module), name)
    return found


def make_actors(
    plan: Plan, process: str, *, run_dir: Path, attempt_dir: Path, incarnation: str, control: str,
    buffer: str,
    resumed: bool = False, hub: Hub | None = None, index: int | None = None, role: str = "",
) -> list[Actor]:  # fmt: skip
    """The actors of one process of the plan (or of an attached one, whose role is given)."""
    found = next((p for p in plan.processes if p.name == process), None)
    roles = found.roles if found is not None else [role]
    key = read_key(plan.topology.run.key) if plan.topology.run.key else None
    actors = []
    for name in roles:
        context = Context(
            name=process if name == roles[0] else name,
            role=name,
            incarnation=incarnation,
            plan=plan,
            run_dir=run_dir,
            attempt_dir=attempt_dir,
            control_address=control,
            desk_address=buffer,
            index=found.index if found is not None else index,
            hub=hub,
            key=key,
            resumed=resumed,
            host=os.uname().nodename,
            life=begin_life(
                process if name == roles[0] else name,
                plan=plan,
                run_dir=run_dir,
                incarnation=incarnation,
                in_process=hub is not None,
            ),
        )
        actors.append(load_role(name)(context))
    return actors


async def live(actors: list[Actor]) -> ExitCode:
    """Run the actors of one process; the worst exit code counts."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(actor.run(), name=actor.name) for actor in actors]
    codes = [task.result() for task in running]
    return max(codes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m asyncrl.actor.host`, and of a forked process, which gets its arguments here."""
    options = _arguments(arguments)
    if options.parent:
        die_with(options.parent)
    # The terminal's Ctrl-C is the supervisor's to interpret.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plan = msgspec.json.decode((options.run_dir / "plan.json").read_bytes(), type=Plan)
    logging = log.configure(
        actor=options.process, run_dir=options.attempt_dir, console="none", run=plan.topology.run.name
    )
    try:
        with answering():
            code = _run(plan, options)
    finally:
        logging.close()
    _leave(int(code))


def _run(plan: Plan, options: argparse.Namespace) -> ExitCode:
    import uvloop

    async def lived() -> ExitCode:
        actors = make_actors(
            plan,
            options.process,
            run_dir=options.run_dir,
            attempt_dir=options.attempt_dir,
            incarnation=options.incarnation,
            control=options.control,
            buffer=options.buffer,
            resumed=options.resumed,
            index=options.index,
            role=options.role,
        )
        return await live(actors)

    try:
        code: ExitCode = uvloop.run(lived())
    except BaseExceptionGroup as group:
        return report(first_error(group))
    except AsyncrlError as error:
        return report(error)
    return code


def _leave(code: int) -> NoReturn:
    """Exit, also from the midst of a computation that nobody waits for: the loading of a model."""
    ends = time.monotonic() + LAST_WORDS_S
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(timeout=max(0.0, ends - time.monotonic()))
            if thread.is_alive():
                # The interpreter would wait for its end.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    sys.exit(code)


def report(error: BaseException) -> ExitCode:
    """Log what ended a process; the traceback goes to its log, the message to whoever asks."""
    logger = structlog.stdlib.get_logger()
    if isinstance(error, AsyncrlError):
        logger.error("ended", error=str(error))
        return error.exit_code
    logger.error("ended", error=repr(error), exception="".join(traceback.format_exception(error)))
    return ExitCode.FAILED


def die_with(parent: int) -> None:
    """Have the kernel send SIGKILL to this process when its parent, which is this one, is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="asyncrl-actor", description="One process of a run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("process")
    parser.add_argument("--attempt-dir", type=Path, required=True)
    parser.add_argument("--control", required=True)
    parser.add_argument("--buffer", default="")
    parser.add_argument("--incarnation", required=True)
    parser.add_argument("--resumed", action="store_true")
    parser.add_argument("--role", default="")
    parser.add_argument("--index", type=int, default=None)
    parser.add_argument("--parent", type=int, default=0)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
