"""The loss put together: it must not depend on packing, chunks or padding, only on what was recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncrl.train.advantages import fill_advantages
from asyncrl.train.backend import TrainPlan
from asyncrl.train.data import prepare_batch
from asyncrl.train.forward import response_statistics
from asyncrl.train.micro import MicroBatch
from asyncrl.train.model import load_model
from asyncrl.train.objective import policy_objective
from asyncrl.train.tokens import TokenData
from tests.train_support import make_groups, make_plan, make_sample, write_model

ALL_TERMS = {
    "use_tis": True,
    "use_opsm": True,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "low_var_kl",
    "entropy_coef": 0.01,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load_model(model_dir, trainer=make_plan(model_dir).trainer).double()


def step_parts(plan: TrainPlan, groups: Any) -> list[tuple[MicroBatch, TokenData]]:
    """The micro-batches of the first optimizer step with their tokens, in float64."""
    prepared = prepare_batch(groups, plan=plan)
    data, step = prepared.data, prepared.steps[0]
    floats = {k: v.double() for k, v in vars(data).items() if isinstance(v, Tensor) and v.is_floating_point()}
    data = dataclasses.replace(data, **floats)
    fill_advantages(data, algorithm=plan.algorithm)
    data.weigh(samples=step.samples, per_token=plan.algorithm.calculate_per_token_loss)
    return [(micro, data.take(micro)) for micro in step.micros]


def step_gradient(
    model: Any, plan: TrainPlan, *, packed: bool = True, chunk_size: int = -1, groups: Any = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of a step, in float64, with old and reference log-probs off by a bit."""
    model.zero_grad()
    totals: dict[str, float] = {}
    for micro, tokens in step_parts(plan, groups or make_groups()):
        statistics = response_statistics(
            model, micro, packed=packed, temperature=0.8, chunk_size=chunk_size, entropy_gradient=True
        )
        shift = torch.sin(micro.target_R.double())
        tokens.old_R = statistics.logprobs_R.detach() + 0.3 * shift
        if plan.algorithm.use_kl_loss:
            tokens.reference_R = statistics.logprobs_R.detach() - 0.5 * shift
        loss, metrics = policy_objective(statistics, tokens, algorithm=plan.algorithm)
        loss.backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value.item()
    return totals, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(
    first: tuple[dict[str, float], dict[str, Tensor]], second: tuple[dict[str, float], dict[str, Tensor]]
) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-6, abs=1e-9)
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "trainer",
    [{"max_tokens_per_gpu": 40}, {"use_dynamic_batch_size": False}, {"max_tokens_per_gpu": 1}],
    ids=["tokens", "one-by-one", "over-long"],
)
def test_loss_metrics_and_gradient_do_not_depend_on_the_packing(
    model: Any, model_dir: Path, trainer: dict[str, Any], per_token: bool
) -> None:
    algorithm = {**ALL_TERMS, "calculate_per_token_loss": per_token}
    whole = step_gradient(model, make_plan(model_dir, algorithm=algorithm))
    assert whole[0]["opsm_masked_fraction"] > 0
    assert_same(whole, step_gradient(model, make_plan(model_dir, algorithm=algorithm, trainer=trainer)))


def test_chunked_logits_give_the_same_loss_and_gradient(model: Any, model_dir: Path) -> None:
    plan = make_plan(model_dir, algorithm=ALL_TERMS)
    assert_same(step_gradient(model, plan), step_gradient(model, plan, chunk_size=7))


def test_packed_and_padded_forwards_agree(model: Any, model_dir: Path) -> None:
    plan = make_plan(model_dir, algorithm=ALL_TERMS)
    packed = step_gradient(model, plan)
    model.set_attn_implementation("sdpa")
    try:
        assert_same(packed, step_gradient(model, plan, packed=False))
    finally:
        model.set_attn_implementation("packed")


def test_log_probs_are_those_of_transformers_for_each_sample_alone(model: Any, model_dir: Path) -> None:
    micro = prepare_batch(make_groups(), plan=make_plan(model_dir)).steps[0].micros[0]
    ours = response_statistics(model, micro, packed=True, temperature=0.7).logprobs_R
    model.set_attn_implementation("sdpa")
    try:
        start, theirs = 0, []
        for length in micro.lengths:
            tokens = micro.input_T[start : start + length]
            logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1] / 0.7, -1)
            theirs.append(logprobs.gather(-1, tokens[1:, None])[:, 0])
            theirs.append(logprobs.new_zeros(1))
            start += length
        torch.testing.assert_close(ours, torch.cat(theirs)[micro.predict_R], rtol=1e-6, atol=1e-6)
    finally:
        model.set_attn_implementation("packed")


def loss_of(model: Any, plan: TrainPlan, groups: Any, **arguments: Any) -> dict[str, float]:
    micro, tokens = step_parts(plan, groups)[0]
    statistics = response_statistics(model, micro, packed=True, temperature=1.0)
    tokens = dataclasses.replace(tokens, **arguments)
    objective = policy_objective(statistics, tokens, algorithm=plan.algorithm)
    return {name: value.item() for name, value in objective.metrics.items()}


