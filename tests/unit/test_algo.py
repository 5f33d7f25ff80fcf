"""The formulas, against numbers computed by hand or by slime's and Miles' own code."""

import math

import pytest
import torch
from torch import Tensor

from asyncrl.algo.advantage import grpo_advantages
from asyncrl.algo.correction import (
    SequenceMask,
    effective_sample_ratio,
    mismatch,
    off_policy_sequence_mask,
    sequence_advantages,
    truncated_importance,
)
from asyncrl.algo.kl import KlKind, kl_estimate
from asyncrl.algo.loss import ppo_surrogate, token_statistics
from asyncrl.algo.segment import per_sample_weights, per_token_weights, weighted_sum


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: Tensor, *expected: float, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.reshape(-1), vector(*expected), rtol=tolerance, atol=tolerance)


KL_POLICY, KL_REFERENCE = vector(-1, -2, -0.5, -30), vector(-1.2, -1.5, -0.5, -1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.2, -0.5, 0, -29]),
        ("k2", [0.02, 0.125, 0, 420.5]),
        ("k3", [0.01873076, 0.14872122, 0, 3.931334e12]),
        ("low_var_kl", [0.01873076, 0.14872122, 0, 10]),
    ],
)
def test_kl_estimators_agree_with_the_references(kind: KlKind, expected: list[float]) -> None:
    close(kl_estimate(KL_POLICY, reference_R=KL_REFERENCE, kind=kind), *expected)


def test_unbiased_kl_weighs_the_estimate_and_its_gradient() -> None:
    ratio = vector(0.9, 1.1, 1, 0.5)
    weighed = kl_estimate(KL_POLICY, reference_R=KL_REFERENCE, kind="k3", importance_R=ratio)
    close(weighed, 0.01685768, 0.16359334, 0, 1.965667e12)
    logprob = vector(-1.0).requires_grad_()
    importance = torch.exp(logprob - vector(-1.0))
    kl_estimate(logprob, reference_R=vector(-1.5), kind="k1", importance_R=importance).sum().backward()
    close(logprob.grad, 1 * 1 + 0.5 * 1)  # d(kl rho) = rho dkl + kl rho


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown estimator 'k4'; known: k1"):
        kl_estimate(KL_POLICY, reference_R=KL_REFERENCE, kind="k4")  # type: ignore[arg-type]


OLD, NEW = vector(-1, -1, -1, -1, -1, -1), vector(-0.5, -0.9, -2, -0.5, -2, 0.5)
SIGNS = vector(1, 1, 1, -1, -1, -1)


def test_ppo_clip_and_dual_clip_agree_with_the_references() -> None:
    surrogate = ppo_surrogate(NEW, old_R=OLD, advantages_R=SIGNS, eps_clip=0.2, eps_clip_high=0.28)
    close(surrogate.loss_R, -1.28, -1.10517, -0.367879, 1.648721, 0.8, 4.481689)
    close(surrogate.clipped_R, 1, 0, 0, 0, 1, 0)
    dual = ppo_surrogate(NEW, old_R=OLD, advantages_R=SIGNS, eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=3.0)
    close(dual.loss_R, -1.28, -1.10517, -0.367879, 1.648721, 0.8, 3.0)


def test_the_gradient_raises_good_tokens_lowers_bad_ones_and_stops_where_the_clip_cut() -> None:
    logprobs = NEW.clone().requires_grad_()
    ppo_surrogate(logprobs, old_R=OLD, advantages_R=SIGNS, eps_clip_high=0.28).loss_R.sum().backward()
    # A step against the gradient: up (negative gradient) for A > 0, down for A < 0, none where it was cut.
    assert logprobs.grad.sign().tolist() == [0, -1, -1, 1, 0, 1]


def test_the_ratio_cannot_overflow() -> None:
    surrogate = ppo_surrogate(vector(0.0), old_R=vector(-1000.0), advantages_R=vector(-1.0))
    assert torch.isfinite(surrogate.loss_R).all()


def test_log_probs_and_entropy_agree_with_the_references() -> None:
    statistics = token_statistics(torch.tensor([[1.0, 2, 3], [0, 0, 0]]), targets_R=torch.tensor([2, 0]))
    close(statistics.logprobs_R, -0.407606, -1.098612)
    close(statistics.entropy_R, 0.832396, 1.098612)


def test_temperature_scales_the_logits() -> None:
    logits = torch.tensor([[1.0, 2, 3]])
    hot = token_statistics(logits, targets_R=torch.tensor([2]), temperature=2.0)
    close(hot.logprobs_R, torch.log_softmax(logits / 2, -1)[0, 2].item())


def test_entropy_without_gradient_leaves_the_log_prob_gradient_alone() -> None:
    grads = []
    for entropy_gradient in (True, False):
        logits = torch.tensor([[1.0, 2, 3]], requires_grad=True)
        statistics = token_statistics(logits, targets_R=torch.tensor([2]), entropy_gradient=entropy_gradient)
        assert statistics.entropy_R.requires_grad is entropy_gradient
        statistics.logprobs_R.sum().backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)


