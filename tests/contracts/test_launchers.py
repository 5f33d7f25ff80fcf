"""One suite over the ways to start a process: what a supervisor is told of its end, and what goes with it.

The supervisor of each test is this very file, run as a process of its own: it can be killed, and it has one
thread, so that it may fork. The started process is a generator whose plug-in does what the test needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncrl.actor.forks import ForkLauncher, Zygote, fork
from asyncrl.actor.launchers import Launcher, ProcessLauncher, TaskLauncher
from asyncrl.errors import ExitCode
from asyncrl.run.rundir import RunDir, read_plan
from asyncrl.topology.load import load
from asyncrl.topology.plan import compile_plan
from tests.support.processes import alive, wait_until
from tests.support.world import write_topology

ROOT = Path(__file__).parents[2]
NAME = "generator"
CHILD = "\nasync def generate(args, sample, sampling_params):\n    return sample\n"
FOREVER = "import time\nPath('ready').write_text(f'{os.getpid()} {other}')\ntime.sleep(600)\n"
FACTS = """
import json, random
os.system("echo from a child")
print("to stderr", file=sys.stderr)
links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
print(json.dumps({
    "mine": os.environ["MINE"],
    "leads": os.getsid(0) == os.getpid() == os.getpgid(0),
    "blocked": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "defaults": [signal.getsignal(n) is signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGCHLD)],
    "ignored": [signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGPIPE, signal.SIGXFSZ)],
    "ignores Ctrl-C": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    "inherited": [link for link in links if "held by the supervisor" in link],
    "number": random.random(),
}), flush=True)
os._exit(0)
"""
"""What a process sees of itself."""
processes = pytest.mark.parametrize("kind", ["process", "fork"])
everything = pytest.mark.parametrize("kind", ["process", "fork", "task"])


class Place:
    """A run directory whose generator imports a plug-in of the test's."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory, self.model = directory, model
        self.ready = directory / "ready"

    def plug_in(self, text: str) -> None:
        """What the generator does as soon as it opens."""
        head = "import os, signal, subprocess, sys\nfrom pathlib import Path\n"
        head += f"os.chdir({str(self.directory)!r})\n"
        (self.directory / "mine.py").write_text(head + text + CHILD, encoding="utf-8")
        options = {"rollout.custom_generate_function_path": str(self.directory / "mine.py:generate")}
        plan = compile_plan(load(write_topology(self.directory, self.model, options), []))
        run = RunDir.create(str(self.directory), "run")
        run.write_plan(plan)
        run.new_attempt()
        run.close()

    @property
    def output(self) -> str:
        """What the process has written."""
        return (self.directory / "run" / "attempt-001" / "log" / f"{NAME}.out").read_text(encoding="utf-8")

    @contextmanager
    def supervised(self, kind: str, *, kill: bool = False, lives: int = 1) -> Iterator[subprocess.Popen[str]]:
        """A supervisor that starts the generator; with `kill` it ends it as soon as "ready" is there."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        arguments = [kind, str(self.directory / "run"), str(self.ready) if kill else "", str(lives)]
        with subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MINE": "the supervisor's"},
        ) as supervisor:
            try:
                yield supervisor
            finally:
                supervisor.kill()

    def code(self, kind: str, *, kill: bool = False, lives: int = 1) -> int:
        """How the generator ended, the last one of so many lives."""
        with self.supervised(kind, kill=kill, lives=lives) as supervisor:
            out, _ = supervisor.communicate(timeout=60)
        return int(json.loads(out.splitlines()[-1])["code"])

    def pids(self) -> list[int]:
        """What the plug-in wrote: its own process id, then that of a process it started."""
        return [int(word) for word in wait_until(self._words, "the plug-in to run")]

    def _words(self) -> list[str]:
        return self.ready.read_text(encoding="utf-8").split() if self.ready.exists() else []


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Place:
    """Where the process of a test lives."""
    return Place(tmp_path, model)


@processes
def test_its_own_exit_code_arrives(place: Place, kind: str) -> None:
    place.plug_in("os._exit(7)\n")
    assert place.code(kind) == 7


@everything
def test_an_error_gives_the_exit_code_of_its_kind(place: Place, kind: str) -> None:
    place.plug_in("raise ValueError('mine')\n")
    assert place.code(kind) == ExitCode.CONFIG


@processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_is_a_negative_code(place: Place, kind: str, number: signal.Signals) -> None:
    place.plug_in(f"os.kill(os.getpid(), {int(number)})\n")
    assert place.code(kind) == -number


@processes
def test_a_kill_takes_along_what_the_process_started(place: Place, kind: str) -> None:
    place.plug_in("other = subprocess.Popen(['sleep', '600']).pid\n" + FOREVER)
    assert place.code(kind, kill=True) == -signal.SIGKILL
    wait_until(lambda: not any(map(alive, place.pids())), "both processes to be gone")


def test_killed_tasks_end_as_if_by_a_signal(place: Place) -> None:
    place.plug_in("Path('ready').write_text('0')\n")
    assert place.code("task", kill=True) == -signal.SIGKILL


@processes
def test_a_process_dies_with_its_supervisor(place: Place, kind: str) -> None:
    place.plug_in("other = os.getppid()\n" + FOREVER)
    with place.supervised(kind) as supervisor:
        pids = place.pids()
        assert all(map(alive, pids))
        supervisor.kill()
        wait_until(lambda: not any(map(alive, pids)), "the process to end with its supervisor")


def test_the_end_of_the_zygote_is_the_end_of_all_it_forked(place: Place) -> None:
    place.plug_in("other = os.getppid()\n" + FOREVER)
    with place.supervised("fork") as supervisor:
        pid, zygote = place.pids()
        os.kill(zygote, signal.SIGKILL)
        out, _ = supervisor.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1])["code"] == -signal.SIGKILL
    wait_until(lambda: not alive(pid), "what it forked to be gone")


@processes
def test_it_begins_as_a_fresh_process(place: Place, kind: str) -> None:
    place.plug_in(FACTS)
    assert place.code(kind, lives=2) == 0
    first, second = [json.loads(line) for line in place.output.splitlines() if line.startswith("{")]
    assert "from a child" in place.output
    assert "to stderr" in place.output
    assert first.pop("number") != second.pop("number"), "both lives drew the same number"
    assert first == {
        "mine": "the process's", "leads": True, "blocked": [], "defaults": [True, True],
        "ignored": [True, True], "ignores Ctrl-C": True,
        "inherited": [],
    }  # fmt: skip


def test_a_process_with_threads_does_not_fork() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="another")
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="another"):
            fork(lambda: 0)
    finally:
        release.set()
        thread.join()


# The supervisor of a test.


async def _supervise(launcher: Launcher, run_dir: Path, ready: str, lives: int) -> int:
    import msgspec

    plan = read_plan(run_dir)
    process = next(p for p in plan.processes if p.name == NAME)
    process = msgspec.structs.replace(process, env={**process.env, "MINE": "the process's"})
    handle = await launcher.start(
        process,
        incarnation="life",
        control=_nobody(launcher),
        buffer=_nobody(launcher),
        resumed=False,
    )
    if ready:
        await asyncio.to_thread(
            wait_until, lambda: _is_written(Path(ready)), "the plug-in to run", deadline_s=60.0
        )
        handle.kill()
    code = await handle.wait()
    return code if lives == 1 else await _supervise(launcher, run_dir, ready, lives - 1)


def _is_written(path: Path) -> bool:
    """A file is there before what is written into it."""
    return path.exists() and path.stat().st_size > 0


def _nobody(launcher: Launcher) -> str:
    """An address where nobody answers."""
    return "memory://nobody" if isinstance(launcher, TaskLauncher) else "ipc:///tmp/nobody-is-here"


def _launcher(kind: str, run_dir: Path) -> Launcher:
    where: dict[str, Any] = {"run_dir": run_dir, "attempt_dir": run_dir / "attempt-001"}
    if kind == "fork":
        return ForkLauncher(**where, zygote=Zygote())
    if kind == "task":
        return TaskLauncher(**where, plan=read_plan(run_dir))
    return ProcessLauncher(**where)


if __name__ == "__main__":
    # What must not be inherited: a descriptor, a handler, a blocked signal.
    held = Path(sys.argv[2], "held by the supervisor").open("w")  # noqa: SIM115 - open until the end
    os.set_inheritable(held.fileno(), True)
    signal.signal(signal.SIGTERM, lambda *_: None)
    chosen = _launcher(sys.argv[1], Path(sys.argv[2]))
    work = _supervise(chosen, Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    print(json.dumps({"code": asyncio.run(work)}))  # noqa: T201
