"""The losses: the references' numbers, finite differences, and the way a step moves a token."""

# ruff: noqa: N803 -- tensors carry shape suffixes
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from asyncrl.algo.kl import KlKind, kl_estimate
from asyncrl.algo.loss import (
    cispo_surrogate,
    dppo_surrogate,
    ppo_surrogate,
    sequence_log_ratio,
    token_statistics,
    value_loss,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor | None, *expected: float, tolerance: float = 1e-5) -> None:
    assert actual is not None
    wanted = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.reshape(-1), wanted, rtol=tolerance, atol=tolerance)


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


def test_low_var_kl_stays_finite_and_bounded_however_far_apart_the_policies_are() -> None:
    far = kl_estimate(vector(-1e4, 0, -200), reference_R=vector(0, -1e4, -1), kind="low_var_kl")
    assert far.tolist() == [10.0, 10.0, 10.0]
    weighed = kl_estimate(
        vector(-30.0), reference_R=vector(-1.0), kind="low_var_kl", importance_R=vector(1e3)
    )
    assert weighed.item() == 10.0  # the clamp comes after the weight


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


def test_the_upper_clip_is_the_lower_one_where_it_is_left_out() -> None:
    close(ppo_surrogate(NEW, old_R=OLD, advantages_R=SIGNS, eps_clip=0.2).loss_R[:2], -1.2, -1.10517)
    close(
        cispo_surrogate(NEW, old_R=OLD, advantages_R=SIGNS, eps_clip=0.2, eps_clip_high=None).loss_R[0], 0.6
    )


def test_the_gradient_raises_good_tokens_lowers_bad_ones_and_stops_where_the_clip_cut() -> None:
    logprobs = NEW.clone().requires_grad_()
    ppo_surrogate(logprobs, old_R=OLD, advantages_R=SIGNS, eps_clip_high=0.28).loss_R.sum().backward()
    # A step against the gradient: up (negative gradient) for A > 0, down for A < 0, none where it was cut.
    assert logprobs.grad is not None
    assert logprobs.grad.sign().tolist() == [0, -1, -1, 1, 0, 1]


def test_the_ratio_cannot_overflow() -> None:
    far: dict[str, Any] = {"old_R": vector(-1000.0), "advantages_R": vector(-1.0)}
    assert torch.isfinite(ppo_surrogate(vector(0.0), **far).loss_R).all()
    assert torch.isfinite(cispo_surrogate(vector(0.0), **far, eps_clip_high=1e30).loss_R).all()
    dppo = dppo_surrogate(vector(0.0), rollout_R=vector(-1000.0), advantages_R=vector(1.0))
    assert torch.isfinite(dppo.loss_R).all()


def test_cispo_agrees_with_the_references_in_value_and_gradient() -> None:
    logprobs = NEW.clone().requires_grad_()
    surrogate = cispo_surrogate(logprobs, old_R=OLD, advantages_R=SIGNS, eps_clip=1.0, eps_clip_high=4.0)
    close(surrogate.loss_R, 0.824361, 0.994654, 0.735759, -0.824361, -0.735759, 2.240844)
    assert surrogate.clipped_R.tolist() == [0.0] * 6
    surrogate.loss_R.sum().backward()
    close(logprobs.grad, *(-surrogate.ratio_R * SIGNS).tolist())


def test_a_token_that_cispo_clips_still_learns_with_the_clipped_weight() -> None:
    logprobs = vector(0.0, -3.0).requires_grad_()
    old, good = vector(-3.0, 0.0), vector(1.0, 1.0)
    surrogate = cispo_surrogate(logprobs, old_R=old, advantages_R=good, eps_clip=0.2, eps_clip_high=0.3)
    surrogate.loss_R.sum().backward()
    close(logprobs.grad, -1.3, -0.8)
    assert surrogate.clipped_R.tolist() == [1.0, 1.0]


GSPO_NEW, GSPO_OLD = vector(-1, -2, -3, -0.5, -0.5), vector(-1.1, -1.8, -3.3, -0.4, -0.9)
GSPO_MASK, GSPO_SAMPLE = vector(1, 1, 0, 1, 1), torch.tensor([0, 0, 0, 1, 1])


def gspo_log_ratio(current: Tensor, old: Tensor, mask: Tensor = GSPO_MASK) -> Tensor:
    return sequence_log_ratio(current - old, mask_R=mask, sample_R=GSPO_SAMPLE, num_samples=2)


def test_the_sequence_ratio_agrees_with_the_references() -> None:
    log_ratio = gspo_log_ratio(GSPO_NEW, GSPO_OLD)
    close(log_ratio, -0.05, -0.05, -0.05, 0.15, 0.15)
    surrogate = ppo_surrogate(
        GSPO_NEW, old_R=GSPO_OLD, advantages_R=torch.ones(5), eps_clip=0.5, log_ratio_R=log_ratio
    )
    close(surrogate.ratio_R, 0.951229, 0.951229, 0.951229, 1.161834, 1.161834)
    close(surrogate.loss_R, -0.951229, -0.951229, -0.951229, -1.161834, -1.161834)


