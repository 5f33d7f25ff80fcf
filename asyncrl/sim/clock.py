"""The clock that jumps: a queue of events ordered by (time, sequence), and nothing else.

It never sleeps and never looks at the machine's clock. Two events at one time happen in the order in which
they were queued, so a seed repeats a run exactly. Background events (ticks) keep nothing alive: a simulation
in which only they are left has run out of events.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.now = 0.0
        """Virtual seconds."""
        self.num_events = 0
        self.foreground = 0
        """Queued events that are work, not ticks."""
        self._queue: list[tuple[float, int, bool, Callable[..., None], tuple[Any, ...]]] = []
        self._seq = 0

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call this in `delay_s` virtual seconds."""
        self.at(self.now + delay_s, call, *args)

    def at(self, time: float, call: Callable[..., None], *args: Any) -> None:
        """Call this at a time, or now if that has passed."""
        self._seq += 1
        self.foreground += 1
        heapq.heappush(self._queue, (max(time, self.now), self._seq, True, call, args))

    def background(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """The same for an event that nobody waits for."""
        self._seq += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._seq, False, call, args))

    def step(self) -> bool:
        """The next event happens. False when there is none."""
        if not self._queue:
            return False
        self.now, _, foreground, call, args = heapq.heappop(self._queue)
        self.foreground -= foreground
        self.num_events += 1
        call(*args)
        return True
