"""Corrections put together: the policy loss of any combination against one written out in plain Python."""

# ruff: noqa: N806 -- tensors carry shape suffixes
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor

from asyncrl.algo.loss import TokenStatistics
from asyncrl.messages.sample import Span
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.train.masks import apply_staleness, step_normalizer
from asyncrl.train.objective import policy_objective
from asyncrl.train.tokens import TokenData
from tests.train_support import make_groups, write_model
from tests.unit.plain_loss import STEP, Case, Token, frozen, make_case, normalizer, plain
from tests.unit.train_world import loaded, logprobs_under, samples_of, snapshot, train


def tokens_of(case: Case, algorithm: AlgorithmConfig, *, old: bool = True) -> tuple[Tensor, TokenData]:
    """The same as the trainer holds it, weighed and with its staleness masks: (current_R leaf, data)."""
    flat = [token for sample in case for token in sample]

    def column(name: str) -> Tensor:
        return torch.tensor([float(getattr(token, name)) for token in flat], dtype=torch.float64)

    data = TokenData(
        names=[f"0.{i}" for i in range(len(case))],
        lengths=[len(sample) + 1 for sample in case],
        sample_R=torch.tensor([i for i, sample in enumerate(case) for _ in sample], dtype=torch.int64),
        mask_R=column("mask"),
        rollout_R=column("rollout"),
        version_R=column("version").long(),
        reward_S=torch.zeros(len(case), dtype=torch.float64),
        weight_R=torch.zeros(len(flat), dtype=torch.float64),
        keep_R=torch.ones(len(flat), dtype=torch.float64),
        old_R=column("old") if old else None,
        advantage_R=column("advantage"),
    )
    apply_staleness(data, algorithm=algorithm, rollout_step=STEP, num_steps_per_rollout=2)
    data.weigh(samples=range(len(case)), per_token=algorithm.calculate_per_token_loss)
    data.tis_normalizer = step_normalizer(data, samples=range(len(case)), algorithm=algorithm)
    return column("current").requires_grad_(), data


class Found(NamedTuple):
    loss: float
    masked: float
    gradient: list[float]


def ours(case: Case, options: dict[str, Any], *, old: bool = True) -> Found:
    algorithm = AlgorithmConfig(**options)
    current_R, data = tokens_of(case, algorithm, old=old)
    statistics = TokenStatistics(current_R, torch.zeros_like(current_R))
    objective = policy_objective(statistics, data, algorithm=algorithm, proximal_version=STEP)
    torch.autograd.backward(objective.loss)
    assert current_R.grad is not None
    metrics = objective.metrics
    assert metrics["pg_loss"] == metrics["loss"]
    return Found(float(metrics["pg_loss"]), float(metrics["masked_ratio"]), current_R.grad.tolist())


