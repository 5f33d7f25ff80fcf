"""Processes forked from one that has imported everything: a life starts in milliseconds instead of seconds.

    harness (torch imported, one thread) -fork-> supervisor -ForkLauncher-> zygote -fork-> role, role, ...

For tests and fault injection; a run of a user's starts with `ProcessLauncher`. The zygote does nothing but
fork and reap, so that no lock of another thread is ever copied. It owns the way into a forked process: what
such a process inherits is set back to what an executed one begins with (signals, descriptors, environment,
random numbers, logging, warnings). It knows no topology and no role: those are `host`'s.

Invariants: who forks has one thread and no event loop; the zygote dies with the process that started it, and
every role with the zygote, as the children of `ProcessLauncher` die with their supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import io
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from asyncrl.actor.host import die_with, main
from asyncrl.actor.launchers import Handle, host_arguments
from asyncrl.topology.plan import ProcessPlan

MAX_BYTES = 1 << 16
"""Of one message between supervisor and zygote."""
SWITCH_S = 0.005
"""Python's own switch interval."""
TORCH_SEED = 67280421310721
"""What torch's generators begin with in a fresh process (c10::detail::default_rng_seed_val)."""


class _Fork(msgspec.Struct, frozen=True, tag=True):
    """Supervisor to zygote: start this."""

    process: str
    arguments: list[str]
    """Of `host.main`, without --parent."""
    env: dict[str, str]
    output: str


class _Forked(msgspec.Struct, frozen=True, tag=True):
    """Zygote to supervisor: it has this process id."""

    pid: int


class _Ended(msgspec.Struct, frozen=True, tag=True):
    """Zygote to supervisor: it is reaped."""

    pid: int
    code: int
    """Exit code; negative for a signal."""


_ENCODER = msgspec.json.Encoder()
_FORKS = msgspec.json.Decoder(_Fork)
_NEWS: msgspec.json.Decoder[_Forked | _Ended] = msgspec.json.Decoder(_Forked | _Ended)


def fork(
    body: Callable[[], int | None], *, output: Path | None = None, env: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
) -> int:  # fmt: skip
    """Fork a process that is set back to how an executed one begins, runs `body`, and exits with its result.

    It is the leader of a session of its own, which it is already when this returns, and dies with this
    process. An exception ends it with code 1 and a traceback; SystemExit with its code.

    Args:
        body: what it does; its result is the exit code, None is 0.
        output: file that its stdout and stderr are appended to; None: those of this process.
        env: environment variables, on top of those there are.
        keep: descriptors that it keeps beside the standard ones.

    Returns:
        Its process id.

    Raises:
        RuntimeError: this process has several threads, one of which may hold a lock that nobody would free.
    """
    _check_threads()
    parent = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            os.close(writer)
            _begin(parent, output=output, env=env or {}, keep=keep)
            code = contextvars.Context().run(_exit_code, body)
        except BaseException:  # noqa: BLE001 - as below: this process ends here, whatever happened
            traceback.print_exc()
        finally:
            # Nothing may unwind into the frames of the process that was copied.
            os._exit(code)
    os.close(writer)
    # Its end of the pipe closes once it leads its session: a kill of its group works from now on.
    os.read(reader, 1)
    os.close(reader)
    return pid


def _check_threads() -> None:
    count = sum(1 for _ in Path("/proc/self/task").iterdir())
    if count > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise RuntimeError(
            f"fork: this process has {count} threads (Python's: {names}), and may have its main thread only; "
            "fork before anything starts another one, with OMP_NUM_THREADS=1"
        )


def _exit_code(body: Callable[[], int | None]) -> int:
    """What the interpreter would exit with, having done what it does on its way out."""
    try:
        code = body() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - the end of a process: there is nobody else to report it
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does it: waits for threads
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return int(code)


def _begin(parent: int, *, output: Path | None, env: Mapping[str, str], keep: Sequence[int]) -> None:
    """Be a fresh process: see the module's docstring."""
    die_with(parent)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        # Some numbers are the C library's own.
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As Python itself begins: what cannot be written is an error, not a death.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    faulthandler.disable()
    _descriptors(output, keep)
    os.environ.update(env)
    asyncio.set_event_loop_policy(None)
    asyncio._set_running_loop(None)  # noqa: SLF001 - a fork from within a loop would inherit it
    sys.setswitchinterval(SWITCH_S)
    for handler in list(logging.getLogger().handlers):
        logging.getLogger().removeHandler(handler)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    _default_warnings()
    _random_numbers()


def _descriptors(output: Path | None, keep: Sequence[int]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
    first = 3
    for kept in [*sorted(keep), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, kept)
        first = kept + 1
    # The stream objects may be another's (a test runner's), with somebody else's unwritten text in them.
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)), line_buffering=True)


