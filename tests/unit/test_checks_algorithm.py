"""Options of [algorithm] and [trainer] that exclude each other or do nothing alone are refused, with why."""

from __future__ import annotations

import pytest

from asyncrl.topology import words
from asyncrl.topology.algorithm import AlgorithmConfig, rejection_bounds
from tests.support.topologies import compiled, refused

PPO = "advantage_estimator=ppo"
PLUS_PLUS = "advantage_estimator=reinforce_plus_plus"
OPD = "advantage_estimator=on_policy_distillation"
SFT = "loss_type=sft_loss"


@pytest.mark.parametrize(
    ("overrides", "option", "why"),
    [
        (["kl_coef=0.1", PLUS_PLUS, "normalize_advantages=true", "use_kl_loss=true"], "kl_coef", "exclusive"),
        (["kl_coef=0.1", PPO], "kl_coef", "Miles refuses it"),
        (["kl_coef=0.1"], "kl_coef", "no effect with advantage_estimator"),
        ([PLUS_PLUS], "normalize_advantages", "required by"),
        (["advantage_estimator=reinforce_plus_plus_baseline"], "normalize_advantages", "required by"),
        (["use_tis=true", "use_rollout_logprobs=true"], "use_tis", "applied twice"),
        (["use_tis=true", "use_decoupled_loss=true"], "use_tis", "exclusive with use_decoupled_loss"),
        (["use_tis=true", "use_dppo=true"], "use_tis", "exclusive with use_dppo"),
        (["use_rs=true", "use_rollout_logprobs=true"], "use_rs", "nothing is rejected"),
        (["use_decoupled_loss=true", "use_rollout_logprobs=true"], "use_decoupled_loss", "apart"),
        (["use_decoupled_loss=true", "use_dppo=true"], "use_decoupled_loss", "two policy losses"),
        (["use_dppo=true", "advantage_estimator=gspo"], "use_dppo", "two policy losses"),
        (["use_dppo=true", "eps_clip_c=3"], "eps_clip_c", "no dual clip"),
        (["advantage_estimator=cispo", "eps_clip_c=3"], "eps_clip_c", "no dual clip"),
        (["custom_tis_function_path=a:b"], "custom_tis_function_path", "without use_tis"),
        (["use_opd=true"], "opd_teacher_load", "required by use_opd"),
        ([OPD], "opd_teacher_load", "required by advantage_estimator"),
        ([OPD, "use_opd=true", "opd_teacher_load=t"], "use_opd", "count twice"),
        (["opd_teacher_load=t"], "opd_teacher_load", "without use_opd"),
        (
            ["use_opd=true", "opd_type=engine", "teacher_url=http://t", "opd_teacher_load=t"],
            "opd_teacher_load",
            "does not load",
        ),
        (["loss_type=custom_loss"], "custom_loss_function_path", "required by loss_type"),
        (["custom_loss_function_path=a:b"], "custom_loss_function_path", "no effect with loss_type"),
        (["pg_loss_divisor=9", "calculate_per_token_loss=true"], "pg_loss_divisor", "exclusive"),
        (["pg_loss_divisor=9", "custom_pg_loss_reducer_function_path=a:b"], "pg_loss_divisor", "exclusive"),
        (["stale=mask"], "stale_after", "required by stale"),
        (["stale_after=3"], "stale_after", "no effect with stale"),
        (["rs_level=token"], "rs_level", "without use_rs"),
        (["rs_upper_bound=2"], "rs_upper_bound", "without use_rs"),
        (["rs_lower_bound=0.5"], "rs_lower_bound", "without use_rs"),
        (["rs_veto_threshold=1e-4"], "rs_veto_threshold", "without use_rs"),
        (["use_rs=true", "rs_lower_bound=3"], "rs_lower_bound", "not below the upper bound 2"),
        (["use_tis=true", "tis_level=geometric", "tis_batch_normalize=true"], "tis_batch_normalize", "not"),
        (["prox_logp_method=loglinear"], "prox_logp_method", "without use_decoupled_loss"),
        (["opsm_per_token=true"], "opsm_per_token", "without use_opsm"),
        (["use_unbiased_kl=true"], "use_unbiased_kl", "without use_kl_loss"),
        ([SFT, "use_tis=true"], "use_tis", "sft_loss"),
        ([SFT, "pg_loss_divisor=9"], "pg_loss_divisor", "sft_loss"),
        (["n_samples_per_prompt=1", "advantage_estimator=gspo"], "n_samples_per_prompt", "8 is usual"),
        (["n_samples_per_prompt=1", "advantage_estimator=rloo"], "n_samples_per_prompt", "every advantage"),
    ],
)
def test_an_algorithm_at_odds_with_itself_is_refused(overrides: list[str], option: str, why: str) -> None:
    (found,) = refused(*overrides)
    assert found.split(":")[0].rpartition(".")[2] == option
    assert why in found


