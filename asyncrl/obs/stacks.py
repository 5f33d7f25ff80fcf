"""Where a process is: stacks of its asyncio tasks and threads, asked from inside or, by signal, from outside.

A process that is `answering` answers SIGUSR1 with two things: the stacks of all threads, written by
`faulthandler` in C at once, even while Python code or C code blocks the event loop; and the stacks of its
asyncio tasks, as soon as the interpreter gets round to it. Both go into an anonymous file in memory, which
whoever examines it reads through /proc: there is nothing to clean up, and a full disk does not matter.

`ask` signals only processes that hold such a file open and catch the signal, so never a stranger.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import re
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import msgspec

MEMORY_FILE = "asyncrl-stacks"
"""Name of the anonymous file, as /proc shows it."""
END_OF_TASKS = "end of tasks"
POLL_S = 0.02
MAX_FRAMES = 64
"""Of one stack, the innermost ones."""

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
_HEAD = re.compile(r"(?:(Current) t|T)hread (0x[0-9a-f]+)")
_TASK = re.compile(r"Task (.*) \(innermost first\):")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a stack."""

    file: str
    line: int
    function: str
    kind: str
    """"user", "ours" or "library"."""

    @property
    def where(self) -> str:
        """In words: FUNCTION at FILE:LINE."""
        return f"{self.function} at {short(self.file)}:{self.line}"


class Stack(msgspec.Struct, frozen=True, kw_only=True):
    """One task or thread; its outermost frame is the first."""

    kind: str
    """"task" or "thread"."""
    name: str
    frames: list[Frame]


def frame_of(file: str, line: int, function: str) -> Frame:
    """A frame, with whose code it is."""
    if file.startswith(_PACKAGE):
        kind = "ours"
    elif file.startswith((*_LIBRARIES, "<")):
        kind = "library"
    else:
        kind = "user"
    return Frame(file=file, line=line, function=function, kind=kind)


def short(file: str) -> str:
    """A path for people: the package's and libraries' files by their place in them."""
    for root, prefix in ((_PACKAGE, "asyncrl/"), *((root, "") for root in sorted(_LIBRARIES, reverse=True))):
        if file.startswith(root):
            return prefix + file.removeprefix(root)
    return file


# From inside.


def task_stacks(tasks: Iterable[asyncio.Task[Any]] | None = None) -> list[Stack]:
    """What each task of the running loop awaits, through all coroutines down to the last one."""
    found = asyncio.all_tasks() if tasks is None else tasks
    stacks = [Stack(kind="task", name=task.get_name(), frames=_awaited(task)) for task in found]
    return sorted(stacks, key=lambda stack: stack.name)


