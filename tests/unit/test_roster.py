"""The restart policy and the silence rule, as tables."""

from __future__ import annotations

import itertools

import pytest

from asyncrl.actor.health import State
from asyncrl.actor.roster import POLICY, ROLES, Ending, Fate, MemberState, Roster, ending_of
from asyncrl.errors import AsyncrlError, ConfigError, DataError, NumericsError, PluginError, RunError

ENDS = {
    Ending.FINISHED: (0, False),
    Ending.SIGNAL: (-9, False),
    Ending.FAILED: (1, False),
    Ending.FINAL: (1, True),
    Ending.CONFIG: (2, False),
}
"""(exit code, whether the last words were final) of each ending."""


def ended(roster: Roster, member: MemberState, ending: Ending) -> Fate:
    """The member ends that way."""
    code, member.final = ENDS[ending]
    return roster.ended(member, code)


def test_every_role_has_a_rule_for_every_ending() -> None:
    assert set(POLICY) == set(itertools.product(ROLES, Ending))
    assert {ending: ending_of(*ENDS[ending][:1], final=ENDS[ending][1]) for ending in ENDS} == {
        ending: ending for ending in ENDS
    }


@pytest.mark.parametrize(("role", "ending"), list(itertools.product(ROLES, Ending)))
def test_what_follows_an_end(role: str, ending: Ending) -> None:
    hand_written = {
        Ending.FINISHED: Fate.EXPECTED,
        Ending.SIGNAL: Fate.RESTART,
        Ending.FAILED: Fate.RESTART,
        Ending.FINAL: Fate.FAIL,
        Ending.CONFIG: Fate.FAIL,
    }
    roster = Roster(max_restarts=2)
    member = roster.join(role, role, "a")
    assert ended(roster, member, ending) is hand_written[ending]
    restarts = hand_written[ending] is Fate.RESTART
    assert member.state is (State.RESTARTING if restarts else State.RETIRED)
    # The budget belongs to the name, not to the life.
    if restarts:
        assert ended(roster, roster.join(role, role, "b"), ending) is Fate.RESTART
        last = roster.join(role, role, "c")
        assert ended(roster, last, ending) is Fate.FAIL
        assert roster.spent(last) == " (restarted 2 times before; run.max_restarts = 2)"


@pytest.mark.parametrize("ending", list(Ending))
def test_an_end_that_was_asked_for_is_expected(ending: Ending) -> None:
    roster = Roster(max_restarts=2)
    attached = roster.join("far", "generator", "a", attached=True)
    leaving = roster.join("near", "generator", "b")
    leaving.leaving = True
    assert ended(roster, attached, ending) is Fate.EXPECTED
    assert ended(roster, leaving, ending) is Fate.EXPECTED
    member = roster.join("buffer", "buffer", "c")
    roster.ending = True
    assert ended(roster, member, ending) is Fate.EXPECTED


def test_which_errors_another_try_would_repeat() -> None:
    final = {ConfigError, PluginError, DataError, NumericsError}
    assert all(error.final for error in final)
    assert not AsyncrlError.final
    assert not RunError.final


def silent(roster: Roster, now: float, *, stopped: str = "") -> list[str]:
    """Names of the silent, looked for every half second."""
    found = roster.silent(
        now, every_s=0.5, heartbeat_s=0.5, dead_after_s=3.0, start_s=100.0, stopped={stopped}
    )
    return [member.name for member, _ in found]


def test_only_silence_beyond_the_limit_counts() -> None:
    roster = Roster(max_restarts=1)
    roster.join("g", "generator", "a", now=0.0)
    roster.join("far", "generator", "b", attached=True, now=0.0)
    # It has not reported yet: it may be loading a model.
    assert [silent(roster, now / 2) for now in range(100)] == [[]] * 100
    roster.heard("g", 50.0)
    roster.heard("far", 50.0)
    looks = {now / 2: silent(roster, now / 2) for now in range(100, 108)}
    assert [now for now, names in looks.items() if names] == [53.5], looks
    # A report that was under way when it was killed brings nobody back.
    member = roster.members["g"]
    roster.heard("g", 53.6)
    member.health.report(53.6, verified=True)
    assert member.state is State.DEAD
    assert silent(roster, 54.0) == []


def test_three_missed_reports_make_a_suspect_and_an_attached_one_is_never_killed() -> None:
    roster = Roster(max_restarts=1)
    members = [roster.join(name, "generator", "a", attached=name == "far") for name in ("near", "far")]
    for member in members:
        roster.heard(member.name, 1.0)
        member.health.report(1.0, verified=True)
    assert [silent(roster, now) for now in (1.0, 1.5, 2.0)] == [[]] * 3
    assert [m.state for m in members] == [State.HEALTHY] * 2
    assert silent(roster, 2.5) == []
    assert [m.state for m in members] == [State.SUSPECT] * 2
    assert [silent(roster, now) for now in (3.0, 3.5, 4.0, 4.5, 5.0)] == [[], [], [], ["near"], []]
    assert [m.state for m in members] == [State.DEAD, State.SUSPECT]