@pytest.mark.parametrize(
    ("overrides", "option", "why"),
    [
        (["lr_warmup_fraction=0.1", "lr_warmup_iters=3"], "lr_warmup_fraction", "exclusive"),
        (["lr_decay_style=WSD"], "lr_wsd_decay_iters", "required by"),
        (["lr_wsd_decay_iters=3"], "lr_wsd_decay_iters", "no effect with lr_decay_style"),
        (
            ["lr_decay_style=WSD", "lr_wsd_decay_iters=9", "lr_decay_iters=5"],
            "lr_wsd_decay_iters",
            "lr_decay_iters = 5",
        ),
        (["balance_by_flops=true"], "balance_by_flops", "without balance_data"),
        (["use_rollout_routing_replay=true", "engine=scripted"], "use_rollout_routing_replay", "embedded"),
        (["use_routing_replay=true", "use_rollout_logprobs=true"], "use_routing_replay", "leaves out"),
        (["keep_old_actor=true", "use_rollout_logprobs=true"], "keep_old_actor", "exclusive"),
        (["num_critic_only_steps=2"], "num_critic_only_steps", "has no critic"),
        (["critic_lr=1e-5"], "critic_lr", "has no critic"),
        (["critic_load=c"], "critic_load", "has no critic"),
        (["critic_lr_warmup_iters=2"], "critic_lr_warmup_iters", "has no critic"),
        (["ref_update_interval=2"], "ref_update_interval", "no reference model"),
        (["no_load_optim=true"], "no_load_optim", "without load"),
        (["main_params_dtype=bfloat16"], "main_params_dtype", "never keeps less"),
        (
            ["load=x", "use_checkpoint_opt_param_scheduler=true", "override_opt_param_scheduler=true"],
            "use_checkpoint_opt_param_scheduler",
            "exclusive",
        ),
        (
            ["log_probs_max_tokens_per_gpu=9", "use_dynamic_batch_size=false"],
            "log_probs_max_tokens_per_gpu",
            "no effect",
        ),
    ],
)
def test_a_trainer_at_odds_with_itself_is_refused(overrides: list[str], option: str, why: str) -> None:
    (found,) = refused(*overrides)
    assert found.split(":")[0] == f"trainer.{option}"
    assert why in found


