"""What the ledger must know of the topology, and nothing more."""

from __future__ import annotations

import msgspec


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
    dead_after_s: float = 5.0
    evaluates: bool = False
    eval_interval: int | None = None
    skip_eval_before_train: bool = False
    eval_share: float = 0.5
    prompt_lead: int = 0
    """Fresh groups kept at the desk beyond those outstanding; 0: one batch."""
