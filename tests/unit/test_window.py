"""The credit window, against the plainest possible model of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.link.window import Window

ITEMS = st.tuples(st.integers(1, 4), st.integers(0, 150))


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 100), st.lists(st.one_of(ITEMS, st.none()), max_size=60))
def test_what_is_under_way_never_exceeds_the_grant(
    granted_samples: int, granted_bytes: int, events: list[tuple[int, int] | None]
) -> None:
    window = Window(granted_samples=granted_samples, granted_bytes=granted_bytes)
    under_way: list[tuple[int, int]] = []
    for event in events:
        if event is None:
            if under_way:
                samples, size = under_way.pop(0)
                window.give_back(size, num_samples=samples)
        elif window.can_take(event[1], num_samples=event[0]):
            window.take(event[1], num_samples=event[0])
            under_way.append(event)
        assert window.used_samples == sum(s for s, _ in under_way) <= granted_samples
        assert window.used_bytes == sum(b for _, b in under_way)
        assert window.used_bytes <= granted_bytes or len(under_way) == 1
        assert window.free_samples == granted_samples - window.used_samples
        assert window.free_bytes == max(0, granted_bytes - window.used_bytes)


def test_an_item_larger_than_the_window_passes_when_it_is_empty_and_then_alone() -> None:
    window = Window(granted_samples=4, granted_bytes=10)
    assert window.can_take(1000)
    window.take(1000)
    assert not window.can_take(0)
    assert not window.can_take(1)
    window.give_back(1000)
    window.take(1)
    assert not window.can_take(1000)
    assert window.can_take(9)


def test_more_samples_than_granted_never_pass() -> None:
    assert not Window(granted_samples=2, granted_bytes=10).can_take(1, num_samples=3)


def test_a_smaller_grant_lets_nothing_in_until_enough_is_back() -> None:
    window = Window(granted_samples=4, granted_bytes=40)
    for _ in range(4):
        window.take(10)
    window.resize(granted_samples=2, granted_bytes=20)
    window.give_back(10, num_samples=1)
    window.give_back(10, num_samples=1)
    assert not window.can_take(1)
    window.give_back(10)
    assert window.can_take(10)


def test_statistics_tell_the_peak_and_the_refusals() -> None:
    window = Window(granted_samples=1, granted_bytes=5)
    window.take(5)
    assert not window.can_take(1)
    window.give_back(5)
    statistics = window.statistics()
    assert (statistics.used_samples, statistics.used_bytes) == (0, 0)
    assert (statistics.peak_samples, statistics.peak_bytes, statistics.refused) == (1, 5, 1)


@pytest.mark.parametrize(("num_bytes", "num_samples"), [(6, 1), (0, 2), (-1, 1)])
def test_more_than_is_under_way_cannot_come_back(num_bytes: int, num_samples: int) -> None:
    window = Window(granted_samples=4, granted_bytes=40)
    window.take(5)
    with pytest.raises(ValueError, match="cannot give back"):
        window.give_back(num_bytes, num_samples=num_samples)


def test_taking_what_does_not_fit_is_a_mistake() -> None:
    window = Window(granted_samples=0, granted_bytes=40)
    with pytest.raises(ValueError, match="do not fit"):
        window.take(1)
    with pytest.raises(ValueError, match="granted_bytes"):
        Window(granted_samples=0, granted_bytes=-1)
