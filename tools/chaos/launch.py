"""A command of `asyncrl` in a forked process: all as on the command line, but a launch forks its roles too.

For the drivers of cases and for tests. Whoever calls `start` has one thread and has imported what a command
needs (`world.preload`); the command itself is the real one, with its parsing, its errors and its exit code.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncrl.actor.forks import ForkLauncher, Zygote, fork
from asyncrl.actor.launchers import Launcher
from asyncrl.cli import main, run
from asyncrl.run.session import Session


class ForkSession(Session):
    """A launch whose processes come from a zygote."""

    def __init__(self, *arguments: Any, zygote: Zygote, **options: Any) -> None:
        """As `Session`, with the process that forks for it."""
        super().__init__(*arguments, **options)
        self.zygote = zygote

    def make_launcher(self) -> Launcher:
        """The roles' processes are forked."""
        return ForkLauncher(run_dir=self.run_dir.path, attempt_dir=self.attempt_dir, zygote=self.zygote)


def start(arguments: Sequence[str | Path], *, place: Path, output: Path, env: Mapping[str, str]) -> int:
    """Fork a command.

    Args:
        arguments: what follows `asyncrl` on the command line.
        place: its working directory, where it also finds modules, as with `python -m`.
        output: file that it writes to, in place of the terminal.
        env: environment variables, on top of those there are.

    Returns:
        Its process id.
    """
    return fork(functools.partial(_command, list(map(str, arguments)), place), output=output, env=env)


def _command(arguments: list[str], place: Path) -> None:
    """Never returns: leaves by SystemExit, as the console script does."""
    os.chdir(place)
    sys.path[0] = str(place)
    sys.argv = ["asyncrl", *arguments]
    if arguments[0] != "launch":
        main.main()
    # Before the supervisor has any thread, loop or socket.
    zygote = Zygote()
    # The command line knows no other kind of session; this process is forked for this one command.
    run.launch = functools.partial(run.launch, make_session=functools.partial(ForkSession, zygote=zygote))
    try:
        main.main()
    finally:
        zygote.close()