def test_grpo_normalises_each_group_and_zeroes_equal_rewards() -> None:
    advantages = grpo_advantages(
        vector(1, 0, 0, 1, 1, 1, 1, 1), group_S=torch.tensor([7, 7, 7, 7, 3, 3, 3, 3])
    )
    close(advantages, 0.8660239, -0.8660239, -0.8660239, 0.8660239, 0, 0, 0, 0)
    assert advantages[4:].tolist() == [0.0] * 4


def test_grpo_takes_unequal_interleaved_groups_and_groups_of_one() -> None:
    # The numbers of Miles' miles_reward_norm_by_rollout, group 5 of four, group 9 of one, interleaved.
    group = torch.tensor([5, 9, 5, 5, 5])
    advantages = grpo_advantages(vector(1, 0.7, 0, 0, 0), group_S=group)
    close(advantages, 1.499997, 0, -0.499999, -0.499999, -0.499999)
    assert advantages[1].item() == 0.0


def test_equal_rewards_that_do_not_sum_exactly_are_exactly_zero() -> None:
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert grpo_advantages(rewards, group_S=torch.zeros(3, dtype=torch.int64)).tolist() == [0.0, 0.0, 0.0]


def test_normalisations_can_be_left_out() -> None:
    rewards, group = vector(1, 0, 0, 1), torch.zeros(4, dtype=torch.int64)
    centred = grpo_advantages(rewards, group_S=group, grpo_std_normalization=False)
    close(centred, 0.5, -0.5, -0.5, 0.5)
    assert torch.equal(grpo_advantages(rewards, group_S=group, rewards_normalization=False), rewards)


def test_tis_bounds_the_ratio_and_reports_what_it_did() -> None:
    weighting = truncated_importance(
        vector(-1, -1, -1, -3), rollout_R=vector(-1, -2.5, -0.5, -0.2), tis_clip=2.0, tis_clip_low=0.5
    )
    close(weighting.weight_R, 1, 2, 0.606531, 0.5)
    close(weighting.metrics["tis"], 1, math.exp(1.5), 0.606531, math.exp(-2.8))
    close(weighting.metrics["tis_clipfrac"], 0, 1, 0, 1)
    close(weighting.metrics["tis_abs"], 0, math.exp(1.5) - 1, 0.393469, 1 - math.exp(-2.8))


def test_tis_has_no_gradient() -> None:
    old = vector(-1.0).requires_grad_()
    assert not truncated_importance(old, rollout_R=vector(-2.0)).weight_R.requires_grad


def opsm(*, advantages: Tensor, drift: Tensor, delta: float = 1e-4) -> SequenceMask:
    """Three sequences of two tokens, each with a mean drift away from the engine."""
    sample = torch.tensor([0, 0, 1, 1, 2, 2])
    return off_policy_sequence_mask(
        -drift[sample],
        rollout_R=torch.zeros(6),
        mask_R=torch.ones(6),
        sample_R=sample,
        advantages_S=advantages,
        opsm_delta=delta,
    )


def test_opsm_drops_only_bad_sequences_that_drifted() -> None:
    mask = opsm(advantages=vector(-1, 1, -1), drift=vector(1, 1, 0))
    close(mask.keep_R, 0, 0, 1, 1, 1, 1)
    close(mask.dropped_S, 1, 0, 0)


def test_opsm_drift_is_a_mean_over_unmasked_tokens() -> None:
    mask = off_policy_sequence_mask(
        vector(-5, -0.1),
        rollout_R=torch.zeros(2),
        mask_R=vector(0, 1),
        sample_R=torch.tensor([0, 0]),
        advantages_S=vector(-1),
        opsm_delta=0.2,
    )
    assert mask.dropped_S.tolist() == [0.0]


def test_opsm_takes_one_sign_per_sequence_and_keeps_shapes_apart() -> None:
    sample = torch.tensor([0, 0, 0, 1])
    signs = sequence_advantages(vector(-3, 1, 1, 1), mask_R=torch.ones(4), sample_R=sample, num_samples=2)
    mask = off_policy_sequence_mask(
        vector(-1, -1, -1, -1),
        rollout_R=torch.zeros(4),
        mask_R=torch.ones(4),
        sample_R=sample,
        advantages_S=signs,
        opsm_delta=0.5,
    )
    assert mask.keep_R.shape == (4,)
    close(mask.keep_R, 0, 0, 0, 1)


def test_effective_sample_ratio_is_one_for_equal_weights_and_one_nth_for_a_single_one() -> None:
    ratio = effective_sample_ratio(
        vector(0.3, 0.3, 0.3, 10, -10, -10, 0),
        mask_R=vector(1, 1, 1, 1, 1, 1, 0),
        sample_R=torch.tensor([0, 0, 0, 1, 1, 1, 2]),
        num_samples=3,
    )
    close(ratio, 1, 1 / 3, 1, tolerance=1e-4)


def test_mismatch_is_zero_for_equal_log_probs_and_positive_otherwise() -> None:
    same = mismatch(vector(-1.0, -2.0), rollout_R=vector(-1.0, -2.0))
    assert {name: value.abs().max().item() for name, value in same.items()} == {
        "train_rollout_kl": 0.0,
        "train_rollout_logprob_abs_diff": 0.0,
    }
    off = mismatch(vector(-1.0), rollout_R=vector(-1.5))
    close(off["train_rollout_kl"], math.exp(0.5) - 1 - 0.5)
    close(off["train_rollout_logprob_abs_diff"], 0.5)


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
