"""A push at its receiving end: a fetch whose publisher is gone does not outlast the news of it."""

from __future__ import annotations

import asyncio

import pytest

from asyncrl.engines.base import OnNewWeights
from asyncrl.engines.swap import Swapper
from asyncrl.errors import StalledError
from asyncrl.link import Hub
from asyncrl.messages.version import Manifest

GONE = Manifest(
    run_id="run",
    version=3,
    incarnation=1,
    step=3,
    digest="d",
    num_bytes=8,
    tensors=[],
    address="memory://gone",
)


async def fetch(moved: asyncio.Event, *, deadline_s: float) -> object:
    """What comes of fetching a version from a publisher that is not there."""
    swapper = Swapper(mode=OnNewWeights.KEEP, deadline_s=deadline_s, hub=Hub())
    return await swapper.swap(None, GONE, is_newest=lambda _: True, moved=moved)  # type: ignore[arg-type]


async def test_news_of_another_place_end_a_fetch_that_would_never_end() -> None:
    moved = asyncio.Event()
    fetching = asyncio.ensure_future(fetch(moved, deadline_s=60.0))
    await asyncio.sleep(0)
    assert not fetching.done()
    moved.set()
    assert await asyncio.wait_for(fetching, 10.0) is None


async def test_without_news_it_ends_by_name_at_its_deadline() -> None:
    with pytest.raises(StalledError, match=r"v3\.1: waited 0\.05 s for memory://gone"):
        await fetch(asyncio.Event(), deadline_s=0.05)


async def test_a_fetch_that_is_cancelled_leaves_nothing_running() -> None:
    fetching = asyncio.ensure_future(fetch(asyncio.Event(), deadline_s=60.0))
    await asyncio.sleep(0)
    fetching.cancel()
    await asyncio.wait([fetching])
    assert fetching.cancelled()
