"""The health of a member as a machine, what makes one slow, and how often one may be started again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncrl.actor.budget import FIRST_BACKOFF_S, JITTER, MAX_BACKOFF_S, Budget
from asyncrl.actor.health import NEXT, SLOWNESS, WELL_REPORTS, Doubt, Health, State
from asyncrl.actor.slowness import BUSY, LAG_WINDOW_S, LAGS, WINDOW_S, Culling, Paces
from asyncrl.obs.view import MemberUpdate

DOUBTS = st.dictionaries(st.sampled_from([d for d in Doubt if d is not Doubt.SILENT]), st.just("why"))


class Lives(RuleBasedStateMachine):
    """Anything may happen in any order; a shadow remembers what was shown since the present life began.

    Fails when DEAD may be left by a report, when STALE is left by one that verifies nothing, when RETIRED is
    left at all, and when `begin` keeps what an earlier life has shown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.health = Health(self.now)
        self.before = self.health.state
        self.verified = False
        self.retired = False

    @rule(seconds=st.floats(0, 10))
    def time(self, seconds: float) -> None:
        self.now += seconds

    @rule(verified=st.booleans(), doubts=DOUBTS)
    def report(self, verified: bool, doubts: dict[Doubt, str]) -> None:
        alive = self.health.alive
        self.health.report(self.now, verified=verified, doubts=doubts)
        self.verified |= verified and alive

    @rule(seconds=st.floats(0, 10))
    def silent(self, seconds: float) -> None:
        self.health.silent(self.now, seconds=seconds, suspect_after_s=3.0)

    @rule(what=st.sampled_from(["died", "restart", "begin"]))
    def event(self, what: str) -> None:
        to = {"died": State.DEAD, "restart": State.RESTARTING, "begin": State.STALE}[what]
        before = self.health.state
        again = before is to is State.DEAD
        if to in NEXT[before] or again:
            getattr(self.health, what)(self.now)
            self.verified &= what != "begin"
            assert self.health.state is to
        else:
            with pytest.raises(ValueError, match=f"{before} -> {to}"):
                getattr(self.health, what)(self.now)
            assert self.health.state is before

    @precondition(lambda self: self.health.state is not State.HEALTHY)
    @rule()
    def retire(self) -> None:
        self.health.retire(self.now)
        self.retired = True

    @invariant()
    def sound(self) -> None:
        state = self.health.state
        if state is not self.before:
            assert state in NEXT[self.before]
        assert not self.retired or state is State.RETIRED
        assert state not in {State.HEALTHY, State.SUSPECT} or self.verified
        assert (state is State.SUSPECT) == bool(self.health.why)
        assert (self.health.slow_since is not None) <= (state is State.SUSPECT)
        self.before = state


TestLives = Lives.TestCase


def test_from_dead_to_healthy_every_way_leads_through_stale() -> None:
    """Fails when NEXT gets a short cut."""
    reached, frontier = {State.DEAD}, [State.DEAD]
    while frontier:
        for state in NEXT[frontier.pop()] - reached - {State.STALE}:
            reached.add(state)
            frontier.append(state)
    assert reached == {State.DEAD, State.RESTARTING, State.RETIRED}
    assert NEXT[State.RETIRED] == frozenset()
    assert [state for state, after in NEXT.items() if State.HEALTHY in after] == [State.STALE, State.SUSPECT]
    assert [state for state, after in NEXT.items() if State.SUSPECT in after] == [State.HEALTHY]


def healthy() -> Health:
    health = Health(0.0)
    health.report(1.0, verified=True)
    assert health.state is State.HEALTHY
    return health


def test_one_good_report_does_not_clear_a_suspect() -> None:
    health = healthy()
    health.silent(4.0, seconds=2.9, suspect_after_s=3.0)
    assert health.state is State.HEALTHY, "below the threshold"
    health.silent(4.1, seconds=3.0, suspect_after_s=3.0)
    assert (health.state, health.why) == (State.SUSPECT, "nothing was heard of it for 3.0 s")
    for number in range(1, WELL_REPORTS):
        health.report(5.0 + number, verified=True)
    assert health.state is State.SUSPECT
    health.report(9.0, verified=True, doubts={Doubt.SLOW: "slow"})
    for number in range(1, WELL_REPORTS + 1):
        assert health.state is State.SUSPECT, "the count began anew"
        health.report(9.0 + number, verified=True)
    assert (health.state, health.why) == (State.HEALTHY, "")


def test_how_long_one_has_been_slow_is_counted_from_the_first_doubt() -> None:
    health = healthy()
    health.silent(4.0, seconds=3.0, suspect_after_s=3.0)
    assert health.slow_since is None, "silence is no slowness"
    health.report(5.0, verified=True, doubts={Doubt.SLOW: "slow"})
    health.report(6.0, verified=True)
    health.report(7.0, verified=True, doubts={Doubt.LOADING: "loads"})
    assert health.slow_since == 5.0
    for number in range(WELL_REPORTS):
        health.report(8.0 + number, verified=True)
    assert health.slow_since is None
    assert frozenset(Doubt) - {Doubt.SILENT} == SLOWNESS


