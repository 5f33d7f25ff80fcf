"""The table [algorithm] of a topology file: advantages, loss, off-policy corrections and training hooks.

See `schema` for the rules of names and defaults. In the formulas: current, old and rollout are a token's
log-probs under the weights in training, under those at the start of the rollout step, and as the engine
reported them; all are of logits / rollout_temperature. Never decides whether values go together
(`checks_algorithm`) nor what a preset stands for (`presets`).
"""

from __future__ import annotations

from typing import Literal

import msgspec


class AlgorithmConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[algorithm]: advantages, loss, off-policy corrections and hooks of the trainer."""

    correction: str = ""
    """Name of a preset, or several joined by "+" ("geometric-mask+tis"): it stands for the flags that
    `asyncrl check` prints, and a flag set beside it must agree with it. Empty: only the flags count."""
    advantage_estimator: Literal[
        "grpo",
        "gspo",
        "cispo",
        "ppo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "rloo",
        "on_policy_distillation",
    ] = "grpo"
    """How rewards become advantages. "grpo" (arXiv:2402.03300): (reward - group mean) / (group std + 1e-6) at
    every token; "gspo" (arXiv:2507.18071): the same, with one importance ratio per answer, the exponential of
    the mean of current - old; "cispo" (arXiv:2506.13585): the same, with the clipped ratio as a weight
    without gradient; "ppo": GAE with a critic; "reinforce_plus_plus" (arXiv:2501.03262): discounted returns
    of the reward less kl_coef x KL; "reinforce_plus_plus_baseline": reward - group mean - kl_coef x KL;
    "rloo" (arXiv:2402.14740): reward - mean of the group's other answers; "on_policy_distillation": teacher's
    - old log-prob, the reward is not used (as an addition to any estimator: use_opd)."""
    grpo_std_normalization: bool = True
    """Divide by the group's standard deviation (grpo, gspo, cispo; off: Dr.GRPO, arXiv:2503.20783). Miles:
    --disable-grpo-std-normalization."""
    rewards_normalization: bool = True
    """Subtract the group's mean. Miles: --disable-rewards-normalization."""
    normalize_advantages: bool = False
    """Whiten advantages over the trained tokens of the rollout step, on all ranks: (advantage - mean) /
    sqrt(variance + 1e-8), with Bessel's correction. The ++ estimators need it."""
    kl_coef: float = 0.0
    """KL penalty inside the reward: a token's reward is lowered by kl_coef x KL(old, reference), estimated by
    kl_loss_type. Exclusive with kl_loss_coef; changes the advantages of the ++ estimators only."""
    gamma: float = 1.0
    """Discount per token, of ppo and reinforce_plus_plus."""
    lambd: float = 1.0
    """Lambda of GAE (arXiv:1506.02438): the advantage of a token is delta + gamma x lambda x the next
    token's. ppo only."""
    gae_over_masked_tokens: bool = False
    """GAE counts tokens with loss mask 0 (tools, hints) as steps and pays the reward at the last token, as
    slime does. Off, as in Miles: they are no steps, and the reward comes at the last trained token."""
    mask_kl_reward: bool = False
    """reinforce_plus_plus leaves masked tokens out of the KL penalty, as slime does. Off, as in Miles: they
    count."""
    use_opd: bool = False
    """On-policy distillation beside any estimator: the advantage of a token is lowered by opd_kl_coef x
    (old - teacher's log-prob)."""
    opd_type: Literal["model", "engine"] = "model"
    """Where the teacher's log-probs come from: a frozen model in the trainer (slime, Miles: megatron), or the
    samples, where reward.teacher_url or a reward function of yours put them (sglang)."""
    opd_kl_coef: float = 1.0
    """Weight of distillation in the advantage."""
    opd_teacher_load: str | None = None
    """Directory of the teacher, of the same vocabulary. Required by opd_type = "model"."""
    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = "policy_loss"
    """"policy_loss": the PPO clipped surrogate or what advantage_estimator puts in its place; "sft_loss":
    the negative log-prob of the tokens; "custom_loss": custom_loss_function_path."""
    eps_clip: float = 0.2
    """PPO clip range below 1 (arXiv:1707.06347): the ratio exp(current - old) counts from 1 - eps_clip. For
    cispo 1, which leaves only the upper bound."""
    eps_clip_high: float | None = None
    """PPO clip range above 1. None: `eps_clip`."""
    eps_clip_c: float | None = None
    """Dual-clip bound c > 1 for negative advantages (arXiv:1912.09729). None: off."""
    value_clip: float = 0.2
    """How far the critic's value may move from its value at the start of the step before the value loss is
    clipped: the larger of (value - return)^2 with and without the clip. ppo only."""
    calculate_per_token_loss: bool = False
    """Average over all tokens of the step, instead of over samples of each sample's mean."""
    pg_loss_divisor: float | None = None
    """Dr.GRPO (arXiv:2503.20783): divide the sum of a sample's policy loss by this many tokens, instead of by
    its own length, then average over samples. The KL term and the entropy bonus keep their means. None: off.
    slime's and Miles' examples do it by a custom reducer."""
    use_kl_loss: bool = False
    """Add a KL term against the frozen reference to the loss."""
    kl_loss_coef: float = 0.0
    """Weight of the KL term."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Estimator of the KL term, with d = current - reference: "k1": d; "k2": d^2 / 2; "k3": exp(-d) - 1 + d;
    "low_var_kl": k3 with bounded exponents, clamped to [-10, 10]. kl_coef uses it, too."""
    use_unbiased_kl: bool = False
    """Weigh the KL term by the importance ratio, gradient included (DeepSeek-V3.2)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus. The entropy is reported whatever this is."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as the old policy in the PPO ratio, instead of recomputing them with the
    trainer's weights at the start of the rollout step. Exclusive with `use_tis`."""
    use_tis: bool = False
    """Truncated importance sampling: weigh each token's loss by exp(old - rollout), bounded as tis_mode says,
    without gradient."""
    tis_level: Literal["token", "sequence", "geometric"] = "token"
    """What the weight is made of: the token's own log-ratio, the sum of its answer's, or their mean (mis.yaml
    of slime and Miles)."""
    tis_mode: Literal["clip", "truncate", "mask"] = "clip"
    """"clip": bounded to [tis_clip_low, tis_clip]; "truncate": from above only; "mask": tokens (or answers)
    out of bounds give no gradient, the others keep their weight (IcePop)."""
    tis_clip: float = 2.0
    """Upper bound of the TIS weight (mis.yaml: tis_upper_bound)."""
    tis_clip_low: float = 0.0
    """Lower bound of the TIS weight (mis.yaml: tis_lower_bound, 1 / upper there when left out)."""
    tis_batch_normalize: bool = False
    """Divide the weights by their mean over the optimizer step (mis.yaml: over the micro-batch, so that there
    the loss depends on the packing); not for tis_level = "geometric"."""
    use_rs: bool = False
    """Rejection: tokens (or answers) whose importance weight at rs_level lies out of the bounds give no
    policy gradient; the denominators stay (mis.yaml)."""
    rs_level: Literal["token", "sequence", "geometric"] = "geometric"
    """What is compared with the bounds: exp(old - rollout) of a token, of the sum over the answer, or of the
    mean over the answer (mis.yaml; None there: tis_level)."""
    rs_upper_bound: float | None = None
    """Largest weight that is kept. None: `tis_clip`."""
    rs_lower_bound: float | None = None
    """Smallest weight that is kept. None: `tis_clip_low`, or 1 / upper bound where that is 0."""
    rs_veto_threshold: float | None = None
    """An answer with a token whose exp(old - rollout) is below this gives no policy gradient at all
    (mis.yaml; 1e-4 is usual). None: off."""
    use_opsm: bool = False
    """Off-policy sequence masking: a sequence with negative advantage whose mean (rollout - current) log-prob
    exceeds `opsm_delta` gives no policy gradient (DeepSeek-V3.2)."""
    opsm_delta: float = 1e-4
    """Threshold of OPSM (Miles' default; 0.05-0.2 is what others found reasonable under engine mismatch)."""
    opsm_per_token: bool = False
    """slime's and Miles' rule: within a sequence above the threshold, mask only the tokens whose own
    advantage is negative. Off: the sign of the sequence's mean advantage decides for all of them."""
    use_decoupled_loss: bool = False
    """Decoupled PPO (AReaL, arXiv:2505.24298): the ratio to the old policy inside the clip, times
    exp(old - rollout) without gradient and without a bound, see behave_imp_weight_cap."""
    behave_imp_weight_cap: float | None = 5.0
    """Tokens whose weight exp(old - rollout) is above this give no policy gradient (AReaL's name and default;
    decoupled loss only). TOML has no null: a huge number switches it off."""
    prox_logp_method: Literal["recompute", "loglinear"] = "recompute"
    """Where the decoupled loss takes old from (AReaL's name): "recompute" by a forward pass, or "loglinear"
    without one: rollout + alpha x (current - rollout), alpha = (old version - the token's) / (current version
    - the token's)."""
    use_dppo: bool = False
    """DPPO (prime-rl's loss): ratio exp(current - rollout) x advantage without a clip, less the tokens whose
    probability moved too far in the direction of their advantage, plus a squared-log-ratio penalty."""
    dppo_mask_low: float = 0.2
    """A token of negative advantage is left out when p(current) - p(rollout) is below minus this."""
    dppo_mask_high: float = 0.2
    """A token of positive advantage is left out when p(current) - p(rollout) is above this."""
    dppo_kl_coef: float = 1e-3
    """Weight of DPPO's penalty (current - rollout)^2."""
    stale: Literal["train", "mask", "drop"] = "train"
    """What becomes of tokens older than stale_after: trained like others, left out of the loss, or (drop)
    left out with their whole sample. Denominators count them in any case."""
    stale_after: int | None = None
    """Optimizer steps a token may be old before `stale` applies to it. None: no limit."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Of an answer that several versions of the weights wrote, only the newest version's tokens stay in the
    loss."""
    get_mismatch_metrics: bool = False
    """Report every metric of engine-trainer mismatch (mis_*), whether or not a correction is on; never
    changes the loss. slime and Miles need custom_tis_function_path for it; here it is built in."""
    custom_loss_function_path: str | None = None
    """Function (args, batch, logits, sum_of_sample_mean) -> (loss, metrics), for loss_type =
    "custom_loss"."""
    custom_tis_function_path: str | None = None
    """Function (args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths,
    response_lengths, **kwargs) -> (pg_loss, modified loss masks, metrics) in place of the built-in TIS; needs
    use_tis or get_mismatch_metrics."""
    custom_pg_loss_reducer_function_path: str | None = None
    """Function (total_lengths, response_lengths, loss_masks, calculate_per_token_loss) -> function that sums
    the policy loss of a micro-batch; metrics keep the default reducer."""
    custom_advantage_function_path: str | None = None
    """Function (args, rollout_data) that sets rollout_data["advantages"] and ["returns"] in place of the
    estimator's (slime)."""
    custom_reward_post_process_path: str | None = None
    """Function (args, samples) -> (raw rewards, rewards) in place of the normalisation of rewards."""
    custom_convert_samples_to_train_data_path: str | None = None
    """Function (args, samples) -> dict of lists (tokens, response_lengths, rewards, raw_reward, truncated,
    sample_indices, loss_masks, ...) in place of the built-in conversion."""
    rollout_data_postprocess_path: str | None = None
    """Function that may change the batch in place after log-probs and advantages: (args, rollout_id,
    rollout_data) as slime calls it, (args, samples) as slime documents it, or (args) as Miles calls it."""
    custom_before_log_prob_hook_path: str | None = None
    """Function (args, model, store_prefix) before each forward pass for log-probs; store_prefix is "", "ref_"
    or "teacher_"."""
    custom_before_train_step_hook_path: str | None = None
    """Function (args, rollout_id, step_id, model, optimizer, opt_param_scheduler) before each optimizer step,
    after the gradients are set to zero."""


def rejection_bounds(algorithm: AlgorithmConfig) -> tuple[float, float]:
    """(lower, upper) bound of the weights that `use_rs` keeps, with what left-out options stand for."""
    upper = algorithm.tis_clip if algorithm.rs_upper_bound is None else algorithm.rs_upper_bound
    lower = algorithm.tis_clip_low if algorithm.rs_lower_bound is None else algorithm.rs_lower_bound
    return (lower if lower > 0 or algorithm.rs_lower_bound is not None else 1 / upper), upper
