"""Real processes of a test: found, waited for, killed; every wait has a deadline."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

POLL_S = 0.02


def wait_until(
    condition: Callable[[], T], what: str, *, deadline_s: float = 30.0, show: Callable[[], Any] = lambda: ""
) -> T:
    """The first true value of a condition that is asked again and again; fails by name at the deadline."""
    ends = time.monotonic() + deadline_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > ends:
            raise AssertionError(f"waited {deadline_s:g} s for {what}; {show()}")
        time.sleep(POLL_S)


def stat(pid: int) -> tuple[int, str] | None:
    """(parent, state letter) of a process; None once it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return int(parent), state


def alive(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    found = stat(pid)
    return found is not None and found[1] not in "ZX"


def children(parent: int) -> set[int]:
    """Living children of a process."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            facts = stat(int(entry.name))
            if facts is not None and facts[0] == parent and facts[1] not in "ZX":
                found.add(int(entry.name))
    return found


def is_pythons_own(pid: int) -> bool:
    """Whether a process is a helper of `multiprocessing`, which lives as long as the interpreter."""
    try:
        return b"multiprocessing." in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(parent: int) -> set[int]:
    """Living children, their children, and so on."""
    found = children(parent)
    return found | {pid for child in found for pid in descendants(child)}


def kill(pid: int) -> float:
    """SIGKILL; returns when, in Unix seconds."""
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    return at
