"""Returns and GAE, against slime's and Miles' numbers, a plain loop over tokens, and by property."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncrl.algo.returns import (
    Returns,
    discounted_returns,
    generalized_advantages,
    reinforce_plus_plus_returns,
    terminal_rewards,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: Tensor, *expected: float, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, vector(*expected), rtol=tolerance, atol=tolerance)


SAMPLE, MASK = torch.tensor([0, 0, 0, 0, 1, 1]), vector(1, 1, 1, 0, 1, 1)


@pytest.mark.parametrize(
    ("mask_kl", "first_row"),
    [(True, (0.7577, 0.853, 0.97, 0)), (False, (0.72854, 0.8206, 0.934, -0.04))],
    ids=["slime", "miles"],
)
def test_reinforce_plus_plus_agrees_with_the_references(mask_kl: bool, first_row: tuple[float, ...]) -> None:
    returns = reinforce_plus_plus_returns(
        vector(1, -1),
        kl_R=vector(0.1, 0.2, 0.3, 0.4, 0.5, 0),
        mask_R=MASK,
        sample_R=SAMPLE,
        kl_coef=0.1,
        gamma=0.9,
        mask_kl=mask_kl,
    )
    close(returns, *first_row, -0.95, -1)


def test_reinforce_plus_plus_names_the_sample_that_is_masked_out() -> None:
    with pytest.raises(ValueError, match=r"sample 1: all 2 tokens are masked.*leave the sample out"):
        reinforce_plus_plus_returns(
            vector(1, -1),
            kl_R=torch.zeros(6),
            mask_R=vector(1, 1, 1, 0, 0, 0),
            sample_R=SAMPLE,
            kl_coef=0.0,
            gamma=1.0,
        )


def test_a_sample_without_tokens_has_no_returns_and_is_no_error() -> None:
    returns = reinforce_plus_plus_returns(
        vector(5, 1, 7),
        kl_R=vector(0, 0),
        mask_R=vector(1, 1),
        sample_R=torch.tensor([1, 1]),
        kl_coef=0.0,
        gamma=0.5,
    )
    close(returns, 0.5, 1)


def gae(values: Tensor, rewards: Tensor, mask: Tensor, *, over_masked_tokens: bool = False) -> Returns:
    return generalized_advantages(
        values,
        rewards_R=rewards,
        mask_R=mask,
        sample_R=torch.zeros(len(values), dtype=torch.int64),
        num_samples=1,
        gamma=0.99,
        lambd=0.95,
        over_masked_tokens=over_masked_tokens,
    )


@pytest.mark.parametrize("over_masked_tokens", [False, True])
def test_gae_agrees_with_the_references(over_masked_tokens: bool) -> None:
    returns = gae(
        vector(0.1, 0.2, 0.3), vector(0, 0, 1), vector(1, 1, 1), over_masked_tokens=over_masked_tokens
    )
    close(returns.advantages_R, 0.808407, 0.75535, 0.7)
    close(returns.returns_R, 0.908407, 0.95535, 1)


def test_gae_of_miles_steps_over_masked_tokens() -> None:
    mask = vector(1, 0, 1, 0)
    rewards = terminal_rewards(vector(1), mask_R=mask, sample_R=torch.zeros(4, dtype=torch.int64))
    returns = gae(vector(0.1, 0.2, 0.3, 0.4), rewards, mask)
    close(returns.advantages_R, 0.85535, 0, 0.7, 0)
    close(returns.returns_R, 0.95535, 0, 1, 0)


def test_gae_of_slime_runs_through_masked_tokens() -> None:
    mask, sample = vector(1, 0, 1, 0), torch.zeros(4, dtype=torch.int64)
    rewards = terminal_rewards(vector(1), mask_R=mask, sample_R=sample, over_masked_tokens=True)
    assert rewards.tolist() == [0, 0, 0, 1]
    returns = gae(vector(0.1, 0.2, 0.3, 0.4), rewards, mask, over_masked_tokens=True)
    # A_3 = 1 - .4; A_2 = .99 * .4 - .3 + .9405 A_3; A_1 = .99 * .3 - .2 + .9405 A_2; A_0 likewise.
    close(returns.advantages_R, 0.7732904, 0.7180122, 0.6603, 0.6)
    close(returns.returns_R, 0.8732904, 0.9180122, 0.9603, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_masked_value_or_reward_is_not_read(bad: float) -> None:
    returns = gae(vector(0.1, bad, 0.3, bad), vector(0, bad, 1, 0), vector(1, 0, 1, 0))
    close(returns.advantages_R, 0.85535, 0, 0.7, 0)


def test_a_nan_stays_in_its_sample() -> None:
    rewards, sample = vector(1, float("nan"), 1, 1), torch.tensor([0, 0, 1, 1])
    returns = discounted_returns(rewards, sample_R=sample, num_samples=2, gamma=1.0)
    assert returns.isnan().tolist() == [True, True, False, False]


def test_a_terminal_reward_lands_on_the_last_trained_token_of_samples_in_any_order() -> None:
    sample, mask = torch.tensor([2, 2, 0, 0, 3]), vector(1, 0, 1, 1, 0)
    rewards = vector(5, 6, 7, 8)  # Sample 1 has no tokens, sample 3 no trained one.
    assert terminal_rewards(rewards, mask_R=mask, sample_R=sample).tolist() == [7, 0, 0, 5, 0]
    anywhere = terminal_rewards(rewards, mask_R=mask, sample_R=sample, over_masked_tokens=True)
    assert anywhere.tolist() == [0, 7, 0, 5, 8]


def test_a_discount_of_0_keeps_rewards_and_of_1_sums_them() -> None:
    rewards, sample = vector(1, 2, 3, 4), torch.tensor([1, 1, 1, 0])
    assert discounted_returns(rewards, sample_R=sample, num_samples=2, gamma=0.0).tolist() == [1, 2, 3, 4]
    assert discounted_returns(rewards, sample_R=sample, num_samples=2, gamma=1.0).tolist() == [6, 5, 3, 4]


def test_no_tokens_at_all_are_no_special_case() -> None:
    none, ids = vector(), torch.tensor([], dtype=torch.int64)
    assert discounted_returns(none, sample_R=ids, num_samples=2, gamma=0.9).shape == (0,)
    assert terminal_rewards(vector(1, 2), mask_R=none, sample_R=ids).shape == (0,)
    for over_masked_tokens in (False, True):
        assert gae(none, none, none, over_masked_tokens=over_masked_tokens).returns_R.shape == (0,)


def test_every_token_masked_gives_zeros() -> None:
    returns = gae(vector(0.5, 0.5), vector(0, 0), vector(0, 0))
    assert returns.advantages_R.tolist() == returns.returns_R.tolist() == [0, 0]


def test_a_packing_that_tears_a_sample_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens of sample 4 do not lie together"):
        discounted_returns(torch.ones(3), sample_R=torch.tensor([4, 1, 4]), num_samples=5, gamma=1.0)
    with pytest.raises(ValueError, match="sample 5 of 5"):
        discounted_returns(torch.ones(3), sample_R=torch.tensor([4, 5, 5]), num_samples=5, gamma=1.0)


def test_results_carry_no_gradient() -> None:
    values = vector(0.1, 0.2, 0.3).requires_grad_()
    returns = gae(values, vector(0, 0, 1), vector(1, 1, 1))
    assert not returns.advantages_R.requires_grad
    assert not returns.returns_R.requires_grad


class Token(NamedTuple):
    value: float
    reward: float
    kept: bool


def loop(tokens: list[Token], *, gamma: float, lambd: float, over_masked_tokens: bool) -> list[list[float]]:
    """(A, return) of each token of one sample, one token at a time from the end."""
    results, ahead, advantage = [], 0.0, 0.0
    for token in reversed(tokens):
        if not (token.kept or over_masked_tokens):
            results.append([0.0, 0.0])
            continue
        advantage = token.reward + gamma * ahead - token.value + gamma * lambd * advantage
        results.append([advantage, advantage + token.value])
        ahead = token.value
    return results[::-1]


def float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


NUMBERS, FACTORS = st.floats(-10, 10), st.floats(0, 1)
SAMPLES = st.lists(st.lists(st.builds(Token, NUMBERS, NUMBERS, st.booleans()), max_size=40), max_size=6)


@given(samples=SAMPLES, gamma=FACTORS, lambd=FACTORS, over_masked_tokens=st.booleans(), data=st.data())
def test_gae_equals_a_loop_over_tokens_however_samples_are_packed(
    samples: list[list[Token]], gamma: float, lambd: float, over_masked_tokens: bool, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(samples))))
    tokens = [token for index in order for token in samples[index]]
    returns = generalized_advantages(
        float64([token.value for token in tokens]),
        rewards_R=float64([token.reward for token in tokens]),
        mask_R=float64([token.kept for token in tokens]),
        sample_R=torch.tensor([index for index in order for _ in samples[index]], dtype=torch.int64),
        num_samples=len(samples),
        gamma=gamma,
        lambd=lambd,
        over_masked_tokens=over_masked_tokens,
    )
    expected = [
        row
        for index in order
        for row in loop(samples[index], gamma=gamma, lambd=lambd, over_masked_tokens=over_masked_tokens)
    ]
    actual = torch.stack(returns, dim=1)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64).reshape(-1, 2), rtol=1e-9, atol=1e-9
    )


@given(samples=SAMPLES, gamma=FACTORS, kl_coef=FACTORS, mask_kl=st.booleans(), data=st.data())
def test_the_order_of_packing_does_not_change_reinforce_plus_plus(
    samples: list[list[Token]], gamma: float, kl_coef: float, mask_kl: bool, data: st.DataObject
) -> None:
    samples = [sample for sample in samples if any(token.kept for token in sample)]

    def packed(order: list[int]) -> list[Tensor]:
        tokens = [token for index in order for token in samples[index]]
        returns = reinforce_plus_plus_returns(
            float64([sample[0].value for sample in samples]),
            kl_R=float64([token.reward for token in tokens]),
            mask_R=float64([token.kept for token in tokens]),
            sample_R=torch.tensor([index for index in order for _ in samples[index]], dtype=torch.int64),
            kl_coef=kl_coef,
            gamma=gamma,
            mask_kl=mask_kl,
        )
        parts = returns.split([len(samples[index]) for index in order])
        return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]

    order = data.draw(st.permutations(range(len(samples))))
    for moved, plain in zip(packed(order), packed(list(range(len(samples)))), strict=True):
        assert torch.equal(moved, plain)


@pytest.mark.parametrize("gamma", [1.0, 0.9999, 0.5])
def test_a_response_of_20k_tokens_in_float32_stays_exact(gamma: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(20_000, dtype=torch.float64, generator=generator)
    sample = torch.zeros(20_000, dtype=torch.int64)
    plain = rewards.tolist()
    for index in range(len(plain) - 2, -1, -1):
        plain[index] += gamma * plain[index + 1]
    single = discounted_returns(rewards.float(), sample_R=sample, num_samples=1, gamma=gamma)
    torch.testing.assert_close(single.double(), float64(plain), rtol=1e-4, atol=1e-3)
    double = discounted_returns(rewards, sample_R=sample, num_samples=1, gamma=gamma)
    torch.testing.assert_close(double, float64(plain), rtol=1e-10, atol=1e-10)
