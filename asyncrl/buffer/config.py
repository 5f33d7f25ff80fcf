"""What the ledger must know of the topology, and nothing more."""

from __future__ import annotations

import msgspec

from asyncrl.topology.plan import Plan


class LedgerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of one run; see the topology's options of the same names."""

    batch_size: int
    """rollout_batch_size: groups per rollout step."""
    max_staleness: int
    tickets: int
    """Most groups outstanding."""
    num_rollout: int | None
    on_straggler: str = "wait"
    allow_partial_train_step: bool = False
    partial_rollout: bool = True
    filters: bool = False
    """Whether complete groups go to a reward worker's filters."""
    group_rm: bool = False
    max_refused_per_step: int = 1_000_000
    max_attempts: int = 3
    progress_every_tokens: int = 256
    """0: an answer is handed in at its end alone."""
    max_response_len: int = 1024
    """Tokens; what a death may cost at most."""
    eval_max_response_len: int = 1024
    dead_after_s: float = 5.0
    evaluates: bool = False
    eval_interval: int | None = None
    skip_eval_before_train: bool = False
    eval_share: float = 0.5
    update_weights_interval: int = 1
    """Rollout steps between versions, for noticing that one was left out."""
    prompt_lead: int = 0
    """Fresh groups kept at the desk beyond those outstanding; 0: one batch."""


def ledger_config(plan: Plan) -> LedgerConfig:
    """The ledger's numbers, out of a plan."""
    topology = plan.topology
    rollout = topology.rollout
    filters = (
        rollout.dynamic_sampling_filter_path
        or rollout.buffer_filter_path
        or rollout.rollout_sample_filter_path
    )
    return LedgerConfig(
        batch_size=rollout.rollout_batch_size,
        max_staleness=rollout.max_staleness,
        tickets=plan.tickets,
        num_rollout=plan.num_rollout,
        on_straggler=rollout.on_straggler,
        allow_partial_train_step=topology.trainer.allow_partial_train_step,
        partial_rollout=rollout.partial_rollout,
        filters=filters is not None,
        group_rm=any(table.group_rm for table in topology.reward),
        max_refused_per_step=rollout.max_refused_per_step or 10 * rollout.rollout_batch_size,
        max_attempts=rollout.max_attempts,
        progress_every_tokens=rollout.progress_every_tokens * (rollout.custom_generate_function_path is None),
        max_response_len=rollout.rollout_max_response_len,
        eval_max_response_len=topology.eval.eval_max_response_len or rollout.rollout_max_response_len,
        dead_after_s=topology.run.dead_after_s,
        evaluates=bool(plan.eval_sets),
        eval_interval=topology.eval.eval_interval,
        skip_eval_before_train=topology.eval.skip_eval_before_train,
        eval_share=topology.buffer.eval_share,
        update_weights_interval=rollout.update_weights_interval,
    )
