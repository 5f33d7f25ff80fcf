"""The pieces of training that need no backend: schedule, optimizer, packed attention, plan, metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from asyncrl.errors import ConfigError
from asyncrl.messages.sample import Span
from asyncrl.topology.schema import RolloutConfig, RunConfig, Topology
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.attention import Segments, bucket_length, packed_attention, plan_segments
from asyncrl.train.backend import train_plan
from asyncrl.train.data import prepare_batch
from asyncrl.train.optimizer import NamedOptimizer
from asyncrl.train.rows import decode, staleness_metrics
from asyncrl.train.schedule import learning_rate
from tests.train_support import make_groups, make_plan, make_sample


def trainer(**options: Any) -> TrainerConfig:
    return TrainerConfig(hf_checkpoint="model", **options)


@pytest.mark.parametrize(
    ("style", "step", "expected"),
    [
        ("constant", 0, 0.1),
        ("constant", 2, 0.55),
        ("constant", 4, 1.0),
        ("constant", 99, 1.0),
        ("linear", 9, 0.75),
        ("linear", 14, 0.5),
        ("cosine", 14, 0.5),
        ("cosine", 4, 1.0),
        ("linear", 24, 0.0),
        ("cosine", 99, 0.0),
    ],
)
def test_learning_rate_warms_up_then_decays(style: Any, step: int, expected: float) -> None:
    config = trainer(lr=1.0, lr_decay_style=style, lr_warmup_iters=4, lr_warmup_init=0.1)
    assert learning_rate(step, trainer=config, decay_iters=24) == pytest.approx(expected)


def test_decay_ends_at_min_lr_and_needs_an_end() -> None:
    config = trainer(lr=1.0, min_lr=0.2, lr_decay_style="linear")
    assert learning_rate(5, trainer=config, decay_iters=10) == pytest.approx(0.6)
    assert learning_rate(10, trainer=config, decay_iters=10) == 0.2
    assert learning_rate(10, trainer=config, decay_iters=None) == 1.0


def one_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_matrices_decay_and_vectors_do_not(kind: Any) -> None:
    layer = one_layer()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    config = trainer(lr=0.1, weight_decay=0.5, optimizer=kind)
    optimizer = NamedOptimizer(dict(layer.named_parameters()), trainer=config)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before["weight"] * 0.95)
    assert torch.equal(layer.bias, before["bias"])


def test_clipping_scales_to_the_limit_and_reports_the_norm_before() -> None:
    layer = one_layer()
    for limit, expected in ((1.0, 1.0), (0.0, 3.0)):
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter) * 3 / math.sqrt(8)
        optimizer = NamedOptimizer(dict(layer.named_parameters()), trainer=trainer(clip_grad=limit))
        assert optimizer.clip().item() == pytest.approx(3.0, rel=1e-5)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in layer.parameters() if p.grad is not None))
        assert norm == pytest.approx(expected, rel=1e-5)


def test_optimizer_state_of_another_model_is_refused() -> None:
    optimizer = NamedOptimizer(dict(one_layer().named_parameters()), trainer=trainer())
    with pytest.raises(ConfigError, match="optimizer state of 'head'"):
        optimizer.load_state({"head|exp_avg": torch.zeros(1)})


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [9, 3, 40, 17, 8, 3, 130, 64], list(range(1, 40))])
def test_packed_attention_is_attention_within_each_sequence(lengths: list[int]) -> None:
    torch.manual_seed(1)
    total = sum(lengths)
    query = torch.randn(1, 4, total, 8, dtype=torch.float64)
    key, value = (torch.randn(1, 2, total, 8, dtype=torch.float64) for _ in range(2))
    ours, _ = packed_attention(
        nn.Module(), query, key, value, None, scaling=0.3, segments=plan_segments(lengths)
    )
    theirs = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        for q, k, v in zip(*(row.split(lengths, dim=2) for row in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(ours, torch.cat(theirs, dim=2).transpose(1, 2))


def test_a_sliding_window_hides_what_is_further_back() -> None:
    torch.manual_seed(2)
    query, key, value = (torch.randn(1, 1, 12, 4, dtype=torch.float64) for _ in range(3))
    segments = plan_segments([12])
    ours, _ = packed_attention(nn.Module(), query, key, value, None, segments=segments, sliding_window=3)
    alone = nn.functional.scaled_dot_product_attention(query[:, :, 11:], key[:, :, 9:], value[:, :, 9:])
    torch.testing.assert_close(ours[:, 11], alone[:, :, 0])


def test_attention_that_packing_cannot_do_is_refused() -> None:
    row = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="got no segments"):
        packed_attention(nn.Module(), row, row, row, None)
    with pytest.raises(ValueError, match="wants softcap"):
        packed_attention(nn.Module(), row, row, row, None, segments=plan_segments([2]), softcap=30.0)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100, 1000, 8191])
def test_at_most_an_eighth_of_a_long_bucket_is_padding(length: int) -> None:
    padded = bucket_length(length)
    assert length <= padded <= max(length + 7, length * 1.125)


def test_a_row_fits_its_plan() -> None:
    segments: Segments = plan_segments([3, 9, 3, 20])
    assert segments.gather_P[segments.scatter_T].tolist() == list(range(35))


def topology(*, rollout: dict[str, Any], options: dict[str, Any]) -> Topology:
    return Topology(
        rollout=RolloutConfig(rollout_batch_size=4, n_samples_per_prompt=6, **rollout),
        trainer=trainer(**options),
        run=RunConfig(num_rollout=10),
    )


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 1),
        ({"global_batch_size": 8}, 3),
        ({"num_steps_per_rollout": 2}, 2),
        ({"global_batch_size": 12, "num_steps_per_rollout": 2}, 2),
    ],
)
def test_the_fourth_knob_follows(options: dict[str, Any], steps: int) -> None:
    plan = train_plan(topology(rollout={"rollout_temperature": 0.7}, options=options))
    assert (plan.num_steps_per_rollout, plan.rollout_temperature, plan.lr_decay_iters) == (
        steps,
        0.7,
        10 * steps,
    )


@pytest.mark.parametrize(
    "options",
    [{"global_batch_size": 7}, {"num_steps_per_rollout": 5}, {"global_batch_size": 48}],
)
def test_knobs_that_do_not_multiply_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="= 24"):
        train_plan(topology(rollout={}, options=options))


def test_optimizer_steps_keep_the_recorded_order() -> None:
    plan = make_plan(Path("model"), trainer={"max_tokens_per_gpu": 50}, num_steps_per_rollout=2)
    prepared = prepare_batch(make_groups(), plan=plan)
    named = [sorted(name for micro in step.micros for name in micro.names) for step in prepared.steps]
    assert named == [[f"{g}.{i}" for g in pair for i in range(4)] for pair in ((0, 1), (2, 3))]
    for step in prepared.steps:
        prepared.data.weigh(samples=step.samples, per_token=False)
        total = sum(float(prepared.data.take(micro).weight_R.sum()) for micro in step.micros)
        assert total == pytest.approx(1.0)


def test_staleness_counts_every_token_from_its_own_version() -> None:
    sample = make_sample(group_id=0, index=0, prompt=[1], response=[2] * 4, logprobs=[-1.0] * 4, reward=1)
    sample.spans = [Span(1, 1, 1), Span(3, 1, 3)]
    fresh = make_sample(
        group_id=0, index=1, prompt=[1], response=[2] * 9, logprobs=[-1.0] * 9, reward=0, version=4
    )
    metrics = staleness_metrics([decode(sample), decode(fresh)], rollout_step=4)
    assert metrics == pytest.approx(
        {
            "staleness/mean": (6 / 4 + 0) / 2,
            "staleness/max": 3,
            "staleness/min": 0,
            "staleness/oldest_token": 1.5,
            "staleness/mixed_version_ratio": 0.5,
            "staleness/by_length/4-7": 1.5,
            "staleness/by_length/8-15": 0,
        }
    )


def test_metrics_of_the_data_need_no_forward() -> None:
    groups = make_groups()
    for group in groups:
        for sample in group:
            reward = 1.0 if group is groups[1] else float(sample.index % 2)
            sample.score = msgspec.structs.replace(sample.score, reward=reward)
    metrics = prepare_batch(groups, plan=make_plan(Path("model"))).metrics
    lengths = [sample.num_tokens for group in groups for sample in group]
    assert metrics["rollout/response_len/max"] == max(lengths)
    assert metrics["rollout/num_tokens"] == sum(lengths)
    assert metrics["rollout/zero_std/count_1"] == 1
    assert metrics["rollout/zero_std/ratio"] == 0.25
    assert metrics["rollout/raw_reward"] == (3 * 0.5 + 1) / 4
    assert metrics["rollout/rewards"] == pytest.approx(0.0)
