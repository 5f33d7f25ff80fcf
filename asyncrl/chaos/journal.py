"""RUN_DIR/orders.jsonl: who has read orders, and which orders fired, written before anything was done.

Owns the file. Every line is one write to a descriptor that appends, so lines of many processes do not mix and
none is torn; nothing is buffered, as the next thing a process does may be its last.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec

JOURNAL = "orders.jsonl"
"""Name of the file in a run's directory."""


class Journal:
    """The end of the file, for one life."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = os.open(run_dir / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, stamped with pid and the true time."""
        # Not time.time(): an order may have moved that.
        stamp = {"pid": os.getpid(), "time": time.clock_gettime(time.CLOCK_REALTIME)}
        os.write(self._file, msgspec.json.encode(line | stamp) + b"\n")


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """All lines so far, in order; none where no orders were ever read.

    A life that has read orders: born (its name), life, incarnation (empty for the supervisor), pid, time.
    An order that was carried out: order (its index in the file), actor, life, incarnation, moment, action,
    message (the beginning of it, after the peer's name at a server; or a path), pid, time. Times are true
    Unix seconds, whatever an order did to the clock.
    """
    try:
        text = (run_dir / JOURNAL).read_bytes()
    except FileNotFoundError:
        return []
    return [msgspec.json.decode(line) for line in text.splitlines()]
