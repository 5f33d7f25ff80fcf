"""What is reported of the distance between engine and trainer, and which tokens are too old."""

from __future__ import annotations

import math
from math import exp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncrl.algo.mismatch import AGE_BOUNDS, AGE_BUCKETS, kl_by_age, mismatch, mismatch_metrics
from asyncrl.algo.stale import Stale, newest_version_mask, stale_mask


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, *expected: float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.reshape(-1), double(*expected), rtol=tolerance, atol=tolerance)


def test_mismatch_is_zero_for_equal_log_probs_and_positive_otherwise() -> None:
    same = mismatch(double(-1.0, -2.0), rollout_R=double(-1.0, -2.0))
    assert {name: value.abs().max().item() for name, value in same.items()} == {
        "train_rollout_kl": 0.0,
        "train_rollout_logprob_abs_diff": 0.0,
    }
    off = mismatch(double(-1.0), rollout_R=double(-1.5))
    close(off["train_rollout_kl"], exp(0.5) - 1 - 0.5)
    close(off["train_rollout_logprob_abs_diff"], 0.5)


TRAIN, ROLLOUT, MASK = double(-1, -2, -1), double(-1.2, -1, -1), double(1, 1, 0)
ONE = torch.zeros(3, dtype=torch.int64)
EXPECTED = {
    "mis_training_log_ppl": [1.5, 1.5],
    "mis_training_ppl": [4.481689, 4.481689],
    "mis_rollout_log_ppl": [1.1, 1.1],
    "mis_rollout_ppl": [3.004166, 3.004166],
    "mis_kl": [-0.2, 1.0],
    "mis_k3_kl": [0.021403, 0.367879],
    "mis_log_ppl_diff": [0.4, 0.4],
    "mis_log_ppl_abs_diff": [0.4, 0.4],
    "mis_ppl_ratio": [1.491825, 1.491825],
    "mis_chi2_token": [(exp(0.4) + exp(-2)) / 2 - 1] * 2,
    "mis_chi2_seq": [exp(-1.6) - 1] * 2,
}


def test_mismatch_metrics_agree_with_the_references() -> None:
    metrics = mismatch_metrics(TRAIN, rollout_R=ROLLOUT, mask_R=MASK, sample_R=ONE, num_samples=1)
    assert set(metrics) == set(EXPECTED)
    for name, expected in EXPECTED.items():
        close(metrics[name], *expected, 0.0, tolerance=1e-6)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -7.0])
def test_mismatch_metrics_are_over_the_tokens_of_each_sequence_that_are_trained(junk: float) -> None:
    # A second and a third sequence, one all masked, and junk at every masked token: the first is unmoved.
    metrics = mismatch_metrics(
        torch.cat([double(-1, -2, junk), double(-3.0, junk)]),
        rollout_R=torch.cat([double(-1.2, -1, -1), double(-3.5, -1)]),
        mask_R=torch.cat([MASK, double(1, 0)]),
        sample_R=torch.tensor([0, 0, 0, 1, 2]),
        num_samples=3,
    )
    for name, expected in EXPECTED.items():
        close(metrics[name][:3], *expected, 0.0, tolerance=1e-6)
        assert metrics[name][4] == 0.0
    close(metrics["mis_log_ppl_diff"][3], -0.5)
    close(metrics["mis_chi2_seq"][3], exp(1) - 1)


def test_mismatch_metrics_are_finite_however_far_apart_and_for_no_tokens() -> None:
    far = mismatch_metrics(
        double(-1e4, 0).float(),
        rollout_R=double(0, -1e4).float(),
        mask_R=torch.ones(2),
        sample_R=torch.tensor([0, 1]),
        num_samples=2,
    )
    assert all(value.isfinite().all() for value in far.values())
    none = mismatch_metrics(double(), rollout_R=double(), mask_R=double(), sample_R=ONE[:0], num_samples=0)
    assert {value.shape for value in none.values()} == {(0,)}


def test_kl_is_summed_by_the_age_of_the_token() -> None:
    age = torch.tensor([0, 1, 2, 3, 4, 7, 8, 64, 1000, 5])
    kl = double(1, 2, 3, 4, 5, 6, 7, 8, 9, math.nan)
    sums = kl_by_age(kl, age_R=age, mask_R=double(1, 1, 1, 1, 1, 1, 1, 1, 1, 0))
    assert list(sums) == list(AGE_BUCKETS)
    found = {name: (total.item(), int(count)) for name, (total, count) in sums.items() if count}
    assert found == {"0": (1, 1), "1": (2, 1), "2-3": (7, 2), "4-7": (11, 2), "8-15": (7, 1), "64+": (17, 2)}


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(-5, 5), st.booleans()), max_size=12))
def test_every_trained_token_is_in_the_bucket_that_names_its_age(
    tokens: list[tuple[int, float, bool]],
) -> None:
    age = torch.tensor([token[0] for token in tokens], dtype=torch.int64)
    kl, mask = double(*[token[1] for token in tokens]), double(*[float(token[2]) for token in tokens])
    sums = kl_by_age(kl, age_R=age, mask_R=mask)
    bounds = [0, *AGE_BOUNDS, math.inf]
    for index, name in enumerate(AGE_BUCKETS):
        assert name.split("-")[0].rstrip("+") == str(bounds[index])
        inside = [value for old, value, used in tokens if used and bounds[index] <= old < bounds[index + 1]]
        total, count = sums[name]
        assert count.item() == len(inside)
        assert math.isclose(total.item(), sum(inside), abs_tol=1e-9)


AGE, SAMPLE = torch.tensor([0, 3, 4, 2, 3, 9]), torch.tensor([0, 0, 0, 1, 1, 2])


@pytest.mark.parametrize(("stale", "keep"), [("mask", [1, 1, 0, 1, 1, 0]), ("drop", [0, 0, 0, 1, 1, 0])])
def test_stale_tokens_or_their_samples_are_left_out(stale: Stale, keep: list[float]) -> None:
    assert stale_mask(AGE, sample_R=SAMPLE, num_samples=3, stale=stale, stale_after=3).tolist() == keep


def test_a_masked_token_does_not_make_its_sample_stale() -> None:
    mask = double(1, 1, 0, 1, 1, 1)
    keep = stale_mask(AGE, sample_R=SAMPLE, num_samples=4, stale="drop", stale_after=3, mask_R=mask)
    close(keep, 1, 1, 1, 1, 1, 0)


def test_stale_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"stale_after -1; allowed: 0"):
        stale_mask(AGE, sample_R=SAMPLE, num_samples=3, stale="mask", stale_after=-1)
    with pytest.raises(ValueError, match=r"unknown stale 'train'; known: mask, drop"):
        stale_mask(AGE, sample_R=SAMPLE, num_samples=3, stale="train", stale_after=1)  # type: ignore[arg-type]


def test_only_the_newest_version_of_each_sample_stays() -> None:
    version = torch.tensor([5, 5, 6, 2, 2, 1])
    assert newest_version_mask(version, sample_R=SAMPLE, num_samples=3).tolist() == [0, 0, 1, 1, 1, 1]
    # The newest token is an environment's: the newest that is trained counts, and the masked one may stay.
    keep = newest_version_mask(version, sample_R=SAMPLE, num_samples=3, mask_R=double(1, 1, 0, 1, 1, 1))
    close(keep, 1, 1, 1, 1, 1, 1)


def test_no_tokens_are_neither_stale_nor_new() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert stale_mask(empty, sample_R=empty, num_samples=2, stale="drop", stale_after=0).shape == (0,)
    assert newest_version_mask(empty, sample_R=empty, num_samples=0).shape == (0,)
