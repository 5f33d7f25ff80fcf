"""Master weights, the optimizer's state, and the schedule of the learning rate."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from asyncrl.errors import ConfigError
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.optimizer import NamedOptimizer
from asyncrl.train.schedule import learning_rate, schedule_of, scheduled


def trainer(**options: Any) -> TrainerConfig:
    return TrainerConfig(hf_checkpoint="model", **options)


def layer(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).to(dtype)


def optimizer_of(model: nn.Module, *, lr: float | None = None, **options: Any) -> NamedOptimizer:
    return NamedOptimizer(dict(model.named_parameters()), trainer=trainer(**options), lr=lr)


def take_steps(model: nn.Module, optimizer: NamedOptimizer, *, count: int, seed: int = 1) -> None:
    """Optimizer steps on gradients drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("masters", "moved"), [("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_small_steps_add_up_in_master_weights_only(kind: Any, masters: Any, moved: bool) -> None:
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    # 200 steps of 1e-4 are 0.02, while bf16 numbers just below 1 lie 0.0039 apart.
    config = trainer(lr=1e-4, optimizer=kind, main_params_dtype=masters, dtype="bfloat16")
    optimizer = NamedOptimizer({"w": weight}, trainer=config)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.item() == pytest.approx(0.98, abs=0.002) if moved else weight.item() == 1


def test_a_bf16_weight_is_its_master_rounded_and_the_master_trains_as_fp32_does() -> None:
    model, reference = layer(), layer().float()
    options = {"lr": 1e-3, "weight_decay": 0.1}
    optimizer, plain = optimizer_of(model, **options), optimizer_of(reference, **options)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for parameter, twin in zip(model.parameters(), reference.parameters(), strict=True):
            gradient = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad, twin.grad = gradient, gradient.float()
        optimizer.step()
        plain.step()
    assert {name for name in plain.state() if name.endswith("|master")} == set()
    state = optimizer.state()
    for name, parameter in model.named_parameters():
        master = state[f"{name}|master"]
        assert master.dtype == torch.float32
        assert torch.equal(master, dict(reference.named_parameters())[name].detach())
        assert torch.equal(parameter.detach(), master.bfloat16())
        assert state[f"{name}|exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype: torch.dtype, kind: Any) -> None:
    options = {"lr": 1e-2, "optimizer": kind}
    model = layer(dtype)
    optimizer = optimizer_of(model, **options)
    take_steps(model, optimizer, count=3)
    weights, state = copies(model.state_dict()), copies(optimizer.state())
    take_steps(model, optimizer, count=3, seed=2)

    other = layer(dtype)
    other.load_state_dict(weights)
    restored = optimizer_of(other, **options)
    restored.load_state(state)
    found = restored.state()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    take_steps(other, restored, count=3, seed=2)
    for before, after in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(before, after)
    for name, tensor in optimizer.state().items():
        assert torch.equal(restored.state()[name], tensor)


def test_loaded_state_does_not_share_memory() -> None:
    model = layer()
    optimizer = optimizer_of(model, lr=0.1)
    take_steps(model, optimizer, count=1)
    state = copies(optimizer.state())
    before = copies(state)
    other = layer()
    restored = optimizer_of(other, lr=0.1)
    restored.load_state(state)
    take_steps(other, restored, count=1)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_masters_are_in_the_state_before_the_first_step() -> None:
    model = layer()
    state = optimizer_of(model).state()
    assert set(state) == {"weight|master", "bias|master"}
    assert torch.equal(state["weight|master"], model.weight.detach().float())


def test_a_master_sets_its_weight_whatever_holds_it() -> None:
    master = {"weight|master": torch.full((3, 4), 1 / 3)}
    holders: list[tuple[torch.dtype, Any]] = [
        (torch.bfloat16, "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.float32, "float32"),
    ]
    for dtype, masters in holders:
        model = layer(dtype)
        optimizer_of(model, main_params_dtype=masters).load_state(master)
        assert torch.equal(model.weight.detach(), master["weight|master"].to(dtype))
        assert torch.equal(model.bias, layer(dtype).bias)


def test_state_of_another_shape_is_refused() -> None:
    optimizer = optimizer_of(layer())
    with pytest.raises(ConfigError, match=r"weight\|master has shape \[1\], the model's weight \[3, 4\]"):
        optimizer.load_state({"weight|master": torch.zeros(1)})


def test_reset_forgets_moments_and_keeps_masters() -> None:
    model = layer()
    optimizer = optimizer_of(model, lr=1e-4)
    take_steps(model, optimizer, count=3)
    masters = {name: t for name, t in copies(optimizer.state()).items() if name.endswith("|master")}
    optimizer.reset()
    assert optimizer.state().keys() == masters.keys()
    assert all(torch.equal(optimizer.state()[name], tensor) for name, tensor in masters.items())
    # Without a past, Adam's step is lr x sign of the gradient.
    take_steps(model, optimizer, count=1, seed=5)
    moved = (optimizer.state()["weight|master"] - masters["weight|master"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=1e-3, atol=1e-7)
    assert optimizer.state()["weight|step"].item() == 1


def test_a_frozen_or_unused_parameter_stays() -> None:
    model = layer()
    model.weight.requires_grad = False
    optimizer = optimizer_of(model, lr=0.1)
    assert set(optimizer.state()) == {"bias|master"}
    before = copies(model.state_dict())
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_clipping_scales_what_the_masters_see() -> None:
    model = layer()
    optimizer = optimizer_of(model, lr=1.0, optimizer="sgd", clip_grad=1.0)
    before = copies(optimizer.state())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.clip()
    optimizer.step()
    squares = sum(float((optimizer.state()[name] - before[name]).square().sum()) for name in before)
    assert math.sqrt(squares) == pytest.approx(1.0, rel=0.01)


def test_a_learning_rate_of_its_own() -> None:
    assert optimizer_of(layer(), lr=0.25).learning_rates == [0.25, 0.25]
    optimizer = optimizer_of(layer())
    assert optimizer.learning_rates == [1e-6, 1e-6]
    optimizer.set_lr(0.5)
    assert optimizer.learning_rates == [0.5, 0.5]


@pytest.mark.parametrize(
    ("style", "halfway"),
    [
        ("exponential", 2 * 0.5**0.5 - 1),
        ("linear", 0.5),
        ("cosine", 0.5),
        ("minus_sqrt", 1 - 0.5**0.5),
    ],
)
def test_wsd_is_stable_then_decays_through_its_last_steps(style: Any, halfway: float) -> None:
    config = trainer(
        lr=1.0,
        min_lr=0.2,
        lr_decay_style="WSD",
        lr_warmup_iters=4,
        lr_wsd_decay_iters=10,
        lr_wsd_decay_style=style,
    )
    rates = [learning_rate(step, trainer=config, decay_iters=30) for step in range(40)]
    assert rates[:4] == [0.0, 0.25, 0.5, 0.75]
    assert rates[4:21] == [1.0] * 17
    assert rates[25] == pytest.approx(0.2 + 0.8 * halfway)
    assert rates[30:] == [0.2] * 10
    assert all(now < before for before, now in itertools.pairwise(rates[20:31]))


@given(
    style=st.sampled_from(["constant", "linear", "cosine", "WSD"]),
    wsd=st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
    fraction=st.integers(0, 50).map(lambda percent: percent / 100),
    decay_iters=st.integers(2, 60),
    data=st.data(),
)
def test_the_learning_rate_rises_to_lr_and_never_rises_again(
    style: Any, wsd: Any, fraction: float, decay_iters: int, data: st.DataObject
) -> None:
    config = trainer(
        lr=1.0,
        min_lr=0.1,
        lr_decay_style=style,
        lr_warmup_fraction=fraction,
        lr_wsd_decay_iters=data.draw(st.integers(1, decay_iters // 2)),
        lr_wsd_decay_style=wsd,
    )
    rates = [learning_rate(step, trainer=config, decay_iters=decay_iters) for step in range(decay_iters + 3)]
    peak = rates.index(max(rates))
    assert abs(peak - fraction * decay_iters) < 1
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[-1] == (1.0 if style == "constant" else 0.1)


def test_warm_up_as_a_share_of_the_decay() -> None:
    config = trainer(lr=1.0, lr_warmup_fraction=0.25, lr_warmup_init=0.2)
    assert learning_rate(5, trainer=config, decay_iters=40) == pytest.approx(0.6)
    assert learning_rate(10, trainer=config, decay_iters=40) == 1.0


def test_options_without_a_schedule_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lr_warmup_fraction: 0\.1 of a run without an end"):
        learning_rate(0, trainer=trainer(lr_warmup_fraction=0.1), decay_iters=None)
    with pytest.raises(ConfigError, match="lr_wsd_decay_iters: not given"):
        learning_rate(0, trainer=trainer(lr_decay_style="WSD"), decay_iters=10)


def test_a_schedule_is_told_apart_by_every_option_the_rate_depends_on() -> None:
    base = schedule_of(trainer())
    assert base == schedule_of(trainer(weight_decay=0.5, clip_grad=2.0))
    others: list[dict[str, Any]] = [
        {"lr": 2.0},
        {"min_lr": 1e-9},
        {"lr_decay_style": "WSD"},
        {"lr_warmup_iters": 1},
        {"lr_warmup_fraction": 0.5},
        {"lr_warmup_init": 1e-9},
        {"lr_decay_iters": 5},
        {"lr_wsd_decay_iters": 3},
        {"lr_wsd_decay_style": "cosine"},
        {"critic_lr": 1.0},
        {"critic_lr_warmup_iters": 2},
    ]
    for options in others:
        changed = schedule_of(trainer(**options))
        assert {name for name in base if base[name] != changed[name]} == set(options)


def test_a_checkpoint_of_another_schedule_goes_on_only_where_one_is_chosen() -> None:
    stored = schedule_of(trainer(lr=1e-3, min_lr=1e-4))
    with pytest.raises(ConfigError, match=r"lr 0\.002 \(there 0\.001\).*override_opt_param_scheduler"):
        scheduled(trainer(lr=2e-3, min_lr=1e-4), stored=stored)
    ours = trainer(lr=2e-3, override_opt_param_scheduler=True)
    assert scheduled(ours, stored=stored) == ours
    theirs = scheduled(
        trainer(lr=2e-3, clip_grad=3.0, use_checkpoint_opt_param_scheduler=True), stored=stored
    )
    assert schedule_of(theirs) == stored
    assert theirs.clip_grad == 3.0
