"""`args`: every option by the name that slime's and Miles' hooks know it by, with a value of their kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncrl.messages.hooks import Args
from asyncrl.topology import catalogue
from asyncrl.topology.flat import flat_options
from asyncrl.topology.foreign_names import FROM_SLIME_AND_MILES, NOT_YET
from tests.hook_support import topology_of

OPTIONS: dict[str, Any] = {
    "algorithm.grpo_std_normalization": False,
    "algorithm.tis_clip": 3.0,
    "algorithm.tis_clip_low": 0.25,
    "algorithm.use_tis": True,
    "algorithm.eps_clip": 0.1,
    "generator.on_new_weights": "keep",
    "generator.concurrency": 5,
    "generator.replicas": 3,
    "reward.use": "math",
    "reward.reward_key": "acc",
    "rollout.max_staleness": 2,
    "rollout.rollout_temperature": 0.7,
    "run.name": "mine",
    "trainer.num_steps_per_rollout": 2,
    "trainer.dtype": "bfloat16",
}

EXPECTED = {
    "pause_generation_mode": "in_place",
    "max_weight_staleness": 2,
    "rm_type": "math",
    "custom_rm_path": None,
    "sglang_server_concurrency": 5,
    "async_max_concurrent_samples": 15,
    "train_backend": "torch",
    "deterministic_mode": True,
    "disable_grpo_std_normalization": True,
    "disable_rewards_normalization": False,
    "start_rollout_id": None,
    "save": "runs/mine/checkpoints",
    "save_hf": None,
    "use_fault_tolerance": True,
    "rollout_health_check_interval": 1.0,
    "rollout_health_check_timeout": 5.0,
    "true_on_policy_mode": False,
    "fully_async": True,
    "rollout_external_engine_addrs": None,
    "rollout_external": False,
    "save_debug_rollout_data": None,
    "load_debug_rollout_data": None,
    "debug_train_only": False,
    "tis_upper_bound": 3.0,
    "tis_lower_bound": 0.25,
    "custom_megatron_before_log_prob_hook_path": None,
    "custom_megatron_before_train_step_hook_path": None,
    "override_lr_scheduler": False,
    "use_checkpoint_lr_scheduler": False,
    "disable_compute_advantages_and_returns": False,
    "use_rollout_entropy": False,
    "observe_training_entropy": True,
    "bf16": True,
    "fp16": False,
    "critic_save": None,
    "warmup_ratio": None,
    "ckpt_step": None,
    "ref_ckpt_step": None,
    "opd_teacher_ckpt_step": None,
    "opd_teacher_urls": None,
    "disable_rollout_trim_samples": True,
    "debug_rollout_only": False,
    "load_debug_rollout_data_subsample": None,
}
"""Every renamed or negated flag."""


def args_of(options: dict[str, Any] | None = None, **where: int) -> Args:
    return Args(flat_options(topology_of(Path("model"), options), **where))


def test_every_option_is_there_by_its_own_name() -> None:
    found = vars(args_of())
    for table, content in catalogue.tables().items():
        missing = [name for name in content.options if name not in found]
        assert not missing, table


def test_every_renamed_flag_has_the_value_of_its_counterpart() -> None:
    args = args_of(OPTIONS)
    assert set(EXPECTED) == set(FROM_SLIME_AND_MILES)
    assert {name: getattr(args, name) for name in EXPECTED} == EXPECTED


def test_what_is_given_keeps_its_value_and_type() -> None:
    args = args_of(OPTIONS)
    given = (
        args.eps_clip,
        args.use_tis,
        args.n_samples_per_prompt,
        args.rollout_temperature,
        args.reward_key,
    )
    assert given == (0.1, True, 4, 0.7, "acc")


def test_what_is_left_out_has_the_value_it_stands_for() -> None:
    args = args_of(OPTIONS)
    assert (args.global_batch_size, args.num_steps_per_rollout) == (8, 2)
    assert args.eps_clip_high == 0.1
    assert (args.rs_lower_bound, args.rs_upper_bound) == (0.25, 3.0)
    assert args.eval_temperature == 0.7
    assert args.eval_reward_key == "acc"
    assert args.critic_lr == args.lr
    assert args.ref_load == args.hf_checkpoint == "model"
    assert args_of({"algorithm.eps_clip_high": 0.3}).eps_clip_high == 0.3


def test_a_function_of_yours_is_custom_rm_path() -> None:
    args = args_of({"reward.use": "mine.rewards:grade"})
    assert (args.rm_type, args.custom_rm_path) == (None, "mine.rewards:grade")


def test_a_chosen_table_wins_over_the_first_of_the_other_kind() -> None:
    options = {"generator.concurrency": 5, "reward.concurrency": 2}
    assert args_of(options).concurrency == 5
    assert args_of(options, generator=0).concurrency == 5
    assert args_of(options, reward=0).concurrency == 2
    assert args_of(options, reward=0).sglang_server_concurrency == 5


def test_features_that_are_not_there_read_as_off() -> None:
    args = args_of()
    assert args.context_parallel_size == 1
    assert args.qkv_format == "thd"
    assert not args.colocate
    off = [name for name in NOT_YET if hasattr(args, name)]
    assert all(getattr(args, name) in (None, False, 1, "thd") for name in off)


def test_args_are_a_namespace(tmp_path: Path) -> None:
    path = tmp_path / "custom.yaml"
    path.write_text("eps_clip: 0.4\nmax_turns: 6\n", encoding="utf-8")
    args = Args(flat_options(topology_of(Path("model"))), custom_config_path=str(path))
    assert (args.eps_clip, args.max_turns) == (0.4, 6)
    assert getattr(args, "max_turn", 9) == 9
    assert not hasattr(args, "max_turn")
    assert vars(args)["max_turns"] == 6
    with pytest.raises(AttributeError, match=r"args\.max_turn: no such option; close to it: max_turns"):
        _ = args.max_turn