def _default_warnings() -> None:
    """The filters of a fresh interpreter (Python's documentation of `warnings`)."""
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category, append=True)
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")


def _random_numbers() -> None:
    """Every generator begins as in a fresh process: with entropy, but torch's with its own constant."""
    random.seed()
    modules: dict[str, Any] = sys.modules
    if "numpy" in modules:
        modules["numpy"].random.seed(None)
    if "torch" in modules:
        modules["torch"].set_num_threads(1)
        modules["torch"].random.default_generator.manual_seed(TORCH_SEED)


class Zygote:
    """The supervisor's end: a process that forks for it. Start it before any thread, loop or socket."""

    def __init__(self) -> None:
        """Forks the zygote itself. Raises RuntimeError as `fork` does."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = fork(lambda: _serve(theirs), keep=[theirs.fileno()])
        theirs.close()
        self._socket = ours
        self._socket.setblocking(False)
        self._asked: list[asyncio.Future[_Child]] = []
        """Answers come in the order of the questions."""
        self._children: dict[int, _Child] = {}
        self._listening = False

    async def fork(self, request: _Fork) -> _Child:
        """Have a process started; returns once it leads its session."""
        loop = asyncio.get_running_loop()
        if not self._listening:
            self._listening = True
            loop.add_reader(self._socket.fileno(), self._hear)
        answer: asyncio.Future[_Child] = loop.create_future()
        self._asked.append(answer)
        self._socket.send(_ENCODER.encode(request))
        return await answer

    def _hear(self) -> None:
        try:
            data = self._socket.recv(MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone()
            return
        match _NEWS.decode(data):
            case _Forked(pid):
                self._children[pid] = child = _Child(pid)
                self._asked.pop(0).set_result(child)
            case _Ended(pid, code):
                self._children.pop(pid).end(code)

    def _gone(self) -> None:
        """The zygote is dead, and so is everything it forked."""
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        for child in self._children.values():
            child.end(-int(signal.SIGKILL))
        for answer in self._asked:
            answer.set_exception(ChildProcessError("the process that forks is gone"))
        self._children.clear()
        self._asked.clear()

    def close(self) -> None:
        """End the zygote and everything it forked. May be called twice."""
        if self._socket.fileno() < 0:
            return
        if self._listening:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class _Child:
    """See `launchers.Handle`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code: int | None = None
        self._ended = asyncio.Event()

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> int:
        await self._ended.wait()
        assert self._code is not None
        return self._code

    def kill(self) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)

    def end(self, code: int) -> None:
        """It was reaped."""
        self._code = code
        self._ended.set()


@dataclass(kw_only=True)
class ForkLauncher:
    """Children of a zygote: the same code as `ProcessLauncher` runs, without its imports."""

    run_dir: Path
    attempt_dir: Path
    zygote: Zygote

    async def start(
        self, process: ProcessPlan, *, incarnation: str, control: str, buffer: str, resumed: bool
    ) -> Handle:
        """See `Launcher`."""
        arguments = host_arguments(
            process.name, run_dir=self.run_dir, attempt_dir=self.attempt_dir, incarnation=incarnation,
            control=control, buffer=buffer, resumed=resumed, parent=self.zygote.pid,
        )  # fmt: skip
        output = self.attempt_dir / "log" / f"{process.name}.out"
        return await self.zygote.fork(_Fork(process.name, arguments, dict(process.env), str(output)))


def ended_children() -> int:
    """A descriptor that is readable once a child of this process has ended; 512 bytes are read from it then.

    For a process that waits for its children and for something else. There is one such descriptor at a time.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Without a handler nothing is written to the descriptor.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return reader


def _serve(link: socket.socket) -> int:
    """The zygote: forks what it is asked for, and says what became of it, until the other end is closed."""
    reader = ended_children()
    # The terminal's Ctrl-C is the supervisor's to interpret; it ends us when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([link.fileno(), reader], [], [])
        if reader in ready:
            os.read(reader, 512)
            _reap(link)
        if link.fileno() in ready:
            try:
                data = link.recv(MAX_BYTES)
            except ConnectionError:
                return 0  # killed, with news of ours unread
            if not data:
                return 0
            request = _FORKS.decode(data)
            pid = fork(lambda: _role(request), output=Path(request.output), env=request.env)  # noqa: B023 - forked at once
            with contextlib.suppress(ConnectionError):
                link.send(_ENCODER.encode(_Forked(pid)))


def _reap(link: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        with contextlib.suppress(ConnectionError):
            link.send(_ENCODER.encode(_Ended(pid, os.waitstatus_to_exitcode(status))))


def _role(request: _Fork) -> int:
    """The forked process: from here on all is as in an executed one."""
    sys.argv = ["asyncrl-actor", *request.arguments]
    main(request.arguments)
    return 0