def test_the_next_life_of_a_retired_name_is_another_member() -> None:
    roster = Roster(max_restarts=1)
    first = roster.join("g", "generator", "a")
    assert ended(roster, first, Ending.SIGNAL) is Fate.RESTART
    second = roster.join("g", "generator", "b")
    assert second.health is first.health
    assert (second.state, second.restarts) == (State.STALE, 1)
    second.leaving = True
    ended(roster, second, Ending.FINISHED)
    third = roster.join("g", "generator", "c")
    assert (second.state, third.state, third.restarts) == (State.RETIRED, State.STALE, 0)


def test_a_death_is_counted_by_reason_and_one_that_we_caused_costs_nothing() -> None:
    roster = Roster(max_restarts=1, restart_window_s=100.0)
    for number in range(3):
        member = roster.join("g", "generator", f"slow{number}", now=0.0)
        member.killed_for, member.killed_by_us = "slowness", True
        assert ended(roster, member, Ending.SIGNAL) is Fate.RESTART
    assert ended(roster, roster.join("g", "generator", "a"), Ending.FAILED) is Fate.RESTART
    assert roster.acquit({"a"}) == [roster.members["g"]]
    assert ended(roster, roster.join("g", "generator", "b"), Ending.SIGNAL) is Fate.RESTART
    well = roster.join("g", "generator", "c", now=0.0)
    well.health.report(1.0, verified=True)
    assert roster.ended(well, -9, now=101.0) is Fate.RESTART
    last = roster.join("g", "generator", "d")
    assert ended(roster, last, Ending.SIGNAL) is Fate.FAIL
    assert last.budget.deaths == {"slowness": 3, "exit code 1": 1, "signal 9": 3}


def test_one_that_never_reports_is_given_up_after_its_start_deadline() -> None:
    roster = Roster(max_restarts=1)
    roster.join("g", "generator", "a", now=0.0)
    assert [n for n in range(220) if silent(roster, n / 2)] == [201], "once"


def test_one_that_reports_that_it_loads_may_be_silent_until_its_start_deadline() -> None:
    """Fails when a report makes its sender one that is ready, whatever it says."""
    roster = Roster(max_restarts=1)
    roster.join("g", "generator", "a", now=0.0)
    roster.heard("g", 10.0, ready=False)
    assert [n / 2 for n in range(300) if silent(roster, n / 2)] == [110.5]


@pytest.mark.parametrize("attached", [False, True], ids=["own", "attached"])
def test_one_that_is_stopped_loads_nothing(*, attached: bool) -> None:
    """Fails when a stopped process is given the time of one that loads, or one that was continued is not."""
    roster = Roster(max_restarts=1)
    roster.join("g", "generator", "a", attached=attached, now=0.0)
    assert [silent(roster, n / 2, stopped="g") for n in range(6)] == [[]] * 6
    assert [silent(roster, n / 2) for n in range(6, 12)] == [[]] * 6
    looks = {n / 2: silent(roster, n / 2, stopped="g") for n in range(12, 24)}
    assert [now for now, names in looks.items() if names] == ([] if attached else [9.5])


def test_one_that_reports_is_missed_by_its_silence_alone() -> None:
    """Fails when a stand-still that it has reported after counts together with the next one."""
    roster = Roster(max_restarts=1)
    roster.join("g", "generator", "a", now=0.0)
    roster.heard("g", 0.0)
    assert [silent(roster, n / 2, stopped="g") for n in range(6)] == [[]] * 6
    roster.heard("g", 2.6)
    assert [n / 2 for n in range(6, 20) if silent(roster, n / 2, stopped="g")] == [6.0]


def test_a_stopped_one_is_not_charged_for_the_time_in_which_the_supervisor_stood_still() -> None:
    roster = Roster(max_restarts=1)
    roster.join("g", "generator", "a", now=0.0)
    assert silent(roster, 1.0, stopped="g") == []
    assert silent(roster, 3.0, stopped="g") == []
    # One second more than usual without a look.
    assert [n / 2 for n in range(7, 20) if silent(roster, n / 2, stopped="g")] == [5.5]


def test_one_that_said_goodbye_may_clean_up_in_silence() -> None:
    roster = Roster(max_restarts=1)
    member = roster.join("g", "generator", "a", now=0.0)
    roster.heard("g", 1.0)
    member.said_why = True
    member.health.report(1.0, verified=True)
    assert [silent(roster, n / 2) for n in range(40)] == [[]] * 40


def test_the_time_in_which_the_supervisor_stood_still_is_not_charged() -> None:
    roster = Roster(max_restarts=1)
    roster.join("g", "generator", "a", now=0.0)
    roster.heard("g", 0.9)
    assert silent(roster, 1.0) == []
    # Two seconds and a bit without a look: it was the supervisor that was stopped, for one more than usual.
    assert silent(roster, 3.25) == []
    assert [n / 2 for n in range(7, 20) if silent(roster, n / 2)] == [5.5]


def test_a_supervisor_that_stood_still_for_long_hears_everybody_anew() -> None:
    """Fails when a silence from before counts on: reports said to a stopped supervisor may be lost."""
    roster = Roster(max_restarts=1)
    roster.join("g", "generator", "a", now=0.0)
    roster.heard("g", 0.5)
    for looked in (1.0, 1.5, 2.0, 2.5, 3.0):
        assert silent(roster, looked) == []
    assert silent(roster, 13.0) == []
    assert [n / 2 for n in range(27, 40) if silent(roster, n / 2)] == [16.5]
