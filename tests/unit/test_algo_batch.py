"""Cuts into optimizer steps and micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algo.batch import pack_by_count, pack_by_tokens, schedule, split_steps

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


PACKINGS = st.one_of(
    st.integers(1, 400).map(lambda limit: {"max_tokens": limit}),
    st.integers(1, 6).map(lambda size: {"micro_batch_size": size}),
)


@st.composite
def batches(draw: st.DrawFn, *, divisible: bool) -> dict[str, Any]:
    """Arguments of schedule: steps of samples that all ranks can share."""
    num_ranks, num_steps = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if divisible:
        num_samples = num_steps * num_ranks * draw(st.integers(1, 8))
    else:
        num_samples = draw(st.integers(num_steps * num_ranks, num_steps * num_ranks * 8))
    numbers = st.lists(st.integers(1, 200), min_size=num_samples, max_size=num_samples)
    return {
        "lengths": draw(numbers),
        "sizes": draw(st.none() | numbers),
        "num_steps": num_steps,
        "num_ranks": num_ranks,
        "balance": draw(st.booleans()),
        **draw(PACKINGS),
    }


def plan_of(batch: dict[str, Any]) -> list[list[list[list[int]]]]:
    return schedule(batch["lengths"], **{name: batch[name] for name in batch if name != "lengths"})


def tokens(members: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in members)


def crowded(batch: dict[str, Any], micro_batches: list[list[int]]) -> list[list[int]]:
    """Micro-batches of several samples that are over what was asked for."""
    if "max_tokens" in batch:
        return [m for m in micro_batches if len(m) > 1 and tokens(m, batch["lengths"]) > batch["max_tokens"]]
    return [m for m in micro_batches if len(m) > batch["micro_batch_size"]]


@given(batch=batches(divisible=False))
def test_ranks_of_a_step_share_its_samples_in_equally_many_micro_batches(batch: dict[str, Any]) -> None:
    plan = plan_of(batch)
    wanted = split_steps(len(batch["lengths"]), num_steps=batch["num_steps"])
    assert len(plan) == len(wanted)
    for step, members in zip(plan, wanted, strict=True):
        assert len(step) == batch["num_ranks"]
        assert sorted(i for rank in step for micro in rank for i in micro) == list(members)
        assert len({len(rank) for rank in step}) == 1
        assert all(micro == sorted(micro) and micro for rank in step for micro in rank)
    assert plan == plan_of(batch)


@given(batch=batches(divisible=True))
def test_the_budget_holds_where_samples_divide_over_ranks(batch: dict[str, Any]) -> None:
    for step in plan_of(batch):
        assert not crowded(batch, [micro for rank in step for micro in rank])


@given(batch=batches(divisible=False))
def test_elsewhere_fewer_micro_batches_than_ranks_are_over_it(batch: dict[str, Any]) -> None:
    for step in plan_of(batch):
        over = crowded(batch, [micro for rank in step for micro in rank])
        assert len(over) < batch["num_ranks"]
        # Only where the step has as many micro-batches as equal numbers of non-empty ones allow.
        num_samples = sum(len(micro) for rank in step for micro in rank)
        assert not over or len(step[0]) == num_samples // batch["num_ranks"]


@given(batch=batches(divisible=True))
def test_balance_leaves_at_most_one_sample_of_work_between_ranks(batch: dict[str, Any]) -> None:
    work = batch["sizes"] or batch["lengths"]
    for step in plan_of(batch | {"balance": True}):
        ranks = [[i for micro in rank for i in micro] for rank in step]
        loads = [sum(work[i] for i in rank) for rank in ranks]
        assert max(loads) - min(loads) <= max(work[i] for rank in ranks for i in rank)
        assert len({len(rank) for rank in ranks}) == 1


@given(lengths=LENGTHS, max_tokens=st.integers(1, 300), balance=st.booleans())
def test_one_rank_packs_as_first_fit_does(lengths: list[int], max_tokens: int, balance: bool) -> None:
    plan = schedule(lengths, num_steps=1, max_tokens=max_tokens, balance=balance)
    assert plan == ([[pack_by_tokens(lengths, max_tokens=max_tokens)]] if lengths else [])


def test_micro_batches_of_a_number_of_samples_are_consecutive_and_dealt_in_turn() -> None:
    assert schedule([1] * 16, num_steps=2, num_ranks=2, micro_batch_size=2) == [
        [[[0, 1], [4, 5]], [[2, 3], [6, 7]]],
        [[[8, 9], [12, 13]], [[10, 11], [14, 15]]],
    ]


def test_the_largest_micro_batch_is_split_in_even_halves_for_a_rank_that_lacks_one() -> None:
    # First-fit gives [1, 1, 6], [7], [8]; the fourth is cut from the first, between 1 + 1 and 6.
    plan = schedule([1, 1, 7, 8, 6], num_steps=1, num_ranks=2, max_tokens=8)
    assert plan == [[[[0, 1], [3]], [[2], [4]]]]


def test_balance_by_work_is_not_balance_by_tokens() -> None:
    lengths, work = [4, 3, 3, 2], [9, 1, 2, 8]
    options: dict[str, Any] = {"num_steps": 1, "num_ranks": 2, "max_tokens": 9, "balance": True}
    assert [tokens(rank[0], lengths) for rank in schedule(lengths, **options)[0]] == [6, 6]
    assert [tokens(rank[0], work) for rank in schedule(lengths, sizes=work, **options)[0]] == [10, 10]


def test_samples_that_neither_pair_nor_divide_are_joined_at_their_smallest() -> None:
    for balance in (False, True):
        (step,) = schedule([9, 8, 7, 9, 9], num_steps=1, num_ranks=2, max_tokens=10, balance=balance)
        assert sorted(micro for rank in step for micro in rank) == [[0], [1, 2], [3], [4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 2, "num_ranks": 2, "max_tokens": 9}, "step 1: 1 samples for 2 ranks; a rank without"),
        ({"num_steps": 1, "num_ranks": 0, "max_tokens": 9}, "num_ranks: 0; must be at least 1"),
        ({"num_steps": 1}, "exactly one must be given"),
        ({"num_steps": 1, "max_tokens": 9, "micro_batch_size": 1}, "exactly one must be given"),
        ({"num_steps": 1, "max_tokens": 9, "sizes": [1]}, "sizes: 1 of them for 3 lengths"),
        ({"num_steps": 1, "micro_batch_size": 0}, "micro_batch_size: 0; must be at least 1"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule([1, 2, 3], **options)
