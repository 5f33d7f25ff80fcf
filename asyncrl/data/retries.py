"""Requests to try failed groups again: a file of them beside the run, and how far the source has come in it.

    asyncrl quarantine retry --> RUN/retries.jsonl (one request a line) --> source --> a new group each

The file is only ever added to, so the number of requests that were taken is a position in it. That number is
part of the source's cursor, which is committed in one transaction with the groups it covers: a request is
issued exactly once, whatever dies when, on a live run and on one that is resumed. A request brings its
prompt's body along, so that the source needs no records. Never decides what may be retried.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from asyncrl.errors import DataError, StorageError

FILE = "retries.jsonl"
"""In the run directory."""
_CURSOR = re.compile(rb"retries=(\d+);")
"""What stands before a source's own cursor once a request was taken. No source's cursor begins like this:
they are JSON."""


class RetryRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the file."""

    group_id: int
    """The group that failed."""
    num_tokens: int
    """Of its prompt."""
    dataset: str
    prompt: bytes
    """The body of its prompt, as recorded (base64 in the file)."""
    asked_at: float
    """Unix seconds."""


class Retries:
    """What the source still has to issue again."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.taken = 0
        """Requests taken so far; goes into the cursor."""

    def next(self, n: int) -> list[RetryRequest]:
        """At most `n` further requests; blocks for the file. DataError: a line is no request."""
        found = requests(self._run_dir, start=self.taken)[:n]
        self.taken += len(found)
        return found

    def wrap(self, cursor: bytes) -> bytes:
        """The source's cursor with our position; without a request it is the source's own."""
        return b"retries=%d;" % self.taken + cursor if self.taken else cursor

    def unwrap(self, cursor: bytes) -> bytes:
        """Continue where this cursor stands; returns the source's own."""
        match = _CURSOR.match(cursor)
        self.taken = int(match[1]) if match else 0
        return cursor[match.end() :] if match else cursor


def requests(run_dir: Path, *, start: int = 0) -> list[RetryRequest]:
    """The requests of a run from number `start` on; a line that is still being written is not there yet.

    Raises DataError naming the line that is no request, or a file that cannot be read.
    """
    path = run_dir / FILE
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines[start:], start + 1):
        try:
            found.append(msgspec.json.decode(line, type=RetryRequest))
        except msgspec.DecodeError as error:
            raise DataError(
                f"{path}, line {number}: no request to retry a group: {error}; `asyncrl quarantine retry` "
                "alone writes this file, and lines that a run has taken may not be changed"
            ) from error
    return found


def ask(run_dir: Path, wanted: Sequence[RetryRequest]) -> None:
    """Add requests, all of them or none; they are on disk when this returns. Raises StorageError."""
    path = run_dir / FILE
    data = b"".join(msgspec.json.encode(request) + b"\n" for request in wanted)
    try:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            # Whoever died while writing left a line without an end, which nobody has taken.
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: the request cannot be written: {error.strerror}") from error
