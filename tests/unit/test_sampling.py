"""The mathematics of sampling: noise that needs no order, inverse CDF, top-p, top-k, log-probabilities."""

from __future__ import annotations

import numpy as np
import torch

from asyncrl.engines.noise import hash_words, seed_word, uniform, uniforms
from asyncrl.engines.sampling import BatchParams, invert_cdf, keep_top, sample

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def halves(value: float, rows: int = 1) -> torch.Tensor:
    return torch.full((rows,), value, dtype=torch.float64)


def test_noise_is_splitmix64() -> None:
    """Reference: the first output of splitmix64 from state 0 is 0xE220A8397B1DCDAF (Vigna's C code)."""
    first = hash_words(np.array([0], dtype=np.uint64) - np.uint64(0x9E3779B97F4A7C15), np.array([0]))
    assert int(first[0]) == 0xE220A8397B1DCDAF


def test_noise_depends_on_its_own_seed_and_position_only() -> None:
    seeds = np.array([seed_word(s) for s in (3, -1, 2**70 + 3)])
    whole = uniforms(seeds[:, None], np.arange(50)[None])
    assert whole[0, 7] == uniforms(seeds[:1], np.array([7]))[0]
    assert (whole[0] == whole[2]).all()  # equal modulo 2**64
    assert not (whole[0] == whole[1]).any()


def test_a_single_number_is_the_same_as_in_an_array() -> None:
    for seed in (0, 5, -9, 2**64 + 1):
        for position in (-2, 0, 10**9):
            (expected,) = uniforms(np.array([seed_word(seed)]), np.array([position]))
            assert uniform(seed, position) == expected


def test_noise_is_uniform_and_neighbouring_seeds_are_unrelated() -> None:
    seeds = np.arange(200, dtype=np.uint64)
    u = uniforms(seeds[:, None], np.arange(200)[None])
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins=20)[0]
    assert (np.abs(counts - 2000) < 5 * np.sqrt(2000)).all()
    assert abs(np.corrcoef(u[:-1, 1:].ravel(), u[1:, :-1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02


def test_inverse_cdf_at_its_edges() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).repeat(4, 1)
    u = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(probs, u).tolist() == [1, 1, 3, 3]


def test_frequencies_follow_the_probabilities() -> None:
    n = 20000
    u = torch.from_numpy(uniforms(np.arange(n, dtype=np.uint64), np.zeros(n, dtype=np.int64)))
    tokens, logprobs = sample(LOGITS.repeat(n, 1), uniforms_N=u, params=BatchParams())
    shares = torch.bincount(tokens, minlength=4) / n
    torch.testing.assert_close(shares, LOGITS[0].exp(), atol=0.015, rtol=0)
    torch.testing.assert_close(logprobs, LOGITS[0][tokens])


def test_log_probabilities_are_of_the_tempered_distribution_before_any_cut() -> None:
    params = BatchParams(
        temperature_N1=torch.tensor([[0.5]]), top_p_N=torch.tensor([0.1]), top_k_N=torch.tensor([1])
    )
    token, logprob = sample(LOGITS, uniforms_N=halves(0.99), params=params)
    assert token.item() == 0
    torch.testing.assert_close(logprob, torch.log_softmax(LOGITS / 0.5, -1)[:, 0])


def test_greedy_rows_take_the_best_token_whatever_the_noise() -> None:
    params = BatchParams(greedy_N=torch.tensor([True, False]))
    tokens, _ = sample(LOGITS.repeat(2, 1), uniforms_N=halves(0.999, 2), params=params)
    assert tokens.tolist() == [0, 3]


def test_banned_tokens_are_never_taken_and_change_no_log_probability() -> None:
    banned = torch.tensor([[True, False, False, False]])
    for params in (BatchParams(), BatchParams(greedy_N=torch.tensor([True]))):
        for u in (0.0, 0.5, 0.999):
            token, logprob = sample(LOGITS, uniforms_N=halves(u), params=params, banned_NV=banned)
            assert token.item() != 0
            torch.testing.assert_close(logprob, LOGITS[0][token])


def test_top_p_and_top_k_keep_what_they_should_row_by_row() -> None:
    probs = LOGITS.exp().repeat(5, 1)
    kept = keep_top(
        probs,
        top_p_N=torch.tensor([1.0, 0.5001, 0.4, 1.0, 0.99]),
        top_k_N=torch.tensor([4, 4, 4, 2, 3]),
    )
    assert (kept > 0).sum(-1).tolist() == [4, 2, 1, 2, 3]
    assert torch.equal(kept[kept > 0], probs[kept > 0])


def test_a_row_without_cuts_draws_the_same_beside_one_with_cuts() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    cut = BatchParams(top_p_N=torch.tensor([1.0, 0.3]), top_k_N=torch.tensor([50, 50]))
    for u in np.linspace(0, 0.999, 50):
        alone, _ = sample(logits[:1], uniforms_N=halves(float(u)), params=BatchParams())
        beside, _ = sample(logits, uniforms_N=halves(float(u), 2), params=cut)
        assert alone[0] == beside[0]