TIS = {"use_tis": True, "tis_clip": 1.5}
RS = {"use_rs": True, "rs_upper_bound": 1.4, "rs_lower_bound": 0.6}
OPSM = {"use_opsm": True, "opsm_delta": 0.05}
DECOUPLED = {"use_decoupled_loss": True, "behave_imp_weight_cap": 1.3}
LOGLINEAR = {**DECOUPLED, "prox_logp_method": "loglinear"}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "rollout log-probs": {"use_rollout_logprobs": True},
    "tis": TIS,
    "tis, clipped below": {**TIS, "tis_clip_low": 0.7},
    "icepop": {**TIS, "tis_mode": "mask", "tis_clip_low": 0.5},
    "truncated sequences": {**TIS, "tis_level": "sequence", "tis_mode": "truncate"},
    "masked geometric": {**TIS, "tis_level": "geometric", "tis_mode": "mask", "tis_clip_low": 0.8},
    "normalised tokens": {**TIS, "tis_batch_normalize": True},
    "normalised sequences": {**TIS, "tis_level": "sequence", "tis_batch_normalize": True},
    "opsm": OPSM,
    "tis + opsm": {**TIS, **OPSM},
    "rs": RS,
    "rs with tis' bounds": {"use_rs": True, "tis_clip": 1.3},
    "rs + tis": {**RS, **TIS},
    "rs by token + icepop": {**RS, **TIS, "rs_level": "token", "tis_mode": "mask", "tis_clip_low": 0.5},
    "rs by sequence with a veto": {
        "use_rs": True,
        "rs_level": "sequence",
        "rs_veto_threshold": 0.3,
        "rs_upper_bound": 9.0,
        "rs_lower_bound": 0.01,
    },
    "rs + tis + opsm": {**RS, **TIS, **OPSM},
    "decoupled": DECOUPLED,
    "decoupled without a cap": {**DECOUPLED, "behave_imp_weight_cap": None},
    "decoupled + rs + opsm": {**DECOUPLED, **RS, **OPSM},
    "log-linear": LOGLINEAR,
    "log-linear + opsm": {**LOGLINEAR, **OPSM},
    "dppo": {"use_dppo": True, "dppo_mask_low": 0.05, "dppo_mask_high": 0.05, "dppo_kl_coef": 0.01},
    "dppo + opsm": {"use_dppo": True, "dppo_mask_low": 0.05, "dppo_mask_high": 0.05, **OPSM},
    "stale masked": {"stale": "mask", "stale_after": 4},
    "stale dropped": {"stale": "drop", "stale_after": 4},
    "newest version": {"mask_offpolicy_in_partial_rollout": True},
    "stale + newest + tis + rs": {
        "stale": "mask",
        "stale_after": 6,
        "mask_offpolicy_in_partial_rollout": True,
        **TIS,
        **RS,
    },
    "gspo + tis": {"advantage_estimator": "gspo", **TIS},
    "cispo + rs": {"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": 0.2, **RS},
    "dual clip + tis": {"eps_clip_c": 1.1, "eps_clip_high": 0.3, **TIS},
}
REDUCERS: dict[str, dict[str, Any]] = {
    "samples": {},
    "tokens": {"calculate_per_token_loss": True},
    "constant": {"pg_loss_divisor": 10.0},
}


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_the_policy_loss_is_the_one_written_out(options: dict[str, Any], reducer: dict[str, Any]) -> None:
    case, algorithm = make_case(), {**options, **reducer}
    found = ours(case, algorithm)
    loss, masked = plain(case, algorithm)
    assert found.loss == pytest.approx(loss, rel=1e-10, abs=1e-12)
    assert found.masked == pytest.approx(masked, rel=1e-10, abs=1e-12)
    # Weights move nobody out of the loss; whatever masks does so for some tokens, and not for all.
    masks = any(
        (
            algorithm.get("use_rs"),
            algorithm.get("use_opsm"),
            algorithm.get("tis_mode") == "mask",
            algorithm.get("behave_imp_weight_cap"),
            algorithm.get("stale_after"),
            algorithm.get("mask_offpolicy_in_partial_rollout"),
        )
    )
    assert (0 < found.masked < 1) == masks


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if "rollout log-probs" not in name])
def test_at_a_first_step_the_current_log_probs_are_the_old_ones(name: str) -> None:
    """A single optimizer step runs no pass for them; two have them, equal to the current at the first."""
    options, case = COMBINATIONS[name], make_case(same_old=True)
    alone, first = ours(case, options, old=False), ours(case, options)
    if "tis_batch_normalize" in options:
        # The mean over the step is not known without them: the backend makes the pass.
        assert alone.loss != pytest.approx(first.loss)
        return
    assert alone.loss == pytest.approx(plain(case, options, old=False)[0], rel=1e-10)
    assert alone.loss == pytest.approx(first.loss, rel=1e-12)
    assert alone.gradient == pytest.approx(first.gradient, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name != "nothing"])
