"""Settings of the interpreter for a process that only the desk lives in."""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.0005
"""Longest wait of one of the buffer's two threads for the other, in its own process."""
GC_THRESHOLD = (50_000, 20, 50)
"""When the cycle collector runs there; Python's own default is (700, 10, 10)."""


def tune_interpreter() -> None:
    """Let commits get their turn; never where other actors live in the process."""
    # The store's thread gives the interpreter's lock up for every call into SQLite, and a busy loop
    # hands it back only after this long (5 ms by default): commits would crawl under load.
    sys.setswitchinterval(SWITCH_S)
    # None of the many small records is part of a cycle: looking for one again and again is lost time.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
