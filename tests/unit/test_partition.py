"""Spreading numbers over parts, and the estimate of work they may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from asyncrl.algo.partition import flops, karmarkar_karp

SIZES = st.lists(st.integers(0, 1000), max_size=40)


def totals(sizes: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(sizes[i] for i in part) for part in parts]


@given(sizes=SIZES, num_parts=st.integers(1, 9), equal_count=st.booleans())
@example(sizes=[5, 0, 0], num_parts=3, equal_count=False)
def test_parts_hold_every_number_once_and_sums_differ_by_one_number_at_most(
    sizes: list[int], num_parts: int, equal_count: bool
) -> None:
    parts = karmarkar_karp(sizes, num_parts=num_parts, equal_count=equal_count)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    counts = [len(part) for part in parts]
    assert min(counts) >= 1 or len(sizes) < num_parts
    assert max(counts) - min(counts) <= 1 or not equal_count
    loads = totals(sizes, parts)
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_the_example_of_the_differencing_method() -> None:
    # Differences 8 - 7 = 1, 6 - 5 = 1, 4 - 1 = 3, 3 - 1 = 2: sums 16 and 14, not the best 15 and 15.
    sizes = [4, 5, 6, 7, 8]
    assert karmarkar_karp(sizes, num_parts=2) == [[0, 1, 3], [2, 4]]
    assert totals(sizes, karmarkar_karp(sizes, num_parts=2)) == [16, 14]


def test_equal_counts_are_kept_where_sums_alone_would_not_keep_them() -> None:
    sizes = [9, 1, 1, 1, 1, 1]
    assert totals(sizes, karmarkar_karp(sizes, num_parts=2)) == [9, 5]
    assert [len(part) for part in karmarkar_karp(sizes, num_parts=2)] == [1, 5]
    parts = karmarkar_karp(sizes, num_parts=2, equal_count=True)
    assert [len(part) for part in parts] == [3, 3]
    assert totals(sizes, parts) == [11, 3]


def test_nothing_to_spread_is_empty_parts() -> None:
    assert karmarkar_karp([], num_parts=2) == [[], []]
    assert karmarkar_karp([7], num_parts=3) == [[0], [], []]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karmarkar_karp([1], num_parts=0), "num_parts: 0; must be at least 1"),
        (lambda: karmarkar_karp([1, -4], num_parts=2), "sizes: -4; must not be negative"),
    ],
)
def test_impossible_partitions_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_flops_are_those_torch_counts() -> None:
    tokens, width, layers = 7, 4, 3
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(5, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward((hidden @ weight.T).sum())
        for _ in range(layers):
            for last in range(tokens):
                seen = hidden[: last + 1]
                torch.autograd.backward((hidden[last : last + 1] @ seen.T @ seen).sum())
    assert flops([tokens], num_parameters=5 * width, num_layers=layers, attention_size=width) == [
        counter.get_total_flops()
    ]


def test_flops_grow_linearly_until_attention_takes_over() -> None:
    options = {"num_parameters": 10_000_000, "num_layers": 4, "attention_size": 64}
    empty, one, two = flops([0, 10, 20], **options)
    assert empty == 0
    assert two == pytest.approx(2 * one, rel=1e-3)
    long, longer = flops([1_000_000, 2_000_000], **options)
    assert longer == pytest.approx(4 * long, rel=0.05)