# Slowness.


class Fleet:
    """Generators that report every second."""

    def __init__(self, *names: str) -> None:
        self.paces = Paces()
        self.now = 0.0
        self.tokens = dict.fromkeys(names, 0)

    def pass_second(
        self, rates: dict[str, int], held: dict[str, int], **more: float
    ) -> dict[str, set[Doubt]]:
        """What each generator is suspected of after one more second."""
        self.now += 1.0
        found = {}
        for name, tokens in self.tokens.items():
            self.tokens[name] = tokens + rates[name]
            update = MemberUpdate(
                name=name,
                role="generator",
                state="running",
                generated_tokens=self.tokens[name],
                held=held[name],
            )
            found[name] = set(self.paces.report(update, self.now))
        return found

    def run(self, rates: dict[str, int], held: dict[str, int], *, seconds: int = 20) -> dict[str, set[Doubt]]:
        """The same, after so many."""
        return [self.pass_second(rates, held) for _ in range(seconds)][-1]


SAME = {"a": 8, "b": 8, "c": 8}


def test_one_of_three_that_is_far_slower_is_found_after_a_whole_window() -> None:
    fleet = Fleet("a", "b", "c")
    rates = {"a": 100, "b": 100, "c": 24}
    seconds = [fleet.pass_second(rates, SAME)["c"] for _ in range(20)]
    first = next(number for number, doubts in enumerate(seconds) if doubts)
    assert first == WINDOW_S, "the first report is at 0"
    assert fleet.run(rates, SAME) == {"a": set(), "b": set(), "c": {Doubt.SLOW}}


@pytest.mark.parametrize(
    ("rates", "held"),
    [
        pytest.param({"a": 100, "b": 100, "c": 26}, SAME, id="a little above a quarter"),
        pytest.param({"a": 100, "b": 100, "c": 12}, {"a": 8, "b": 8, "c": 1}, id="little to do"),
        pytest.param({"a": 100, "b": 100, "c": 100}, {"a": 8, "b": 8, "c": 64}, id="much to do"),
        pytest.param({"a": 100, "b": 100, "c": 0}, {"a": 8, "b": 8, "c": 0}, id="nothing to do"),
        pytest.param({"a": 5, "b": 5, "c": 5}, SAME, id="all slow"),
        pytest.param({"a": 0, "b": 0, "c": 0}, SAME, id="all at a standstill"),
        pytest.param({"a": 100, "b": 100, "c": 10}, {"a": 0, "b": 0, "c": 8}, id="nobody to compare with"),
    ],
)
def test_nobody_is_slow(rates: dict[str, int], held: dict[str, int]) -> None:
    assert Fleet("a", "b", "c").run(rates, held, seconds=40) == {"a": set(), "b": set(), "c": set()}


def test_of_two_the_slower_one_is_slow_and_stays_so_until_it_is_half_as_fast() -> None:
    fleet = Fleet("a", "b")
    assert fleet.run({"a": 100, "b": 0}, {"a": 8, "b": 8}) == {"a": set(), "b": {Doubt.SLOW}}
    assert fleet.run({"a": 100, "b": 40}, {"a": 8, "b": 8})["b"] == {Doubt.SLOW}
    assert fleet.run({"a": 100, "b": 60}, {"a": 8, "b": 8})["b"] == set()
    assert fleet.run({"a": 100, "b": 40}, {"a": 8, "b": 8})["b"] == set()


def test_a_next_life_is_not_judged_by_the_one_before() -> None:
    fleet = Fleet("a", "b")
    assert fleet.run({"a": 100, "b": 0}, {"a": 8, "b": 8})["b"]
    fleet.paces.forget("b")
    fleet.tokens["b"] = 0
    assert not fleet.run({"a": 100, "b": 0}, {"a": 8, "b": 8}, seconds=int(WINDOW_S * BUSY))["b"]


def test_a_load_is_slow_against_what_others_took() -> None:
    paces = Paces()

    def loads(name: str, **values: float) -> set[Doubt]:
        update = MemberUpdate(name=name, role="generator", state="running", **values)  # type: ignore[arg-type]
        return set(paces.report(update, 1.0))

    assert loads("a", loading_s=100.0) == set(), "nobody has loaded anything yet"
    for name, seconds in {"b": 1.0, "c": 2.0, "d": 4.0}.items():
        assert loads(name, load_s=seconds) == set()
    assert loads("a", loading_s=7.9) == set()
    assert loads("a", loading_s=8.0) == {Doubt.LOADING}
    assert loads("b", load_s=0.01) == loads("c", load_s=0.01) == set()
    assert loads("a", loading_s=4.9) == set(), "seconds are never slow"


