"""Memory is bounded: whoever does not read is not sent more, up to the source, and bodies lie on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.buffer.store import RECENT_BYTES
from asyncrl.errors import ExitCode
from asyncrl.topology.plan import Plan
from tests.support.books import assert_closed, one, pairs, rows
from tests.support.command import RUN_S, Run, launched
from tests.support.processes import wait_until
from tests.support.recovery import stopped
from tools.bench import peers
from tools.bench.buffer import joined, plan, serving

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

MIB = 1 << 20
STILL_S = 1.5
"""Nothing has moved for so long: nothing will."""
FLAT_BYTES = 2 * MIB
"""What a process may grow by while it stands still (it goes on writing metrics)."""
TICKETS = 3 * 4
LEAD = 4
"""Prompts that are kept ready beyond those that tickets are for: one batch."""


def rss_bytes(pid: int, *, peak: bool = False) -> int:
    """Resident memory of a process, now or at most since it began."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) << 10


def position(run: Run) -> tuple[Any, ...]:
    """Where a run is: prompts, tokens, batches."""
    return (
        one(run.path, "select max(group_id) from groups"),
        one(run.path, "select sum(tokens) from samples"),
        one(run.path, "select max(batch) from trained"),
        one(run.path, "select count(*) from leases"),
    )


def is_held_back(run: Run, names: Sequence[str]) -> bool:
    """The source has handed in all it was asked for, only these hold leases, and no batch can be trained."""
    holders = {
        name for (name,) in rows(run.path, "select distinct worker from leases where ended_at is null")
    }
    untrained = one(run.path, "select count(*) from batches where batch not in (select batch from trained)")
    at_hand = one(run.path, "select count(*) from groups where lane = 'train' and reason is null")
    return at_hand == TICKETS + LEAD and holders <= {*names} and ("trainer" in names or not untrained)


def wait_for_standstill(run: Run, names: Sequence[str]) -> tuple[Any, ...]:
    """Wait until nothing can move, and has not moved for STILL_S."""
    last, since = position(run), time.monotonic()

    def stands() -> bool:
        nonlocal last, since
        now = position(run)
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > STILL_S and is_held_back(run, names)

    wait_until(stands, "the run to stand still", deadline_s=RUN_S, show=lambda: run.text)
    return last


def assert_flat(run: Run) -> None:
    """Buffer and source do not grow for STILL_S."""
    watched = {name: run.pid(name) for name in ("buffer", "source")}
    first = {name: rss_bytes(pid) for name, pid in watched.items()}
    most = dict(first)
    ends = time.monotonic() + STILL_S

    def later() -> bool:
        for name, pid in watched.items():
            most[name] = max(most[name], rss_bytes(pid))
        return time.monotonic() > ends

    wait_until(later, "the time to pass")
    grown = {name: most[name] - first[name] for name in watched}
    assert all(size < FLAT_BYTES for size in grown.values()), grown


def assert_backpressure(run: Run, *names: str) -> None:
    """With these stopped the others stop by themselves, the source too, and nobody's memory grows."""
    with stopped(*(run.pid(name) for name in names)):
        before = wait_for_standstill(run, names)
        assert_flat(run)
        assert position(run) == before
        issued = one(run.path, "select count(*) from groups where lane = 'train'")
        trained = one(run.path, "select count(*) from groups where reason = 'trained'")
        assert 0 < issued - trained <= TICKETS + LEAD, "the source was not held back"
    run.until("select 1 from trained where batch > ?", before[2] + 2)


