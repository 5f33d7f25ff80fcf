"""What the doctor is told of an actor's queues and events, wherever in the actor they lie."""

from __future__ import annotations

import asyncio

from asyncrl.obs.vitals import Part, events_of, queues_of


class Inner(Part):
    """A part of a part."""

    def __init__(self) -> None:
        self._deep = asyncio.Event()
        self._deep.set()


class Delivery(Part):
    """A part with a queue, an event and a part."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self._parts: asyncio.Queue[int] = asyncio.Queue()
        self._parts.put_nowait(1)
        self._finish = asyncio.Event()
        self.inner = Inner()


class Library:
    """A thing that an actor uses, and that is no part of it."""

    def __init__(self) -> None:
        self._jobs: asyncio.Queue[int] = asyncio.Queue()
        self._changed = asyncio.Event()


class Owner:
    """As an actor holds them."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._leases: asyncio.Queue[int] = asyncio.Queue()
        self.delivery = Delivery(self)
        self.library = Library()


def test_queues_and_events_of_parts_are_seen_and_of_nothing_else() -> None:
    """Fails when a queue that has moved into a part of a role is no longer in the doctor's report."""
    owner = Owner()
    assert queues_of(owner) == {"leases": 0, "parts": 1}
    assert events_of(owner) == {"over": False, "finish": False, "deep": True}
