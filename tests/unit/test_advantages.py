"""Rewards compared within groups, and whitening, against slime's and Miles' numbers and by property."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncrl.algo.advantage import leave_one_out, normalize_rewards
from asyncrl.algo.whiten import masked_whiten


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: Tensor, *expected: float, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, vector(*expected), rtol=tolerance, atol=tolerance)


def test_std_normalisation_agrees_with_slime_and_zeroes_equal_rewards() -> None:
    group = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3])
    advantages = normalize_rewards(vector(1, 0, 0, 1, 1, 1, 1, 1), group_S=group, std_normalization=True)
    close(advantages, 0.8660239, -0.8660239, -0.8660239, 0.8660239, 0, 0, 0, 0)
    assert advantages[4:].tolist() == [0.0] * 4


def test_siblings_of_a_rollout_count_once_as_in_miles() -> None:
    # miles_reward_norm_by_rollout: samples 1 and 2 are parts of one rollout, and so are 4 and 5.
    rewards, group = vector(1, 0, 0, 0, 0.7, 0.7), torch.tensor([0, 0, 0, 0, 1, 1])
    rollout = torch.tensor([10, 11, 11, 12, 13, 13])
    advantages = normalize_rewards(rewards, group_S=group, rollout_S=rollout, std_normalization=True)
    close(advantages, 1.154698, -0.577349, -0.577349, -0.577349, 0, 0)
    assert advantages[4:].tolist() == [0.0, 0.0]
    apart = normalize_rewards(rewards, group_S=group, std_normalization=True)
    close(apart[:4], 1.499997, -0.499999, -0.499999, -0.499999)


def test_a_rollout_id_is_read_within_its_group() -> None:
    group, rollout = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    advantages = normalize_rewards(
        vector(1, 0, 0, 1), group_S=group, rollout_S=rollout, std_normalization=False
    )
    close(advantages, 0.5, -0.5, -0.5, 0.5)


def test_siblings_of_unequal_rewards_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"rollout 41 \(group 9\) have rewards from 0\.25 to 1;.*own rollout id"
    ):
        normalize_rewards(
            vector(0.5, 1, 0.25),
            group_S=torch.tensor([9, 9, 9]),
            rollout_S=torch.tensor([40, 41, 41]),
            std_normalization=False,
        )


def test_centring_leaves_the_scale_alone() -> None:
    group = torch.zeros(4, dtype=torch.int64)
    close(normalize_rewards(vector(1, 0, 0, 1), group_S=group, std_normalization=False), 0.5, -0.5, -0.5, 0.5)


@pytest.mark.parametrize("std_normalization", [True, False])
def test_equal_rewards_that_do_not_sum_exactly_are_exactly_zero(std_normalization: bool) -> None:
    rewards, group = torch.full((3,), 0.1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    relative = normalize_rewards(rewards, group_S=group, std_normalization=std_normalization)
    assert relative.tolist() == [0.0] * 3
    assert leave_one_out(rewards, group_S=group).tolist() == [0.0] * 3


def test_the_deviation_of_nearly_equal_rewards_gets_1e_6_added() -> None:
    # Mean 5e-7, std 5e-7 * sqrt(2).
    rewards, group = torch.tensor([0, 1e-6], dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    relative = normalize_rewards(rewards, group_S=group, std_normalization=True)
    assert relative[1].item() == pytest.approx(0.5 / (1 + 0.5 * math.sqrt(2)))


def test_leave_one_out_by_hand() -> None:
    # Group 5: 1 - (0 + 0.5) / 2, 0 - (1 + 0.5) / 2, 0.5 - (1 + 0) / 2; group 9 has one sample.
    baseline = leave_one_out(vector(1, 0.7, 0, 0.5), group_S=torch.tensor([5, 9, 5, 5]))
    close(baseline, 0.75, 0, -0.75, 0)
    assert baseline[1].item() == 0.0


def test_siblings_are_not_each_others_baseline() -> None:
    baseline = leave_one_out(
        vector(1, 1, 0), group_S=torch.tensor([0, 0, 0]), rollout_S=torch.tensor([4, 4, 5])
    )
    close(baseline, 1, 1, -1)


def test_no_samples_are_no_special_case() -> None:
    none, ids = vector(), torch.tensor([], dtype=torch.int64)
    assert normalize_rewards(none, group_S=ids, rollout_S=ids, std_normalization=True).shape == (0,)
    assert leave_one_out(none, group_S=ids).shape == (0,)


def test_nan_rewards_stay_visible_and_in_their_group() -> None:
    relative = normalize_rewards(
        vector(1, math.nan, 1, 0), group_S=torch.tensor([0, 0, 1, 1]), std_normalization=True
    )
    assert relative.isnan().tolist() == [True, True, False, False]


Rule = Callable[[Tensor, Tensor], Tensor]
RULES: dict[str, Rule] = {
    "std": lambda rewards, group: normalize_rewards(rewards, group_S=group, std_normalization=True),
    "centred": lambda rewards, group: normalize_rewards(rewards, group_S=group, std_normalization=False),
    "leave-one-out": lambda rewards, group: leave_one_out(rewards, group_S=group),
}
GROUPS = st.lists(
    st.lists(st.integers(-4, 4).map(lambda n: n / 4), min_size=1, max_size=5), min_size=1, max_size=5
)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(groups=GROUPS, data=st.data())
def test_interleaving_and_renaming_groups_changes_nothing(
    rule: Rule, groups: list[list[float]], data: st.DataObject
) -> None:
    def float64(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    # Each group alone is the reference for all of them together, in any order, under any ids.
    alone = [rule(float64(group), torch.zeros(len(group), dtype=torch.int64)) for group in groups]
    ids = data.draw(
        st.lists(st.integers(-(2**40), 2**40), min_size=len(groups), max_size=len(groups), unique=True)
    )
    samples = [(row, column) for row, group in enumerate(groups) for column in range(len(group))]
    order = data.draw(st.permutations(samples))
    together = rule(
        float64([groups[row][column] for row, column in order]), torch.tensor([ids[row] for row, _ in order])
    )
    expected = torch.stack([alone[row][column] for row, column in order])
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)


def test_whitening_agrees_with_the_references() -> None:
    close(masked_whiten(vector(1, 2, 3, 10), mask_R=vector(1, 1, 1, 0)), -1, 0, 1, 8)


def test_whitened_tokens_have_mean_0_and_unbiased_variance_1_far_from_zero() -> None:
    values = 1000 + torch.randn(501, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(501)
    mask[::3] = 0
    whitened = masked_whiten(values, mask_R=mask)[mask > 0]
    assert abs(whitened.mean().item()) < 1e-6
    assert abs(whitened.var().item() - 1) < 1e-6


def test_a_masked_nan_does_not_reach_the_statistics() -> None:
    close(masked_whiten(vector(1, 2, 3, math.nan), mask_R=vector(1, 1, 1, 0))[:3], -1, 0, 1)


def test_one_unmasked_token_has_variance_0() -> None:
    close(masked_whiten(vector(3, 4), mask_R=vector(1, 0)), 0, 1e4)


def test_equal_tokens_become_zero() -> None:
    close(masked_whiten(torch.full((7,), 0.1), mask_R=torch.ones(7)), *[0.0] * 7)


def test_whitening_leaves_values_alone_where_no_rank_trains_a_token() -> None:
    close(masked_whiten(vector(1, 2), mask_R=vector(0, 0)), 1, 2)
    assert masked_whiten(vector(), mask_R=vector()).shape == (0,)


def whiten_shards(values: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """Each shard whitened as its own rank: a first round collects what each rank hands to the collective."""
    shards = list(zip(values.split(sizes), mask.split(sizes), strict=True))
    local: list[Tensor] = []

    def collect(sums: Tensor) -> Tensor:
        local.append(sums)
        return sums

    for part, part_mask in shards:
        masked_whiten(part, mask_R=part_mask, all_reduce=collect)
    assert len(local) == len(sizes), "a rank did not take part in the collective"
    total = torch.stack(local).sum(0)
    return torch.cat([masked_whiten(part, mask_R=m, all_reduce=lambda _: total) for part, m in shards])


@given(
    ranks=st.lists(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), max_size=6), min_size=1, max_size=4)
)
def test_whitening_over_ranks_equals_whitening_in_one_place(ranks: list[list[tuple[float, bool]]]) -> None:
    tokens = [token for rank in ranks for token in rank]
    # A grid, so that the variance is not a rounding error that 1 / sqrt blows up.
    values = torch.tensor([round(value * 8) / 8 for value, _ in tokens], dtype=torch.float64)
    mask = torch.tensor([float(kept) for _, kept in tokens], dtype=torch.float64)
    sharded = whiten_shards(values, mask, [len(rank) for rank in ranks])
    torch.testing.assert_close(sharded, masked_whiten(values, mask_R=mask), rtol=1e-9, atol=1e-9)


def test_a_rank_without_an_unmasked_token_still_takes_part() -> None:
    whitened = whiten_shards(vector(1, 2, 3, 10), vector(1, 1, 1, 0), [3, 1, 0])
    close(whitened, -1, 0, 1, 8)
