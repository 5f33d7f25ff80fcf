"""Every option of a topology under its bare name: what hooks find on `args`, as slime's and Miles' do.

Owns what their other names stand for here, and what an option that is left out stands for where that is the
value of another one. Changes no value of an option that is given.
"""

from __future__ import annotations

from typing import Any

import msgspec

from asyncrl.topology.algorithm import rejection_bounds
from asyncrl.topology.batch import solve
from asyncrl.topology.foreign_names import FROM_SLIME_AND_MILES, Foreign
from asyncrl.topology.plugins import is_plugin_path
from asyncrl.topology.schema import Topology

ONE_TABLE = ("buffer", "weights", "eval", "run", "source", "algorithm", "trainer", "rollout")
"""Tables in the order in which a later one wins where two have an option of the same name."""

STANDS_FOR = {
    "eps_clip_high": "eps_clip",
    "ref_load": "hf_checkpoint",
    "critic_load": "hf_checkpoint",
    "critic_lr": "lr",
    "log_probs_max_tokens_per_gpu": "max_tokens_per_gpu",
    "over_sampling_batch_size": "rollout_batch_size",
    "eval_temperature": "rollout_temperature",
    "eval_top_p": "rollout_top_p",
    "eval_top_k": "rollout_top_k",
    "eval_max_response_len": "rollout_max_response_len",
    "eval_input_key": "input_key",
    "eval_label_key": "label_key",
    "eval_reward_key": "reward_key",
}
"""Option -> the one whose value it has when it is left out."""

ABSENT: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "qkv_format": "thd",
    "colocate": False,
    "offload": False,
    "offload_train": False,
    "offload_rollout": False,
    "debug_rollout_only": False,
    "use_wandb": False,
    "use_tensorboard": False,
    "ci_test": False,
    "multimodal_keys": None,
    "rollout_external": False,
    "rollout_external_engine_addrs": None,
    "start_rollout_id": None,
    "load_debug_rollout_data": None,
    "load_debug_rollout_data_subsample": None,
    "save_debug_rollout_data": None,
    "debug_train_only": False,
    "ckpt_step": None,
    "ref_ckpt_step": None,
    "opd_teacher_ckpt_step": None,
    "critic_save": None,
    "save_hf": None,
    "fp16": False,
    "use_rollout_entropy": False,
}
"""Flags of slime and Miles that hooks ask for, with the value that says "not here"."""


def flat_options(
    topology: Topology, *, generator: int | None = None, reward: int | None = None
) -> dict[str, Any]:
    """Option name -> value; `generator` and `reward` choose one of the repeated tables, else the first.

    Where they have an option of the same name the chosen one wins, else the generator's.
    """
    generators = topology.generator[generator or 0 :][:1]
    rewards = topology.reward[reward or 0 :][:1]
    repeated = [*generators, *rewards] if reward is not None else [*rewards, *generators]
    options: dict[str, Any] = {}
    for table in [*repeated, *(getattr(topology, name) for name in ONE_TABLE)]:
        options |= msgspec.structs.asdict(table)
    for name, other in STANDS_FOR.items():
        if options[name] is None:
            options[name] = options.get(other)
    knobs = solve(topology)
    if not isinstance(knobs, str):
        options |= knobs._asdict()
    if topology.algorithm.tis_clip > 0:
        options["rs_lower_bound"], options["rs_upper_bound"] = rejection_bounds(topology.algorithm)
    tables = {name: getattr(topology, name) for name in ONE_TABLE}
    tables |= {"generator": next(iter(generators), None), "reward": next(iter(rewards), None)}
    return {**ABSENT, **_renamed(tables), **_computed(topology, tables), **options}


def _renamed(tables: dict[str, Any]) -> dict[str, Any]:
    """Their names of options that have another one here."""
    found = {}
    for name, foreign in FROM_SLIME_AND_MILES.items():
        table, _, key = foreign.ours.partition(".")
        if name not in ABSENT and tables.get(table) is not None:
            found[name] = _theirs(getattr(tables[table], key), foreign)
    return found


def _theirs(value: Any, foreign: Foreign) -> Any:
    """Our value as they write it."""
    if isinstance(value, bool):
        return not value if foreign.values.get("true") == "false" else value
    written = {ours: theirs for theirs, ours in foreign.values.items()}.get(value, value)
    return {"true": True, "false": False}.get(written, written) if isinstance(written, str) else written


def _computed(topology: Topology, tables: dict[str, Any]) -> dict[str, Any]:
    """What follows from an option without being its value."""
    run, rollout, algorithm = topology.run, topology.rollout, topology.algorithm
    reward = tables["reward"]
    use = None if reward is None else reward.use
    is_path = use is not None and is_plugin_path(use)
    return {
        "rm_type": None if is_path else use,
        "custom_rm_path": use if is_path else None,
        "async_max_concurrent_samples": sum(each.concurrency * each.replicas for each in topology.generator),
        "save": f"{run.dir}/{run.name}/checkpoints",
        "opd_teacher_urls": None if reward is None or reward.teacher_url is None else [reward.teacher_url],
        "use_fault_tolerance": True,
        "fully_async": True,
        "true_on_policy_mode": rollout.max_staleness == 0,
        "disable_compute_advantages_and_returns": algorithm.loss_type == "sft_loss",
        "observe_training_entropy": True,
        "disable_rollout_trim_samples": True,
    }
