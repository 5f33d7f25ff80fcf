"""Whether the options of [algorithm] go together: what excludes what, and what does nothing without what.

Pure, and part of `checks`: each problem is one line that starts with the option it is about and says what was
given, why it cannot be, and what to do. What is allowed and probably not meant is in `words_algorithm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asyncrl.topology import catalogue, presets
from asyncrl.topology.algorithm import AlgorithmConfig, rejection_bounds
from asyncrl.topology.schema import Topology

PLUS_PLUS = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
"""Estimators with a KL penalty in the reward."""
GROUP_RELATIVE = ("grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus_baseline")
"""Estimators that compare an answer with the others of its group."""
DISTILLATION = "on_policy_distillation"
"""The estimator that is distillation and nothing else."""

_EXCLUSIVE = (
    ("use_tis", "use_rollout_logprobs", "the ratio to the engine's log-probs would be applied twice"),
    ("use_tis", "use_decoupled_loss", "both weigh tokens by the old policy's ratio to the engine's"),
    ("use_tis", "use_dppo", "DPPO's ratio is to the engine's log-probs already"),
    ("use_rs", "use_rollout_logprobs", "old and engine's log-probs are then equal, and nothing is rejected"),
    ("use_decoupled_loss", "use_rollout_logprobs", "a decoupled loss keeps the two policies apart"),
    ("use_decoupled_loss", "use_dppo", "they are two policy losses"),
)
"""(switch, switch, why not both)."""

_POLICY_LOSS_ONLY = (
    "use_tis",
    "use_rs",
    "use_opsm",
    "use_decoupled_loss",
    "use_dppo",
    "use_opd",
    "mask_offpolicy_in_partial_rollout",
    "pg_loss_divisor",
    "custom_pg_loss_reducer_function_path",
    "custom_tis_function_path",
)
"""Options that a loss without advantages and ratios cannot use."""

_NEEDS = (
    ("rs_level", "use_rs"),
    ("rs_upper_bound", "use_rs"),
    ("rs_lower_bound", "use_rs"),
    ("rs_veto_threshold", "use_rs"),
    ("opsm_per_token", "use_opsm"),
    ("prox_logp_method", "use_decoupled_loss"),
    ("kl_loss_coef", "use_kl_loss"),
    ("use_unbiased_kl", "use_kl_loss"),
)
"""(option, switch without which a value of it does nothing)."""


def problems(topology: Topology) -> Iterator[str]:
    """Every reason why the options of [algorithm] cannot be used together."""
    algorithm = topology.algorithm
    yield from presets.disagreements(
        algorithm,
        correction=algorithm.correction,
        response_length=topology.rollout.rollout_max_response_len,
    )
    yield from _exclusive(algorithm)
    yield from _needs(algorithm)
    yield from _kl(algorithm)
    yield from _estimator(topology)
    yield from _distillation(algorithm)
    yield from _loss(algorithm)
    yield from _bounds(algorithm)
    yield from _staleness(algorithm)


def _exclusive(algorithm: AlgorithmConfig) -> Iterator[str]:
    for one, other, why in _EXCLUSIVE:
        if getattr(algorithm, one) and getattr(algorithm, other):
            yield f"algorithm.{one}: exclusive with {other} ({why}); set one of them to false"
    if algorithm.use_dppo and algorithm.advantage_estimator in {"gspo", "cispo"}:
        yield (
            f'algorithm.use_dppo: exclusive with advantage_estimator = "{algorithm.advantage_estimator}" '
            f'(they are two policy losses); set use_dppo = false, or advantage_estimator = "grpo"'
        )
    if algorithm.eps_clip_c is not None:
        loss = "use_dppo" if algorithm.use_dppo else algorithm.advantage_estimator
        if loss in {"use_dppo", "cispo"}:
            yield (
                f"algorithm.eps_clip_c: given {algorithm.eps_clip_c:g}, but {loss} has no dual clip; leave "
                "it out"
            )


def _needs(algorithm: AlgorithmConfig) -> Iterator[str]:
    for option, switch in _NEEDS:
        value = getattr(algorithm, option)
        if value != _default(option) and not getattr(algorithm, switch):
            yield (
                f"algorithm.{option}: given {presets.shown(value)}, which has no effect without {switch} = "
                f"true; set that, or leave {option} out"
            )


def _default(option: str) -> Any:
    return catalogue.tables()["algorithm"].options[option].default


def _kl(algorithm: AlgorithmConfig) -> Iterator[str]:
    if not algorithm.kl_coef:
        return
    estimator, given = algorithm.advantage_estimator, f"algorithm.kl_coef: given {algorithm.kl_coef:g}"
    if algorithm.use_kl_loss or algorithm.kl_loss_coef:
        yield (
            f"{given}: exclusive with use_kl_loss and kl_loss_coef (the KL term would count twice, in the "
            f"reward and in the loss); leave one of them out"
        )
    if estimator == "ppo":
        yield (
            f'{given}: not with advantage_estimator = "ppo" (the critic would learn a return that moves '
            f"with the policy; Miles refuses it, too); use kl_loss_coef with use_kl_loss = true"
        )
    elif estimator not in PLUS_PLUS and algorithm.custom_advantage_function_path is None:
        yield (
            f'{given}, which has no effect with advantage_estimator = "{estimator}"; it is for '
            f"{' and '.join(PLUS_PLUS)}; use kl_loss_coef with use_kl_loss = true"
        )


def _estimator(topology: Topology) -> Iterator[str]:
    algorithm, estimator = topology.algorithm, topology.algorithm.advantage_estimator
    if algorithm.loss_type != "policy_loss":
        return
    if estimator in PLUS_PLUS and not algorithm.normalize_advantages:
        yield (
            f'algorithm.normalize_advantages: required by advantage_estimator = "{estimator}" (its '
            f"advantages have no scale of their own); set it to true"
        )
    normalised = algorithm.rewards_normalization or estimator == "rloo"
    if topology.rollout.n_samples_per_prompt == 1 and estimator in GROUP_RELATIVE and normalised:
        if _gives_other_advantages(topology):
            return
        other = "" if estimator == "rloo" else ", or rewards_normalization = false"
        yield (
            f'rollout.n_samples_per_prompt: given 1, and advantage_estimator = "{estimator}" compares an '
            "answer with the others of its group, so every advantage is 0 and nothing is learned; set it "
            f"to 2 or more (8 is usual){other}"
        )


def _gives_other_advantages(topology: Topology) -> bool:
    """Whether something beside the reward makes advantages, or nothing is trained at all."""
    algorithm = topology.algorithm
    return topology.trainer.backend == "scripted" or bool(
        algorithm.use_opd
        or algorithm.custom_advantage_function_path
        or algorithm.custom_reward_post_process_path
        or algorithm.custom_convert_samples_to_train_data_path
    )


def _distillation(algorithm: AlgorithmConfig) -> Iterator[str]:
    estimator, teacher = algorithm.advantage_estimator == DISTILLATION, algorithm.opd_teacher_load
    if estimator and algorithm.use_opd:
        yield (
            f'algorithm.use_opd: exclusive with advantage_estimator = "{DISTILLATION}" (the teacher would '
            f"count twice); set use_opd = false, or another estimator"
        )
    if not (estimator or algorithm.use_opd):
        if teacher is not None:
            yield (
                f'algorithm.opd_teacher_load: given "{teacher}", which has no effect without use_opd = '
                f"true; set that, or leave opd_teacher_load out"
            )
        return
    cause = f'advantage_estimator = "{DISTILLATION}"' if estimator else "use_opd = true"
    if algorithm.opd_type == "model" and teacher is None:
        yield (
            f'algorithm.opd_teacher_load: required by {cause} with opd_type = "model", and not given; set '
            'it to the teacher\'s model directory, or opd_type = "engine" where samples carry '
            "teacher_log_probs"
        )
    if algorithm.opd_type == "engine" and teacher is not None:
        yield (
            f'algorithm.opd_teacher_load: given "{teacher}", which opd_type = "engine" does not load; '
            f'leave it out, or set opd_type = "model"'
        )


def _loss(algorithm: AlgorithmConfig) -> Iterator[str]:
    path, kind = algorithm.custom_loss_function_path, algorithm.loss_type
    if kind == "custom_loss" and path is None:
        yield 'algorithm.custom_loss_function_path: required by loss_type = "custom_loss", and not given'
    if kind != "custom_loss" and path is not None:
        yield (
            f'algorithm.custom_loss_function_path: given "{path}", which has no effect with loss_type = '
            f'"{kind}"; set loss_type = "custom_loss", or leave it out'
        )
    if kind == "sft_loss":
        for option in _POLICY_LOSS_ONLY:
            if getattr(algorithm, option) not in {None, False}:
                yield f'algorithm.{option}: has no effect with loss_type = "sft_loss"; leave it out'
    if algorithm.pg_loss_divisor is not None:
        for other in ("calculate_per_token_loss", "custom_pg_loss_reducer_function_path"):
            if getattr(algorithm, other):
                yield (
                    f"algorithm.pg_loss_divisor: exclusive with {other} (each says what the policy loss is "
                    f"divided by); leave one of them out"
                )
    if algorithm.custom_tis_function_path and not (algorithm.use_tis or algorithm.get_mismatch_metrics):
        yield (
            "algorithm.custom_tis_function_path: has no effect without use_tis = true (or "
            "get_mismatch_metrics = true, for its metrics alone); set one of them, or leave it out"
        )


def _bounds(algorithm: AlgorithmConfig) -> Iterator[str]:
    if algorithm.tis_clip_low >= algorithm.tis_clip:
        yield (
            f"algorithm.tis_clip_low: given {algorithm.tis_clip_low:g}; allowed: below tis_clip = "
            f"{algorithm.tis_clip:g}"
        )
    if algorithm.tis_batch_normalize and algorithm.tis_level == "geometric":
        yield (
            'algorithm.tis_batch_normalize: not with tis_level = "geometric", for which the references '
            'define no mean weight; set tis_level to "token" or "sequence", or tis_batch_normalize = false'
        )
    if not algorithm.use_rs or algorithm.tis_clip <= 0:
        return
    lower, upper = rejection_bounds(algorithm)
    if lower >= upper:
        yield (
            f"algorithm.rs_lower_bound: {lower:g} is not below the upper bound {upper:g}; set "
            f"rs_lower_bound and rs_upper_bound on the two sides of 1"
        )


def _staleness(algorithm: AlgorithmConfig) -> Iterator[str]:
    if algorithm.stale != "train" and algorithm.stale_after is None:
        yield (
            f'algorithm.stale_after: required by stale = "{algorithm.stale}", and not given; set it to the '
            f"optimizer steps that a token may be old"
        )
    if algorithm.stale == "train" and algorithm.stale_after is not None:
        yield (
            f"algorithm.stale_after: given {algorithm.stale_after}, which has no effect with stale = "
            f'"train"; set stale to "mask" or "drop", or leave stale_after out'
        )
