"""What an order may do to its own process: end it, stop it, hold it up, move its clock, watch its files.

None of it can be undone: an audit hook stays until the process ends. So this is for processes that run one
actor's life, never for a process that others share.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any

FLUSH_S = 0.1
"""How long a transport's own thread gets to write what it was handed, before its process ends or stops."""


def end() -> None:
    """SIGKILL."""
    signal.pthread_kill(threading.get_ident(), signal.SIGKILL)


def stop() -> None:
    """SIGSTOP of the whole process; returns when somebody continues it.

    Sent to this very thread: then it is taken before the call returns, and nothing further is done.
    """
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def hold(seconds: float) -> None:
    """The calling thread stands still."""
    time.sleep(seconds)


def move_clock(seconds: float) -> None:
    """From now on `time.time()` is ahead by so much, on top of earlier moves; monotonic clocks are not."""
    before = time.time

    def moved() -> float:
        return before() + seconds

    time.time = moved


def watch_files(events: AbstractSet[str], found: Callable[[str, str], None]) -> None:
    """Call `found(event, path)` before each of these audit events, for the rest of this process.

    On the thread of the event; what it raises comes out of the call that was about to be made.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in events and arguments:
            found(event, _text(arguments[0]))

    sys.addaudithook(hook)


def _text(path: Any) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
