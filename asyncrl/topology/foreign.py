"""Names that users of slime, Miles, verl and others bring along, and what asyncrl has in their place.

slime's and Miles' flags keep their names here wherever the option exists (`catalogue` knows those);
`foreign_names` holds the others: renamed options, flags whose work another part does, and flags with no
counterpart yet. Look-up only; it never changes a value by itself, because a silent translation hides a change
of meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from asyncrl.topology import catalogue
from asyncrl.topology.foreign_names import FROM_OTHERS, FROM_SLIME_AND_MILES, NOT_YET, Foreign

__all__ = [
    "DIFFERENT_DEFAULTS",
    "NOT_YET",
    "OWN",
    "RENAMED",
    "VALUES",
    "Foreign",
    "counterpart",
    "look_up",
    "normalised",
    "our_value",
]

RENAMED: Mapping[str, Foreign] = MappingProxyType({**FROM_SLIME_AND_MILES, **FROM_OTHERS})
"""Foreign name (snake case, no leading dashes) -> what takes its place."""

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
    "trainer.lr_wsd_decay_style": "no default there; Megatron's is exponential",
    "trainer.data_pad_size_multiplier": "Miles' default is 128",
    "trainer.critic_load": "Miles' default is --load",
    "trainer.load": "a Megatron checkpoint there",
    "trainer.main_params_dtype": "Megatron's; fp32, bf16 there",
    "algorithm.opd_type": 'megatron is "model" here, sglang is "engine"',
    "algorithm.get_mismatch_metrics": "needs --custom-tis-function-path there",
    "algorithm.use_opsm": "per token there, see opsm_per_token",
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
        "run.restart_window_s",
        "run.slow_after_s",
        "run.max_slow_kills",
        "source.on_bad_line",
        "rollout.rollout_min_new_tokens",
        "rollout.max_staleness",
        "rollout.on_straggler",
        "rollout.max_refused_per_step",
        "rollout.max_attempts",
        "rollout.progress_every_tokens",
        "rollout.progress_every_s",
        "trainer.backend",
        "trainer.num_threads",
        "trainer.scripted_step_s",
        "trainer.device",
        "trainer.dtype",
        "trainer.deterministic",
        "trainer.on_nan",
        "trainer.keep_checkpoints",
        "trainer.prefetch_batches",
        "trainer.override_opt_param_scheduler",
        "trainer.use_checkpoint_opt_param_scheduler",
        "algorithm.correction",
        "algorithm.grpo_std_normalization",
        "algorithm.rewards_normalization",
        "algorithm.gae_over_masked_tokens",
        "algorithm.mask_kl_reward",
        "algorithm.pg_loss_divisor",
        "algorithm.opsm_per_token",
        "algorithm.use_decoupled_loss",
        "algorithm.behave_imp_weight_cap",
        "algorithm.prox_logp_method",
        "algorithm.use_dppo",
        "algorithm.dppo_mask_low",
        "algorithm.dppo_mask_high",
        "algorithm.dppo_kl_coef",
        "algorithm.stale",
        "algorithm.stale_after",
        "algorithm.custom_before_log_prob_hook_path",
        "algorithm.custom_before_train_step_hook_path",
        "eval.verify_export",
        "eval.min_final_accuracy",
    ]
)
"""Options whose name is no flag of slime or Miles, beside those of the tables that are ours altogether."""

_MIS_YAML = frozenset(
    [
        "tis_level",
        "tis_mode",
        "tis_batch_normalize",
        "use_rs",
        "rs_level",
        "rs_lower_bound",
        "rs_upper_bound",
        "rs_veto_threshold",
    ]
)
"""Options that slime and Miles read from mis.yaml (--custom-config-path) and not from a flag."""
VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "algorithm.opd_type": {"megatron": "model", "sglang": "engine"},
        "trainer.main_params_dtype": {"fp32": "float32", "bf16": "bfloat16"},
        "trainer.dtype": {"fp32": "float32", "bf16": "bfloat16"},
        "algorithm.advantage_estimator": {
            "gae": "ppo",
            "reinforce++": "reinforce_plus_plus",
            "reinforce++-baseline": "reinforce_plus_plus_baseline",
            "reinforce_baseline": "reinforce_plus_plus_baseline",
            "opd": "on_policy_distillation",
        },
    }
)
"""Our option -> foreign value -> ours, where slime, Miles, verl or OpenRLHF call a value otherwise."""

_OWN_TABLES = ("generator", "buffer", "weights")
_OWN_REWARD = frozenset(["name", "replicas", "use", "teacher_url", "timeout_s", "concurrency", "batch"])


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


def our_value(path: str, given: object) -> str | None:
    """What another trainer's value of the option `path` is called here; None when we know nothing of it."""
    return VALUES.get(path, {}).get(str(given).lower())


def counterpart(option: catalogue.Option) -> str:
    """What slime and Miles call an option and how their defaults differ; "" when it is ours alone."""
    renamed = sorted(
        f"--{name.replace('_', '-')}" for name, it in FROM_SLIME_AND_MILES.items() if it.ours == option.path
    )
    own = option.table in _OWN_TABLES or option.path in OWN
    own = own or (option.table == "reward" and option.name in _OWN_REWARD)
    flags = renamed if own else [f"--{option.name.replace('_', '-')}"]
    if option.table == "algorithm" and option.name in _MIS_YAML:
        flags = [*renamed, f"{option.name} in mis.yaml"]
    note = DIFFERENT_DEFAULTS.get(option.path, "")
    return ", ".join(flags) + (f" ({note})" if flags and note else "")