def test_a_sequence_ratio_spreads_its_gradient_over_the_unmasked_tokens() -> None:
    current = GSPO_NEW.clone().requires_grad_()
    gspo_log_ratio(current, GSPO_OLD)[0].backward()
    close(current.grad, 0.5, 0.5, 0, 0, 0)


def test_a_masked_token_has_no_part_in_the_sequence_ratio_and_a_masked_sequence_has_ratio_one() -> None:
    current = GSPO_NEW.clone()
    current[2] = math.nan
    close(gspo_log_ratio(current, GSPO_OLD), -0.05, -0.05, -0.05, 0.15, 0.15)
    close(gspo_log_ratio(current, GSPO_OLD, vector(0, 0, 0, 1, 1)), 0, 0, 0, 0.15, 0.15)
    nothing = sequence_log_ratio(
        vector(), mask_R=vector(), sample_R=torch.zeros(0, dtype=torch.int64), num_samples=0
    )
    assert nothing.shape == (0,)


def test_dppo_leaves_out_tokens_that_already_moved_the_way_they_are_pushed() -> None:
    # Probabilities of the engine and of the trainer, and the sign: up past 0.2, up less, up but bad, down
    # past 0.3, down less, down but good, and no advantage at all.
    engine = vector(0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.1)
    trainer = vector(0.75, 0.65, 0.75, 0.5, 0.65, 0.5, 0.9)
    advantages = vector(1, 1, -1, -1, -1, 1, 0)
    surrogate = dppo_surrogate(
        trainer.log(),
        rollout_R=engine.log(),
        advantages_R=advantages,
        mask_low=0.3,
        mask_high=0.2,
        kl_coef=0.0,
    )
    assert surrogate.clipped_R.tolist() == [1, 0, 0, 1, 0, 0, 0]
    close(surrogate.loss_R, 0, -1.3, 1.5, 0, 0.65 / 0.9, -0.5 / 0.9, 0)
    close(surrogate.ratio_R, *(trainer / engine).tolist())


def test_dppo_keeps_its_squared_term_on_the_tokens_it_leaves_out() -> None:
    current = vector(math.log(0.9)).requires_grad_()
    rollout, good = vector(math.log(0.1)), vector(1.0)
    loss = dppo_surrogate(current, rollout_R=rollout, advantages_R=good, kl_coef=0.5).loss_R
    close(loss.detach(), 0.5 * math.log(9) ** 2)
    loss.sum().backward()
    close(current.grad, math.log(9))  # towards the engine: a step lowers the log-prob


def test_the_value_loss_takes_the_worse_of_the_clipped_and_the_plain_value() -> None:
    # v_old 1; v = 2 is clipped to 1.2. R = 3: plain 1, clipped 3.24. R = 1: plain 1, clipped 0.04.
    result = value_loss(vector(2, 2, 1.1), old_R=vector(1, 1, 1), returns_R=vector(3, 1, 0), value_clip=0.2)
    close(result.loss_R, 3.24, 1.0, 1.21)
    assert result.clipped_R.tolist() == [1.0, 1.0, 0.0]


def test_a_value_stops_learning_only_where_it_left_its_region_towards_the_return() -> None:
    values = vector(2, 2, 1.1, 0).requires_grad_()
    loss = value_loss(values, old_R=vector(1, 1, 1, 1), returns_R=vector(3, 1, 0, 3), value_clip=0.2).loss_R
    loss.sum().backward()
    close(values.grad, 0, 2, 2.2, -6)


def test_log_probs_and_entropy_agree_with_the_references() -> None:
    statistics = token_statistics(torch.tensor([[1.0, 2, 3], [0, 0, 0]]), targets_R=torch.tensor([2, 0]))
    close(statistics.logprobs_R, -0.407606, -1.098612)
    close(statistics.entropy_R, 0.832396, 1.098612)


def test_the_gradient_of_log_probs_and_entropy_is_the_formula() -> None:
    logits = torch.tensor([[1.0, 2, 3], [0, 0, 0]], dtype=torch.float64, requires_grad=True)
    statistics = token_statistics(logits, targets_R=torch.tensor([2, 0]))
    (statistics.logprobs_R + 0.5 * statistics.entropy_R).sum().backward()
    expected = []
    for row, target in (([1.0, 2.0, 3.0], 2), ([0.0, 0.0, 0.0], 0)):
        total = sum(math.exp(z) for z in row)
        p = [math.exp(z) / total for z in row]
        entropy = -sum(x * math.log(x) for x in p)
        for index, x in enumerate(p):  # d lp = [target] - p; d H = -p (log p + H)
            expected.append((index == target) - x - 0.5 * x * (math.log(x) + entropy))
    close(logits.grad, *expected, tolerance=1e-12)


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
        assert logits.grad is not None
        grads.append(logits.grad)
    assert torch.equal(*grads)


