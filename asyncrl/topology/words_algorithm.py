"""What [algorithm] and [trainer] allow and what is probably not meant, in sentences.

Part of `words`: a warning never stops a run; what must stop one is in `checks_algorithm` and
`checks_trainer`.
"""

from __future__ import annotations

from collections.abc import Iterator

from asyncrl.topology import catalogue, presets
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.topology.plan import Plan

SMALL_OPSM_DELTA = 1e-4
"""Thresholds up to this one mask many sequences: bfloat16 engines differ from the trainer by more."""
GSPO_CLIP = 1e-2
"""A mean ratio of a whole answer hardly ever leaves a wider range than this."""

_SWITCHES = ("use_tis", "use_rs", "use_opsm", "use_decoupled_loss", "use_dppo", "use_rollout_logprobs")
"""Options that do something about samples of older weights."""
_IDLE = (
    ("tis_level", ("use_tis",)),
    ("tis_mode", ("use_tis",)),
    ("tis_batch_normalize", ("use_tis",)),
    ("tis_clip", ("use_tis", "use_rs")),
    ("tis_clip_low", ("use_tis", "use_rs")),
    ("opsm_delta", ("use_opsm",)),
    ("behave_imp_weight_cap", ("use_decoupled_loss",)),
    ("dppo_mask_low", ("use_dppo",)),
    ("dppo_mask_high", ("use_dppo",)),
    ("dppo_kl_coef", ("use_dppo",)),
    ("opd_kl_coef", ("use_opd",)),
)
"""(number or mode, switches of which one must be on for it to matter)."""
_ESTIMATORS_WITH = {
    "value_clip": ("ppo",),
    "lambd": ("ppo",),
    "gae_over_masked_tokens": ("ppo",),
    "gamma": ("ppo", "reinforce_plus_plus"),
    "mask_kl_reward": ("reinforce_plus_plus",),
}
"""Option -> estimators that read it."""


def warnings(plan: Plan) -> Iterator[str]:
    """Every doubt about the plan's algorithm, one line each."""
    algorithm = plan.topology.algorithm
    yield from _staleness(plan)
    yield from _thresholds(algorithm)
    yield from _idle(algorithm)
    if algorithm.use_kl_loss and not algorithm.kl_loss_coef:
        yield "algorithm.use_kl_loss: kl_loss_coef is 0, so the KL term is computed and not used"
    post, convert = "custom_reward_post_process_path", "custom_convert_samples_to_train_data_path"
    if getattr(algorithm, post) and getattr(algorithm, convert):
        yield f"algorithm.{post}: {convert} returns the rewards itself, so this function may not be called"
    critic_only = plan.topology.trainer.num_critic_only_steps
    if plan.num_rollout is not None and critic_only >= plan.num_rollout:
        yield (
            f"trainer.num_critic_only_steps: {critic_only} of {plan.num_rollout} rollout steps; the actor is "
            "never trained"
        )


def _staleness(plan: Plan) -> Iterator[str]:
    topology, algorithm = plan.topology, plan.topology.algorithm
    eta, steps = topology.rollout.max_staleness, plan.num_steps_per_rollout
    corrected = any(getattr(algorithm, switch) for switch in _SWITCHES)
    corrected = corrected or algorithm.stale != "train" or topology.trainer.keep_old_actor
    if eta and not corrected and algorithm.loss_type == "policy_loss":
        yield (
            'algorithm.correction: samples may be stale and no correction is on; "tis" (or "icepop", '
            '"geometric-mask+tis", "decoupled", "opsm") corrects for it; `asyncrl explain correction` '
            "lists them"
        )
    oldest = eta * steps + steps - 1
    late = topology.rollout.on_straggler == "train"
    if algorithm.stale_after is not None and algorithm.stale_after >= oldest and not late:
        yield (
            f"algorithm.stale_after: no token gets older than {oldest} optimizer steps under max_staleness = "
            f"{eta}, so nothing is ever older than {algorithm.stale_after}"
        )


def _thresholds(algorithm: AlgorithmConfig) -> Iterator[str]:
    if algorithm.use_opsm and algorithm.opsm_delta <= SMALL_OPSM_DELTA:
        yield (
            f"algorithm.opsm_delta: {algorithm.opsm_delta:g} (Miles' default) is below the ordinary "
            "difference between engine and trainer in bfloat16 and may mask most bad answers; 0.05 to 0.2 "
            "is usual; watch opsm_masked_fraction"
        )
    estimator, low, high = algorithm.advantage_estimator, algorithm.eps_clip, algorithm.eps_clip_high
    if estimator == "cispo" and low < 1:
        yield (
            f"algorithm.eps_clip: {low:g} keeps a lower bound on CISPO's weights; the paper has none: "
            'eps_clip = 1, eps_clip_high = 4 (correction = "cispo")'
        )
    if estimator == "gspo" and max(low, high or 0) > GSPO_CLIP:
        yield (
            f"algorithm.eps_clip: {low:g} hardly ever clips the mean ratio of a whole answer; the paper's "
            "range is 3e-4 below and 4e-4 above (eps_clip_high)"
        )
    if algorithm.use_opd and not algorithm.opd_kl_coef:
        yield "algorithm.opd_kl_coef: 0, so the teacher is asked and not listened to"


def _idle(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Numbers that were set and that nothing reads."""
    # A function of the user's own reads what it likes from its args.
    for option, switches in _IDLE if algorithm.custom_tis_function_path is None else ():
        if _was_set(algorithm, option) and not any(getattr(algorithm, switch) for switch in switches):
            yield f"algorithm.{option}: has no effect without {' or '.join(switches)} = true"
    for option, estimators in _ESTIMATORS_WITH.items():
        if _was_set(algorithm, option) and algorithm.advantage_estimator not in estimators:
            yield (
                f"algorithm.{option}: {presets.shown(getattr(algorithm, option))} has no effect with "
                f'advantage_estimator = "{algorithm.advantage_estimator}", only with '
                f"{' and '.join(estimators)}"
            )


def _was_set(algorithm: AlgorithmConfig, option: str) -> bool:
    default = catalogue.tables()["algorithm"].options[option].default
    return bool(getattr(algorithm, option) != default)
