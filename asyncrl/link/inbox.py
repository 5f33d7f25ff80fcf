"""A bounded queue between a link's reader and the callers of `recv`.

Unlike `asyncio.Queue` it can fail: whoever waits then, on either side, gets the error at once. What was
queued before the failure is still handed out first. Getting is atomic: a cancelled `get` has taken nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque

from asyncrl.link.base import Delivery


class Inbox:
    """At most `capacity` deliveries; putters wait for room, getters for deliveries."""

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self.peak = 0
        self._items: deque[Delivery] = deque()
        self._error: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        return len(self._items)

    @property
    def full(self) -> bool:
        """Whether a put would wait."""
        return len(self._items) >= self.capacity

    async def put(self, item: Delivery) -> None:
        """Append, after waiting for room. Raises the error given to `fail`."""
        while self.full:
            self.check()
            await self.change()
        self.put_nowait(item)

    def put_nowait(self, item: Delivery) -> None:
        """Append without regard to the capacity. Raises the error given to `fail`."""
        self.check()
        self._items.append(item)
        self.peak = max(self.peak, len(self._items))
        self.wake()

    async def get(self) -> Delivery:
        """The oldest delivery, after waiting for one. Raises the error given to `fail`."""
        while not self._items:
            self.check()
            await self.change()
        item = self._items.popleft()
        self.wake()
        return item

    def check(self) -> None:
        """Raises the error given to `fail`, if there was one."""
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """End the queue; the first error stays."""
        self._error = self._error or error
        self.wake()

    async def change(self) -> None:
        """Wait until something was put, taken or woken; the caller looks again."""
        # One future per waiter: an Event shared by getters would stay set between two of them.
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)

    def wake(self) -> None:
        """Let everybody who waits look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
