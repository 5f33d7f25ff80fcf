"""How often a process may complain about its peers: a flood of rubbish must not become a flood of log lines.

A token bucket, pure: time comes in with every call. It says whether a line may be written, and how many were
left out since the last one.
"""

from __future__ import annotations

import time
from typing import Any

MAX_REASON = 500
"""Characters of a reason that are written."""


class Complaints:
    """At most `burst` lines at once and `per_s` a second in the long run, whoever they are about."""

    def __init__(self, *, burst: int = 20, per_s: float = 1.0) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._tokens = float(burst)
        self._at: float | None = None
        self._left_out = 0
        self.total = 0
        """Complaints so far, written or not."""

    def admit(self, now: float) -> int | None:
        """None: stay silent. Otherwise write, and say that so many were left out since the last line."""
        if self._at is not None:
            earned = max(0.0, now - self._at) * self._per_s
            self._tokens = min(self._burst, self._tokens + earned)
        self._at = now
        self.total += 1
        if self._tokens < 1.0:
            self._left_out += 1
            return None
        self._tokens -= 1.0
        left_out, self._left_out = self._left_out, 0
        return left_out


def complain(complaints: Complaints, log: Any, what: str, peer: bytes, why: str) -> None:
    """Write a warning about a peer, if there is room for one."""
    left_out = complaints.admit(time.monotonic())
    if left_out is not None:
        log.warning(what, peer=shown(peer), why=why[:MAX_REASON], left_out=left_out)


def shown(peer: bytes) -> str:
    """A peer's identity for people: it chose the bytes, so whatever is not printable is escaped."""
    return peer.decode("ascii", "backslashreplace").encode("unicode_escape").decode("ascii")