@pytest.mark.parametrize(("every_s", "found"), [(LAG_WINDOW_S / 2, True), (LAG_WINDOW_S / 2 + 0.1, False)])
def test_an_event_loop_has_to_stand_still_again_and_again(every_s: float, found: bool) -> None:
    paces = Paces()
    update = MemberUpdate(name="x", role="reward", state="running", lag_s=2.5)
    doubts = [Doubt.LAGGING in paces.report(update, n * every_s) for n in range(6)]
    assert doubts == [found and n >= LAGS - 1 for n in range(6)]


# Killing the slow.


def choose(culling: Culling, slow: dict[str, float], now: float, *, fleet: int = 8) -> tuple[list[str], bool]:
    names, words = culling.choose(slow, own=set("abcdef"), num_generators=fleet, now=now)
    return names, bool(words)


def test_one_slow_generator_is_killed_when_its_time_is_up() -> None:
    culling = Culling(after_s=10.0, share=0.25, window_s=100.0)
    assert choose(culling, {"a": 0.0}, 9.9) == ([], False)
    assert choose(culling, {"a": 0.0}, 10.0) == (["a"], False)


def test_a_shared_cause_kills_nobody_neither_at_once_nor_one_by_one() -> None:
    """Fails when only those that are slow now are counted, or only those that were killed."""
    culling = Culling(after_s=10.0, share=0.25, window_s=100.0)
    assert choose(culling, {"a": 0.0, "b": 0.0, "c": 9.0}, 20.0) == ([], True), "three of eight, two allowed"
    assert choose(culling, {"a": 0.0, "b": 19.0}, 20.0) == (["a"], False)
    assert choose(culling, {"b": 19.0, "c": 20.0}, 40.0) == ([], True)
    assert choose(culling, {"b": 19.0}, 40.0) == (["b"], False)
    assert choose(culling, {"c": 19.0}, 41.0) == ([], True), "two were killed a moment ago"
    assert choose(culling, {"c": 19.0}, 141.0) == (["c"], False), "that was long ago"


def test_at_least_one_may_be_killed_and_others_processes_never() -> None:
    culling = Culling(after_s=1.0, share=0.25, window_s=100.0)
    assert choose(culling, {"far": 0.0}, 9.0, fleet=2) == ([], False)
    assert choose(culling, {"a": 0.0, "far": 0.0}, 9.0, fleet=2) == ([], True), "attached ones are slow, too"
    assert choose(culling, {"a": 0.0}, 9.0, fleet=2) == (["a"], False)
    assert choose(Culling(after_s=None, share=1.0, window_s=1.0), {"a": 0.0}, 1e9) == ([], False)


# Restarts.


def grants(budget: Budget, *lives: str, well_s: float = 0.0, ours: bool = False) -> list[bool]:
    """Whether each of these lives may be followed by another."""
    return [budget.grant(life, max_restarts=3, well_s=well_s, window_s=600.0, ours=ours) for life in lives]


def test_a_budget_is_spent_and_comes_back_after_a_healthy_life() -> None:
    """Fails when the window is ignored: a run of weeks would end with its fourth unrelated death."""
    budget = Budget()
    assert grants(budget, "a", "b", "c", "d") == [True, True, True, False]
    assert grants(budget, "e", well_s=599.0) == [False]
    assert grants(budget, "f", well_s=600.0) == [True]
    assert grants(budget, "g", "h", "i") == [True, True, False]
    assert budget.restarts == 6


def test_what_was_not_its_own_doing_is_not_charged() -> None:
    budget = Budget()
    assert grants(budget, *"abcdef", ours=True) == [True] * 6
    assert grants(budget, "g", "h", "i") == [True] * 3
    assert budget.acquit("h")
    assert not budget.acquit("h")
    assert not budget.acquit("a")
    assert grants(budget, "j", "k") == [True, False]


@given(deaths=st.integers(0, 3000), restarts=st.integers(0, 10**6), name=st.text(max_size=5))
def test_the_wait_doubles_to_a_ceiling(deaths: int, restarts: int, name: str) -> None:
    """Fails without the ceiling (the wait overflows), and when the jitter is drawn from a generator."""
    budget = Budget(restarts=restarts, charged=["x"] * deaths)
    wait = budget.backoff_s(name)
    assert wait == budget.backoff_s(name)
    full = MAX_BACKOFF_S if deaths > 9 else min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** max(0, deaths - 1))
    assert (1 - JITTER) * full <= wait <= full


def test_two_names_do_not_come_back_at_the_same_moment() -> None:
    waits = {Budget(restarts=1, charged=["x"]).backoff_s(f"generator-{n}") for n in range(32)}
    assert len(waits) == 32
