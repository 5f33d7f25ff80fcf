"""A generator that drains asks for nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from asyncrl.messages.control import Want, Welcome
from tests.support.roles import idle_generator


async def test_a_draining_generator_gives_no_credit_whoever_asks_for_it(tmp_path: Path) -> None:
    """Fails when it does: it is leased anew what it hands back, until its drain is given up."""
    role = idle_generator(tmp_path)
    role.version = (1, 0)
    said: asyncio.Queue[msgspec.Struct] = asyncio.Queue()

    async def send(message: msgspec.Struct, _frames: object = ()) -> None:
        said.put_nowait(message)

    role.send = send  # type: ignore[method-assign]
    role.leave = lambda *_: None  # type: ignore[method-assign]
    welcome = Welcome(run_id="run")
    assert [m.samples for m, _ in role.restate(welcome) if isinstance(m, Want)] == [role.capacity]
    await role.drain()
    assert [m.samples for m, _ in role.restate(welcome) if isinstance(m, Want)] == [0]
    role.leased._free(3, 100)
    crediting = asyncio.create_task(role._credit())
    async with asyncio.timeout(5):
        want = await said.get()
    crediting.cancel()
    assert isinstance(want, Want)
    assert (want.samples, want.num_bytes) == (0, 0)
    role.metrics.close()
