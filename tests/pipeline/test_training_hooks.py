"""Training hooks from a user's file in whole runs: refused before, at work within, named when they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncrl.errors import ExitCode
from tests.hook_support import USER_HOOKS
from tests.support.books import assert_closed
from tests.support.command import asyncrl
from tests.support.inside import run_inside
from tests.support.world import write_topology


def test_hooks_of_the_wrong_form_are_refused_all_at_once(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def tis(args, pg_loss):\n    return pg_loss\n\n"
        "def reduce(x):\n    return x.sum()\n\n"
        "async def rewards(args, samples):\n    return [], []\n",
        encoding="utf-8",
    )
    options = {
        "algorithm.use_tis": True,
        "algorithm.custom_tis_function_path": "mine.py:tis",
        "algorithm.custom_pg_loss_reducer_function_path": "mine.py:reduce",
        "algorithm.custom_reward_post_process_path": "mine.py:rewards",
        "algorithm.custom_advantage_function_path": "mine.py:advantage",
    }
    topology = write_topology(tmp_path, model, options)
    said = asyncrl("launch", "--topology", topology, cwd=tmp_path)
    assert said.code == ExitCode.CONFIG, said.text
    assert "Traceback" not in said.text
    for words in (
        "algorithm.custom_tis_function_path: expected def name(args, *, pg_loss, train_log_probs,",
        "found def tis(args, pg_loss)",
        "algorithm.custom_pg_loss_reducer_function_path: expected def name(total_lengths, response_lengths,",
        "found def reduce(x)",
        "algorithm.custom_reward_post_process_path: expected def name(args, samples)",
        "found async def rewards(args, samples)",
        'algorithm.custom_advantage_function_path: "mine.py:advantage"',
    ):
        assert words in said.err, said.err
    assert not (tmp_path / "runs" / "run" / "plan.json").exists()


def test_a_run_trains_through_hooks_of_a_users_file(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER_HOOKS.read_text(encoding="utf-8"), encoding="utf-8")
    options = {
        "algorithm.use_tis": True,
        "algorithm.custom_tis_function_path": f"{file}:compute_mis_weights_with_cp",
        "algorithm.custom_reward_post_process_path": f"{file}:group_normalise",
    }
    run = run_inside(tmp_path, model, options)
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    found = [row["custom/mis_is_ratio"] for row in run.metrics("trainer") if "custom/mis_is_ratio" in row]
    assert len(found) == 3


def test_a_hook_that_fails_ends_the_run_by_name(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def rewards(args, samples):\n"
        "    scores = [s.reward for s in samples]\n"
        "    return scores, scores / len(scores)\n",
        encoding="utf-8",
    )
    options = {
        "algorithm.custom_reward_post_process_path": f"{file}:rewards",
        "run.max_restarts": 0,
    }
    run = run_inside(tmp_path, model, options)
    assert run.code == ExitCode.FAILED
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "trainer ended with exit code 2: algorithm.custom_reward_post_process_path: " in run.detail
    assert f"{file}:rewards failed at {file}:3 (rewards): TypeError: unsupported operand" in run.detail
