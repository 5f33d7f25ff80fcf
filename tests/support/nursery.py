"""Live jobs of tests: started in milliseconds, and nothing of theirs can get away.

    pytest -one of these a session-> nursery -fork, one a job-> keeper -fork-> `asyncrl ...` -> its processes

The nursery has imported all that a run needs and has one thread, so that it can fork; pytest has several and
never does. A keeper adopts whatever loses its parent below it: a job is all gone when the kernel says that
its keeper has no child, however its processes have detached themselves. A keeper outlives its job; it ends,
with all that is left of the job, when pytest closes its end of the keeper's socket, or is dead. The nursery
dies with pytest, and its keepers are told by the kernel when it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from asyncrl.actor.forks import ended_children, fork
from asyncrl.actor.host import PR_SET_PDEATHSIG, die_with
from tests.support.processes import children
from tools.chaos import kernel, world

ROOT = Path(__file__).parents[2]
MAX_BYTES = 1 << 17
"""Of one message; a job's environment is the largest part."""
SIGNALS = 512
"""How many signals' numbers are read at once."""
START_S = 60.0
"""How long the nursery's imports, before its first fork of a command, may take on very busy cores."""
END_S = 30.0
"""How long a keeper may take to end a job."""
AGAIN_S = 0.02
"""A keeper that ends its job looks for what was forked meanwhile."""


class Start(msgspec.Struct, frozen=True):
    """Pytest to nursery, with the socket of the new keeper: start this job."""

    arguments: list[str]
    """Of `asyncrl`; or, where it is to be executed, a whole command line."""
    place: str
    output: str
    env: dict[str, str]
    """The whole environment."""
    execute: bool


class Started(msgspec.Struct, frozen=True, tag=True):
    """Keeper to pytest: the job's first process, and the keeper's own."""

    pid: int
    keeper: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """Keeper to pytest: the job's first process has ended; `code` as `Popen.returncode`."""

    code: int


class Gone(msgspec.Struct, frozen=True, tag=True):
    """Keeper to pytest: no process of the job is left, and none can come."""


NEWS: msgspec.json.Decoder[Started | Ended | Gone] = msgspec.json.Decoder(Started | Ended | Gone)


class Process:
    """The first process of a job, with the interface of `Popen`, and what became of all the others."""

    def __init__(self, keeper: socket.socket) -> None:
        self._keeper = keeper
        self._keeper_pid = 0
        self.pid = 0
        self.returncode: int | None = None
        self.gone = False
        """No process of the job is left; read by `poll`."""
        self._closed = False

    def hear(self, timeout_s: float) -> bool:
        """Take in one piece of news, waiting for so long; False where there was none."""
        if self._closed or not select.select([self._keeper], [], [], timeout_s)[0]:
            return False
        try:
            data = self._keeper.recv(MAX_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            # The keeper has ended. Where it did not say that all is gone, it was killed, and nobody knows.
            self._closed = True
            self._keeper.close()
            self.returncode = -signal.SIGKILL if self.returncode is None else self.returncode
            return False
        match NEWS.decode(data):
            case Started(pid, keeper):
                self.pid, self._keeper_pid = pid, keeper
            case Ended(code):
                self.returncode = code
            case Gone():
                self.gone = True
        return True

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None as long as it lives."""
        while self.hear(0.0):
            pass
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code, once there is one. Raises `subprocess.TimeoutExpired`."""
        ends = time.monotonic() + timeout
        while self.poll() is None:
            if not self.hear(max(0.0, ends - time.monotonic())) and time.monotonic() >= ends:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the first process alone, where it still lives."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def left(self) -> list[str]:
        """Living processes of the job in words, for messages; `gone` is what is exact."""
        return [kernel.describe(pid) for pid in sorted(kernel.descendants(self._keeper_pid))]

    def close(self) -> None:
        """SIGKILL to all that is left, and wait until it is gone."""
        if not self._closed:
            self._keeper.shutdown(socket.SHUT_WR)
        ends = time.monotonic() + END_S
        while not self._closed:
            self.hear(max(0.0, ends - time.monotonic()))
            assert time.monotonic() < ends, f"the keeper of job {self.pid} did not end it within {END_S:g} s"
        assert self.gone, f"the keeper of job {self.pid} was killed; what is left of the job is unknown"


class Nursery:
    """Pytest's end; made by `nursery`."""

    def __init__(self) -> None:
        # It dies with the thread that starts it.
        assert threading.current_thread() is threading.main_thread()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link = ours
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the nursery
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.nursery", str(os.getpid()), str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is pytest's to interpret.
                start_new_session=True,
            )

    def start(
        self, arguments: Sequence[str | Path], *, place: Path, output: Path, env: Mapping[str, str],
        execute: bool = False,
    ) -> Process:  # fmt: skip
        """Start a job.

        Args:
            arguments: of `asyncrl`, which is forked, and so are its roles; with `execute` a whole command
                line, which is executed.
            place: its working directory.
            output: file that its output is appended to.
            env: its whole environment. What is read at the import of a library is the nursery's in a fork.
            execute: see `arguments`.

        Raises:
            RuntimeError: the nursery has died; with its last words.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = Start(list(map(str, arguments)), str(place), str(output), dict(env), execute)
        process = Process(ours)
        # Where nobody is there to read it, nobody has the other end either, and `hear` finds out.
        with theirs, contextlib.suppress(ConnectionError):
            socket.send_fds(self._link, [msgspec.json.encode(request)], [theirs.fileno()])
        process.hear(START_S)
        if not process.pid:
            self._words.seek(0)
            raise RuntimeError(f"the nursery starts nothing: {self._words.read().decode(errors='replace')}")
        return process

    def close(self) -> None:
        """End it; jobs that are still kept end with it."""
        self._link.close()
        self.process.kill()
        self.process.wait()
        self._words.close()


@functools.cache
def nursery() -> Nursery:
    """The nursery of this pytest session, started when it is first asked for; closed by conftest.py."""
    return Nursery()


def close_nursery() -> None:
    """End the session's nursery, if there is one."""
    if nursery.cache_info().currsize:
        nursery().close()
        nursery.cache_clear()


