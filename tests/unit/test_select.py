"""The staleness rule, by hand and by simulation."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.buffer.select import after, choose, feasible, first_overdue


@pytest.mark.parametrize(
    ("dues", "next_batch", "expected"),
    [
        ({}, 7, None),
        ({0: 2}, 0, None),
        ({0: 3}, 0, 0),
        ({0: 1, 1: 3}, 0, None),
        ({0: 1, 1: 4}, 0, 1),
        ({3: 6, 4: 2, 5: 3}, 1, 5),
        ({3: 1}, 4, 3),
    ],
)
def test_the_first_batch_by_which_too_much_is_due(
    dues: dict[int, int], next_batch: int, expected: int | None
) -> None:
    """With 2 groups a batch: by batch d at most 2 (d - next + 1) may be due, and nothing before next."""
    assert first_overdue(dues, next_batch, 2) == expected
    assert feasible(dues, next_batch, 2) == (expected is None)


def test_earliest_due_goes_first_and_ties_by_ordinal() -> None:
    ready = [(4, 1), (3, 9), (4, 0), (5, 2)]
    assert choose(ready, Counter({3: 1, 4: 2, 5: 1}), 3, 2) == [9, 0]


def test_a_batch_waits_for_a_group_that_could_not_be_in_time_otherwise() -> None:
    """Group 7 is due in batch 3 and not ready: batch 3 must not go without it, batch 2 may."""
    ready = [(4, 1), (4, 2)]
    dues = Counter({3: 1, 4: 2})
    assert choose(ready, dues, 3, 2) is None
    assert choose(ready, dues, 2, 2) == [1, 2]
    assert choose([*ready, (3, 7)], dues, 3, 2) == [7, 1]


def test_a_batch_is_never_cut_short() -> None:
    assert choose([(0, 0)], Counter({0: 1}), 0, 2) is None


def test_after_leaves_no_zeros() -> None:
    assert after(Counter({1: 2, 2: 1}), [1, 2]) == {1: 1}
    assert 2 not in after(Counter({2: 1}), [2])


class Run:
    """The rule alone: tickets, issues, cuts and publications as counts, without a ledger."""

    def __init__(self, *, size: int, staleness: int, interval: int, prefetch: int) -> None:
        self.size, self.staleness, self.interval, self.prefetch = size, staleness, interval, prefetch
        self.tickets = (staleness + 1) * size
        self.batch = self.trained = self.published = 0
        self.serving = [0, 0]
        """Version of each generator; one may lag."""
        self.working: dict[int, tuple[int, int]] = {}
        """group -> (issue version, oldest token's version)."""
        self.ready: dict[int, tuple[int, int]] = {}
        self.next_group = 0

    @property
    def dues(self) -> Counter[int]:
        live = [*self.working.values(), *self.ready.values()]
        return Counter(version + self.staleness for version, _ in live)

    def issue(self, generator: int) -> None:
        version = self.serving[generator]
        outstanding = self.dues.total() + (self.batch - self.published) * self.size
        if outstanding >= self.tickets:
            return
        newer = self.dues + Counter({version + self.staleness: 1})
        if version < self.published and not feasible(newer, self.batch, self.size):
            return
        self.working[self.next_group] = (version, version)
        self.next_group += 1

    def pick(self, which: int) -> int:
        return sorted(self.working)[which % len(self.working)]

    def finish(self, which: int) -> None:
        if self.working:
            group = self.pick(which)
            self.ready[group] = self.working.pop(group)

    def restart(self, which: int, generator: int) -> None:
        """Its generator died: it starts again, under its issue version or a newer one."""
        if self.working:
            group = self.pick(which)
            version, _ = self.working[group]
            if self.serving[generator] >= version:
                self.working[group] = (version, self.serving[generator])

    def refuse(self, which: int) -> None:
        """A filter refuses a ready group: its ticket is free."""
        if self.ready:
            del self.ready[sorted(self.ready)[which % len(self.ready)]]

    def cut(self) -> None:
        if self.batch - self.trained > self.prefetch:
            return
        ready = [(version + self.staleness, group) for group, (version, _) in self.ready.items()]
        chosen = choose(ready, self.dues, self.batch, self.size)
        if chosen is None:
            return
        for group in chosen:
            _, oldest = self.ready.pop(group)
            assert self.batch - oldest <= self.staleness, "a token is older than the bound"
        self.batch += 1

    def train(self) -> None:
        if self.trained < self.batch:
            self.trained += 1
            if self.trained % self.interval == 0:
                self.published = self.trained

    def load(self, generator: int) -> None:
        self.serving[generator] = self.published

    def step(self, event: int, which: int) -> None:
        generator = which % 2
        match event:
            case 0:
                self.issue(generator)
            case 1:
                self.finish(which)
            case 2:
                self.cut()
            case 3:
                self.train()
            case 4:
                self.load(generator)
            case 5:
                self.restart(which, generator)
            case 6:
                self.refuse(which)

    def go_on(self) -> None:
        """One round in which everybody does what they can."""
        self.load(0)
        for _ in range(self.tickets):
            self.issue(0)
        while self.working:
            self.finish(0)
        self.cut()
        self.train()


EVENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 50)), max_size=120)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 3),
    staleness=st.integers(0, 4),
    interval=st.integers(1, 3),
    prefetch=st.integers(0, 2),
    events=EVENTS,
)
def test_no_token_is_older_than_the_bound_and_nothing_locks_up(
    size: int, staleness: int, interval: int, prefetch: int, events: list[tuple[int, int]]
) -> None:
    """Any order of issues, finishes, cuts, slow loads, deaths and refusals keeps the bound, and can go on."""
    run = Run(size=size, staleness=staleness, interval=min(interval, staleness + 1), prefetch=prefetch)
    for event, which in events:
        run.step(event, which)
        assert feasible(run.dues, run.batch, size)
        assert run.dues.total() + (run.batch - run.published) * size <= run.tickets
    goal = run.batch + 4
    for _ in range(12):
        run.go_on()
    assert run.batch >= goal, "once everything finishes, batches are cut"
