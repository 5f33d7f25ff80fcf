"""A sample that ends its workers is found, alone; nothing else is ever found guilty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ledger_cast import Generator
from ledger_world import Setup, World

from asyncrl.buffer.blame import MAX_PROVEN
from asyncrl.buffer.config import LedgerConfig
from asyncrl.messages.sample import Settled, Status
from asyncrl.messages.supervision import Acquitted

CONFIG = LedgerConfig(batch_size=2, max_staleness=1, tickets=4, num_rollout=4, max_attempts=3)
POISON = (1, 1)
"""(group, sample) that ends whoever works on it."""
Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A run with these changes to `CONFIG`; closed afterwards."""
    worlds: list[World] = []

    def build(*, capacity: int = 4, **changes: Any) -> World:
        setup = Setup(ledger=msgspec.structs.replace(CONFIG, **changes), capacity=capacity)
        worlds.append(World(tmp_path / str(len(worlds)), setup))
        for name in ("source", "trainer", "gen-0", "reward-0"):
            worlds[-1].join(name)
        for _ in range(4):
            settle(worlds[-1])
        return worlds[-1]

    yield build
    for world in worlds:
        world.desk.store.close()


def settle(world: World) -> None:
    """Everybody reads; generators load what is announced; nobody works."""
    world.commit()
    for peer in world.peers.values():
        peer.read()
        if isinstance(peer, Generator):
            peer.swap()
    world.commit()


def generator(world: World) -> Generator:
    peer = world.peers["gen-0"]
    assert isinstance(peer, Generator)
    peer.read()
    return peer


def die(world: World, *, ours: bool = False) -> str:
    """The generator dies and comes back; the incarnation that died."""
    incarnation = generator(world).incarnation
    world.die("gen-0", seen=True, ours=ours)
    world.join("gen-0")
    for _ in range(3):
        settle(world)
    return incarnation


def work_until_death(world: World, *, is_poison: Callable[[tuple[int, int]], bool]) -> str:
    """Answers are finished one by one until a poisoned sample is leased; who died of it."""
    for _ in range(100):
        peer = generator(world)
        held = {(job.sample.group_id, job.sample.index) for job in peer.jobs.values()}
        if any(map(is_poison, held)):
            return die(world)
        for job in peer.free()[:1]:
            peer.report(job, Status.COMPLETED, new=job.length - job.done)
        settle(world)
        world.peers["reward-0"].work()
        settle(world)
    raise AssertionError("the poisoned sample was never leased")


def test_a_poisoned_sample_is_proven_guilty_of_all_its_deaths(make: Make) -> None:
    world = make()
    dead = []
    while world.desk.ledger.book.groups.get(POISON[0]) is not None or not dead:
        assert world.desk.members.blame.take() == [], "not proven yet"
        dead.append(work_until_death(world, is_poison=lambda sample: sample == POISON))
    assert len(dead) == 3, "its attempts"
    (proven,) = world.desk.members.blame.take()
    assert proven.incarnations == dead
    assert proven.reason.startswith("sample 1 of group 1 ended 3 workers")
    reasons = dict(
        world.desk.store.db.execute("select group_id, reason from groups where reason is not null")
    )
    assert reasons[POISON[0]] == Settled.FAILED
    assert set(reasons.values()) <= {Settled.FAILED, "trained"}
    assert list(reasons.values()).count(Settled.FAILED) == 1, "only its own group fails"
    # From the next death on nothing is remembered of what is settled.
    world.finish()
    world.die("gen-0", seen=True)
    assert world.desk.members.blame._deaths == {}


@pytest.mark.parametrize(("ours", "progress"), [(True, 0), (False, 1)])
def test_deaths_that_are_no_attempts_prove_nothing(make: Make, *, ours: bool, progress: int) -> None:
    """Our own kills, and answers that go on."""
    world = make()
    for _ in range(3):
        peer = generator(world)
        for job in peer.free():
            if progress:
                peer.report(job, Status.PENDING, new=progress)
        die(world, ours=ours)
    assert world.desk.members.blame.take() == []


def test_one_death_proves_nothing_even_where_it_is_the_last_attempt(make: Make) -> None:
    """Fails without `again`: with max_attempts = 1 every death would be some sample's doing."""
    world = make(max_attempts=1, capacity=1)
    assert len(generator(world).jobs) == 1
    die(world)
    assert world.desk.ledger.batches.refused == 1, "its group has failed"
    assert world.desk.members.blame.take() == []


def test_a_suspect_in_company_proves_nothing(make: Make) -> None:
    """A desk that comes back may give its worker more than the suspect. Fails without the look at `held`."""
    world = make()
    die(world)
    die(world)
    assert len(generator(world).jobs) == 1, "a suspect is leased alone"
    world.crash(committed=True, survivors=True)
    for _ in range(3):
        settle(world)
    generator(world).want(3, 1200)
    settle(world)
    assert len(generator(world).jobs) > 1
    die(world)
    assert world.desk.ledger.batches.refused == 1, "the suspect's group has failed"
    assert world.desk.members.blame.take() == []


def test_workers_that_die_of_everything_are_not_acquitted_for_ever(make: Make) -> None:
    """Fails without MAX_PROVEN: generators that cannot work at all would be started again without end."""
    world = make(max_refused_per_step=1000)
    proven: list[Acquitted] = []
    for _ in range(60):
        die(world)
        proven += world.desk.members.blame.take()
    failed = world.desk.ledger.batches.refused
    assert failed > 2 * MAX_PROVEN
    assert len(proven) == MAX_PROVEN


def test_failures_that_are_no_deaths_acquit_nobody_twice(make: Make) -> None:
    """An attempt that failed by a report was nobody's death; only those that were are named."""
    world = make()
    dead = [work_until_death(world, is_poison=lambda sample: sample == POISON)]
    for _ in range(100):
        peer = generator(world)
        for job in peer.free():
            bad = (job.sample.group_id, job.sample.index) == POISON
            if bad:
                peer.report(job, Status.FAILED, new=0)
                break
        else:
            for job in peer.free()[:1]:
                peer.report(job, Status.COMPLETED, new=job.length - job.done)
            settle(world)
            world.peers["reward-0"].work()
            settle(world)
            continue
        break
    settle(world)
    dead.append(work_until_death(world, is_poison=lambda sample: sample == POISON))
    (proven,) = world.desk.members.blame.take()
    assert proven.incarnations == dead
