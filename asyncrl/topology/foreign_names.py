"""The names themselves that `foreign` looks up: flags of slime, Miles and others, and what is ours instead.

Pure data: no look-up, no change of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec


class Foreign(msgspec.Struct, frozen=True):
    """What a foreign name stands for."""

    ours: str
    """`table.key`, or "" when no single option takes its place."""
    says: str = ""
    """A sentence for the user: what differs, or what to do instead."""
    values: dict[str, str] = {}
    """Foreign value -> our value, where they differ."""


FROM_SLIME_AND_MILES: Mapping[str, Foreign] = MappingProxyType(
    {
        "pause_generation_mode": Foreign(
            "generator.on_new_weights",
            'retract = "recompute", in_place = "keep", abort = "abort"',
            {"retract": "recompute", "in_place": "keep", "abort": "abort"},
        ),
        "max_weight_staleness": Foreign(
            "rollout.max_staleness",
            "Miles drops samples that are too old and may train one step more than its number; asyncrl "
            "admits no work that would become older than max_staleness rollout steps",
        ),
        "rm_type": Foreign("reward.use", "same names"),
        "custom_rm_path": Foreign(
            "reward.use", 'use = "package.module:function" or "package.module.function"'
        ),
        "sglang_server_concurrency": Foreign(
            "generator.concurrency", "samples in work at once, per generator"
        ),
        "async_max_concurrent_samples": Foreign(
            "generator.concurrency", "per generator, not for the whole fleet"
        ),
        "train_backend": Foreign(
            "trainer.backend", '"torch" for now; "megatron" and "fsdp" are not built in yet'
        ),
        "deterministic_mode": Foreign(
            "trainer.deterministic", "on by default: recovery and replay rest on it"
        ),
        "disable_grpo_std_normalization": Foreign(
            "algorithm.grpo_std_normalization", "the sense is reversed", {"true": "false", "false": "true"}
        ),
        "disable_rewards_normalization": Foreign(
            "algorithm.rewards_normalization", "the sense is reversed", {"true": "false", "false": "true"}
        ),
        "start_rollout_id": Foreign("", "`asyncrl launch --resume RUN` continues where a run stopped"),
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
        "save_debug_rollout_data": Foreign(
            "buffer.keep",
            'keep = "all" keeps every sample on disk; `asyncrl buffer export RUN FILE` writes JSON lines',
        ),
        "load_debug_rollout_data": Foreign(
            "",
            "`asyncrl replay RUN` trains on the recorded samples of a run; `asyncrl buffer import FILE "
            "--topology FILE --out RUN` makes a run of samples from elsewhere",
        ),
        "load_debug_rollout_data_subsample": Foreign(
            "",
            "a part of the batches: `asyncrl buffer export RUN FILE --batches A:B`, then `asyncrl buffer "
            "import`; a part of each batch: take the other groups' lines out of the file and set "
            "rollout.rollout_batch_size to how many are left",
        ),
        "debug_train_only": Foreign(
            "", "`asyncrl replay RUN` runs the trainer alone, on recorded or imported batches"
        ),
        "debug_rollout_only": Foreign(
            "trainer.backend",
            'backend = "scripted" trains nothing, for the scripted engine; with a real one, lr = 0 and '
            "weight_decay = 0 leave its weights as they are",
        ),
        "tis_upper_bound": Foreign("algorithm.tis_clip", "of mis.yaml"),
        "tis_lower_bound": Foreign(
            "algorithm.tis_clip_low", "of mis.yaml, where it is 1 / upper if left out"
        ),
        "custom_megatron_before_log_prob_hook_path": Foreign("algorithm.custom_before_log_prob_hook_path"),
        "custom_megatron_before_train_step_hook_path": Foreign(
            "algorithm.custom_before_train_step_hook_path"
        ),
        "override_lr_scheduler": Foreign("trainer.override_opt_param_scheduler", "Megatron's name for it"),
        "use_checkpoint_lr_scheduler": Foreign(
            "trainer.use_checkpoint_opt_param_scheduler", "Megatron's name for it"
        ),
        "disable_compute_advantages_and_returns": Foreign(
            "algorithm.loss_type", 'loss_type = "sft_loss" computes no advantages; there is no other switch'
        ),
        "use_rollout_entropy": Foreign(
            "algorithm.entropy_coef", "the entropy is always computed and reported"
        ),
        "observe_training_entropy": Foreign(
            "algorithm.entropy_coef", "the entropy is always computed and reported"
        ),
        "bf16": Foreign(
            "trainer.dtype", "see trainer.main_params_dtype, too", {"true": "bfloat16", "false": "float32"}
        ),
        "fp16": Foreign("trainer.dtype", "float16 would need loss scaling; bfloat16 does not"),
        "critic_save": Foreign("trainer.save_interval", "every checkpoint holds the critic"),
        "warmup_ratio": Foreign("trainer.lr_warmup_fraction"),
        "ckpt_step": Foreign("trainer.load", "name the step's directory: RUN/checkpoints/step-000200"),
        "ref_ckpt_step": Foreign("trainer.ref_load", "name the directory of that step's Hugging Face export"),
        "opd_teacher_ckpt_step": Foreign(
            "algorithm.opd_teacher_load", "name the directory of that step's Hugging Face export"
        ),
        "opd_teacher_urls": Foreign(
            "reward.teacher_url",
            "one server; with several, let a reward function of yours set sample.teacher_log_probs",
        ),
        "disable_rollout_trim_samples": Foreign(
            "trainer.use_dynamic_global_batch_size", "samples are never trimmed to fit a batch"
        ),
    }
)
"""Flags, and keys of mis.yaml, that are called otherwise here."""

FROM_OTHERS: Mapping[str, Foreign] = MappingProxyType(
    {
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
        "kl_ctrl": Foreign("algorithm.kl_coef"),
        "init_kl_coef": Foreign("algorithm.kl_coef"),
        "use_kl_in_reward": Foreign("algorithm.kl_coef", "above 0 switches it on"),
        "kl_estimator": Foreign("algorithm.kl_loss_type"),
        "beta": Foreign("algorithm.kl_loss_coef", "with use_kl_loss = true"),
        "epsilon": Foreign("algorithm.eps_clip"),
        "epsilon_high": Foreign("algorithm.eps_clip_high"),
        "c_clip": Foreign("algorithm.eps_clip_c"),
        "cliprange_value": Foreign("algorithm.value_clip"),
        "discount": Foreign("algorithm.gamma"),
        "lam": Foreign("algorithm.lambd"),
        "gae_lambda": Foreign("algorithm.lambd"),
        "adv_norm": Foreign("algorithm.normalize_advantages"),
        "norm_adv_by_std_in_grpo": Foreign("algorithm.grpo_std_normalization"),
        "scale_rewards": Foreign("algorithm.grpo_std_normalization"),
        "loss_agg_mode": Foreign(
            "algorithm.calculate_per_token_loss", '"token-mean" is true, "seq-mean-token-mean" false'
        ),
        "critic_warmup": Foreign("trainer.num_critic_only_steps", "rollout steps"),
        "rollout_correction": Foreign(
            "algorithm.correction", "presets; `asyncrl explain algorithm.correction`"
        ),
        "rollout_is": Foreign("algorithm.tis_level", "with use_tis = true"),
        "rollout_is_threshold": Foreign("algorithm.tis_clip"),
        "rollout_rs": Foreign("algorithm.rs_level", "with use_rs = true"),
        "bypass_mode": Foreign("algorithm.use_rollout_logprobs"),
        "behav_imp_weight_cap": Foreign("algorithm.behave_imp_weight_cap"),
        "vllm_importance_sampling_correction": Foreign("algorithm.use_tis"),
        "vllm_importance_sampling_cap": Foreign("algorithm.tis_clip"),
        "enable_vllm_is_correction": Foreign("algorithm.use_tis"),
        "off_policy_mask_threshold": Foreign("algorithm.opsm_delta", "with use_opsm = true"),
        "kl_tau": Foreign("algorithm.dppo_kl_coef"),
        "mixed_precision": Foreign("trainer.dtype", "see trainer.main_params_dtype, too"),
    }
)
"""Names of verl, TRL, AReaL, prime-rl and OpenRLHF."""

_NOT_YET = {
    "asyncrl places no GPUs: one process per [[generator]] replica and one trainer": """
        actor_num_nodes actor_num_gpus_per_node critic_num_nodes critic_num_gpus_per_node rollout_num_gpus
        rollout_num_gpus_per_engine num_gpus_per_node colocate offload offload_train offload_rollout
        prefill_num_servers distributed_backend distributed_timeout_minutes train_memory_margin_bytes
        disable_weights_backuper update_weight_buffer_size train_env_vars""",
    'Megatron and FSDP are not built in yet; trainer.backend is "torch"': """
        qkv_format context_parallel_size custom_model_provider_path recompute_loss_function model_name
        enable_mtp_training mtp_num_layers mtp_loss_scaling_factor megatron_to_hf_mode fsdp_cpu_offload
        fsdp_state_dict_cpu_offload fsdp_cpu_backend custom_megatron_init_path
        custom_megatron_post_save_hook_path use_hf_config_for_megatron padded_vocab_size async_save
        no_save_optim tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
        expert_tensor_parallel_size sequence_parallel recompute_granularity recompute_method
        recompute_num_layers num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
        use_distributed_optimizer attention_backend optimizer_cpu_offload use_indexer_replay
        use_rollout_indexer_replay use_stateless_adam main_grads_dtype exp_avg_dtype exp_avg_sq_dtype""",
    'SGLang and its router are not built in yet; generator.engine is "embedded" or "scripted"': """
        use_miles_router miles_router_middleware_paths miles_router_timeout miles_router_max_connections
        miles_router_health_check_failure_threshold use_slime_router slime_router_middleware_paths
        rollout_health_check_first_wait""",
    "the trainer has no such switch": """
        loss_mask_type skip_actor_forward_only recompute_logprobs_via_prefill only_train_params_name_list
        freeze_params_name_list""",
    "metrics are JSON lines in RUN/metrics; trackers come later": """
        use_wandb wandb_mode wandb_project wandb_group wandb_team wandb_host wandb_key wandb_run_id wandb_dir
        wandb_run_name disable_wandb_random_suffix wandb_always_use_train_step use_tensorboard tb_project_name
        tb_experiment_name tensorboard_dir log_multi_turn log_passrate log_correct_samples
        log_reward_category custom_rollout_log_function_path custom_eval_rollout_log_function_path""",
    "there is no such hook yet": """
        rollout_function_path eval_function_path rollout_all_samples_process_path rollout_sample_hook_path
        generate_max_turns generate_tool_specs_path generate_tool_call_parser
        generate_execute_tool_function_path generate_multi_samples multimodal_keys""",
    "evaluation takes these from the training options": """
        eval_config eval_max_prompt_len eval_max_context_len eval_min_new_tokens eval_tool_key""",
    "the buffer is part of every run and has no such switch": """
        rollout_buffer_url fetch_trajectory_retry_times min_batch_collection_ratio rollout_task_type
        disable_rollout_global_dataset http_proxy use_distributed_post""",
    "there is no such debugging switch yet; `asyncrl audit` and `asyncrl replay` work on any run": """
        check_weight_update_equal save_debug_train_data
        dump_details memory_snapshot_path record_memory_history memory_snapshot_dir memory_snapshot_num_steps
        memory_recorder profile_target use_pytorch_profiler profile_step_start profile_step_end ci_test
        ci_disable_kl_checker ci_metric_checker_key ci_metric_checker_threshold ci_save_grad_norm
        ci_load_grad_norm""",
    "distillation compares the log-probs of the sampled tokens, with one teacher": """
        opd_log_prob_top_k opd_top_k_strategy opd_reward_weight_mode opd_topk_per_position opd_teacher_key""",
}
NOT_YET: Mapping[str, str] = MappingProxyType(
    {name: why for why, names in _NOT_YET.items() for name in names.split()}
)
"""Flags with no counterpart -> why."""
