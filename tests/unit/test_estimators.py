"""Every advantage estimator, from recorded rewards to what the loss sees, against its formula written out."""

# ruff: noqa: N806 -- tensors carry shape suffixes
from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncrl.algo.loss import TokenStatistics
from asyncrl.train.advantages import fill_advantages
from asyncrl.train.data import prepare_batch
from asyncrl.train.objective import policy_objective
from asyncrl.train.tokens import TokenData
from tests.train_support import make_plan, make_sample

REWARDS = [[1.0, 0.0], [0.5, 2.0, -1.0]]
FLAT_REWARDS = [reward for rewards in REWARDS for reward in rewards]
MASKS = [[[1, 1, 1], [1, 0, 1, 0]], [[1], [0, 1, 1], [1, 1]]]
PLUS_PLUS = {"kl_coef": 0.3, "normalize_advantages": False}

Lists = list[list[float]]
"""Numbers of each token of each sample."""


def groups_of(*, removed: tuple[int, int] | None = None) -> Any:
    return [
        [
            make_sample(
                group_id=7 - g,
                index=i,
                prompt=[3],
                response=[5] * len(mask),
                logprobs=[-1.0 - 0.1 * t for t in range(len(mask))],
                reward=REWARDS[g][i],
                mask=mask,
                remove=removed == (g, i),
            )
            for i, mask in enumerate(masks)
        ]
        for g, masks in enumerate(MASKS)
    ]


def numbers(shift: float) -> Lists:
    """Something different at every token."""
    lengths = [len(mask) for masks in MASKS for mask in masks]
    return [[shift - 0.4 * math.sin(3 * i + 2 * t + shift) for t in range(n)] for i, n in enumerate(lengths)]


OLD, REFERENCE, TEACHER, VALUE = (numbers(shift) for shift in (-2.0, -2.3, -1.7, 0.4))


