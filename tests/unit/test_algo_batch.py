"""Cuts into optimizer steps and micro-batches."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algo.batch import pack_by_count, pack_by_tokens, split_steps

LENGTHS = st.lists(st.integers(1, 200), max_size=60)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 300))
def test_packing_keeps_every_sample_once_in_order_and_within_the_budget(
    lengths: list[int], max_tokens: int
) -> None:
    bins = pack_by_tokens(lengths, max_tokens=max_tokens)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    for members in bins:
        assert members == sorted(members)
        assert sum(lengths[i] for i in members) <= max_tokens or len(members) == 1


@given(lengths=LENGTHS, max_tokens=st.integers(1, 300))
def test_first_fit_leaves_at_most_one_micro_batch_half_empty(lengths: list[int], max_tokens: int) -> None:
    loads = [sum(lengths[i] for i in members) for members in pack_by_tokens(lengths, max_tokens=max_tokens)]
    assert sum(load * 2 <= max_tokens for load in loads) <= 1


def test_an_over_long_sample_sits_alone() -> None:
    assert pack_by_tokens([3, 50, 4], max_tokens=10) == [[0, 2], [1]]


def test_micro_batches_by_count() -> None:
    assert pack_by_count(5, micro_batch_size=2) == [[0, 1], [2, 3], [4]]


@given(num_samples=st.integers(0, 100), num_steps=st.integers(1, 12))
def test_steps_cut_the_recorded_order_into_equal_runs(num_samples: int, num_steps: int) -> None:
    steps = split_steps(num_samples, num_steps=num_steps)
    assert [i for step in steps for i in step] == list(range(num_samples))
    assert len(steps) == min(num_steps, num_samples)
    sizes = [len(step) for step in steps]
    assert not sizes or (min(sizes) >= 1 and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes)[::-1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack_by_tokens([1], max_tokens=0),
        lambda: pack_by_count(1, micro_batch_size=0),
        lambda: split_steps(1, num_steps=0),
    ],
)
def test_impossible_cuts_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        call()
