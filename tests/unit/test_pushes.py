"""Training waits for a disk that is slow to take versions; nothing fails, and none is left out."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncrl.messages.control import Published, TrainerStart
from asyncrl.obs.metrics import Waits
from asyncrl.weights.publisher import MAX_SNAPSHOTS, Publisher
from asyncrl.weights.pushes import Pushes, PushSettings

WITHIN_S = 20.0


async def test_a_slow_disk_makes_training_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a snapshot is taken before there is room: the trainer died where it had to wait."""
    gate, write = threading.Event(), Publisher.write

    def slowly(self: Publisher, *args: Any, **kwargs: Any) -> Any:
        assert gate.wait(WITHIN_S)
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Publisher, "write", slowly)
    told: asyncio.Queue[int] = asyncio.Queue()
    weights = torch.zeros(3)

    async def send(message: Published) -> None:
        told.put_nowait(message.manifest.version)

    place = str(tmp_path)
    settings = PushSettings(run_id="run", directory=place, run_dir=place, keep=2, address="")
    waits = Waits()
    pushes = Pushes(settings, weights=lambda: {"w": weights}, send=send, record=lambda *_: None, waits=waits)
    await pushes.open(TrainerStart(incarnation=1))
    writing = asyncio.create_task(pushes.write())
    try:
        async with asyncio.timeout(WITHIN_S):
            for version in range(MAX_SNAPSHOTS):
                await pushes.push(version, version)
            third = asyncio.create_task(pushes.push(MAX_SNAPSHOTS, MAX_SNAPSHOTS))
            while [name for name, _ in waits.now()] != ["push"]:  # noqa: ASYNC110 - its state
                await asyncio.sleep(0)
            assert not third.done()
            gate.set()
            await third
            assert [await told.get() for _ in range(MAX_SNAPSHOTS + 1)] == list(range(MAX_SNAPSHOTS + 1))
    finally:
        gate.set()
        writing.cancel()
        await asyncio.wait([writing])
        await pushes.close()