def test_each_combination_changes_the_gradient(name: str) -> None:
    case = make_case()
    plain_gradient = torch.tensor(ours(case, {}).gradient)
    gradient = torch.tensor(ours(case, COMBINATIONS[name]).gradient)
    assert not torch.allclose(plain_gradient, gradient, rtol=1e-3, atol=1e-6)
    _, data = tokens_of(case, AlgorithmConfig())
    assert not gradient[data.mask_R == 0].any()


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_gradient_is_that_of_the_loss_written_out(name: str) -> None:
    """By differences, where weights and masks stand still: all but the current log-probs of the surrogate."""
    options, case = COMBINATIONS[name], make_case(seed=8)
    algorithm = AlgorithmConfig(**options)
    found, flat = (
        ours(case, options).gradient,
        [(i, t) for i, row in enumerate(case) for t in range(len(row))],
    )

    def moved(i: int, t: int, by: float) -> float:
        case_ = [list(row) for row in case]
        case_[i][t] = case[i][t]._replace(current=case[i][t].current + by)
        return frozen(case, case_, algorithm)

    for place, (i, t) in enumerate(flat):
        difference = (moved(i, t, 1e-6) - moved(i, t, -1e-6)) / 2e-6
        assert found[place] == pytest.approx(difference, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_what_stands_at_masked_tokens_has_no_influence(name: str) -> None:
    options, case = COMBINATIONS[name], make_case()
    poisoned = [
        [
            token if token.mask else token._replace(rollout=math.nan, old=math.inf, advantage=math.nan)
            for token in row
        ]
        for row in case
    ]
    found, expected = ours(poisoned, options), ours(case, options)
    assert found.loss == expected.loss
    assert found.gradient == expected.gradient


def test_a_step_without_a_response_has_no_mean_weight() -> None:
    algorithm = AlgorithmConfig(**COMBINATIONS["normalised tokens"])
    current_R, data = tokens_of([[], []], algorithm)
    assert data.tis_normalizer == 1.0
    assert not current_R.numel()


def test_the_mean_weight_is_the_optimizer_steps_own() -> None:
    algorithm = AlgorithmConfig(**COMBINATIONS["normalised tokens"])
    case = make_case()
    _, data = tokens_of(case, algorithm)
    first = step_normalizer(data, samples=range(3), algorithm=algorithm)
    assert first == pytest.approx(normalizer(case[:3], algorithm))
    assert first != pytest.approx(normalizer(case, algorithm))


# Through the backend: which passes run, and that the loss is made of their log-probs.


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    ("name", "num_steps", "forward"),
    [
        ("decoupled", 1, False),
        ("decoupled", 2, True),
        ("log-linear", 1, False),
        ("log-linear", 2, False),
        ("rollout log-probs", 2, False),
        ("dppo", 2, False),
        ("normalised tokens", 1, True),
        ("rs + tis + opsm", 2, True),
    ],
)
def test_a_pass_for_old_log_probs_runs_only_where_it_is_needed(
    model_dir: Path, name: str, num_steps: int, forward: bool
) -> None:
    backend = loaded(model_dir, algorithm=COMBINATIONS[name], num_steps_per_rollout=num_steps)
    report = train(backend, STEP, make_groups(version=STEP - 2))
    assert ("log_probs" in report.phase_s) == forward
    assert math.isfinite(report.metrics["train/pg_loss"])


@pytest.mark.parametrize(
    "name", ["tis + opsm", "rs + tis", "decoupled", "log-linear", "dppo", "normalised tokens", "stale masked"]
)
def test_a_step_of_the_backend_has_the_loss_written_out(model_dir: Path, name: str) -> None:
    algorithm = {**COMBINATIONS[name], "grpo_std_normalization": False}
    backend, probe, groups = loaded(model_dir, algorithm=algorithm), loaded(model_dir), make_groups()
    samples = samples_of(groups)
    for i, sample in enumerate(samples):
        sample.spans = [at_version(span, STEP - i % 4) for span in sample.spans]
    current = logprobs_under(probe, snapshot(backend.weights()), groups)
    case = []
    for i, (sample, logprobs) in enumerate(zip(samples, current, strict=True)):
        rewards = [other.score.reward for other in groups[i // 4] if other.score]
        assert sample.score is not None
        advantage = sample.score.reward - sum(rewards) / len(rewards)
        recorded = torch.frombuffer(bytearray(sample.logprobs), dtype=torch.float32).tolist()
        case.append(
            [
                Token(x, x, y, advantage, STEP - i % 4, m)
                for x, y, m in zip(logprobs, recorded, sample.loss_mask, strict=True)
            ]
        )
    options = {**COMBINATIONS[name]}
    if options.get("stale_after"):
        options["stale_after"] *= 2  # One optimizer step a rollout step here, two in `plain`.
    loss, masked = plain(case, options)
    metrics = train(backend, STEP, groups).metrics
    assert metrics["train/pg_loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert metrics["train/masked_ratio"] == pytest.approx(masked, abs=1e-4)


def at_version(span: Span, version: int) -> Span:
    return msgspec.structs.replace(span, version=version)
