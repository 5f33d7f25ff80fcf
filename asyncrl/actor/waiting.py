"""A wait on another process: it has a name while it lasts, and a deadline.

Owns nothing and decides nothing: whoever waits says how long is too long. The supervisor's watchdog sees
every process and can say why nothing moves, so it speaks first; a deadline here is for where it cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncrl.errors import StalledError
from asyncrl.obs.metrics import Waits

WATCHDOG_S = 30.0
"""What a deadline adds to `run.stall_s`: by then the supervisor has examined everybody and ended the run."""


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
