"""A wait on another process has a name while it lasts, and an end: its own deadline, or its peer's silence.

    an answer that is owed      `awaiting`: the block has so many seconds
    work, when there is some    `Peers.idle`: as long as everybody is heard of who may bring it, or end it

Owns nothing and decides nothing: whoever waits says how long is too long. The supervisor's watchdog sees
every process and can say why nothing moves, so it speaks first; a deadline here is for where it cannot.
Invariant: nobody idles in an actor that does not listen for its peers' silence.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from asyncrl.errors import StalledError
from asyncrl.obs.metrics import Waits
from asyncrl.topology.schema import RunConfig

WATCHDOG_S = 30.0
"""What a deadline adds to `run.stall_s`: by then the supervisor has examined everybody and ended the run."""
MISSED = 3
"""Answers to heartbeats that have to stay out, whatever `run.stall_s`, before a peer is silent."""


@asynccontextmanager
async def awaiting(
    waits: Waits, name: str, *, who: str, what: str, deadline_s: float, advice: str
) -> AsyncIterator[None]:
    """Charge the block to `waits` under `name`, and end it at the deadline.

    Args:
        waits: of the loop that waits.
        name: what it waits for, in a word.
        who: the actor that waits.
        what: what it waits for and from whom, for people.
        deadline_s: seconds.
        advice: what to do about it.

    Raises:
        StalledError: the block took longer.
    """
    limit = asyncio.timeout(deadline_s)
    try:
        with waits(name):
            async with limit:
                yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise StalledError(f"{who}: waited {deadline_s:g} s for {what}; {advice}") from None


def deadline_of(run: RunConfig) -> float:
    """Seconds for an answer that is owed and has no deadline of its own."""
    return run.stall_s + WATCHDOG_S


def silence_of(run: RunConfig) -> float:
    """Seconds of silence after which a peer counts as gone."""
    return max(deadline_of(run), MISSED * run.heartbeat_s)


class Looks:
    """From when on the silence of others counts, for one who looks at it regularly.

    Time in which the looker itself stood still (stopped, or asleep with its machine) is charged to nobody.
    Where that was half the limit or more, every silence begins anew: what was said meanwhile may be lost, for
    the transport cuts a connection on which it gets no answer, and a peer needs a moment to be heard again.
    Nothing is known about the time before the first look: silences begin with it.
    """

    def __init__(self) -> None:
        self._now: float | None = None
        self._pardon_s = 0.0

    def look(self, now: float, *, every_s: float, limit_s: float) -> None:
        """It is looked now.

        Args:
            now: the present time, on a clock that nobody can set.
            every_s: how often this is called when nothing is wrong.
            limit_s: the silence that has consequences.
        """
        stood_still = math.inf if self._now is None else max(0.0, now - self._now - 2 * every_s)
        self._now, self._pardon_s = now, math.inf if stood_still >= limit_s / 2 else stood_still

    def since(self, start: float) -> float:
        """The start of a silence by the last look, given its start by the look before."""
        assert self._now is not None, "nobody has looked yet"
        return max(start, min(self._now, start + self._pardon_s))


class Peers:
    """Whose silence ends an actor: the supervisor, and the buffer where the actor dials it.

    They answer heartbeats, so one that lives is heard every `every_s`. Silence is counted in looks, of which
    none counts more than twice `every_s`: time in which this process itself stood still (stopped, or asleep
    with its machine) is charged to nobody.
    """

    def __init__(self, who: str, *, limit_s: float, every_s: float) -> None:
        """`limit_s` is the silence that ends the actor `who`; `every_s` is how often it is looked at."""
        self._who = who
        self._limit_s, self._every_s = limit_s, every_s
        self._silent_s: dict[str, float] = {}
        """By peer: seconds since it was heard of last."""
        self._last: float | None = None
        self._watched = False

    def heard(self, peer: str) -> None:
        """It has said something, or has to say something from now on. `peer` is a name for people."""
        self._silent_s[peer] = 0.0

    def look(self, now: float) -> None:
        """Count the time since the last look, on a clock that nobody can set.

        Raises:
            StalledError: a peer has been silent for longer than the limit.
        """
        passed = 0.0 if self._last is None else min(now - self._last, 2 * self._every_s)
        self._last = now
        for peer in self._silent_s:
            self._silent_s[peer] += passed
            if self._silent_s[peer] > self._limit_s:
                raise StalledError(
                    f"{self._who}: {peer} was silent for {self._silent_s[peer]:.0f} s, and it answers "
                    f"heartbeats as long as it lives (allowed are {self._limit_s:g} s: run.stall_s and "
                    f"{WATCHDOG_S:g} s more); see whether it is stopped, hangs, or cannot be reached from "
                    "here. What was handed in is safe; `asyncrl launch --resume RUN` goes on"
                )

    async def watch(self) -> None:
        """consumes: the clock    produces: StalledError    ends: never"""
        self._watched = True
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(self._every_s)

    @contextmanager
    def idle(self, waits: Waits, name: str) -> Iterator[None]:
        """Charge the block, a wait for work, to `waits` under `name`; `watch` bounds it."""
        assert self._watched, f'{self._who}: "{name}" is waited for, but nobody notices that no one is there'
        with waits(name):
            yield
