"""Training hooks written for slime and Miles do here what the built-in options do, gradients included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from asyncrl.errors import NumericsError
from tests.hook_support import (
    ADVANTAGE,
    LOSS,
    REDUCER,
    REWARD,
    TIS,
    Trained,
    difference,
    prepared,
    trained,
    user_hook,
    write_hook,
)
from tests.train_support import make_groups, make_sample, write_model

TOLERANCE = 3e-7
"""Rounding of float32 after one update."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def plain(model: Path) -> Trained:
    """No hook, no correction."""
    return trained(model)


# Importance sampling.

MIS = {
    "token clip": {"tis_level": "token", "tis_mode": "clip", "tis_clip": 1.2, "tis_clip_low": 0.8},
    "token truncate": {"tis_level": "token", "tis_mode": "truncate", "tis_clip": 1.1},
    "token mask": {"tis_level": "token", "tis_mode": "mask", "tis_clip": 2.0, "tis_clip_low": 0.5},
    "sequence clip": {"tis_level": "sequence", "tis_mode": "clip", "tis_clip": 3.0, "tis_clip_low": 0.2},
    "geometric mask": {"tis_level": "geometric", "tis_mode": "mask", "tis_clip": 1.3, "tis_clip_low": 0.7},
    "rejection": {"tis_mode": "truncate", "use_rs": True, "rs_level": "geometric", "rs_upper_bound": 1.3},
    "veto": {"tis_clip": 1.5, "use_rs": True, "rs_level": "token", "rs_upper_bound": 9.0,
             "rs_lower_bound": 0.05, "rs_veto_threshold": 0.2},
}  # fmt: skip


@pytest.mark.parametrize(("case", "per_token"), [*((case, False) for case in MIS), ("rejection", True)])
def test_mis_is_the_built_in_importance_sampling(
    model: Path, plain: Trained, case: str, per_token: bool
) -> None:
    options = {f"algorithm.{name}": value for name, value in MIS[case].items()}
    options |= {"algorithm.use_tis": True, "algorithm.calculate_per_token_loss": per_token}
    built_in = trained(model, options)
    # The hook reads use_rs and its bounds from args; the built-in rejection must not run a second time.
    own = options | {TIS: user_hook("compute_mis_weights_with_cp")}
    custom = trained(model, own)
    assert difference(custom, built_in) < TOLERANCE
    assert difference(built_in, plain) > 100 * TOLERANCE
    assert custom.metrics["train/masked_ratio"] == pytest.approx(built_in.metrics["train/masked_ratio"])
    assert custom.metrics["train/pg_loss"] == pytest.approx(built_in.metrics["train/pg_loss"], abs=1e-6)
    assert custom.metrics["custom/mis_is_ratio"] == pytest.approx(built_in.metrics["train/tis"], rel=1e-5)
    # A list per sample is reduced as a packed tensor is; here old - rollout.
    expected = custom.metrics["rollout/log_probs"] - custom.metrics["rollout/rollout_log_probs"]
    assert custom.metrics["custom/mis_log_ratio"] == pytest.approx(expected, abs=1e-5)


def test_icepop_is_the_built_in_mask(model: Path) -> None:
    bounds = {"algorithm.use_tis": True, "algorithm.tis_clip": 1.3, "algorithm.tis_clip_low": 0.7}
    built_in = trained(model, {**bounds, "algorithm.tis_mode": "mask"})
    custom = trained(model, {**bounds, TIS: user_hook("icepop_function")})
    assert difference(custom, built_in) < TOLERANCE
    for name in ("tis", "tis_clipfrac", "tis_abs"):
        ours = built_in.metrics[f"train/{name}"]
        assert custom.metrics[f"custom/{name}"] == pytest.approx(ours, abs=1e-6)


def test_masks_that_were_changed_in_place_leave_the_loss(model: Path, plain: Trained) -> None:
    custom = trained(model, {"algorithm.use_tis": True, TIS: user_hook("rejects_in_place")})
    lower, upper = float(np.exp(-0.5)), float(np.exp(0.5))
    built_in = trained(
        model,
        {
            "algorithm.use_rs": True,
            "algorithm.rs_level": "token",
            "algorithm.rs_lower_bound": lower,
            "algorithm.rs_upper_bound": upper,
        },
    )
    assert 0.01 < custom.metrics["train/masked_ratio"] < 0.99
    assert difference(custom, built_in) < TOLERANCE
    assert difference(custom, plain) > 100 * TOLERANCE


def test_without_tis_only_the_metrics_of_the_function_count(model: Path, plain: Trained) -> None:
    own = {"algorithm.get_mismatch_metrics": True, TIS: user_hook("icepop_function")}
    custom = trained(model, own)
    assert difference(custom, plain) < TOLERANCE
    assert custom.metrics["custom/tis_abs"] > 0


# Reducers and losses.


def test_the_dr_grpo_reducer_is_the_constant_divisor(model: Path, plain: Trained) -> None:
    kl = {"algorithm.use_kl_loss": True, "algorithm.kl_loss_coef": 0.2, "algorithm.entropy_coef": 0.01}
    custom = trained(model, {**kl, REDUCER: user_hook("get_pg_loss_reducer")})
    built_in = trained(model, {**kl, "algorithm.pg_loss_divisor": 24.0})
    assert difference(custom, built_in) < TOLERANCE
    assert difference(custom, plain) > 100 * TOLERANCE
    assert custom.metrics["train/pg_loss"] == pytest.approx(built_in.metrics["train/pg_loss"], abs=1e-6)


