"""Foreign names lead to options that exist, and our names and defaults are those of Miles."""

from __future__ import annotations

from typing import Any

import pytest

from asyncrl.topology import catalogue, foreign

MILES_DEFAULTS: dict[str, Any] = {
    "trainer.lr": 1e-6,
    "trainer.min_lr": 0.0,
    "trainer.lr_warmup_init": 0.0,
    "trainer.lr_warmup_iters": 0,
    "trainer.lr_decay_iters": None,
    "trainer.optimizer": "adam",
    "trainer.adam_beta1": 0.9,
    "trainer.adam_beta2": 0.95,
    "trainer.adam_eps": 1e-8,
    "trainer.weight_decay": 0.0,
    "trainer.clip_grad": 1.0,
    "trainer.micro_batch_size": 1,
    "trainer.log_probs_chunk_size": -1,
    "trainer.global_batch_size": None,
    "trainer.num_steps_per_rollout": None,
    "trainer.save_interval": None,
    "trainer.gradient_checkpointing": False,
    "run.seed": 1234,
    "run.num_rollout": None,
    "source.num_epoch": None,
    "source.input_key": "input",
    "source.label_key": None,
    "source.metadata_key": "metadata",
    "source.tool_key": "tools",
    "source.apply_chat_template": False,
    "source.apply_chat_template_kwargs": {},
    "source.rollout_shuffle": False,
    "source.rollout_seed": 42,
    "source.rollout_max_prompt_len": None,
    "rollout.n_samples_per_prompt": 1,
    "rollout.rollout_temperature": 1.0,
    "rollout.rollout_top_p": 1.0,
    "rollout.rollout_top_k": -1,
    "rollout.rollout_max_context_len": None,
    "rollout.rollout_skip_special_tokens": False,
    "rollout.update_weights_interval": 1,
    "rollout.over_sampling_batch_size": None,
    "algorithm.advantage_estimator": "grpo",
    "algorithm.loss_type": "policy_loss",
    "algorithm.eps_clip": 0.2,
    "algorithm.eps_clip_high": None,
    "algorithm.eps_clip_c": None,
    "algorithm.calculate_per_token_loss": False,
    "algorithm.use_kl_loss": False,
    "algorithm.kl_loss_coef": 0.0,
    "algorithm.kl_loss_type": "k1",
    "algorithm.use_unbiased_kl": False,
    "algorithm.entropy_coef": 0.0,
    "algorithm.use_rollout_logprobs": False,
    "algorithm.use_tis": False,
    "algorithm.tis_clip": 2.0,
    "algorithm.tis_clip_low": 0.0,
    "algorithm.use_opsm": False,
    "algorithm.opsm_delta": 1e-4,
    "eval.eval_interval": None,
    "eval.skip_eval_before_train": False,
    "eval.n_samples_per_eval_prompt": 1,
    "eval.eval_temperature": None,
    "reward.group_rm": False,
    "reward.reward_key": None,
    "eval.eval_input_key": None,
    "eval.eval_label_key": None,
    "eval.eval_max_response_len": None,
    "eval.eval_top_k": None,
    "eval.eval_top_p": None,
    "reward.eval_reward_key": None,
    "reward.rm_url": None,
    "rollout.buffer_filter_path": None,
    "rollout.custom_generate_function_path": None,
    "rollout.dynamic_sampling_filter_path": None,
    "rollout.rollout_batch_size": None,
    "rollout.rollout_sample_filter_path": None,
    "run.custom_config_path": None,
    "source.data_source_path": None,
    "source.prompt_data": None,
    "trainer.hf_checkpoint": None,
    "trainer.ref_load": None,
    "trainer.allow_partial_train_step": False,
    "trainer.no_load_optim": False,
    "trainer.lr_warmup_fraction": None,
    "trainer.lr_wsd_decay_iters": None,
    "trainer.critic_lr": None,
    "trainer.critic_lr_warmup_iters": 0,
    "trainer.num_critic_only_steps": 0,
    "trainer.ref_update_interval": None,
    "trainer.keep_old_actor": False,
    "trainer.reset_optimizer_states": False,
    "trainer.use_routing_replay": False,
    "trainer.use_rollout_routing_replay": False,
    "trainer.log_probs_max_tokens_per_gpu": None,
    "trainer.balance_data": False,
    "trainer.balance_by_flops": False,
    "trainer.use_dynamic_global_batch_size": False,
    "algorithm.normalize_advantages": False,
    "algorithm.kl_coef": 0.0,
    "algorithm.gamma": 1.0,
    "algorithm.lambd": 1.0,
    "algorithm.use_opd": False,
    "algorithm.opd_kl_coef": 1.0,
    "algorithm.opd_teacher_load": None,
    "algorithm.value_clip": 0.2,
    "algorithm.mask_offpolicy_in_partial_rollout": False,
    "algorithm.get_mismatch_metrics": False,
    "algorithm.custom_loss_function_path": None,
    "algorithm.custom_tis_function_path": None,
    "algorithm.custom_pg_loss_reducer_function_path": None,
    "algorithm.custom_advantage_function_path": None,
    "algorithm.custom_reward_post_process_path": None,
    "algorithm.custom_convert_samples_to_train_data_path": None,
    "algorithm.rollout_data_postprocess_path": None,
    "eval.eval_prompt_data": [],
    "rollout.rollout_stop": [],
    "rollout.rollout_stop_token_ids": [],
}
"""Option -> default of the flag of that name in Miles' list of server arguments; [] stands for none."""