# Away from every kink, so that a finite difference stays on one branch: ratios inside and outside each clip.
CURRENT = double(-0.9, -1.05, -0.4, -2.2, -1.7, -0.3)
OTHER = double(-1.0, -1.0, -1.0, -1.0, -2.5, -1.0)
ADVANTAGE = double(0.7, -1.2, 1.5, 0.4, -0.8, -1.1)
MASK, SAMPLE = double(1, 1, 0, 1, 1, 1), torch.tensor([0, 0, 0, 1, 1, 1])


def ppo(current: Tensor) -> Tensor:
    return ppo_surrogate(current, old_R=OTHER, advantages_R=ADVANTAGE, eps_clip_c=1.7).loss_R


def gspo(current: Tensor) -> Tensor:
    log_ratio = sequence_log_ratio(current - OTHER, mask_R=MASK, sample_R=SAMPLE, num_samples=2)
    return ppo_surrogate(current, old_R=OTHER, advantages_R=ADVANTAGE, log_ratio_R=log_ratio).loss_R


def cispo_with_every_ratio_cut(current: Tensor) -> Tensor:
    return cispo_surrogate(current, old_R=OTHER - 9, advantages_R=ADVANTAGE).loss_R


def dppo(current: Tensor) -> Tensor:
    return dppo_surrogate(current, rollout_R=OTHER, advantages_R=ADVANTAGE, kl_coef=0.1).loss_R


def critic(values: Tensor) -> Tensor:
    return value_loss(values, old_R=OTHER, returns_R=ADVANTAGE).loss_R


def kl(kind: KlKind) -> Callable[[Tensor], Tensor]:
    def estimate(current: Tensor) -> Tensor:
        importance = torch.exp(current - OTHER)
        return kl_estimate(current, reference_R=OTHER.flip(0), kind=kind, importance_R=importance)

    return estimate


@pytest.mark.parametrize(
    "loss",
    [ppo, gspo, cispo_with_every_ratio_cut, dppo, critic, kl("k1"), kl("k2"), kl("k3"), kl("low_var_kl")],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(loss, (CURRENT.clone().requires_grad_(),), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_log_prob_and_entropy_gradients_are_those_of_finite_differences() -> None:
    logits = torch.linspace(-2, 1.5, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()

    def both(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        statistics = token_statistics(logits_RV, targets_R=torch.tensor([0, 2, 3]), temperature=0.7)
        return statistics.logprobs_R, statistics.entropy_R

    assert gradcheck(both, (logits,))


TARGETS = torch.tensor([0, 3, 1, 2])
SEQUENCES = torch.tensor([0, 0, 1, 1])
GOOD_THEN_BAD = double(1, 1, -1, -1)


def of_ppo(current: Tensor, old: Tensor) -> Tensor:
    return ppo_surrogate(current, old_R=old, advantages_R=GOOD_THEN_BAD, eps_clip_c=3.0).loss_R


def of_gspo(current: Tensor, old: Tensor) -> Tensor:
    log_ratio = sequence_log_ratio(
        current - old, mask_R=torch.ones_like(old), sample_R=SEQUENCES, num_samples=2
    )
    return ppo_surrogate(current, old_R=old, advantages_R=GOOD_THEN_BAD, log_ratio_R=log_ratio).loss_R


def of_cispo(current: Tensor, old: Tensor) -> Tensor:
    return cispo_surrogate(current, old_R=old, advantages_R=GOOD_THEN_BAD).loss_R


def of_dppo(current: Tensor, old: Tensor) -> Tensor:
    return dppo_surrogate(current, rollout_R=old, advantages_R=GOOD_THEN_BAD).loss_R


@pytest.mark.parametrize("loss", [of_ppo, of_gspo, of_cispo, of_dppo])
@given(shift=st.lists(st.floats(-0.1, 0.1), min_size=4, max_size=4))
def test_a_good_answers_tokens_become_likelier_and_a_bad_ones_less_likely(
    loss: Callable[[Tensor, Tensor], Tensor], shift: list[float]
) -> None:
    logits = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4).requires_grad_()
    before = token_statistics(logits, targets_R=TARGETS).logprobs_R
    loss(before, before.detach() + double(*shift)).sum().backward()
    assert logits.grad is not None
    after = token_statistics(logits.detach() - 0.01 * logits.grad, targets_R=TARGETS).logprobs_R
    assert (after - before).sign().tolist() == [1.0, 1.0, -1.0, -1.0]


def test_the_value_moves_towards_the_return() -> None:
    values = double(0.0, 0.0).requires_grad_()
    value_loss(values, old_R=double(0.1, -0.1), returns_R=double(1.0, -1.0)).loss_R.sum().backward()
    assert values.grad is not None
    assert (-values.grad).sign().tolist() == [1.0, -1.0]


def test_the_kl_term_pulls_towards_the_reference() -> None:
    kinds: tuple[KlKind, ...] = ("k2", "k3", "low_var_kl")
    for kind in kinds:
        logprobs = double(-1.0, -1.0).requires_grad_()
        kl_estimate(logprobs, reference_R=double(-0.5, -1.5), kind=kind).sum().backward()
        assert logprobs.grad is not None
        assert (-logprobs.grad).sign().tolist() == [1.0, -1.0], kind