def test_the_reducer_gets_the_masks_after_corrections(model: Path) -> None:
    own = {"algorithm.use_tis": True, "algorithm.tis_mode": "mask", "algorithm.tis_clip": 1.3}
    own["algorithm.tis_clip_low"] = 0.7
    custom = trained(model, {**own, REDUCER: user_hook("get_pg_loss_reducer")})
    built_in = trained(model, {**own, "algorithm.pg_loss_divisor": 24.0})
    assert 0.01 < custom.metrics["train/masked_ratio"] < 0.99
    assert difference(custom, built_in) < TOLERANCE


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_custom_loss_is_the_built_in_policy_loss(
    model: Path, plain: Trained, per_token: bool, steps: int
) -> None:
    shared = {
        "rollout.rollout_temperature": 0.7,
        "trainer.num_steps_per_rollout": steps,
        "trainer.data_pad_size_multiplier": 16,
        "algorithm.calculate_per_token_loss": per_token,
        "algorithm.entropy_coef": 0.05,
        "algorithm.use_kl_loss": True,
        "algorithm.kl_loss_coef": 0.1,
        "algorithm.eps_clip": 0.02,
        "algorithm.eps_clip_high": 0.03,
    }
    built_in = trained(model, shared)
    own = {"algorithm.loss_type": "custom_loss", LOSS: user_hook("policy_loss_function")}
    custom = trained(model, {**shared, **own})
    assert built_in.metrics["train/num_micro_batches"] > 2
    # Two steps: the second one's old log-probs come from the pass before the first, and the ratio is not 1.
    assert difference(custom, built_in) < TOLERANCE * 5
    assert difference(custom, plain) > 100 * TOLERANCE
    for name in ("loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl"):
        ours = built_in.metrics[f"train/{name}"]
        assert custom.metrics[f"custom/{name}"] == pytest.approx(ours, rel=1e-4, abs=2e-6), name
    if steps == 2:
        assert custom.metrics["custom/pg_clipfrac"] > 0


@pytest.mark.parametrize(
    ("own", "ours"),
    [
        ({"algorithm.loss_type": "custom_loss", LOSS: user_hook("policy_loss_function")}, {}),
        ({REDUCER: user_hook("get_pg_loss_reducer")}, {"algorithm.pg_loss_divisor": 24.0}),
    ],
    ids=["loss", "reducer"],
)
def test_stale_tokens_are_left_out_and_the_denominator_stays(
    model: Path, own: dict[str, Any], ours: dict[str, Any]
) -> None:
    fresh, stale = make_groups(version=3), make_groups(version=0)
    groups = [fresh[0], stale[1], *fresh[2:]]
    left_out = {"algorithm.stale": "mask", "algorithm.stale_after": 1}
    built_in = trained(model, {**left_out, **ours}, groups=groups, rollout_step=3)
    custom = trained(model, {**left_out, **own}, groups=groups, rollout_step=3)
    assert 0.2 < built_in.metrics["train/masked_ratio"] < 0.3
    assert difference(custom, built_in) < TOLERANCE
    assert difference(trained(model, ours), built_in) > 100 * TOLERANCE


def test_a_custom_loss_that_is_nan_names_its_sample(model: Path, tmp_path: Path) -> None:
    path = write_hook(
        tmp_path,
        "import torch\n\n"
        "def hook(args, batch, logits, sum_of_sample_mean):\n"
        "    factor = torch.ones_like(torch.cat(batch['advantages']))\n"
        "    lengths, start = batch['response_lengths'], 0\n"
        "    for tokens, length in zip(batch['unconcat_tokens'], lengths):\n"
        "        factor[start : start + length] = torch.nan if tokens[-1] == 63 else 1.0\n"
        "        start += length\n"
        "    return sum_of_sample_mean(factor * logits.mean()), {}\n",
    )
    groups = make_groups(max_len=8)
    odd = make_sample(group_id=2, index=1, prompt=[3], response=[4, 63], logprobs=[-4.0] * 2, reward=1.0)
    groups[2][1] = odd
    with pytest.raises(NumericsError, match=r"samples 2\.1;"):
        trained(model, {"algorithm.loss_type": "custom_loss", LOSS: path}, groups=groups)


# Advantages and rewards.


def test_a_custom_advantage_function_is_the_estimator_it_copies(model: Path, plain: Trained) -> None:
    shared = {
        "algorithm.advantage_estimator": "reinforce_plus_plus",
        "algorithm.normalize_advantages": True,
        "algorithm.kl_coef": 0.05,
        "algorithm.gamma": 0.95,
    }
    groups = make_groups(seed=3)
    built_in = trained(model, shared, groups=groups)
    custom = trained(model, {**shared, ADVANTAGE: user_hook("compute_advantages")}, groups=groups)
    assert difference(custom, built_in) < TOLERANCE
    assert difference(custom, plain) > 100 * TOLERANCE
    assert custom.metrics["rollout/returns"] == pytest.approx(built_in.metrics["rollout/returns"], abs=1e-6)


def test_reward_post_processing_is_the_group_normalisation_it_copies(model: Path, plain: Trained) -> None:
    custom = trained(model, {REWARD: user_hook("group_normalise")})
    assert difference(custom, plain) < TOLERANCE
    assert custom.metrics["rollout/raw_reward"] == plain.metrics["rollout/raw_reward"]


def test_reward_post_processing_sees_the_number_of_a_dict_reward(model: Path) -> None:
    groups = make_groups()
    scored = [
        [
            msgspec.structs.replace(
                sample,
                score=msgspec.structs.replace(sample.score, detail={"acc": sample.score.reward, "len": 7.0}),
            )
            for sample in group
            if sample.score is not None
        ]
        for group in groups
    ]
    options = {REWARD: user_hook("group_normalise"), "reward.reward_key": "acc"}
    assert torch.equal(prepared(model, options, scored).data.reward_S, prepared(model, {}).data.reward_S)
