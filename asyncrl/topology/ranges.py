"""The numbers that single options may be; `checks` looks at combinations, `explain` prints these."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Range(NamedTuple):
    """Numbers from `low` to `high`; `above` leaves `low` itself out."""

    low: float
    high: float = float("inf")
    above: bool = False

    def __contains__(self, value: object) -> bool:
        """Whether the number is allowed."""
        if not isinstance(value, int | float):
            return False
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        """The range as messages and `explain` say it."""
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return low if self.high == float("inf") else f"{low} and at most {self.high:g}"


_COUNT = Range(1)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, above=True)
_SHARE = Range(0, 1, above=True)

_RANGES = {
    **dict.fromkeys(
        [
            "run.num_rollout",
            "source.num_epoch",
            "source.rollout_max_prompt_len",
            "rollout.rollout_batch_size",
            "rollout.n_samples_per_prompt",
            "rollout.rollout_max_response_len",
            "rollout.rollout_max_context_len",
            "rollout.update_weights_interval",
            "rollout.over_sampling_batch_size",
            "rollout.max_refused_per_step",
            "rollout.max_attempts",
            "generator.replicas",
            "generator.concurrency",
            "generator.max_bytes",
            "generator.num_threads",
            "reward.replicas",
            "reward.concurrency",
            "reward.batch",
            "buffer.window_bytes",
            "buffer.segment_bytes",
            "eval.eval_interval",
            "eval.n_samples_per_eval_prompt",
            "eval.eval_max_response_len",
            "trainer.num_threads",
            "trainer.global_batch_size",
            "trainer.num_steps_per_rollout",
            "trainer.max_tokens_per_gpu",
            "trainer.micro_batch_size",
            "trainer.lr_decay_iters",
            "trainer.lr_wsd_decay_iters",
            "trainer.log_probs_max_tokens_per_gpu",
            "trainer.data_pad_size_multiplier",
            "trainer.ref_update_interval",
            "trainer.save_interval",
            "trainer.keep_checkpoints",
        ],
        _COUNT,
    ),
    "rollout.progress_every_tokens": Range(2),  # handed in at half of it
    **dict.fromkeys(
        [
            "run.max_restarts",
            "rollout.rollout_min_new_tokens",
            "rollout.max_staleness",
            "rollout.progress_every_s",
            "buffer.min_free_bytes",
            "eval.eval_temperature",
            "trainer.prefetch_batches",
            "trainer.lr",
            "trainer.min_lr",
            "trainer.lr_warmup_iters",
            "trainer.lr_warmup_init",
            "trainer.weight_decay",
            "trainer.clip_grad",
            "trainer.scripted_step_s",
            "trainer.critic_lr",
            "trainer.critic_lr_warmup_iters",
            "trainer.num_critic_only_steps",
            "algorithm.kl_coef",
            "algorithm.kl_loss_coef",
            "algorithm.opd_kl_coef",
            "algorithm.tis_clip_low",
            "algorithm.rs_lower_bound",
            "algorithm.dppo_kl_coef",
            "algorithm.stale_after",
            "run.seed",
            "source.rollout_seed",
        ],
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        [
            "run.heartbeat_s",
            "run.dead_after_s",
            "run.stall_s",
            "run.restart_window_s",
            "run.slow_after_s",
            "rollout.rollout_temperature",
            "reward.timeout_s",
            "weights.push_timeout_s",
            "trainer.adam_eps",
            "algorithm.eps_clip_high",
            "algorithm.tis_clip",
            "algorithm.rs_upper_bound",
            "algorithm.opsm_delta",
            "algorithm.value_clip",
            "algorithm.pg_loss_divisor",
            "algorithm.behave_imp_weight_cap",
        ],
        _POSITIVE,
    ),
    **dict.fromkeys(["rollout.rollout_top_p", "eval.eval_top_p", "buffer.eval_share"], _SHARE),
    "run.max_slow_kills": _SHARE,
    **dict.fromkeys(["trainer.adam_beta1", "trainer.adam_beta2"], Range(0, 0.999999)),
    **dict.fromkeys(["algorithm.gamma", "algorithm.lambd"], Range(0, 1)),
    **dict.fromkeys(["algorithm.dppo_mask_low", "algorithm.dppo_mask_high"], _SHARE),
    "algorithm.rs_veto_threshold": Range(0, 1, above=True),
    "algorithm.eps_clip": _SHARE,
    "algorithm.eps_clip_c": Range(1, above=True),
    "rollout.rollout_top_k": Range(-1),
    "eval.eval_top_k": Range(-1),
    "trainer.log_probs_chunk_size": Range(-1),
    "trainer.lr_warmup_fraction": Range(0, 1),
}
RANGES: Mapping[str, Range] = MappingProxyType(_RANGES)
"""`table.key` -> the numbers it may be."""
