"""What a driver asks of the kernel: to inherit orphans, small disks that only it sees, and who is there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 16384, 1 << 18

BUSY_S = 5.0
"""Files of a process that was just killed may be closed a little after it is gone."""


class NotAllowed(Exception):  # noqa: N818 - a reason to skip, not a mistake
    """The kernel refuses what a case needs."""


def adopt_orphans() -> None:
    """Whatever descends from this process and loses its parent becomes its child: nothing can get away."""
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def private_disk(path: Path, *, num_bytes: int) -> None:
    """A small disk at `path` that only this process and its descendants see, and that goes with them."""
    _call("unshare", CLONE_NEWNS)
    _mount(b"none", b"/", b"", MS_REC | MS_PRIVATE, b"")
    _mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={num_bytes}".encode())


def read_only(path: Path, *, on: bool) -> None:
    """Make the disk at `path` read-only, or writable again. Nothing may be open for writing there."""
    ends = time.monotonic() + BUSY_S
    while True:
        try:
            _mount(b"none", os.fsencode(path), b"", MS_REMOUNT | (MS_RDONLY if on else 0), b"")
        except NotAllowed:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)
        else:
            return


def _mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> None:
    _call("mount", source, target, kind, flags, data)


def _call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    converted = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if function(*converted) != 0:
        raise NotAllowed(f"{name}: {os.strerror(ctypes.get_errno())}")


def children(parent: int) -> set[int]:
    """Children of a process, zombies included."""
    return {pid for pid, (above, _) in _table().items() if above == parent}


def descendants(parent: int) -> set[int]:
    """Living processes below this one (no zombies)."""
    parents = {pid: above for pid, (above, state) in _table().items() if state not in "ZX"}
    return set(_below(parent, parents))


def _table() -> dict[int, tuple[int, str]]:
    """(parent, state letter) of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                state, above = text.rpartition(")")[2].split()[:2]
                found[int(entry.name)] = (int(above), state)
    return found


def _below(parent: int, parents: dict[int, int]) -> Iterator[int]:
    for pid, above in parents.items():
        if above == parent:
            yield pid
            yield from _below(pid, parents)


def describe(pid: int) -> str:
    """A process in words."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return f"{pid} ({command[:80].strip()})"
    return str(pid)


def send(pids: set[int], number: signal.Signals) -> None:
    """A signal to all of them that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def reap_others(mine: set[int]) -> None:
    """Reap children that have ended and are none of these: orphans of cases."""
    for pid in children(os.getpid()) - mine:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def reap() -> dict[int, int]:
    """Exit codes of the children that have ended."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)
