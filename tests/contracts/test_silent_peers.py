"""An actor whose buffer or supervisor says nothing any more ends by name; one that is late does no harm.

The peers are played by hand, and then the real ones, on a memory link, with limits of fractions of a second.
Guards that these tests were seen to fail without: `Peers.watch` among an actor's loops, both calls of
`Peers.heard`, the answers of `BufferRole._take` and of `Supervisor._telemetry`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.actor import waiting
from asyncrl.actor.base import Actor, Context
from asyncrl.actor.client import DeskActor
from asyncrl.actor.supervisor import Supervisor
from asyncrl.actor.waiting import Peers
from asyncrl.errors import ExitCode, StalledError
from asyncrl.link import Hub, ServerLink, bind
from asyncrl.messages.control import (
    Alive,
    BatchPart,
    Finish,
    Heartbeat,
    Hello,
    ToBuffer,
    TrainerStart,
    Want,
    Welcome,
)
from asyncrl.messages.supervision import Telemetry, ToSupervisor
from asyncrl.roles.buffer import BufferRole
from asyncrl.roles.trainer import TrainerRole
from asyncrl.topology.plan import Plan
from tests.desk import make_plan

EVERY_S = 0.02
LIMIT_S = 0.6
"""Of silence. A busy machine may hold a process up for a while; looks count at most twice EVERY_S each."""
LONG_S = 2.5 * LIMIT_S
"""Long enough for silence to show."""
WITHIN_S = 20.0


class Worker(DeskActor):
    """Waits for work, once it has loaded."""

    role = "reward"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.loaded = asyncio.Event()
        self.loaded.set()

    async def on_welcome(self, welcome: Welcome) -> None:
        await self.loaded.wait()

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._wait()]

    async def _wait(self) -> None:
        with self.idle("lease"):
            await asyncio.Event().wait()


def plan_of(**run: Any) -> Plan:
    """Heartbeats in quick succession."""
    plan = make_plan(trainer='backend = "scripted"\nscripted_step_s = 0.0\nprefetch_batches = 1')
    changed = msgspec.structs.replace(plan.topology.run, heartbeat_s=EVERY_S, **run)
    return msgspec.structs.replace(plan, topology=msgspec.structs.replace(plan.topology, run=changed))


def context_of(place: Path, hub: Hub, name: str, role: str, plan: Plan) -> Context:
    """One life of an actor on the hub."""
    (place / "metrics").mkdir(exist_ok=True)
    return Context(
        name=name, role=role, incarnation="life", plan=plan, run_dir=place, attempt_dir=place,
        control_address="memory://control", desk_address="memory://desk", hub=hub,
    )  # fmt: skip


def impatient(actor: Actor) -> Actor:
    """The same actor with a short limit."""
    actor.peers = Peers(actor.name, limit_s=LIMIT_S, every_s=EVERY_S)
    return actor


class Speaker:
    """A peer that reads, and answers as long as it is told to."""

    def __init__(self, link: ServerLink) -> None:
        self.speaks = True
        self.link = link
        self.heard: list[Any] = []
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            peer, message, _ = await self.link.recv()
            self.heard.append(message)
            asks = isinstance(message, Telemetry) or (isinstance(message, Heartbeat) and message.asks)
            if isinstance(message, Hello) and self.link.address == "memory://desk":
                start = TrainerStart(incarnation=1) if message.role == "trainer" else None
                await self.link.send(peer, Welcome(run_id="run", desk="one", trainer=start))
            elif asks and self.speaks:
                await self.link.send(peer, Alive())

    async def close(self) -> None:
        """The end."""
        self.reading.cancel()
        await asyncio.wait([self.reading])
        await self.link.close()


class Stage:
    """An actor between a desk and a supervisor."""

    def __init__(self, actor: Actor, desk: Speaker, supervisor: Speaker) -> None:
        self.actor, self.desk, self.supervisor = actor, desk, supervisor
        self.task = asyncio.create_task(actor.run())

    async def passes(self, seconds: float) -> bool:
        """Let time pass; whether the actor lives."""
        return not (await asyncio.wait([self.task], timeout=seconds))[0]


@asynccontextmanager
async def stage(place: Path, role: str = "reward", **run: Any) -> AsyncIterator[Stage]:
    """An actor at work."""
    hub, plan = Hub(), plan_of(**run)
    desk = Speaker(bind("memory://desk", receives=ToBuffer, hub=hub))
    supervisor = Speaker(bind("memory://control", receives=ToSupervisor, hub=hub))
    context = context_of(place, hub, "r", role, plan)
    actor = TrainerRole(context) if role == "trainer" else Worker(context)
    made = Stage(impatient(actor), desk, supervisor)
    try:
        yield made
    finally:
        if isinstance(actor, Worker):
            actor.loaded.set()
        actor.leave()
        await asyncio.wait([made.task])
        await desk.close()
        await supervisor.close()


async def test_whoever_is_answered_waits_for_work_as_long_as_it_takes(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        assert await at.passes(LONG_S), at.task.result()
        await at.desk.link.send(b"r.life", Finish(reason="enough"))
        assert await at.task is ExitCode.FINISHED


@pytest.mark.parametrize(("silent", "name"), [("desk", "the buffer"), ("supervisor", "the supervisor")])
async def test_a_peer_that_says_nothing_any_more_ends_the_actor(
    tmp_path: Path, silent: str, name: str
) -> None:
    async with stage(tmp_path) as at:
        assert await at.passes(LIMIT_S)
        getattr(at, silent).speaks = False
        with pytest.raises(StalledError, match=rf"^r: {name} was silent for .*launch --resume RUN"):
            async with asyncio.timeout(WITHIN_S):
                await at.task


@pytest.mark.parametrize("silent", ["desk", "supervisor"])
async def test_a_peer_that_stood_still_for_less_does_no_harm(tmp_path: Path, silent: str) -> None:
    async with stage(tmp_path) as at:
        peer: Speaker = getattr(at, silent)
        for _ in range(4):
            peer.speaks = False
            assert await at.passes(LIMIT_S / 3), at.task.result()
            peer.speaks = True
            assert await at.passes(LIMIT_S / 3), at.task.result()


async def test_nobody_asks_who_does_not_read_yet(tmp_path: Path) -> None:
    """Fails when every heartbeat asks: answers pile up while a trainer loads, until messages are lost."""
    async with stage(tmp_path) as at:
        assert isinstance(at.actor, Worker)
        at.actor.loaded.clear()
        assert await at.passes(LONG_S), "nor is the buffer's silence counted"
        beats = [message for message in at.desk.heard if isinstance(message, Heartbeat)]
        assert beats
        assert not any(beat.asks for beat in beats)
        at.actor.loaded.set()
        assert await at.passes(LIMIT_S / 2)
        assert isinstance(at.desk.heard[-1], Heartbeat)
        assert at.desk.heard[-1].asks


async def test_the_rest_of_a_batch_is_owed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a trainer waits for piece 2 as it waits for a batch: as long as the buffer lives."""
    monkeypatch.setattr(waiting, "WATCHDOG_S", 0.0)
    async with stage(tmp_path, "trainer", stall_s=LIMIT_S) as at:
        async with asyncio.timeout(WITHIN_S):
            while not any(isinstance(m, Want) for m in at.desk.heard):  # noqa: ASYNC110 - its state
                await asyncio.sleep(0)
        assert await at.passes(LONG_S), at.task.result()
        await at.desk.link.send(b"r.life", BatchPart(batch=0, part=0, num_parts=2, groups=[], num_bytes=0))
        with pytest.raises(StalledError, match=r"^r: waited 0.6 s for .* piece 2 of 2 of batch 0"):
            async with asyncio.timeout(WITHIN_S):
                await at.task


