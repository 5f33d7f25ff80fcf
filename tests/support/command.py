"""The real command line, as a user starts it: short commands, and launches that live."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from asyncrl.chaos import ORDERS, Order
from asyncrl.errors import AsyncrlError
from asyncrl.messages.supervision import StatusRequest
from asyncrl.run.remote import find, question
from tests.support.books import one
from tests.support.nursery import nursery
from tests.support.processes import wait_until
from tests.support.world import Options, write_topology

ROOT = Path(__file__).parents[2]
COMMAND_S = 30.0
"""How long a short command may take, the import of Python included."""
RUN_S = 110.0
"""How long a small run may take from start to end on very busy cores; alone it takes about 10 s."""


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Everything it printed."""
        return self.out + self.err


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def _command(arguments: Sequence[str | Path], module: str = "asyncrl.cli.main") -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def asyncrl(*arguments: str | Path, cwd: Path, deadline_s: float = COMMAND_S) -> Said:
    """Run a command to its end."""
    done = subprocess.run(
        _command(arguments),
        cwd=cwd,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return Said(done.returncode, done.stdout, done.stderr)


class Job:
    """A command that lives for a while.

    It is forked, and so are the processes of a launch, which saves everybody's imports; with forked=False all
    are executed, as a user's are. What is left of it when its `with` block ends is killed. If it had ended by
    itself, nothing may be left.
    """

    gone_s = COMMAND_S
    """How long what it started may outlive it."""

    def __init__(
        self, *arguments: str | Path, cwd: Path, output: Path, forked: bool = True, module: str = "",
        **environment: str,
    ) -> None:  # fmt: skip
        """`module` is another one than asyncrl's command, executed."""
        forked = forked and not module
        self._output = output
        output.write_bytes(b"")
        self.process = nursery().start(
            arguments if forked else _command(arguments, *([module] if module else [])),
            place=cwd,
            output=output,
            env=_environment(**environment),
            execute=not forked,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.process.poll() is not None and kind is None:
                wait_until(
                    self._gone,
                    "all of an ended job to be gone",
                    deadline_s=self.gone_s,
                    show=self.process.left,
                )
        finally:
            self.process.close()

    def _gone(self) -> bool:
        self.process.poll()
        return self.process.gone

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def says(self, words: str, *, deadline_s: float = COMMAND_S) -> None:
        """Wait until it has printed these words."""
        wait_until(
            lambda: words in self.text or self.process.poll() is not None,
            f'"{words}"',
            deadline_s=deadline_s,
            show=lambda: self.text,
        )
        assert words in self.text, self.text

    def end(self, *, deadline_s: float = RUN_S) -> int:
        """Wait for its exit code."""
        wait_until(
            lambda: self.process.poll() is not None,
            "the command to end",
            deadline_s=deadline_s,
            show=lambda: self.text,
        )
        assert self.process.returncode is not None
        return self.process.returncode

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)


class Run(Job):
    """A `launch` with its run directory."""

    path: Path

    @property
    def status(self) -> dict[str, Any]:
        """status.json."""
        try:
            found: dict[str, Any] = json.loads((self.path / "status.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    def members(self) -> dict[str, dict[str, Any]]:
        """What the supervisor says of every member, by name; empty while it does not answer."""
        try:
            reply = question(find(str(self.path)), StatusRequest(), key=None)
        except AsyncrlError:
            return {}
        return {member["name"]: member for member in json.loads(reply.data)["members"]}

    def pid(self, name: str) -> int:
        """Process id of a member, from the supervisor."""
        return wait_until(
            lambda: int(self.members().get(name, {}).get("pid", 0)), f"the supervisor to know {name}"
        )

    def until(self, query: str, *values: Any, deadline_s: float = RUN_S) -> Any:
        """Wait for a query of the run's tables to give something true."""
        return wait_until(
            lambda: self._alive_and(one(self.path, query, *values)),
            query,
            deadline_s=deadline_s,
            show=lambda: self.text,
        )

    def _alive_and(self, found: Any) -> Any:
        assert found or self.process.poll() is None, f"the run ended before that: {self.text}"
        return found


@contextmanager
def launched(
    place: Path,
    model: Path,
    options: Options | None = None,
    *,
    name: str = "run",
    orders: Sequence[Order] = (),
    forked: bool = True,
) -> Iterator[Run]:
    """A new run, live; its processes fail as ordered."""
    topology = write_topology(place, model, options)
    environment = {}
    if orders:
        file = place / f"{name}-orders.json"
        file.write_bytes(msgspec.json.encode(orders))
        environment[ORDERS] = str(file)
    arguments = ("launch", "--topology", topology, "--name", name, "--plain")
    with Run(*arguments, cwd=place, output=place / f"{name}.out", forked=forked, **environment) as run:
        run.path = place / "runs" / name
        yield run


@contextmanager
def resumed(path: Path, *, forked: bool = True) -> Iterator[Run]:
    """An interrupted run, live again."""
    place = path.parent.parent
    output = place / f"{path.name}-resumed.out"
    with Run("launch", "--resume", path, "--plain", cwd=place, output=output, forked=forked) as run:
        run.path = path
        yield run