def own_processes() -> set[int]:
    """Processes that this one has started and that still live: children, and keepers of jobs."""
    found = children(os.getpid())
    if nursery.cache_info().currsize:
        pid = nursery().process.pid
        found = (found - {pid}) | children(pid)
    return found


# The nursery itself.


def main() -> None:
    """Fork a keeper for every request, until pytest closes its end or dies."""
    parent, descriptor = map(int, sys.argv[1:])
    die_with(parent)
    link = socket.socket(fileno=descriptor)
    ended = ended_children()
    while True:
        ready, _, _ = select.select([descriptor, ended], [], [])
        if ended in ready:
            os.read(ended, SIGNALS)
            kernel.reap()
        if descriptor not in ready:
            continue
        data, descriptors, _, _ = socket.recv_fds(link, MAX_BYTES, 1)
        if not data:
            return
        request = msgspec.json.decode(data, type=Start)
        if not request.execute:
            world.preload()
        fork(functools.partial(keep, request, descriptors[0]), keep=descriptors)
        os.close(descriptors[0])


def keep(request: Start, descriptor: int) -> None:
    """A keeper: start the job, tell what becomes of it, and end all of it when pytest says so or is dead."""
    link = socket.socket(fileno=descriptor)
    kernel.adopt_orphans()
    ended = ended_children()
    # The death of the nursery (which is pytest's, or near it) is a signal that leaves time to clean up.
    signal.signal(signal.SIGTERM, lambda *_: None)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    os.environ.clear()
    os.environ.update(request.env)
    first = _first(request)
    _tell(link, Started(first, os.getpid()))
    wanted = True
    while wanted:
        ready, _, _ = select.select([link.fileno(), ended], [], [])
        if ended in ready:
            # The numbers of the signals that came.
            wanted = signal.SIGTERM not in os.read(ended, SIGNALS)
            codes = kernel.reap()
            if first in codes:
                _tell(link, Ended(codes[first]))
            if _is_alone():
                _tell(link, Gone())
        wanted = wanted and link.fileno() not in ready
    while not _is_alone():
        kernel.send(kernel.descendants(os.getpid()), signal.SIGKILL)
        if select.select([ended], [], [], AGAIN_S)[0]:
            os.read(ended, SIGNALS)
        kernel.reap()
    _tell(link, Gone())


def _first(request: Start) -> int:
    """Start the job's first process."""
    place, output = Path(request.place), Path(request.output)
    if not request.execute:
        from tools.chaos import launch

        return launch.start(request.arguments, place=place, output=output, env={})

    def executed() -> None:
        os.chdir(place)
        os.execv(request.arguments[0], request.arguments)  # noqa: S606 - no shell is wanted

    return fork(executed, output=output)


def _tell(link: socket.socket, news: Started | Ended | Gone) -> None:
    # Pytest may have closed its end meanwhile.
    with contextlib.suppress(ConnectionError):
        link.send(msgspec.json.encode(news))


def _is_alone() -> bool:
    """Whether this process has no children, living or not: as it inherits orphans, no descendants either."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


if __name__ == "__main__":
    main()
