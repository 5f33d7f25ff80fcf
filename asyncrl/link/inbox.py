"""A bounded queue between a link's reader and the callers of `recv`.

Unlike `asyncio.Queue` it can fail: whoever waits then, on either side, gets the error at once. What was
queued before the failure is still handed out first. Getting is atomic: a cancelled `get` has taken nothing.
It is bounded in deliveries and in bytes; one that is larger than the bound passes when nothing is queued.
"""

from __future__ import annotations

import asyncio
from collections import deque

from asyncrl.link.base import Delivery


class Inbox:
    """At most `capacity` deliveries and `max_bytes`; putters wait for room, getters for deliveries."""

    def __init__(self, *, capacity: int, max_bytes: int) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Of what is queued: its bodies, and its headers where they came as bytes."""
        self.peak = 0
        self._items: deque[tuple[Delivery, int]] = deque()
        self._error: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        return len(self._items)

    def takes(self, size: int) -> bool:
        """Whether a delivery of so many bytes may be put now."""
        fits = self.num_bytes + size <= self.max_bytes or not self._items
        return fits and len(self._items) < self.capacity

    async def put(self, item: Delivery, *, size: int) -> None:
        """Append a delivery of `size` bytes, after waiting for room. Raises the error given to `fail`."""
        while not self.takes(size):
            self.check()
            await self.change()
        self.put_nowait(item, size=size)

    def put_nowait(self, item: Delivery, *, size: int) -> None:
        """Append without regard to the bounds. Raises the error given to `fail`."""
        self.check()
        self._items.append((item, size))
        self.num_bytes += size
        self.peak = max(self.peak, len(self._items))
        self.wake()

    async def get(self) -> Delivery:
        """The oldest delivery, after waiting for one. Raises the error given to `fail`."""
        while not self._items:
            self.check()
            await self.change()
        item, size = self._items.popleft()
        self.num_bytes -= size
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
