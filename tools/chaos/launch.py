"""The supervisor's process of a case: `asyncrl launch`, with roles that are forked instead of executed."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncrl.actor.forks import ForkLauncher, Zygote, fork
from asyncrl.actor.launchers import Launcher
from asyncrl.cli.run import launch
from asyncrl.errors import AsyncrlError
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


def start(
    place: Path, *, topology: Path | None, resume: Path | None, output: Path, env: Mapping[str, str]
) -> int:
    """Fork a launch, or the resumption of one; returns its process id."""
    return fork(functools.partial(_launch, place, topology=topology, resume=resume), output=output, env=env)


def _launch(place: Path, *, topology: Path | None, resume: Path | None) -> int:
    os.chdir(place)
    # Before the supervisor has any thread, loop or socket.
    zygote = Zygote()
    try:
        return launch(
            topology, overrides=[], resume=resume, in_process=False, name=None, plain=True,
            make_session=functools.partial(ForkSession, zygote=zygote),
        )  # fmt: skip
    except AsyncrlError as error:
        # As `cli.main` does it.
        sys.stderr.write(f"asyncrl: {error}\n")
        return int(error.exit_code)
    finally:
        zygote.close()


def attach(place: Path, run_dir: Path, *, role: str, output: Path, env: Mapping[str, str]) -> int:
    """Fork an `asyncrl attach`; returns its process id."""
    return fork(functools.partial(_attach, place, run_dir, role=role), output=output, env=env)


def _attach(place: Path, run_dir: Path, *, role: str) -> int:
    from asyncrl.cli import live

    os.chdir(place)
    try:
        return live.attach(role, str(run_dir), key=None, name=None, overrides=[])
    except AsyncrlError as error:
        sys.stderr.write(f"asyncrl: {error}\n")
        return int(error.exit_code)