def hand_made(mask: list[int] | None = None, *, remove: bool = False, logprob: float = -4.0) -> Any:
    """Two samples of one group, rewards 1 and 0, of two and four tokens."""
    good = make_sample(
        group_id=0, index=0, prompt=[3], response=[4, 5], logprobs=[logprob] * 2, reward=1, mask=[1, 1]
    )
    bad = make_sample(
        group_id=0,
        index=1,
        prompt=[3],
        response=[6, 7, 8, 9],
        logprobs=[logprob] * 4,
        reward=0,
        mask=mask,
        remove=remove,
    )
    return [[good, bad]]


A = 0.5 / (0.5**0.5 + 1e-6)
"""Advantage of a reward of 1 beside a 0."""


@pytest.mark.parametrize(
    ("algorithm", "mask", "remove", "expected"),
    [
        # Ratio 1: the loss is minus the reduced advantage.
        ({}, None, False, -(A - A) / 2),
        ({"calculate_per_token_loss": True}, None, False, -(2 * A - 4 * A) / 6),
        ({"calculate_per_token_loss": True}, [1, 0, 0, 1], False, -(2 * A - 2 * A) / 4),
        # A removed sample leaves the loss but not the number of samples, and not its group's mean.
        ({}, None, True, -A / 2),
        ({"calculate_per_token_loss": True}, None, True, -2 * A / 2),
        # OPSM leaves every denominator alone.
        ({"use_opsm": True, "opsm_delta": -100.0}, None, False, -A / 2),
        ({"use_opsm": True, "opsm_delta": -100.0, "calculate_per_token_loss": True}, None, False, -2 * A / 6),
    ],
)
def test_denominators_are_fixed_before_any_correction(
    model: Any, model_dir: Path, algorithm: dict[str, Any], mask: Any, remove: bool, expected: float
) -> None:
    found = loss_of(model, make_plan(model_dir, algorithm=algorithm), hand_made(mask, remove=remove))
    assert found["pg_loss"] == pytest.approx(expected, abs=1e-6)


def test_opsm_compares_the_engine_with_the_current_weights_and_spares_the_kl_term(
    model: Any, model_dir: Path
) -> None:
    algorithm = {**ALL_TERMS, "use_tis": False, "entropy_coef": 0.0, "opsm_delta": 1.0}
    plan = make_plan(model_dir, algorithm=algorithm)
    reference = torch.full((6,), -3.0, dtype=torch.float64)
    # The engine was far more certain of the tokens than the weights are now: the bad sequence is dropped.
    far = loss_of(model, plan, hand_made(logprob=-0.1), reference_R=reference)
    near = loss_of(model, plan, hand_made(logprob=-9.0), reference_R=reference)
    assert (far["opsm_masked_fraction"], near["opsm_masked_fraction"]) == (0.5, 0.0)
    assert far["kl_loss"] == near["kl_loss"]
    assert far["loss"] == pytest.approx(far["pg_loss"] + 0.1 * far["kl_loss"])


def test_without_old_log_probs_the_current_ones_stand_in(model: Any, model_dir: Path) -> None:
    plan = make_plan(model_dir, algorithm={"use_tis": True})
    micro, tokens = step_parts(plan, make_groups())[0]
    results = []
    for given in (False, True):
        model.zero_grad()
        statistics = response_statistics(model, micro, packed=True, temperature=1.0)
        tokens.old_R = statistics.logprobs_R.detach() if given else None
        loss, metrics = policy_objective(statistics, tokens, algorithm=plan.algorithm)
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append(({name: value.item() for name, value in metrics.items()}, gradient))
    assert_same(*results)
    assert results[0][0]["ois"] == pytest.approx(1.0)


def test_rollout_log_probs_take_the_place_of_the_old_ones(model: Any, model_dir: Path) -> None:
    found = loss_of(model, make_plan(model_dir, algorithm={"use_rollout_logprobs": True}), hand_made())
    assert found["ppo_kl"] == pytest.approx(found["rollout_log_probs"] - found["log_probs"], abs=1e-9)


@pytest.mark.parametrize("term", [{"use_tis": True}, {"entropy_coef": 0.1}, {"eps_clip": 0.0}])
def test_an_option_that_is_on_changes_the_gradient(model: Any, model_dir: Path, term: dict[str, Any]) -> None:
    plain = step_gradient(model, make_plan(model_dir))[1]
    other = step_gradient(model, make_plan(model_dir, algorithm=term))[1]
    assert any(not torch.allclose(plain[name], other[name], rtol=1e-4) for name in plain)


def test_a_model_that_ignores_the_packing_is_refused(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncrl.errors import ConfigError
    from asyncrl.train import forward

    def without_positions(plan: Callable[..., Any]) -> Callable[..., Any]:
        return lambda lengths: plan([sum(lengths)])

    monkeypatch.setattr(forward, "plan_segments", without_positions(forward.plan_segments))
    with pytest.raises(ConfigError, match=r"Qwen3ForCausalLM cannot be trained as decoder \+ output head"):
        load_model(model_dir, trainer=make_plan(model_dir).trainer)