def thread_stacks() -> list[Stack]:
    """What each Python thread of this process runs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    # The one way to see other threads' frames.
    frames = sys._current_frames()  # noqa: SLF001
    return [
        Stack(kind="thread", name=names.get(number, str(number)), frames=_called(frame))
        for number, frame in sorted(frames.items())
    ]


def _awaited(task: asyncio.Task[Any]) -> list[Frame]:
    frames: list[Frame] = []
    step: Any = task.get_coro()
    while step is not None and len(frames) < MAX_FRAMES:
        # Coroutines, generators and asynchronous generators name the same things differently.
        frame = next(
            (f for name in ("cr_frame", "gi_frame", "ag_frame") if (f := getattr(step, name, None))), None
        )
        if frame is not None:
            frames.append(_of(frame))
        step = next(
            (s for name in ("cr_await", "gi_yieldfrom", "ag_await") if (s := getattr(step, name, None))), None
        )
    return frames


def _called(frame: FrameType | None) -> list[Frame]:
    frames: list[Frame] = []
    while frame is not None and len(frames) < MAX_FRAMES:
        frames.append(_of(frame))
        frame = frame.f_back
    return frames[::-1]


def _of(frame: FrameType) -> Frame:
    code = frame.f_code
    return frame_of(code.co_filename, frame.f_lineno or 0, code.co_qualname)


class Answering:
    """This process answers the signal, until `close`."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._before: Any = None

    def open(self) -> None:
        """Start answering; the C half in any thread, the tasks where this is the main one."""
        self._file = os.fdopen(os.memfd_create(MEMORY_FILE), "ab", buffering=0)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._write_tasks)
        faulthandler.register(signal.SIGUSR1, file=self._file, all_threads=True, chain=True)

    def close(self) -> None:
        """Stop; a signal that comes later is ignored."""
        if self._file is None:
            return
        faulthandler.unregister(signal.SIGUSR1)
        if threading.current_thread() is threading.main_thread():
            restored = self._before if self._before not in {None, signal.SIG_DFL} else signal.SIG_IGN
            signal.signal(signal.SIGUSR1, restored)
        self._file.close()
        self._file = None

    def _write_tasks(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._file is None:
            return
        lines = []
        with contextlib.suppress(RuntimeError):  # no loop runs
            for stack in task_stacks():
                lines.append(f"Task {stack.name} (innermost first):")
                lines += [f'  File "{f.file}", line {f.line} in {f.function}' for f in stack.frames[::-1]]
        self._file.write("\n".join([*lines, END_OF_TASKS, ""]).encode(errors="replace"))


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """This process answers the signal inside the block."""
    answer = Answering()
    answer.open()
    try:
        yield
    finally:
        answer.close()


# From outside.


def ask(pids: Iterable[int], *, deadline_s: float) -> dict[int, list[Stack]]:
    """The stacks of processes of this host, asked by signal; empty where a process cannot or does not answer.

    Blocks for at most `deadline_s`. A stopped process answers nobody, and answers when it goes on.
    """
    sizes: dict[int, tuple[Path, int]] = {}
    for pid in pids:
        path = _memory_file(pid)
        # A process that does not catch the signal would die of it.
        if path is not None and _catches(pid, signal.SIGUSR1):
            with contextlib.suppress(OSError):
                sizes[pid] = (path, path.stat().st_size)
                os.kill(pid, signal.SIGUSR1)
    ends = time.monotonic() + deadline_s
    texts = dict.fromkeys(sizes, "")
    waiting = set(sizes)
    while waiting and time.monotonic() < ends:
        time.sleep(POLL_S)
        for pid in list(waiting):
            texts[pid] = _read_from(*sizes[pid])
            if texts[pid].endswith(f"{END_OF_TASKS}\n"):
                waiting.discard(pid)
    return {pid: parse(texts.get(pid, "")) for pid in pids}


def _memory_file(pid: int) -> Path | None:
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if entry.readlink().name.partition(" ")[0] == f"memfd:{MEMORY_FILE}":
                    return entry
    except OSError:
        return None  # gone, or somebody else's
    return None


def _catches(pid: int, number: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", text, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def _read_from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def parse(text: str) -> list[Stack]:
    """What a process wrote: tasks first, then its threads, the one that took the signal before the others."""
    tasks: list[Stack] = []
    threads: list[Stack] = []
    frames: list[Frame] = []
    for line in text.splitlines():
        if task := _TASK.match(line):
            frames = []
            tasks.append(Stack(kind="task", name=task[1], frames=frames))
        elif head := _HEAD.match(line):
            frames = []
            stack = Stack(kind="thread", name="main" if head[1] else head[2], frames=frames)
            threads.insert(0 if head[1] else len(threads), stack)
        elif (found := _FRAME.match(line)) and len(frames) < MAX_FRAMES:
            number = int(found[2]) if found[2].isdigit() else 0
            frames.insert(0, frame_of(found[1], number, found[3]))
    return tasks + threads


def descendants(pid: int) -> list[int]:
    """Processes below a process of this host, its children before theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # gone meanwhile
                text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = sorted(children.get(todo.pop(0), []))
        found += below
        todo += below
    return found
