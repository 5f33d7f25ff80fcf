"""From a topology's [[reward]] table to what its children are told."""

from __future__ import annotations

from asyncrl.rewards.base import RewardSpec
from asyncrl.topology.flat import flat_options
from asyncrl.topology.plan import Plan


def reward_spec(plan: Plan, index: int) -> RewardSpec:
    """What the children of a [[reward]] table are told."""
    table, rollout = plan.topology.reward[index], plan.topology.rollout
    return RewardSpec(
        use=table.use,
        rm_url=table.rm_url,
        reward_key=table.reward_key,
        eval_reward_key=table.eval_reward_key,
        group_rm=table.group_rm,
        custom_config_path=plan.topology.run.custom_config_path,
        dynamic_sampling_filter_path=rollout.dynamic_sampling_filter_path,
        buffer_filter_path=rollout.buffer_filter_path,
        rollout_sample_filter_path=rollout.rollout_sample_filter_path,
        options=flat_options(plan.topology, reward=index),
        search_paths=["."],
    )
