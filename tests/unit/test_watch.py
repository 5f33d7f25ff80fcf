"""What the supervisor makes of reports: who is trusted, what is shown, who is killed and on whose account."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from asyncrl.actor.health import State
from asyncrl.actor.roster import Roster
from asyncrl.actor.slowness import WINDOW_S
from asyncrl.actor.watch import LOOK_S, Watch
from asyncrl.obs.metrics import MetricsWriter
from asyncrl.obs.view import MemberUpdate, NoteUpdate, Update
from asyncrl.topology.schema import RunConfig


class World:
    """A watch, what it showed and whom it had killed."""

    def __init__(self, path: Path) -> None:
        self.roster = Roster(max_restarts=1)
        self.shown: list[Update] = []
        self.killed: list[str] = []
        self.path = path
        self.metrics = MetricsWriter(path)
        self.watch = Watch(
            RunConfig(slow_after_s=3.0, restart_window_s=60.0),
            roster=self.roster,
            kill=lambda name: not self.killed.append(name),  # type: ignore[func-returns-value]
            show=self.shown.append,
            log=structlog.stdlib.get_logger(),
            record=self.metrics.write,
        )

    def report(self, name: str, now: float = 1.0, *, role: str = "generator", **facts: Any) -> State:
        """It reports; how it stands then."""
        if name not in self.roster.members:
            self.roster.join(name, role, "a")
        self.roster.heard(name, now)
        self.watch.heard(MemberUpdate(name=name, role=role, **{"state": "running", **facts}), now)
        return self.roster.members[name].state


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "supervisor.jsonl")
    yield world
    world.metrics.close()


def test_a_generator_is_trusted_once_it_serves_what_it_has_verified(world: World) -> None:
    """Fails when version 0 counts as none, a version without a digest as one, or one that loads as ready."""
    assert world.report("g", version=None) is State.STALE
    assert world.report("g", version=-1, digest="") is State.STALE
    assert world.report("g", version=3, digest="") is State.STALE
    assert world.report("g", version=0, digest="abc") is State.HEALTHY
    assert world.report("r", role="reward", state="starting") is State.STALE
    assert world.report("r", role="reward") is State.HEALTHY


def test_people_see_the_supervisors_judgement_beside_what_a_member_says(world: World) -> None:
    words = []
    world.report("g", version=-1)
    world.report("g", version=0, digest="abc")
    world.roster.members["g"].health.silent(9.0, seconds=8.0, suspect_after_s=3.0)
    world.watch.look(1.0 + LOOK_S)
    words = [update.word for update in world.shown if isinstance(update, MemberUpdate)]
    assert words == ["stale", "running", "suspect"]
    assert [u.text for u in world.shown if isinstance(u, NoteUpdate)] == [
        "g is suspect: nothing was heard of it for 8.0 s"
    ]
    (row,) = world.watch.describe()
    assert (row["state"], row["why"]) == ("suspect", "nothing was heard of it for 8.0 s")


def test_a_lie_about_ones_own_health_is_not_shown(world: World) -> None:
    world.report("g", version=-1, health="healthy")
    assert world.watch.reports["g"].health == "stale"


def test_one_that_is_slow_for_too_long_is_killed_on_our_account(world: World) -> None:
    for second in range(40):
        tokens = {"a": 100 * second, "b": 100 * second, "c": 2 * second}
        for name, number in tokens.items():
            if name not in world.killed:
                world.report(name, float(second), version=0, digest="x", held=4, generated_tokens=number)
        world.watch.look(float(second))
        if world.killed:
            break
    assert world.killed == ["c"]
    assert second == pytest.approx(WINDOW_S + 3.0, abs=1.0)
    member = world.roster.members["c"]
    assert (member.state, member.killed_by_us, member.killed_for) == (State.DEAD, True, "slowness")
    world.roster.ended(member, -9, now=40.0)
    world.watch.gone(member)
    assert (member.state, world.watch.in_words()) == (State.RESTARTING, "c 1 restarts (1 slowness)")
    last = json.loads(world.path.read_text().splitlines()[-1])
    assert (last["fleet/healthy"], last["fleet/restarting"], last["fleet/deaths"]) == (2, 1, 1)


def test_one_that_is_silent_is_killed_on_its_own_account(world: World) -> None:
    world.report("g", 0.0, version=0, digest="x")
    for look in range(20):
        world.watch.look(look * LOOK_S)
    member = world.roster.members["g"]
    assert world.killed == ["g"], "once"
    assert (member.killed_by_us, member.killed_for) == (False, "silence")
    assert member.last_words.startswith("silent for 5.5 s")
