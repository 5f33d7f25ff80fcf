"""How per-token values become one number, against numbers of slime's and Miles' own code."""

import math

import torch
from torch import Tensor

from asyncrl.algo.segment import per_sample_weights, per_token_weights, weighted_sum


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: Tensor, *expected: float, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.reshape(-1), vector(*expected), rtol=tolerance, atol=tolerance)


VALUES, MASK = vector(1, 2, 3, 4, 6), vector(1, 1, 0, 1, 1)
SAMPLE = torch.tensor([0, 0, 0, 1, 1])


def test_reducers_agree_with_the_references() -> None:
    counts = torch.tensor([2, 2])
    mean = per_sample_weights(MASK, sample_R=SAMPLE, num_tokens_S=counts, num_samples=1)
    close(weighted_sum(VALUES, weights_R=mean), 6.5)
    token = per_token_weights(MASK, num_tokens=1)
    close(weighted_sum(VALUES, weights_R=token), 13)


def test_a_removed_sample_still_counts_in_the_number_of_samples() -> None:
    removed = vector(1, 1, 1, 0, 0)
    weights = per_sample_weights(removed, sample_R=SAMPLE, num_tokens_S=torch.tensor([3, 0]), num_samples=2)
    close(weights, 1 / 6, 1 / 6, 1 / 6, 0, 0)


def test_a_token_outside_the_loss_is_ignored_even_when_it_is_nan() -> None:
    weights = per_token_weights(vector(1, 0), num_tokens=1)
    assert weighted_sum(vector(2.0, math.nan), weights_R=weights).item() == 2.0