def batch(algorithm: dict[str, Any], *, removed: tuple[int, int] | None = None) -> tuple[TokenData, Any]:
    """The batch in float64 with every log-prob there can be, and its algorithm."""
    plan = make_plan(Path("unread"), algorithm=algorithm)
    data = prepare_batch(groups_of(removed=removed), plan=plan).data
    floats: dict[str, Any] = {
        k: v.double() for k, v in vars(data).items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    found = {"old_R": OLD, "reference_R": REFERENCE, "teacher_R": TEACHER, "value_R": VALUE}
    flat: dict[str, Any] = {
        name: torch.tensor([x for xs in lists for x in xs], dtype=torch.float64)
        for name, lists in found.items()
    }
    return dataclasses.replace(data, **floats, **flat), plan.algorithm


def advantages(algorithm: dict[str, Any], *, removed: tuple[int, int] | None = None) -> Lists:
    data, config = batch(algorithm, removed=removed)
    fill_advantages(data, algorithm=config)
    assert data.advantage_R is not None
    return [part.tolist() for part in data.split(data.advantage_R)]


def masks() -> list[list[int]]:
    return [mask for group in MASKS for mask in group]


def same(found: Lists, expected: Lists, *, masked: bool = True) -> None:
    """Token by token, at masked tokens too unless told otherwise."""
    assert [len(xs) for xs in found] == [len(xs) for xs in expected]
    for xs, ys, ms in zip(found, expected, masks(), strict=True):
        for x, y, m in zip(xs, ys, ms, strict=True):
            if m or masked:
                assert x == pytest.approx(y, rel=1e-6, abs=1e-7)


def spread(rewards: list[float]) -> Lists:
    return [[reward] * len(mask) for reward, mask in zip(rewards, masks(), strict=True)]


def by_group(rule: Callable[[list[float], int], float]) -> list[float]:
    return [rule(rewards, i) for rewards in REWARDS for i in range(len(rewards))]


def centered(rewards: list[float], i: int) -> float:
    return rewards[i] - statistics.fmean(rewards)


def k2(old: float, reference: float) -> float:
    return (old - reference) ** 2 / 2


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo"])
def test_group_relative_estimators_share_grpos_advantage(estimator: str) -> None:
    name = {"advantage_estimator": estimator}
    scaled = by_group(lambda r, i: centered(r, i) / (statistics.stdev(r) + 1e-6))
    same(advantages(name), spread(scaled))
    same(advantages({**name, "grpo_std_normalization": False}), spread(by_group(centered)))
    same(advantages({**name, "rewards_normalization": False}), spread(FLAT_REWARDS))


def test_a_removed_sample_stays_in_its_groups_statistics() -> None:
    assert advantages({}, removed=(1, 2)) == advantages({})
    data, config = batch({}, removed=(1, 2))
    fill_advantages(data, algorithm=config)
    assert data.split(data.mask_R)[4].tolist() == [0, 0]


def test_leave_one_out_compares_with_the_others() -> None:
    expected = by_group(lambda r, i: r[i] - statistics.fmean(r[:i] + r[i + 1 :]))
    same(advantages({"advantage_estimator": "rloo"}), spread(expected))


@pytest.mark.parametrize("over_masked", [False, True])
def test_ppo_is_gae_over_the_critics_values(over_masked: bool) -> None:
    gamma, lambd = 0.9, 0.8
    expected = []
    for reward, values, mask in zip(FLAT_REWARDS, VALUE, masks(), strict=True):
        steps = [t for t in range(len(mask)) if mask[t] or over_masked]
        found, carried, ahead = [0.0] * len(mask), 0.0, 0.0
        for t in reversed(steps):
            paid = reward if t == steps[-1] else 0.0
            carried = paid + gamma * ahead - values[t] + gamma * lambd * carried
            found[t], ahead = carried, values[t]
        expected.append(found)
    options = {"gamma": gamma, "lambd": lambd, "gae_over_masked_tokens": over_masked}
    algorithm = {"advantage_estimator": "ppo", **options}
    same(advantages(algorithm), expected)
    data, config = batch(algorithm)
    fill_advantages(data, algorithm=config)
    assert data.return_R is not None
    returns = [part.tolist() for part in data.split(data.return_R)]
    same(
        returns,
        [[a + v for a, v in zip(xs, vs, strict=True)] for xs, vs in zip(expected, VALUE, strict=True)],
        masked=False,
    )


@pytest.mark.parametrize("mask_kl", [False, True])
def test_reinforce_plus_plus_discounts_the_reward_less_the_kl(mask_kl: bool) -> None:
    expected = []
    for i, (reward, mask) in enumerate(zip(FLAT_REWARDS, masks(), strict=True)):
        last = max(t for t, m in enumerate(mask) if m)
        carried = 0.0
        found: list[float] = []
        for t in reversed(range(len(mask))):
            counted = mask[t] if mask_kl else 1
            carried = (
                -0.3 * k2(OLD[i][t], REFERENCE[i][t]) * counted + (reward if t == last else 0) + 0.9 * carried
            )
            found.insert(0, carried)
        expected.append(found)
    options = {**PLUS_PLUS, "kl_loss_type": "k2", "gamma": 0.9, "mask_kl_reward": mask_kl}
    same(advantages({"advantage_estimator": "reinforce_plus_plus", **options}), expected)


def test_reinforce_plus_plus_baseline_takes_the_kl_from_every_token() -> None:
    options = {"advantage_estimator": "reinforce_plus_plus_baseline", **PLUS_PLUS, "kl_loss_type": "k2"}
    expected = [
        [reward - 0.3 * k2(o, r) for o, r in zip(old, reference, strict=True)]
        for reward, old, reference in zip(by_group(centered), OLD, REFERENCE, strict=True)
    ]
    same(advantages(options), expected)


def test_the_kl_reward_takes_the_engines_log_probs_where_they_are_the_old_ones() -> None:
    options = {
        "advantage_estimator": "reinforce_plus_plus_baseline",
        **PLUS_PLUS,
        "use_rollout_logprobs": True,
    }
    expected = [
        [reward - 0.3 * (-1 - 0.1 * t - r) for t, r in enumerate(reference)]
        for reward, reference in zip(by_group(centered), REFERENCE, strict=True)
    ]
    same(advantages(options), expected)


def test_a_removed_sample_needs_no_return() -> None:
    options = {"advantage_estimator": "reinforce_plus_plus", **PLUS_PLUS}
    plain, found = advantages(options), advantages(options, removed=(1, 0))
    assert found[2] == [0.0]
    assert found[:2] + found[3:] == plain[:2] + plain[3:]


def difference(coefficient: float) -> Lists:
    return [
        [coefficient * (teacher - old) for old, teacher in zip(olds, teachers, strict=True)]
        for olds, teachers in zip(OLD, TEACHER, strict=True)
    ]


def test_distillation_alone_is_the_teacher_less_the_student() -> None:
    same(advantages({"advantage_estimator": "on_policy_distillation"}), difference(1.0))


@pytest.mark.parametrize("estimator", ["grpo", "ppo", "rloo", "reinforce_plus_plus_baseline"])
def test_distillation_adds_to_any_estimator_exactly(estimator: str) -> None:
    options = {"advantage_estimator": estimator}
    plain = advantages(options)
    found = advantages({**options, "use_opd": True, "opd_kl_coef": 0.7})
    for xs, ys, ds in zip(found, plain, difference(0.7), strict=True):
        assert [x - y for x, y in zip(xs, ys, strict=True)] == pytest.approx(ds, rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_opd": True, "opd_kl_coef": 0.5},
        {"advantage_estimator": "reinforce_plus_plus", "kl_coef": 0.2},
        {"advantage_estimator": "ppo", "lambd": 0.5},
        {"advantage_estimator": "on_policy_distillation"},
    ],
)
def test_whitening_comes_last_and_counts_trained_tokens_only(options: dict[str, Any]) -> None:
    raw, found = advantages(options), advantages({**options, "normalize_advantages": True})
    kept = [x for xs, ms in zip(raw, masks(), strict=True) for x, m in zip(xs, ms, strict=True) if m]
    mean, variance = statistics.fmean(kept), statistics.variance(kept)
    same(found, [[(x - mean) / math.sqrt(variance + 1e-8) for x in xs] for xs in raw])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"advantage_estimator": "rloo"},
        {"advantage_estimator": "ppo", "gamma": 0.9},
        {"advantage_estimator": "reinforce_plus_plus", "kl_coef": 0.2, "normalize_advantages": True},
        {"advantage_estimator": "on_policy_distillation"},
        {"advantage_estimator": "cispo"},
    ],
)
@pytest.mark.parametrize("removed", [None, (1, 1)])
def test_these_advantages_are_the_gradient_of_a_first_step(
    options: dict[str, Any], removed: tuple[int, int] | None
) -> None:
    """d loss / d log-prob of token t is -A_t / (tokens of its sample) / (samples) where the ratio is 1."""
    data, config = batch(options, removed=removed)
    fill_advantages(data, algorithm=config)
    data.weigh(samples=range(5), per_token=False)
    assert data.old_R is not None
    current_R = data.old_R.clone().requires_grad_()
    statistics_R = TokenStatistics(current_R, torch.zeros_like(current_R))
    torch.autograd.backward(policy_objective(statistics_R, data, algorithm=config).loss)
    assert current_R.grad is not None
    gradients = [part.tolist() for part in data.split(current_R.grad)]
    found = advantages(options, removed=removed)
    for i, (gradient, xs, mask) in enumerate(zip(gradients, found, masks(), strict=True)):
        kept = [0] * len(mask) if removed == (1, 1) and i == 3 else mask
        expected = [-x * m / max(sum(kept), 1) / 5 for x, m in zip(xs, kept, strict=True)]
        assert gradient == pytest.approx(expected, rel=1e-6, abs=1e-12)
