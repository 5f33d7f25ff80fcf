"""A rollout step's report as metrics and as what people see."""

from __future__ import annotations

from collections.abc import Mapping

from asyncrl.obs.view import StepUpdate
from asyncrl.train.backend import StepReport

PHASES = {
    "prepare": "perf/data_preprocess_time",
    "log_probs": "perf/log_probs_time",
    "ref_log_probs": "perf/ref_log_probs_time",
    "teacher_log_probs": "perf/teacher_log_probs_time",
    "values": "perf/values_time",
    "train_critic": "perf/critic_train_time",
}
"""Phases of a report that have a metric of their own; the rest is actor_train_time."""


MANY_MASKED = 0.1
"""Share of sequences that OPSM may mask before it is said in words."""


def concerns(metrics: Mapping[str, float]) -> dict[str, str]:
    """What a person should know about a step's numbers: metric -> sentence."""
    masked = metrics.get("train/opsm_masked_fraction", 0.0)
    if masked <= MANY_MASKED:
        return {}
    return {
        "train/opsm_masked_fraction": (
            f"OPSM masked {masked:.0%} of the sequences, so bad answers hardly count; algorithm.opsm_delta "
            "may be below the ordinary difference between engine and trainer (0.05 to 0.2 is usual)"
        )
    }


def step_metrics(report: StepReport, *, train_s: float, waited_s: float) -> dict[str, float]:
    """Every number of a step; `train_s` from batch to changed weights, `waited_s` before it for the batch."""
    train = sum(seconds for phase, seconds in report.phase_s.items() if phase not in PHASES)
    metrics = dict(report.metrics)
    metrics |= {PHASES[phase]: seconds for phase, seconds in report.phase_s.items() if phase in PHASES}
    return metrics | {
        "perf/train_time": train_s,
        "perf/actor_train_time": train,
        "perf/actor_train_tok_per_s": report.num_tokens / max(train, 1e-9),
        "perf/step_time": train_s + waited_s,
        "perf/train_wait_time": waited_s,
        "perf/wait_time_ratio": waited_s / max(train_s + waited_s, 1e-9),
        "rollout/num_samples": report.num_samples,
        "rollout/num_tokens": report.num_tokens,
    }


def step_update(report: StepReport, *, step: int) -> StepUpdate:
    """What the live view shows of a step."""
    metrics = report.metrics
    return StepUpdate(
        step=step,
        version=step,
        reward=metrics.get("rollout/raw_reward", 0.0),
        num_tokens=report.num_tokens,
        staleness_mean=metrics.get("staleness/mean", 0.0),
        staleness_max=metrics.get("staleness/max", 0.0),
        response_len=metrics.get("rollout/response_len/mean"),
        truncated_ratio=metrics.get("rollout/truncated_ratio"),
    )