class Cluster:
    """A worker between the real buffer and the real supervisor."""

    def __init__(self, place: Path) -> None:
        hub, plan = Hub(), plan_of()
        self.supervisor = Supervisor(plan, launcher=None, run_dir=place, address="")  # type: ignore[arg-type]
        self.supervisor._link = bind("memory://control", receives=ToSupervisor, hub=hub)
        for name, role in (("buffer", "buffer"), ("r", "reward")):
            self.supervisor.roster.join(name, role, "life")
        self.supervising = asyncio.create_task(self.supervisor._read())
        self.buffer = BufferRole(context_of(place, hub, "buffer", "buffer", plan))
        self.worker = impatient(Worker(context_of(place, hub, "r", "reward", plan)))
        self.living = asyncio.create_task(impatient(self.buffer).run())
        self.working = asyncio.create_task(self.worker.run())

    async def close(self) -> None:
        """The end, of whatever still lives."""
        self.supervising.cancel()
        self.worker.leave()
        self.buffer.leave()
        await asyncio.wait([self.supervising, self.working, self.living])
        await self.supervisor._link.close()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """All three at work."""
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        await made.close()


async def test_the_real_peers_answer(cluster: Cluster) -> None:
    """A worker lives between the real buffer and the real supervisor, and not without either's answers."""
    assert not (await asyncio.wait([cluster.living, cluster.working], timeout=LONG_S))[0]
    cluster.worker.leave()
    await asyncio.wait([cluster.working])
    cluster.supervising.cancel()
    with pytest.raises(StalledError, match=r"^buffer: the supervisor was silent"):
        async with asyncio.timeout(WITHIN_S):
            await cluster.living


async def test_who_has_not_heard_the_end_hears_it_with_its_next_heartbeat(cluster: Cluster) -> None:
    """Fails when every heartbeat of a finished run is answered with Alive: the word can vanish."""
    assert not (await asyncio.wait([cluster.living, cluster.working], timeout=LIMIT_S))[0]
    # As the pump ends a run, except for the Finish, which has vanished.
    cluster.buffer.ledger.finished = True
    cluster.buffer.ledger.book.row("meta", "target", 0)
    cluster.buffer._changed.set()
    async with asyncio.timeout(WITHIN_S):
        assert await cluster.working is ExitCode.FINISHED
