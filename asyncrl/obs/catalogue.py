"""Every metric asyncrl emits, declared once: name, unit, kind and one sentence of help.

Names are those of slime and Miles where they have one. A name with a `{placeholder}` is a pattern: the
placeholder stands for one or more characters other than "/". Immutable; `CATALOGUE` is the only instance.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Literal

import msgspec

from asyncrl.messages.sample import Settled

Kind = Literal["gauge", "counter", "histogram"]

STATES = ("fresh", "generating", "generated", "scoring", "scored", "filtering", "ready", "batched")
"""States of a sample on its way through the buffer, in order."""


class Metric(msgspec.Struct, frozen=True):
    """One declared metric, or a pattern of them."""

    name: str
    """`family/rest`, for example "train/pg_loss"; a pattern has `{placeholders}`."""
    unit: str
    """"s", "bytes", "tokens", "samples", "groups", "steps", "nats"; "1" for ratios and pure numbers."""
    help: str
    """One sentence: what the number says."""
    kind: Kind = "gauge"
    """gauge: the value now; counter: grows since the process began; histogram: a row is one observation."""


class Catalogue:
    """A fixed set of metrics with look-up by emitted name."""

    def __init__(self, metrics: tuple[Metric, ...]) -> None:
        self._exact = {metric.name: metric for metric in metrics if "{" not in metric.name}
        patterns = [metric for metric in metrics if "{" in metric.name]
        # The pattern with the most literal text wins: eval/{name}-truncated_ratio before eval/{name}.
        patterns.sort(key=lambda metric: -len(re.sub(r"\{\w+\}", "", metric.name)))
        self._patterns = tuple((_regex(metric.name), metric) for metric in patterns)
        self._metrics = metrics
        if len({metric.name for metric in metrics}) != len(metrics):
            raise ValueError("a metric is declared twice")

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def find(self, name: str) -> Metric | None:
        """The declaration an emitted name falls under; None where there is none."""
        if name in self._exact:
            return self._exact[name]
        return next((metric for regex, metric in self._patterns if regex.fullmatch(name)), None)

    def require(self, name: str) -> Metric:
        """The declaration of an emitted name. Raises ValueError naming the closest declared ones."""
        metric = self.find(name)
        if metric is None:
            names = [known.name for known in self._metrics]
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"closest: {', '.join(close)}" if close else "none is close"
            raise ValueError(
                f'metric "{name}" is not declared; {hint}. Declare it in asyncrl/obs/catalogue.py, '
                f"or use custom/NAME from a plug-in."
            )
        return metric


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{\w+\}", pattern)
    return re.compile("[^/]+".join(re.escape(part) for part in parts))


def _statistics(prefix: str, unit: str, text: str, *which: str) -> tuple[Metric, ...]:
    return tuple(Metric(f"{prefix}/{name}", unit, f"{text}: {name}.") for name in which)


_ROLLOUT = (
    Metric("rollout/raw_reward", "1", "Mean reward of the batch before group normalisation."),
    Metric("rollout/rewards", "1", "Mean reward after group normalisation."),
    *_statistics(
        "rollout/response_len", "tokens", "Response length in the batch", "mean", "median", "max", "min"
    ),
    Metric("rollout/truncated_ratio", "1", "Share of samples that stopped at the length limit."),
    Metric("rollout/repetition_frac", "1", "Share of samples whose text compresses more than tenfold."),
    Metric("rollout/zero_std/count_{reward}", "groups", "Groups whose samples all have this reward."),
    Metric("rollout/zero_std/ratio", "1", "Share of groups whose samples all have the same reward."),
    Metric("rollout/log_probs", "nats", "Mean log-prob of response tokens under the trainer's weights."),
    Metric("rollout/rollout_log_probs", "nats", "Mean log-prob of response tokens as the engine recorded."),
    Metric("rollout/ref_log_probs", "nats", "Mean log-prob of response tokens under the reference."),
    Metric("rollout/advantages", "1", "Mean advantage over response tokens."),
    Metric("rollout/returns", "1", "Mean return over response tokens."),
    Metric("rollout/values", "1", "Mean value over response tokens, before training."),
    Metric("rollout/kl", "nats", "Mean KL to the reference that shaped the reward."),
    Metric("rollout/num_samples", "samples", "Samples in the batch."),
    Metric("rollout/num_tokens", "tokens", "Response tokens in the batch."),
    Metric("rollout/weight_version/mean", "steps", "Mean version of the batch's tokens."),
    Metric("rollout/weight_version/mixed_version_ratio", "1", "Share of samples with more than one version."),
    Metric("rollout/dynamic_filter/drop_{reason}", "groups", "Groups a filter refused.", "counter"),
)

_TRAIN = (
    Metric("train/step", "steps", "Optimizer step the row belongs to."),
    Metric("train/loss", "1", "Loss that was differentiated."),
    Metric("train/pg_loss", "1", "Policy-gradient part of the loss."),
    Metric("train/pg_clipfrac", "1", "Share of tokens whose ratio the PPO clip cut."),
    Metric("train/ppo_kl", "nats", "Mean of old minus new log-prob."),
    Metric("train/entropy_loss", "nats", "Mean entropy of the policy at response tokens."),
    Metric("train/kl_loss", "nats", "KL to the reference, before its coefficient."),
    Metric("train/value_loss", "1", "Critic's loss."),
    Metric("train/value_clipfrac", "1", "Share of values the clip cut."),
    Metric("train/grad_norm", "1", "Norm of the gradient before clipping."),
    Metric("train/critic_grad_norm", "1", "Norm of the critic's gradient before clipping."),
    Metric("train/lr-pg_{i}", "1", "Learning rate of parameter group i."),
    Metric("train/ois", "1", "Mean ratio of trainer to engine probability."),
    Metric("train/tis", "1", "Mean truncated-importance-sampling ratio before its bounds."),
    Metric("train/tis_clipfrac", "1", "Share of tokens whose TIS ratio the bounds cut."),
    Metric("train/tis_abs", "1", "Mean distance of the TIS ratio from 1."),
    Metric("train/mis_{name}", "1", "A mismatch-correction statistic, named as in slime's helper."),
    Metric("train/opsm_clipfrac", "1", "Share of sequences that off-policy sequence masking removed."),
    Metric("train/opsm_masked_fraction", "1", "Share of sequences that OPSM masked, per sequence."),
    Metric("train/behave_imp_weight", "1", "Mean weight of the decoupled loss, old over engine."),
    Metric("train/behave_approx_kl", "nats", "Mean of old minus engine log-prob."),
    Metric("train/behave_mask_fraction", "1", "Share of tokens above behave_imp_weight_cap."),
    Metric("train/rollout_ess_ratio", "1", "Effective sample size of the trainer-to-engine weights."),
    Metric("train/opd_reverse_kl", "nats", "Reverse KL to the teacher (on-policy distillation)."),
    Metric("train/ess_ratio", "1", "Effective sample size over sample count, from the importance weights."),
    Metric("train/masked_ratio", "1", "Share of response tokens a correction took out of the loss."),
    Metric("train/train_rollout_logprob_abs_diff", "nats", "Mean distance of trainer and engine log-probs."),
    Metric("train/train_rollout_kl", "nats", "KL between engine and trainer at the same tokens."),
    Metric("train/global_batch_size", "samples", "Samples in the optimizer step."),
    Metric("train/num_tokens", "tokens", "Tokens in the optimizer step, prompts included."),
    Metric("train/num_micro_batches", "1", "Micro-batches in the optimizer step."),
    Metric("train/skipped_steps", "steps", "Optimizer steps skipped for NaN or Inf.", "counter"),
)

_EVAL = (
    Metric("eval/{name}", "1", "Mean reward on this evaluation set."),
    Metric("eval/{name}-truncated_ratio", "1", "Share of evaluation samples that hit the length limit."),
    Metric("eval/{name}-none_reward_ratio", "1", "Share of evaluation samples without a reward."),
    Metric("eval/{name}-pass@{k}", "1", "Unbiased estimate of at least one right in k."),
    *_statistics(
        "eval/{name}/response_len", "tokens", "Evaluation response length", "mean", "median", "max", "min"
    ),
    Metric("eval/{name}/num_samples", "samples", "Samples the evaluation rests on."),
    Metric("eval/{name}/version", "steps", "Version that was evaluated."),
    Metric("eval/lag_steps", "steps", "Rollout steps from an evaluation's version to its result."),
    Metric("eval/duration_seconds", "s", "From the first lease of an evaluation to its last score."),
)

_PERF = (
    Metric("perf/rollout_time", "s", "From a batch's first lease to its last score."),
    Metric("perf/step_time", "s", "Between the ends of two rollout steps."),
    Metric("perf/train_time", "s", "Training, from the batch in memory to the weights changed."),
    Metric("perf/actor_train_time", "s", "Forward, backward and optimizer of the policy."),
    Metric("perf/log_probs_time", "s", "The forward pass for old log-probs."),
    Metric("perf/ref_log_probs_time", "s", "The forward pass of the reference."),
    Metric("perf/teacher_log_probs_time", "s", "The forward pass of the teacher."),
    Metric("perf/values_time", "s", "The forward pass of the critic."),
    Metric("perf/critic_train_time", "s", "Forward and backward of the critic."),
    Metric("perf/train_wait_time", "s", "The trainer's wait for its next batch."),
    Metric("perf/wait_time_ratio", "1", "train_wait_time over step_time."),
    Metric("perf/update_weights_time", "s", "Publishing a version, as far as it holds the trainer up."),
    Metric("perf/save_model_time", "s", "Writing a checkpoint, as far as it holds the trainer up."),
    Metric("perf/data_preprocess_time", "s", "Unpacking and packing a batch."),
    Metric("perf/actor_train_tok_per_s", "tokens/s", "Tokens trained over actor_train_time."),
    Metric("perf/tokens_per_gpu_per_sec", "tokens/s", "Response tokens generated per second and engine."),
    Metric("perf/longest_sample_tokens_per_sec", "tokens/s", "Rate of the batch's longest sample."),
    Metric("perf/rss_bytes", "bytes", "Resident memory of the process."),
)

_OURS = (
    *_statistics(
        "staleness",
        "steps",
        "Age of the batch in rollout steps",
        "mean",
        "max",
        "min",
        "oldest_token",
    ),
    Metric("staleness/by_length/{bucket}", "steps", "Mean age of samples in this band of lengths."),
    Metric("staleness/train_rollout_kl/{bucket}", "nats", "KL of engine and trainer by age in steps."),
    Metric("lengths/distance", "1", "How much shorter trained answers are than generated ones, in 0 .. 1."),
    *_statistics(
        "lengths/issued",
        "tokens",
        "Answers that left the desk in recent batches",
        "mean",
        "p50",
        "p90",
        "p99",
    ),
    *_statistics("lengths/trained", "tokens", "Those of them that were trained", "mean", "p50", "p90", "p99"),
    Metric("lengths/oldest_group_s", "s", "Since the prompt of the oldest unfinished group was issued."),
    Metric("lengths/oldest_group_batches", "1", "Batches cut since the oldest unfinished group's version."),
    Metric("tokens_dropped/{reason}", "tokens", "Response tokens thrown away for this reason.", "counter"),
    Metric("staleness/mixed_version_ratio", "1", "Share of samples with tokens of several versions."),
    Metric("overlap/fraction", "1", "Share of the step in which generation and training ran at once."),
    Metric("overlap/achieved_over_bound", "1", "Step time over the slower of generation and training alone."),
    Metric("push/version", "steps", "Version that was pushed."),
    Metric("push/pause_s", "s", "Last token under the old version to first under the new.", "histogram"),
    Metric("push/snapshot_s", "s", "What a push costs the trainer.", "histogram"),
    Metric("push/transfer_s", "s", "Announcement to verified in the engine.", "histogram"),
    Metric("push/bytes", "bytes", "Bytes a receiver took for a version.", "histogram"),
    Metric("push/aborted", "samples", "Requests a push ended early.", "counter"),
    Metric("push/recomputed_tokens", "tokens", "Tokens whose KV cache a push rebuilt.", "counter"),
    Metric("push/failures", "1", "Pushes a receiver refused or lost.", "counter"),
    *(
        Metric(f"queue/{state}", "samples", f"Samples that are {state}.")
        for state in (
            "fresh",
            "generating",
            "generated",
            "scoring",
            "scored",
            "filtering",
            "ready",
            "batched",
        )
    ),
    Metric("queue/tickets_free", "groups", "Groups that may still be issued under the staleness bound."),
    Metric("queue/tickets_used", "groups", "Groups outstanding."),
    Metric("queue/spill_bytes", "bytes", "Bodies on disk that no checkpoint covers yet."),
    Metric("buffer/commit_s", "s", "One group commit, the disk's sync included.", "histogram"),
    Metric("buffer/samples_per_s", "samples/s", "Samples committed per second."),
    Metric("buffer/bytes_per_s", "bytes/s", "Bodies committed per second."),
    Metric("buffer/refused", "1", "Results refused for an old lease number.", "counter"),
    Metric("reward/latency_s", "s", "One reward call.", "histogram"),
    Metric("reward/failures", "samples", "Samples whose reward hung or crashed.", "counter"),
    Metric("reward/scored", "samples", "Samples scored.", "counter"),
    *(
        Metric(f"ledger/settled/{reason.value}", "groups", f"Groups settled as {reason.value}.", "counter")
        for reason in Settled
    ),
    Metric("faults/deaths", "1", "Workers that the desk lost since the run began.", "counter"),
    Metric("faults/samples_interrupted", "samples", "Answers those workers had in the making.", "counter"),
    Metric("faults/tokens_kept", "tokens", "Tokens of those answers that are resumed from.", "counter"),
    Metric("faults/tokens_lost_bound", "tokens", "Most tokens those workers had not handed in.", "counter"),
    Metric("ledger/issued", "groups", "Groups the source issued.", "counter"),
    Metric("ledger/regenerated_tokens", "tokens", "Tokens received and then sampled anew.", "counter"),
    Metric("engine/running", "samples", "Requests decoding now."),
    Metric("engine/waiting", "samples", "Requests that wait for a slot in the engine."),
    Metric("engine/generated_tokens", "tokens", "Response tokens sampled since start.", "counter"),
    Metric("engine/prefilled_tokens", "tokens", "Prompt and prefix tokens computed since start.", "counter"),
    Metric("engine/tokens_per_s", "tokens/s", "Response tokens per second."),
    Metric("source/bad_lines", "1", "Lines of the prompt file that were skipped.", "counter"),
    Metric("source/epoch", "1", "Pass over the prompt file."),
    Metric("actor/busy", "1", "Share of wall time in which the main loop waited for nothing."),
    Metric("actor/wait_s/{wait}", "s", "Time spent in this named wait since start.", "counter"),
    Metric("actor/heartbeat_lag_s", "s", "How late the event loop served its heartbeat.", "histogram"),
    Metric("link/malformed", "1", "Frames dropped because they were malformed.", "counter"),
    Metric("link/bytes_in", "bytes", "Bytes received.", "counter"),
    Metric("link/bytes_out", "bytes", "Bytes sent.", "counter"),
    Metric("obs/failed_rows", "1", "Rows of logs and metrics the disk refused.", "counter"),
    *(
        Metric(f"fleet/{state}", "1", f"Members that are {state}.")
        for state in ("healthy", "suspect", "dead", "restarting", "stale", "retired")
    ),
    Metric("fleet/restarts", "1", "Processes started again.", "counter"),
    Metric("fleet/deaths", "1", "Ends of processes that were not asked for.", "counter"),
    Metric("custom/{name}", "1", "A plug-in's own number."),
)

CATALOGUE = Catalogue(_ROLLOUT + _TRAIN + _EVAL + _PERF + _OURS)
"""All metrics of asyncrl."""
