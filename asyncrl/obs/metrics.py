"""Numbers a process writes down: rows of declared metrics, and where its time goes.

`MetricsWriter` owns one JSON-lines file per process, RUN/metrics/ACTOR.jsonl, and writes nothing that
`CATALOGUE` does not declare. `Waits` measures one loop: every second of it is either busy or in a named wait.
Neither ever waits for anything, and neither raises for a disk's sake.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import orjson

from asyncrl.obs.catalogue import CATALOGUE, Catalogue, Kind, Metric
from asyncrl.obs.jsonl import JsonlFile

__all__ = ["CATALOGUE", "Catalogue", "Kind", "Metric", "MetricsWriter", "Waits", "read"]


class MetricsWriter:
    """Appends rows `{"t": unix seconds, "step": step, NAME: value, ...}`, each flushed. Thread-safe."""

    def __init__(
        self, path: Path, *, catalogue: Catalogue = CATALOGUE, clock: Callable[[], float] = time.time
    ) -> None:
        self._file = JsonlFile(path)
        self._catalogue = catalogue
        self._clock = clock

    @property
    def num_failed(self) -> int:
        """Rows the disk refused: a full disk costs rows, never the training that writes them."""
        return self._file.num_failed

    def write(self, values: Mapping[str, SupportsFloat], *, step: int | None = None) -> bool:
        """Append one row; False when the disk refused it. `step` is the rollout step, None outside of one.

        NaN and infinities are written as null. Raises ValueError for a name that is not declared.
        """
        row: dict[str, Any] = {"t": self._clock()}
        if step is not None:
            row["step"] = step
        for name, value in values.items():
            self._catalogue.require(name)
            row[name] = value if type(value) is int else float(value)
        return self._file.append(orjson.dumps(row))

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def read(path: Path) -> list[dict[str, float]]:
    """The rows of one metrics file, in order; null comes back as NaN, a missing file as no rows.

    Rows torn by a kill or a full disk are left out: they were counted where they were written.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


class Waits:
    """Where one loop's time goes: `with waits("lease"): ...` around every await on someone else.

    Waits may nest and overlap: each name is charged in full, and the loop is busy only while nothing waits,
    so for a loop that waits for one thing at a time `busy_s() + sum(snapshot().values()) == wall_s()`.
    One object per loop; it may be read from other threads.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._began = clock()
        self._totals: dict[str, float] = {}
        self._open: dict[_Wait, float] = {}
        self._idle_s = 0.0
        self._idle_since = 0.0

    def __call__(self, name: str) -> _Wait:
        """A context manager that charges the time inside it to `name`."""
        return _Wait(self, name)

    def wall_s(self) -> float:
        """Seconds since this object was made."""
        return self._clock() - self._began

    def busy_s(self) -> float:
        """Seconds in which nothing waited."""
        with self._lock:
            now = self._clock()
            idle = self._idle_s + (now - self._idle_since if self._open else 0.0)
            return now - self._began - idle

    def snapshot(self) -> dict[str, float]:
        """Seconds per name since the start; a wait that still runs counts up to now."""
        with self._lock:
            now = self._clock()
            totals = dict(self._totals)
            for wait, since in self._open.items():
                totals[wait.name] = totals.get(wait.name, 0.0) + now - since
            return totals

    def now(self) -> list[tuple[str, float]]:
        """What is waited for at this moment, the longest wait first: (name, clock reading at its start)."""
        with self._lock:
            return sorted(
                ((wait.name, since) for wait, since in self._open.items()), key=lambda pair: pair[1]
            )

    def longest(self) -> tuple[str, float] | None:
        """The wait that runs longest now: (name, seconds so far); None when busy."""
        waiting = self.now()
        return (waiting[0][0], self._clock() - waiting[0][1]) if waiting else None

    def _enter(self, wait: _Wait) -> None:
        with self._lock:
            now = self._clock()
            if not self._open:
                self._idle_since = now
            self._open[wait] = now

    def _exit(self, wait: _Wait) -> None:
        with self._lock:
            now = self._clock()
            since = self._open.pop(wait)
            self._totals[wait.name] = self._totals.get(wait.name, 0.0) + now - since
            if not self._open:
                self._idle_s += now - self._idle_since


class _Wait:
    """One entry into a named wait; used once."""

    __slots__ = ("_waits", "name")

    def __init__(self, waits: Waits, name: str) -> None:
        self._waits = waits
        self.name = name

    def __enter__(self) -> None:
        self._waits._enter(self)  # noqa: SLF001 - two halves of one class

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waits._exit(self)  # noqa: SLF001 - two halves of one class
