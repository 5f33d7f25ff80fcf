"""A run that is interrupted, politely or not, goes on where it stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from asyncrl.errors import ExitCode
from asyncrl.roles.reward import DRAIN_S
from tests.support.books import assert_closed, one, pairs, reasons, rows
from tests.support.command import launched, resumed
from tests.support.processes import alive, descendants, kill, wait_until
from tests.support.recovery import assert_replays, gated, let_go

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

STEPS = 5
GONE_S = 15.0
"""How long the children of a killed launch may outlive it."""
BEGUN = "select 1 from samples where state = 'generating' and tokens between 1 and 20"
SCORING = "select 1 from leases where kind = 'score' and ended_at is null"


def test_a_drained_run_says_how_to_resume_and_resumes(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    # Whoever has begun needs more than one and a half seconds for the rest.
    answers = {"median": 100.0, "sigma": 0.0, "max_tokens": 100, "vocab_size": 90, "token_latency_s": 0.02}
    options = {**slow, "run.num_rollout": STEPS, "generator.scripted": answers}
    with launched(tmp_path, model, options, forked=False) as run:
        run.until("select 1 from trained where batch = 1")
        run.until(BEGUN)
        run.interrupt()
        assert run.end() == ExitCode.DRAINED, run.text
        assert "draining" in run.text
        assert f"launch --resume {run.path}" in run.text
        assert "Traceback" not in run.text
        assert run.status["exit_code"] == ExitCode.DRAINED
    assert_closed(run.path, finished=False)
    partial = pairs(run.path, "select group_id || '.' || idx, tokens from samples where state = 'fresh'")
    assert sum(partial.values()) > 0, "the drain handed no partial answer back"
    saved = one(run.path, "select max(rollout_step) from checkpoints")
    assert saved == one(run.path, "select count(*) from trained")
    with resumed(run.path, forked=False) as again:
        assert again.end() == ExitCode.FINISHED, again.text
    assert_closed(run.path)
    assert reasons(run.path)["trained"] == STEPS * 4
    assert rows(run.path, "select batch from trained group by batch having count(*) > 1") == []
    now = pairs(run.path, "select group_id || '.' || idx, tokens from samples")
    assert all(now[sample] >= tokens for sample, tokens in partial.items())


def test_a_killed_launch_takes_its_children_along_and_resumes(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    # Three batches are trained, two of them are in a checkpoint, and answers for the fourth wait for a score.
    options = {**slow, **gated(tmp_path, 12), "run.num_rollout": STEPS, "trainer.save_interval": 2}
    with launched(tmp_path, model, options, forked=False) as run:
        run.until("select 1 from trained where batch = 2")
        run.until(SCORING)
        family = descendants(run.process.pid)
        assert len(family) >= 7
        kill(run.process.pid)
        wait_until(
            lambda: not any(map(alive, family)),
            "the children of a killed launch to end",
            deadline_s=GONE_S,
            show=lambda: [pid for pid in family if alive(pid)],
        )
    assert rows(run.path, "select fence from leases where ended_at is null")
    assert_closed(run.path, finished=False)
    let_go(tmp_path)
    with resumed(run.path) as again:
        assert again.end() == ExitCode.FINISHED, again.text
    assert_closed(run.path)
    assert reasons(run.path)["trained"] == STEPS * 4
    assert_replays(run.path, steps=STEPS)
    # What the second life trained again came out the same.
    twice = rows(
        run.path, "select batch, count(distinct digest) from trained group by batch having count(*) > 1"
    )
    assert twice
    assert all(digests == 1 for _, digests in twice)


def test_a_second_interrupt_stops_at_once(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    (tmp_path / "patient.py").write_text(
        "import time\n\n\ndef grade(sample):\n    time.sleep(60)\n    return 0.0\n", encoding="utf-8"
    )
    with launched(tmp_path, model, slow) as run:
        run.until(SCORING)
        family = descendants(run.process.pid)
        began = time.monotonic()
        run.interrupt()
        # The reward is not done for a minute, so the drain waits.
        run.says("draining")
        run.interrupt()
        code = run.end()
        assert time.monotonic() - began < DRAIN_S, "it waited for the reward"
        assert code == ExitCode.DRAINED, run.text
        assert "Traceback" not in run.text
        wait_until(lambda: not any(map(alive, family)), "all children to end", deadline_s=GONE_S)
    assert_closed(run.path, finished=False)


def test_a_spent_restart_budget_ends_the_run_in_words(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\n\n\nasync def generate(args, sample, sampling_params):\n    os._exit(7)\n",
        encoding="utf-8",
    )
    options = {"rollout.custom_generate_function_path": "mine.py:generate", "run.max_restarts": 1}
    with launched(tmp_path, model, options) as run:
        assert run.end() == ExitCode.FAILED
        assert "Traceback" not in run.text
        assert "generator ended with exit code 7" in run.text
        assert "run.max_restarts = 1" in run.text
    assert one(run.path, "select count(*) from members where name = 'generator'") == 2
    assert_closed(run.path, finished=False)