def test_nobody_grows_while_somebody_stands_still(tmp_path: Path, model: Path) -> None:
    """Fails when tickets do not hold generators back, or when the desk asks for prompts without end."""
    options = {
        "run.num_rollout": 100_000,
        "run.dead_after_s": 250.0,
        "run.stall_s": 250.0,
        "rollout.max_staleness": 2,
        "rollout.rollout_max_response_len": 200,
        "rollout.progress_every_tokens": 50,
        "generator.replicas": 2,
        "generator.scripted": {"median": 150.0, "max_tokens": 200, "vocab_size": 90},
        "trainer.backend": "scripted",
        "trainer.scripted_step_s": 0.1,
    }
    with launched(tmp_path, model, options) as run:
        run.until("select 1 from trained where batch = 4")
        buffer = run.pid("buffer")
        assert_backpressure(run, "trainer")
        settled = rss_bytes(buffer)
        assert_backpressure(run, "generator-0", "generator-1")
        with stopped(run.pid("generator-0")):
            assert_flat(run)  # the others go on, as far as what it holds lets them
        assert_backpressure(run, "reward")
        assert run.pid("buffer") == buffer
        assert rss_bytes(buffer) - settled < 8 * MIB, "the buffer grows with what it has done"
        run.interrupt()
        assert run.end() == ExitCode.DRAINED, run.text
    assert_closed(run.path, finished=False)
    lives = pairs(run.path, "select name, count(*) from members group by name")
    assert set(lives.values()) == {1}, "nobody was given up"


LONG_TOKENS = 100_000
WINDOW_BYTES = 4 * MIB
NUM_BATCHES = 16
OVERHEAD = 12 * WINDOW_BYTES
"""A window for each of the peers, in the link and in the buffer; a commit; what the allocator keeps."""


class LateTrainer(peers.Trainer):
    """Takes no batch before it is told to."""

    def __init__(self, bodies: peers.Bodies) -> None:
        super().__init__(bodies)
        self.begin = asyncio.Event()

    async def take(self, message: Any, frames: list[bytes]) -> None:
        await self.begin.wait()
        await super().take(message, frames)


def long_plan() -> Plan:
    """12 batches of 4 groups of 4 long answers may be outstanding: 150 MB."""
    base = plan(NUM_BATCHES)
    rollout = msgspec.structs.replace(
        base.topology.rollout, rollout_batch_size=4, n_samples_per_prompt=4, max_staleness=11
    )
    buffer = msgspec.structs.replace(base.topology.buffer, window_bytes=WINDOW_BYTES, segment_bytes=32 * MIB)
    topology = msgspec.structs.replace(base.topology, rollout=rollout, buffer=buffer)
    return msgspec.structs.replace(base, topology=topology, tickets=12 * 4)


async def test_long_answers_lie_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer alone, with answers of 100,000 tokens: its memory follows the windows, not the answers.

    Fails when bodies stay in memory until their batch is trained.
    """
    monkeypatch.setattr(peers, "WINDOW_BYTES", WINDOW_BYTES)
    bodies = peers.Bodies(tokens=LONG_TOKENS, group_size=4)
    outstanding = 12 * 4 * 4 * len(bodies.segment)
    trainer = LateTrainer(bodies)
    everybody = [trainer, peers.Source(bodies), peers.Reward(bodies), peers.Generator(bodies)]
    directory = tmp_path / "run"
    async with asyncio.timeout(100.0), serving(directory, long_plan()) as (child, address):
        start = rss_bytes(child.pid)
        async with joined(everybody, address, child):
            while written(directory) < outstanding:  # noqa: ASYNC110 - files have no event
                await asyncio.sleep(0.05)
            held = rss_bytes(child.pid, peak=True) - start
            trainer.begin.set()
            await trainer.reached(NUM_BATCHES)
            peak = rss_bytes(child.pid, peak=True) - start
    bound = RECENT_BYTES + OVERHEAD
    assert held < bound < outstanding, f"{held / MIB:.0f} MiB for {outstanding / MIB:.0f} MiB of answers"
    assert peak < bound < written(directory)


def written(directory: Path) -> int:
    """Bytes of bodies on disk."""
    return sum(path.stat().st_size for path in (directory / "bodies").glob("*.bin"))
