"""Names that users of slime, Miles, verl and others bring along, and what asyncrl has in their place.

slime's and Miles' flags keep their names here wherever the option exists (`catalogue` knows those); this
module holds the others: renamed options, flags whose work another part does, and flags with no counterpart
yet. Pure data and look-up; it never changes a value by itself, because a silent translation hides a change
of meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from asyncrl.topology import catalogue


class Foreign(msgspec.Struct, frozen=True):
    """What a foreign name stands for."""

    ours: str
    """`table.key`, or "" when no single option takes its place."""
    says: str = ""
    """A sentence for the user: what differs, or what to do instead."""
    values: dict[str, str] = {}
    """Foreign value -> our value, where they differ."""


_FROM_SLIME_AND_MILES = {
    "pause_generation_mode": Foreign(
        "generator.on_new_weights",
        'retract = "recompute", in_place = "keep", abort = "abort"',
        {"retract": "recompute", "in_place": "keep", "abort": "abort"},
    ),
    "max_weight_staleness": Foreign(
        "rollout.max_staleness",
        "Miles drops samples that are too old and may train one step more than its number; asyncrl admits no "
        "work that would become older than max_staleness rollout steps",
    ),
    "rm_type": Foreign("reward.use", "same names"),
    "custom_rm_path": Foreign("reward.use", 'use = "package.module:function" or "package.module.function"'),
    "sglang_server_concurrency": Foreign("generator.concurrency", "samples in work at once, per generator"),
    "async_max_concurrent_samples": Foreign(
        "generator.concurrency", "per generator, not for the whole fleet"
    ),
    "train_backend": Foreign(
        "trainer.backend", '"torch" for now; "megatron" and "fsdp" are not built in yet'
    ),
    "deterministic_mode": Foreign("trainer.deterministic", "on by default: recovery and replay rest on it"),
    "disable_grpo_std_normalization": Foreign(
        "algorithm.grpo_std_normalization", "the sense is reversed", {"true": "false", "false": "true"}
    ),
    "disable_rewards_normalization": Foreign(
        "algorithm.rewards_normalization", "the sense is reversed", {"true": "false", "false": "true"}
    ),
    "start_rollout_id": Foreign("", "`asyncrl launch --resume RUN` continues where a run stopped"),
    "load": Foreign(
        "trainer.hf_checkpoint",
        "training starts from that model; `asyncrl launch --resume RUN` continues a run from its checkpoint",
    ),
    "save": Foreign(
        "run.dir", "checkpoints are written to RUN/checkpoints every trainer.save_interval rollout steps"
    ),
    "save_hf": Foreign("trainer.save_interval", "every checkpoint holds a Hugging Face export already"),
    "use_fault_tolerance": Foreign(
        "run.max_restarts",
        "always on: dead workers lose their leases and are restarted; see run.dead_after_s",
    ),
    "rollout_health_check_interval": Foreign("run.heartbeat_s"),
    "rollout_health_check_timeout": Foreign("run.dead_after_s"),
    "true_on_policy_mode": Foreign("rollout.max_staleness", "max_staleness = 0 is exactly on-policy"),
    "fully_async": Foreign(
        "rollout.max_staleness", "asyncrl is always asynchronous; max_staleness is the bound"
    ),
    "rollout_external_engine_addrs": Foreign(
        "", "`asyncrl attach generator ADDRESS` adds machines to a live run"
    ),
    "rollout_external": Foreign("", "`asyncrl attach generator ADDRESS` adds machines to a live run"),
    "save_debug_rollout_data": Foreign("buffer.keep", 'keep = "all" keeps every sample on disk'),
    "load_debug_rollout_data": Foreign("", "`asyncrl replay RUN` trains on the recorded samples of a run"),
    "debug_train_only": Foreign("", "`asyncrl replay RUN` runs the trainer alone"),
}
_FROM_OTHERS = {  # verl, TRL, AReaL, prime-rl, OpenRLHF
    "max_head_offpolicyness": Foreign("rollout.max_staleness"),
    "max_async_level": Foreign("rollout.max_staleness"),
    "max_off_policy_steps": Foreign("rollout.max_staleness"),
    "staleness_threshold": Foreign("rollout.max_staleness", "whole rollout steps, not a fraction"),
    "trigger_parameter_sync_step": Foreign("rollout.update_weights_interval"),
    "learning_rate": Foreign("trainer.lr"),
    "train_batch_size": Foreign("rollout.rollout_batch_size", "prompts per rollout step"),
    "ppo_mini_batch_size": Foreign("trainer.global_batch_size", "samples, not prompts"),
    "ppo_micro_batch_size_per_gpu": Foreign("trainer.micro_batch_size"),
    "ppo_max_token_len_per_gpu": Foreign("trainer.max_tokens_per_gpu"),
    "group_size": Foreign("rollout.n_samples_per_prompt"),
    "num_generations": Foreign("rollout.n_samples_per_prompt"),
    "clip_ratio": Foreign("algorithm.eps_clip"),
    "clip_ratio_low": Foreign("algorithm.eps_clip"),
    "clip_ratio_high": Foreign("algorithm.eps_clip_high"),
    "clip_ratio_c": Foreign("algorithm.eps_clip_c"),
    "entropy_coeff": Foreign("algorithm.entropy_coef"),
    "adv_estimator": Foreign("algorithm.advantage_estimator"),
    "grad_clip": Foreign("trainer.clip_grad"),
    "max_grad_norm": Foreign("trainer.clip_grad"),
    "warmup_steps": Foreign("trainer.lr_warmup_iters"),
    "save_freq": Foreign("trainer.save_interval", "rollout steps"),
    "test_freq": Foreign("eval.eval_interval", "rollout steps"),
    "total_epochs": Foreign("source.num_epoch"),
    "total_training_steps": Foreign("run.num_rollout", "rollout steps"),
    "train_files": Foreign("source.prompt_data", "one JSONL file"),
    "val_files": Foreign("eval.eval_prompt_data"),
    "prompt_key": Foreign("source.input_key"),
    "max_prompt_length": Foreign("source.rollout_max_prompt_len"),
    "max_response_length": Foreign("rollout.rollout_max_response_len"),
    "max_new_tokens": Foreign("rollout.rollout_max_response_len"),
    "max_tokens": Foreign("rollout.rollout_max_response_len"),
    "temperature": Foreign("rollout.rollout_temperature"),
    "top_p": Foreign("rollout.rollout_top_p"),
    "top_k": Foreign("rollout.rollout_top_k"),
    "min_new_tokens": Foreign("rollout.rollout_min_new_tokens"),
    "stop": Foreign("rollout.rollout_stop"),
    "model": Foreign("trainer.hf_checkpoint"),
    "model_path": Foreign("trainer.hf_checkpoint"),
    "tokenizer": Foreign("trainer.hf_checkpoint", "the tokenizer is read from the model directory"),
    "reward_fn": Foreign("reward.use", 'use = "package.module:function"'),
}
RENAMED: Mapping[str, Foreign] = MappingProxyType(_FROM_SLIME_AND_MILES | _FROM_OTHERS)
"""Foreign name (snake case, no leading dashes) -> what takes its place."""

_NOT_YET = {
    "asyncrl places no GPUs: one process per [[generator]] replica and one trainer": """
        actor_num_nodes actor_num_gpus_per_node critic_num_nodes critic_num_gpus_per_node rollout_num_gpus
        rollout_num_gpus_per_engine num_gpus_per_node colocate offload offload_train offload_rollout
        prefill_num_servers distributed_backend distributed_timeout_minutes train_memory_margin_bytes
        disable_weights_backuper update_weight_buffer_size train_env_vars""",
    'Megatron and FSDP are not built in yet; trainer.backend is "torch"': """
        qkv_format context_parallel_size custom_model_provider_path recompute_loss_function model_name
        enable_mtp_training mtp_num_layers mtp_loss_scaling_factor megatron_to_hf_mode warmup_ratio
        fsdp_cpu_offload fsdp_state_dict_cpu_offload fsdp_cpu_backend lr_wsd_decay_iters lr_wsd_decay_style
        lr_warmup_fraction use_checkpoint_lr_scheduler override_lr_scheduler custom_megatron_init_path
        custom_megatron_before_log_prob_hook_path custom_megatron_before_train_step_hook_path
        use_hf_config_for_megatron padded_vocab_size async_save no_save_optim fp16 bf16 balance_data
        tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
        expert_tensor_parallel_size sequence_parallel recompute_granularity recompute_method
        recompute_num_layers num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
        use_distributed_optimizer attention_backend optimizer_cpu_offload use_routing_replay
        use_rollout_routing_replay data_pad_size_multiplier""",
    'SGLang and its router are not built in yet; generator.engine is "embedded" or "scripted"': """
        use_miles_router miles_router_middleware_paths miles_router_timeout miles_router_max_connections
        miles_router_health_check_failure_threshold use_slime_router slime_router_middleware_paths
        rollout_health_check_first_wait""",
    "only the GRPO policy loss is built in yet": """
        critic_load critic_save critic_lr critic_lr_warmup_iters num_critic_only_steps value_clip kl_coef
        gamma lambd normalize_advantages disable_compute_advantages_and_returns custom_loss_function_path
        custom_tis_function_path custom_pg_loss_reducer_function_path get_mismatch_metrics ref_update_interval
        ref_ckpt_step reset_optimizer_states use_rollout_entropy keep_old_actor loss_mask_type
        log_probs_max_tokens_per_gpu use_dynamic_global_batch_size disable_rollout_trim_samples
        mask_offpolicy_in_partial_rollout""",
    "metrics are JSON lines in RUN/metrics; trackers come later": """
        use_wandb wandb_mode wandb_project wandb_group wandb_team wandb_host wandb_key wandb_run_id wandb_dir
        wandb_run_name disable_wandb_random_suffix wandb_always_use_train_step use_tensorboard tb_project_name
        tb_experiment_name tensorboard_dir log_multi_turn log_passrate log_correct_samples
        log_reward_category custom_rollout_log_function_path custom_eval_rollout_log_function_path""",
    "there is no such hook yet": """
        rollout_function_path eval_function_path rollout_data_postprocess_path custom_reward_post_process_path
        rollout_all_samples_process_path custom_convert_samples_to_train_data_path generate_max_turns
        generate_tool_specs_path generate_tool_call_parser generate_execute_tool_function_path
        generate_multi_samples multimodal_keys""",
    "evaluation takes these from the training options": """
        eval_config eval_max_prompt_len eval_max_context_len eval_min_new_tokens eval_tool_key""",
    "the buffer is part of every run and has no such switch": """
        rollout_buffer_url fetch_trajectory_retry_times min_batch_collection_ratio rollout_task_type
        disable_rollout_global_dataset http_proxy use_distributed_post""",
    "there is no such debugging switch yet; `asyncrl audit` and `asyncrl replay` work on any run": """
        check_weight_update_equal load_debug_rollout_data_subsample debug_rollout_only save_debug_train_data
        dump_details memory_snapshot_path record_memory_history memory_snapshot_dir memory_snapshot_num_steps
        memory_recorder profile_target use_pytorch_profiler profile_step_start profile_step_end ci_test
        ci_disable_kl_checker ci_metric_checker_key ci_metric_checker_threshold ci_save_grad_norm
        ci_load_grad_norm""",
}
NOT_YET: Mapping[str, str] = MappingProxyType(
    {name: why for why, names in _NOT_YET.items() for name in names.split()}
)
"""Flags with no counterpart -> why."""

_PREFIXES = (
    ("sglang_", "SGLang"),
    ("router_", "SGLang's router"),
    ("megatron_", "Megatron"),
    ("fsdp_", "FSDP"),
)

_DIFFERENT_DEFAULTS = {
    "source.tool_key": "slime's default is none; Miles' is \"tools\"",
    "rollout.rollout_max_response_len": "Miles' default is none: the engine decides; slime's is 1024",
    "rollout.partial_rollout": "off by default in slime and Miles: an interrupted answer starts again there",
    "trainer.use_dynamic_batch_size": "off by default in slime and Miles",
    "trainer.max_tokens_per_gpu": "slime and Miles have no default",
    "trainer.attn_implementation": "Miles: flash_attention_2, sdpa, eager (FSDP only)",
    "trainer.adam_beta2": "Miles' default; slime leaves Megatron's 0.999",
    "trainer.lr_decay_style": "Miles: constant under FSDP, linear under Megatron",
}
DIFFERENT_DEFAULTS: Mapping[str, str] = MappingProxyType(_DIFFERENT_DEFAULTS)
"""Our option -> how slime's or Miles' default differs from ours or from each other."""

OWN = frozenset(
    [
        "run.name",
        "run.dir",
        "run.address",
        "run.buffer_address",
        "run.publisher_address",
        "run.key",
        "run.heartbeat_s",
        "run.dead_after_s",
        "run.stall_s",
        "run.max_restarts",
        "source.on_bad_line",
        "rollout.rollout_min_new_tokens",
        "rollout.max_staleness",
        "rollout.on_straggler",
        "rollout.max_refused_per_step",
        "rollout.max_attempts",
        "rollout.progress_every_tokens",
        "trainer.backend",
        "trainer.num_threads",
        "trainer.scripted_step_s",
        "trainer.device",
        "trainer.dtype",
        "trainer.deterministic",
        "trainer.on_nan",
        "trainer.keep_checkpoints",
        "trainer.prefetch_batches",
        "algorithm.grpo_std_normalization",
        "algorithm.rewards_normalization",
        "eval.verify_export",
        "eval.min_final_accuracy",
    ]
)
"""Options whose name is no flag of slime or Miles, beside those of the tables that are ours altogether."""

_OWN_TABLES = ("generator", "buffer", "weights")
_OWN_REWARD = frozenset(["name", "replicas", "use", "timeout_s", "concurrency", "batch"])


def normalised(name: str) -> str:
    """A flag as people type it, in our spelling: "--Eps-Clip" is "eps_clip"."""
    return name.strip().lstrip("-").replace("-", "_").lower()


def look_up(name: str) -> Foreign | None:
    """What a foreign name (a bare key or a flag) stands for; None when nobody we know uses it."""
    name = normalised(name)
    if name in RENAMED:
        return RENAMED[name]
    same = catalogue.options_named(name)
    if len(same) == 1:
        return Foreign(same[0].path)
    if name in NOT_YET:
        return Foreign("", f"not supported yet: {NOT_YET[name]}")
    for prefix, whose in _PREFIXES:
        if name.startswith(prefix):
            return Foreign("", f"not supported yet: {whose} is not built in yet")
    return None


def counterpart(option: catalogue.Option) -> str:
    """What slime and Miles call an option and how their defaults differ; "" when it is ours alone."""
    renamed = sorted(
        f"--{name.replace('_', '-')}" for name, it in _FROM_SLIME_AND_MILES.items() if it.ours == option.path
    )
    own = option.table in _OWN_TABLES or option.path in OWN
    own = own or (option.table == "reward" and option.name in _OWN_REWARD)
    flags = renamed if own else [f"--{option.name.replace('_', '-')}"]
    note = DIFFERENT_DEFAULTS.get(option.path, "")
    return ", ".join(flags) + (f" ({note})" if flags and note else "")
