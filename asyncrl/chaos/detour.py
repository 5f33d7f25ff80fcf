"""The longer ways that a message may be sent on: not at all, twice, later, after the next one.

Owns what is under way in one direction of one link, and the timers of it. Knows neither links nor orders'
moments. Nothing waits here: what is late is handed over by a call from the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from asyncrl.chaos.orders import Order

T = TypeVar("T")

SWAP_S = 1.0
"""How long a message waits for the one it is to be swapped with, unless the order says."""


class Detour(Generic[T]):
    """Messages of one direction; `late` is called with each one whose time has come by itself."""

    def __init__(self, late: Callable[[bytes, T], None]) -> None:
        self._late = late
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._held: dict[bytes, tuple[int, T]] = {}
        self._next = 0

    @property
    def pending(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._timers)

    def route(self, order: Order | None, peer: bytes, item: T) -> list[T]:
        """What goes on now, in this order, when a message of this peer comes."""
        now = [item]
        number, held = self._held.pop(peer, (-1, None))
        if held is not None:
            self._timers.pop(number).cancel()
            now.append(held)
        if order is None:
            return now
        match order.action:
            case "drop":
                del now[0]
            case "duplicate":
                now.insert(0, item)
            case "delay":
                del now[0]
                self._after(order.seconds, peer, item)
            case "swap":
                del now[0]
                self._held[peer] = (self._after(order.seconds or SWAP_S, peer, item), item)
        return now

    def _after(self, seconds: float, peer: bytes, item: T) -> int:
        number, self._next = self._next, self._next + 1
        loop = asyncio.get_running_loop()
        self._timers[number] = loop.call_later(seconds, self._due, number, peer, item)
        return number

    def _due(self, number: int, peer: bytes, item: T) -> None:
        del self._timers[number]
        if self._held.get(peer, (-1, None))[0] == number:
            del self._held[peer]
        self._late(peer, item)

    def close(self) -> None:
        """Lose what is on its way."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._held.clear()
