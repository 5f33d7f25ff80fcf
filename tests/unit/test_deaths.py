"""What a death cost is told from what is committed: kept tokens exactly, lost ones as a bound."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ledger_cast import Generator
from ledger_world import Setup, World

from asyncrl.buffer import deaths
from asyncrl.buffer.audit_story import story
from asyncrl.buffer.config import LedgerConfig
from asyncrl.buffer.deaths import DeathRow
from asyncrl.messages.sample import Status
from asyncrl.obs.catalogue import CATALOGUE

CONFIG = LedgerConfig(
    batch_size=2, max_staleness=1, tickets=4, num_rollout=4, progress_every_tokens=3, max_response_len=8
)
Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    worlds: list[World] = []

    def build(**changes: Any) -> World:
        ledger = msgspec.structs.replace(CONFIG, **changes)
        worlds.append(World(tmp_path / str(len(worlds)), Setup(ledger=ledger)))
        for name in ("source", "trainer", "gen-0", "reward-0"):
            worlds[-1].join(name)
        settle(worlds[-1])
        return worlds[-1]

    yield build
    for world in worlds:
        world.desk.store.close()


def settle(world: World) -> None:
    for _ in range(4):
        world.commit()
        for peer in world.peers.values():
            peer.read()
            if isinstance(peer, Generator):
                peer.swap()
        world.commit()


def advance(world: World, *tokens: int) -> None:
    """The generator's four answers get so many committed tokens each."""
    peer = world.peers["gen-0"]
    assert isinstance(peer, Generator)
    peer.read()
    for job, new in zip(list(peer.jobs.values()), tokens, strict=True):
        job.length = 8
        if new:
            peer.report(job, Status.PENDING, new=new)
    settle(world)


def rows(world: World) -> list[DeathRow]:
    world.commit()
    return deaths.deaths(world.desk.store.db)


def goodbye(world: World, reason: str) -> None:
    worker = world.desk.ledger.fleet.workers[world.peers.pop("gen-0").peer]
    world.desk.members.leave(worker, reason, world.desk.now)


@pytest.mark.parametrize(
    ("every", "bound"),
    [
        # one interval, or what is left of 8 tokens
        (3, 3 + 3 + 3 + 1),
        (6, 6 + 6 + 4 + 1),
        (2, 2 + 2 + 2 + 1),
        (100, 8 + 7 + 4 + 1),
        (0, 8 + 7 + 4 + 1),
    ],
)
def test_a_death_keeps_what_is_committed_and_loses_at_most_one_interval(
    make: Make, every: int, bound: int
) -> None:
    world = make(progress_every_tokens=every)
    advance(world, 0, 1, 4, 7)
    world.die("gen-0", seen=True)
    (row,) = rows(world)
    assert (row.name, row.reason, row.at) == ("gen-0", "killed", world.desk.now)
    assert (row.samples, row.kept, row.discarded, row.bound) == (4, 12, 0, bound)


def test_tokens_that_are_not_resumed_from_are_told_as_sampled_anew(make: Make) -> None:
    world = make(partial_rollout=False)
    advance(world, 0, 1, 4, 7)
    world.die("gen-0", seen=False)
    (row,) = rows(world)
    assert row.reason.startswith("silent for")
    assert (row.samples, row.kept, row.discarded) == (4, 0, 12)
    assert world.desk.ledger.book.totals["regenerated.tokens"] == 12


def test_who_hands_its_work_back_is_no_death(make: Make) -> None:
    world = make()
    advance(world, 1, 1, 1, 1)
    goodbye(world, "draining")
    assert rows(world) == []


def test_who_says_goodbye_while_it_runs_has_failed(make: Make) -> None:
    """An actor that an exception ends says goodbye, too: what it had sampled is lost all the same."""
    world = make()
    advance(world, 1, 1, 1, 1)
    goodbye(world, "running")
    assert [(row.name, row.samples, row.kept) for row in rows(world)] == [("gen-0", 4, 4)]


def test_a_worker_without_answers_in_the_making_costs_no_tokens(make: Make) -> None:
    world = make()
    world.die("reward-0", seen=True)
    assert [(row.name, row.samples, row.bound) for row in rows(world)] == [("reward-0", 0, 0)]
    assert deaths.cost(rows(world)) == "no answer was in the making"


def test_after_the_loss_of_a_machine_every_generator_that_held_something_has_a_row(make: Make) -> None:
    world = make()
    advance(world, 0, 1, 4, 7)
    world.crash(committed=True, survivors=False)
    assert [(row.name, row.reason, row.kept) for row in rows(world)] == [("gen-0", "the run was resumed", 12)]


def test_who_stays_away_after_a_restart_of_the_desk_is_counted_once(make: Make) -> None:
    world = make()
    advance(world, 0, 1, 4, 7)
    del world.peers["gen-0"]
    world.crash(committed=True, survivors=True)
    world.tick(world.setup.ledger.dead_after_s + 1)
    world.tick(world.setup.ledger.dead_after_s + 1)
    assert [(row.name, row.kept) for row in rows(world)] == [("gen-0", 12)]


def test_a_finished_run_has_nothing_to_lose(make: Make) -> None:
    world = make()
    world.finish()
    world.die("gen-0", seen=True)
    assert rows(world) == []


def test_totals_words_and_metrics_are_those_of_the_rows(make: Make) -> None:
    world = make()
    advance(world, 0, 1, 4, 7)
    world.die("gen-0", seen=True)
    world.join("gen-0")
    settle(world)
    world.die("gen-0", seen=True)
    found = rows(world)
    gauges = deaths.metrics(world.desk.ledger.book.totals)
    assert gauges == {
        "faults/deaths": 2,
        "faults/samples_interrupted": sum(row.samples for row in found),
        "faults/tokens_kept": sum(row.kept for row in found),
        "faults/tokens_lost_bound": sum(row.bound for row in found),
    }
    assert all(CATALOGUE.find(name) for name in gauges)
    words = deaths.in_words(found)
    assert words.startswith(f"2 deaths: {gauges['faults/samples_interrupted']} answers interrupted, ")
    assert f"at most {gauges['faults/tokens_lost_bound']} lost (gen-0: killed; gen-0: killed)" in words
    assert deaths.in_words([]) == ""
    seen = msgspec.structs.replace(found[0], reason="gen-0 was killed by signal 9; its output is in FILE")
    assert deaths.in_words([seen]).endswith("lost (gen-0 was killed by signal 9)")


def test_the_story_of_a_group_tells_what_the_death_cost(make: Make) -> None:
    world = make()
    advance(world, 0, 1, 4, 7)
    world.die("gen-0", seen=True)
    world.commit()
    told = story(world.desk.store.path.parent, 0)
    assert sum("gen-0 was lost: 4 answers interrupted, 12 tokens of them kept, at most 10" in x for x in told)


def test_a_run_from_before_there_was_a_table_tells_of_none() -> None:
    assert deaths.deaths(sqlite3.connect(":memory:")) == []