@pytest.mark.parametrize("path", MILES_DEFAULTS)
def test_a_default_is_miles_default(path: str) -> None:
    table, _, key = path.partition(".")
    default = catalogue.tables()[table].options[key].default
    assert (type(default), default) == (type(MILES_DEFAULTS[path]), MILES_DEFAULTS[path])


@pytest.mark.parametrize("name", foreign.RENAMED)
def test_a_renamed_option_exists(name: str) -> None:
    ours = foreign.RENAMED[name].ours
    table, _, key = ours.partition(".")
    assert not ours or key in catalogue.tables()[table].options
    assert ours or foreign.RENAMED[name].says


def test_a_mapped_value_is_one_the_option_takes() -> None:
    for known in foreign.RENAMED.values():
        table, _, key = known.ours.partition(".")
        if known.values and table:
            allowed = catalogue.allowed_values(catalogue.tables()[table].options[key]) or ["true", "false"]
            assert set(known.values.values()) <= set(allowed)


def test_no_name_is_both_ours_and_foreign() -> None:
    ours = {key for table in catalogue.tables().values() for key in table.options}
    assert not ours & set(foreign.RENAMED)
    assert not ours & set(foreign.NOT_YET)
    assert not set(foreign.RENAMED) & set(foreign.NOT_YET)


def test_the_lists_of_our_own_options_name_options() -> None:
    for path in [*foreign.OWN, *foreign.DIFFERENT_DEFAULTS]:
        table, _, key = path.partition(".")
        assert key in catalogue.tables()[table].options, path


@pytest.mark.parametrize("flag", ["--rollout-batch-size", "Rollout_Batch_Size", "rollout_batch_size"])
def test_a_flag_is_known_however_it_is_typed(flag: str) -> None:
    known = foreign.look_up(flag)
    assert known is not None
    assert known.ours == "rollout.rollout_batch_size"


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("--custom-megatron-before-train-step-hook-path", "algorithm.custom_before_train_step_hook_path"),
        ("--custom-megatron-before-log-prob-hook-path", "algorithm.custom_before_log_prob_hook_path"),
        ("--override-opt_param-scheduler", "trainer.override_opt_param_scheduler"),
        ("--override-lr-scheduler", "trainer.override_opt_param_scheduler"),
        ("--use-checkpoint-lr-scheduler", "trainer.use_checkpoint_opt_param_scheduler"),
        ("tis_upper_bound", "algorithm.tis_clip"),
        ("rs_veto_threshold", "algorithm.rs_veto_threshold"),
        ("--kl-coef", "algorithm.kl_coef"),
        ("--bf16", "trainer.dtype"),
        ("--load", "trainer.load"),
        ("--use-rollout-entropy", "algorithm.entropy_coef"),
    ],
)
def test_what_is_supported_now_is_no_longer_refused(name: str, ours: str) -> None:
    known = foreign.look_up(name)
    assert known is not None
    assert known.ours == ours


def test_a_foreign_value_is_one_the_option_takes() -> None:
    for path, values in foreign.VALUES.items():
        table, _, key = path.partition(".")
        allowed = set(catalogue.allowed_values(catalogue.tables()[table].options[key]))
        assert set(values.values()) <= allowed
        assert not set(values) & allowed
    assert foreign.our_value("algorithm.opd_type", "sglang") == "engine"
    assert foreign.our_value("algorithm.opd_type", "torch") is None


def test_a_key_of_mis_yaml_is_told_from_a_flag() -> None:
    option = catalogue.tables()["algorithm"].options
    assert foreign.counterpart(option["tis_mode"]) == "tis_mode in mis.yaml"
    assert foreign.counterpart(option["use_tis"]) == "--use-tis"
    assert foreign.counterpart(option["stale_after"]) == ""


def test_a_name_nobody_uses_is_unknown() -> None:
    assert foreign.look_up("warp_factor") is None


def test_every_option_shared_with_miles_is_compared_with_it() -> None:
    shared = {
        option.path
        for table in catalogue.tables().values()
        for option in table.options.values()
        if foreign.counterpart(option).split(" (")[0] == f"--{option.name.replace('_', '-')}"
    }
    assert shared - set(MILES_DEFAULTS) - set(foreign.DIFFERENT_DEFAULTS) == set()
