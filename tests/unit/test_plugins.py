"""Finding user code by path, checking signatures, and checking it in a child process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from asyncrl.errors import PluginError
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.topology.hook_kinds import ALGORITHM_HOOKS, KINDS
from asyncrl.topology.plugins import (
    BUILTIN_REWARDS,
    PLANNED_REWARDS,
    check_plugins,
    check_reward_name,
    check_signature,
    is_plugin_path,
    load,
)

GRADER = """
import helper_beside
class Judges:
    @staticmethod
    def strict(sample): return 1.0
def grade(sample): return helper_beside.VALUE
async def grade_async(args, sample): return 1.0
VALUE = 3
"""


@pytest.fixture
def grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of user code that imports a neighbour; sys.path is restored afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper_beside.py").write_text("VALUE = 0.5\n")
    monkeypatch.delitem(sys.modules, "helper_beside", raising=False)
    file = tmp_path / "grader.py"
    file.write_text(GRADER)
    return file


def test_all_three_spellings_find_the_same_kind_of_thing(grader: Path) -> None:
    import json

    assert load("json:dumps", what="x") is json.dumps
    assert load("json.dumps", what="x") is json.dumps
    assert load(f"{grader}:grade", what="x")(None) == 0.5  # type: ignore[operator]
    assert load(f"{grader}:Judges.strict", what="x")(None) == 1.0  # type: ignore[operator]


def test_a_file_is_loaded_once(grader: Path) -> None:
    assert load(f"{grader}:grade", what="x") is load(f"{grader}:grade", what="x")


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("grade", ["reward.use", '"grade" names no function']),
        ("json:", ["names no function"]),
        ("jsonn:dumps", ['no module "jsonn"', "close to it: json"]),
        ("json.decodr:x", ['no module "json.decodr"', "decoder"]),
        ("json:dunps", ['json has no "dunps"', "close to it: dumps"]),
        ("nowhere/grader.py:grade", ['no file "nowhere/grader.py"']),
    ],
)
def test_what_is_missing_is_named_with_what_is_close(path: str, parts: list[str]) -> None:
    with pytest.raises(PluginError) as caught:
        load(path, what="reward.use")
    for part in ["reward.use", *parts]:
        assert part in str(caught.value)


def test_a_broken_module_is_told_from_a_missing_one(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nimport not_installed_anywhere\n")
    with pytest.raises(PluginError, match=r"broken\.py:2: ModuleNotFoundError.*not_installed_anywhere"):
        load(f"{broken}:grade", what="reward.use")
    broken.write_text("raise SystemExit(0)\n")
    with pytest.raises(PluginError, match="SystemExit"):
        load(f"{broken}:grade", what="reward.use")


def _sample(sample: Any, strict: bool = False) -> float: ...
async def _args_sample(args: Any, sample: Any) -> float: ...
def _renamed(a: Any, s: Any) -> float: ...
def _three(a: Any, s: Any, more: Any) -> float: ...
def _filter(args: Any, samples: Any, **kwargs: Any) -> bool: ...
async def _generate(args: Any, sample: Any, sampling_params: Any) -> Any: ...
async def _generate_eval(args: Any, sample: Any, sampling_params: Any, evaluation: bool = False) -> Any: ...
def _generate_sync(args: Any, sample: Any, sampling_params: Any) -> Any: ...


def _custom_loss(args: Any, batch: Any, logits: Any, sum_of_sample_mean: Any) -> Any: ...
def _icepop(
    args: Any, *, pg_loss: Any, train_log_probs: Any, rollout_log_probs: Any, loss_masks: Any, **kwargs: Any
) -> Any: ...
def _mis(
    args: Any,
    *,
    pg_loss: Any,
    train_log_probs: Any,
    rollout_log_probs: Any,
    loss_masks: Any,
    total_lengths: Any,
    response_lengths: Any,
    **kwargs: Any,
) -> Any: ...
def _tis_without_rest(args: Any, *, pg_loss: Any, train_log_probs: Any) -> Any: ...
def _tis_wants_more(args: Any, *, pg_loss: Any, teacher: Any, **kwargs: Any) -> Any: ...
def _reducer(
    total_lengths: Any, response_lengths: Any, loss_masks: Any, calculate_per_token_loss: bool = False
) -> Any: ...
def _advantage(args: Any, rollout_data: Any) -> None: ...
def _post_process(args: Any, samples: Any, **kwargs: Any) -> Any: ...
def _only_args(args: Any) -> None: ...
def _args_samples(args: Any, samples: Any) -> None: ...
def _args_id_data(args: Any, rollout_id: int, rollout_data: Any) -> None: ...
def _log_prob(args: Any, model: Any, store_prefix: str) -> None: ...
def _train_step(
    args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, opt_param_scheduler: Any
) -> None: ...


class _Source:
    def __init__(self, args: Any) -> None: ...
    def get_samples(self, num_samples: int) -> list[Any]: ...
    def add_samples(self, samples: Any) -> None: ...
    def save(self, rollout_id: int) -> None: ...
    def load(self, rollout_id: int | None = None) -> None: ...


class _HalfSource:
    def __init__(self, args: Any) -> None: ...
    def get_samples(self, num_samples: int) -> list[Any]: ...


@pytest.mark.parametrize(
    ("hook", "kind", "form"),
    [
        (_sample, "reward", ("sample",)),
        (_args_sample, "reward", ("args", "sample")),
        (_renamed, "reward", ("args", "sample")),
        (_filter, "dynamic_sampling_filter", ("args", "samples")),
        (_generate, "generate", ("args", "sample", "sampling_params")),
        (_generate_eval, "generate", ("args", "sample", "sampling_params", "evaluation")),
        (_Source, "data_source", ("args",)),
        (_custom_loss, "custom_loss", ("args", "batch", "logits", "sum_of_sample_mean")),
        (_icepop, "custom_tis", ("args",)),
        (_mis, "custom_tis", ("args",)),
        (
            _reducer,
            "pg_loss_reducer",
            ("total_lengths", "response_lengths", "loss_masks", "calculate_per_token_loss"),
        ),
        (_advantage, "advantage", ("args", "rollout_data")),
        (_post_process, "reward_post_process", ("args", "samples")),
        (_args_samples, "convert_samples", ("args", "samples")),
        (_only_args, "rollout_data_postprocess", ("args",)),
        (_args_samples, "rollout_data_postprocess", ("args", "samples")),
        (_args_id_data, "rollout_data_postprocess", ("args", "rollout_id", "rollout_data")),
        (_log_prob, "before_log_prob", ("args", "model", "store_prefix")),
        (
            _train_step,
            "before_train_step",
            ("args", "rollout_id", "step_id", "model", "optimizer", "opt_param_scheduler"),
        ),
    ],
)
def test_every_documented_form_is_recognised(hook: object, kind: str, form: tuple[str, ...]) -> None:
    assert check_signature(hook, kind=kind, option="x") == form


@pytest.mark.parametrize(
    ("hook", "kind", "expected", "found"),
    [
        (_three, "reward", "def name(sample) or def name(args, sample)", "def _three(a:"),
        (_sample, "buffer_filter", "(args, rollout_id, buffer, num_samples)", "def _sample("),
        (_generate_sync, "generate", "async def name(args, sample, sampling_params)", "def _generate_sync("),
        (_args_sample, "dynamic_sampling_filter", "def name(args, samples)", "async def _args_sample("),
        (3, "reward", "def name(sample)", "int 3"),
        (_Source, "reward", "def name(sample)", "class _Source("),
        (
            _tis_without_rest,
            "custom_tis",
            "def name(args, *, pg_loss, train_log_probs,",
            "_tis_without_rest(",
        ),
        (_tis_wants_more, "custom_tis", "response_lengths, **kwargs)", "*, pg_loss: 'Any', teacher:"),
        (_advantage, "custom_loss", "(args, batch, logits, sum_of_sample_mean)", "def _advantage("),
        (_three, "pg_loss_reducer", "calculate_per_token_loss)", "def _three("),
        (_train_step, "rollout_data_postprocess", "def name(args) or def name(args, samples) or", "step_id"),
        (_HalfSource, "data_source", "get_samples, add_samples", "has no add_samples, save, load"),
    ],
)
def test_another_signature_is_refused_with_both_shown(
    hook: object, kind: str, expected: str, found: str
) -> None:
    with pytest.raises(PluginError) as caught:
        check_signature(hook, kind=kind, option="reward.use")
    assert "reward.use: expected" in str(caught.value)
    assert expected in str(caught.value)
    assert found in str(caught.value)


def test_every_hook_of_the_algorithm_is_an_option_and_a_kind() -> None:
    hooks = {name for name in AlgorithmConfig.__struct_fields__ if name.endswith("_path")}
    assert set(ALGORITHM_HOOKS) == hooks
    assert set(ALGORITHM_HOOKS.values()) <= set(KINDS)


def test_names_of_rewards_are_checked_without_loading_anything() -> None:
    assert all(not check_reward_name(name) for name in (*BUILTIN_REWARDS, "boxed_exact", "a.b:c"))
    for name in PLANNED_REWARDS:
        (problem,) = check_reward_name(name)
        assert "not built in yet" in problem
        assert "remote_rm" in problem
    (problem,) = check_reward_name("mathh")
    assert 'unknown reward "mathh" (close to it: math)' in problem
    assert not is_plugin_path("math")


def test_a_child_checks_all_and_its_death_is_a_problem_of_one(tmp_path: Path) -> None:
    (tmp_path / "fine.py").write_text("import sys\nprint('noise')\ndef grade(sample): return 1\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)\n")
    checks = [
        ("reward[0].use", "reward", "fine:grade"),
        ("reward[1].use", "reward", "dies:grade"),
        ("reward[2].use", "group_reward", "fine:grad"),
    ]
    problems = check_plugins(checks, search_paths=[str(tmp_path)], timeout_s=30)
    assert len(problems) == 2
    assert problems[0].startswith('reward[1].use: importing "dies:grade" ended its process (exit 7)')
    assert problems[1].startswith('reward[2].use: "fine:grad": fine has no "grad" (close to it: grade)')
    assert "fine" not in sys.modules


def test_an_import_that_hangs_is_killed_at_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import threading\nthreading.Event().wait()\n")
    problems = check_plugins([("x", "reward", "hangs:f")], search_paths=[str(tmp_path)], timeout_s=2)
    assert problems == ['x: importing "hangs:f" did not finish within 2 s']