def test_everything_is_told_at_once() -> None:
    found = refused("use_tis=true", "use_dppo=true", "use_opd=true", "stale=drop", "lr_decay_style=WSD")
    assert [problem.split(":")[0] for problem in found] == [
        "algorithm.use_tis",
        "algorithm.opd_teacher_load",
        "algorithm.stale_after",
        "trainer.lr_wsd_decay_iters",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        [PPO, "num_critic_only_steps=2", "critic_lr=1e-5", "gamma=0.9", "lambd=0.9", "use_tis=true"],
        [PPO, "n_samples_per_prompt=1"],
        ["n_samples_per_prompt=1", "rewards_normalization=false"],
        ["n_samples_per_prompt=1", "custom_advantage_function_path=a:b"],
        ["n_samples_per_prompt=1", "use_opd=true", "opd_teacher_load=t"],
        ["n_samples_per_prompt=1", SFT],
        ["n_samples_per_prompt=1", "trainer.backend=scripted"],
        [PLUS_PLUS, "normalize_advantages=true", "kl_coef=0.1", "ref_update_interval=3"],
        ["kl_coef=0.1", "custom_advantage_function_path=a:b"],
        [OPD, "opd_teacher_load=t"],
        [OPD, "opd_type=engine", "teacher_url=http://t"],
        ["use_tis=true", "use_rs=true", "use_opsm=true", "get_mismatch_metrics=true"],
        ["use_dppo=true", "use_rollout_logprobs=true"],
        ["advantage_estimator=gspo", "use_tis=true"],
        ["get_mismatch_metrics=true", "custom_tis_function_path=a:b"],
        ["get_mismatch_metrics=true", "use_rollout_logprobs=true", "use_routing_replay=true"],
        ["custom_pg_loss_reducer_function_path=a:b", "calculate_per_token_loss=true"],
        ["stale=mask", "stale_after=1"],
        ["use_rs=true", "rs_lower_bound=0.99", "rs_upper_bound=1.01"],
        ["dtype=bfloat16", "main_params_dtype=bfloat16"],
        ["lr_decay_style=WSD", "lr_wsd_decay_iters=3", "lr_warmup_fraction=0.1"],
        ["use_rollout_routing_replay=true", "use_routing_replay=true"],
        ["load=x", "no_load_optim=true", "override_opt_param_scheduler=true"],
    ],
)
def test_what_goes_together_compiles(overrides: list[str]) -> None:
    assert compiled(*overrides).processes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["use_opsm=true"], "algorithm.opsm_delta: 0.0001"),
        (["advantage_estimator=cispo"], 'correction = "cispo"'),
        (["advantage_estimator=gspo"], "3e-4 below"),
        (["tis_clip=3"], "algorithm.tis_clip: has no effect without use_tis or use_rs"),
        (["gamma=0.9"], 'no effect with advantage_estimator = "grpo", only with ppo and reinforce_plus_plus'),
        (["stale=mask", "stale_after=2"], "no token gets older than 2 optimizer steps"),
        ([PPO, "num_critic_only_steps=10"], "the actor is never trained"),
        (["use_kl_loss=true"], "computed and not used"),
        (["use_opd=true", "opd_teacher_load=t", "opd_kl_coef=0"], "not listened to"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(overrides: list[str], expected: str) -> None:
    assert any(expected in line for line in words.warnings(compiled(*overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["use_opsm=true", "opsm_delta=0.1"],
        ["correction=cispo+tis"],
        ["advantage_estimator=gspo", "eps_clip=3e-4", "eps_clip_high=4e-4", "use_tis=true"],
        ["tis_clip=3", "use_rs=true"],
        ["tis_mode=mask", "use_tis=true", "custom_tis_function_path=a:b"],
        ["stale=mask", "stale_after=1"],
        ["keep_old_actor=true"],
    ],
)
def test_what_is_meant_has_no_warnings(overrides: list[str]) -> None:
    assert words.warnings(compiled(*overrides)) == []


def test_bounds_that_are_left_out_are_those_of_tis_or_symmetric() -> None:
    assert rejection_bounds(AlgorithmConfig(use_rs=True)) == (0.5, 2.0)
    assert rejection_bounds(AlgorithmConfig(use_rs=True, tis_clip=4, tis_clip_low=0.1)) == (0.1, 4.0)
    assert rejection_bounds(AlgorithmConfig(use_rs=True, rs_upper_bound=1.25)) == (0.8, 1.25)
    assert rejection_bounds(AlgorithmConfig(use_rs=True, rs_lower_bound=0.0)) == (0.0, 2.0)
