"""`asyncrl doctor` on real processes: whoever is stopped, hangs or blocks is named within seconds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from asyncrl.errors import ExitCode
from tests.support.books import one
from tests.support.command import RUN_S, Run, asyncrl, launched
from tests.support.inside import run_inside
from tests.support.processes import alive, kill, stat, wait_until

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

PATIENT = {
    "run.dead_after_s": 250.0,
    "run.stall_s": 250.0,
    "run.num_rollout": 10_000,
    "run.heartbeat_s": 0.5,
    "generator.replicas": 1,
    "reward.replicas": 1,
}
"""Nobody is given up during the test, and it does not end before that."""


def examine(run: Run) -> tuple[str, dict[str, Any]]:
    """(the first line, the JSON report) of `asyncrl doctor RUN` from another terminal."""
    said = asyncrl("doctor", run.path, "--json", cwd=run.path.parent)
    assert said.code == ExitCode.FINISHED, said.text
    report = json.loads(said.out)
    kept = Path(report["path"])
    assert kept.parent == run.path / "doctor"
    assert kept.read_text(encoding="utf-8").splitlines()[0] == report["cause"]
    return report["cause"], report


def named(run: Run, words: str) -> str:
    """The cause, once it is about this; empty before."""
    cause, _ = examine(run)
    return cause if words in cause else ""


def cause_if_all_answered(run: Run) -> str:
    """The cause; empty where somebody was so busy that it missed the deadline of an answer."""
    cause, report = examine(run)
    return cause if all("facts" in member for member in members(report).values()) else ""


def members(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {member["name"]: member for member in report["case"]["members"]}


def test_a_stopped_trainer_is_named_and_goes_on(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    with launched(tmp_path, model, {**slow, **PATIENT}) as run:
        run.until("select 1 from trained")
        pid = run.pid("trainer")
        assert "stopped" not in wait_until(
            lambda: cause_if_all_answered(run), "everybody to answer", deadline_s=RUN_S
        )
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: (stat(pid) or (0, ""))[1] == "T", "the trainer to stop")
        cause, report = examine(run)
        assert cause.startswith(f"trainer (pid {pid}) is stopped by a signal")
        assert "facts" not in members(report)["trainer"]
        assert members(report)["buffer"]["facts"]["desk"]["batch_size"] == 4
        trained = one(run.path, "select count(*) from trained")
        os.kill(pid, signal.SIGCONT)
        run.until("select count(*) > ? from trained", trained)
        run.interrupt()
        assert run.end() == ExitCode.DRAINED, run.text


def test_a_hanging_reward_a_mute_supervisor_and_a_dead_run(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    """One run after the other way of standing still. The reward awaits for ever: its thread shows nothing."""
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import asyncio\n\n\nasync def grade(args, sample):\n    await asyncio.Event().wait()\n"
    )
    options = {**slow, **PATIENT, "reward.use": f"{hanging}:grade", "reward.timeout_s": 250.0}
    with launched(tmp_path, model, options) as run:
        run.until("select 1 from leases where kind = 'score' and ended_at is null")
        cause = wait_until(lambda: named(run, "user code"), "the reward to be named", deadline_s=RUN_S)
        assert f"grade at {hanging}:5" in cause
        pids = [run.pid(name) for name in ("trainer", "generator")]
        os.kill(run.process.pid, signal.SIGSTOP)
        said = asyncrl("doctor", run.path, cwd=tmp_path)
        assert said.out.startswith(f"supervisor (pid {run.process.pid}) is stopped by a signal"), said.text
        assert "GeneratorRole._sample_all" in said.out, "members are looked at by signal"
        kill(run.process.pid)
        wait_until(lambda: not any(map(alive, pids)), "the children to end with their supervisor")
        run.process.wait(timeout=10.0)
        said = asyncrl("doctor", run.path, cwd=tmp_path)
    assert said.out.startswith("the supervisor ended without a word"), said.text
    assert "--resume" in said.out.splitlines()[0]
    assert "reward held" in said.out


def test_a_blocked_loop_is_named_with_its_line(tmp_path: Path, model: Path) -> None:
    """A custom generate function that sleeps instead of awaiting: no message can be answered."""
    (tmp_path / "blocking.py").write_text(
        "import time\n\n\nasync def generate(args, sample, sampling_params):\n    time.sleep(600)\n",
        encoding="utf-8",
    )
    custom = f"{tmp_path / 'blocking.py'}:generate"
    options = {**PATIENT, "rollout.custom_generate_function_path": custom}
    with launched(tmp_path, model, options) as run:
        run.until("select 1 from leases where kind = 'generate' and ended_at is null")
        pid = run.pid("generator")
        cause = wait_until(lambda: named(run, "blocked"), "the loop to be named", deadline_s=RUN_S)
        where = f"generate at {tmp_path / 'blocking.py'}:5"
        assert cause.startswith(f"the event loop of generator (pid {pid}) is blocked for")
        assert where in cause


def test_a_stall_ends_the_run_with_its_cause(tmp_path: Path, model: Path) -> None:
    """Leases that are held and renewed are no excuse: the answers never come."""
    code = "import asyncio\n\n\nasync def generate(*_):\n    await asyncio.Event().wait()\n"
    (tmp_path / "never.py").write_text(code, encoding="utf-8")
    custom = {"rollout.custom_generate_function_path": f"{tmp_path / 'never.py'}:generate"}
    # No token for 8 s is what makes it hang; the start may take the rest.
    run = run_inside(tmp_path, model, {**custom, "run.stall_s": 18.0})
    assert run.code == ExitCode.FAILED
    assert run.detail.startswith("generator hangs: it holds 10 samples and has handed in no token for")
    assert f"in generate at {tmp_path / 'never.py'}:5 (no rollout" in run.detail
    assert "(no rollout step for 18 s (run.stall_s); report: " in run.detail
    report = Path(run.detail.rpartition("report: ")[2].rstrip(")"))
    assert report.parent == run.path / "doctor"
    assert run.detail.startswith(report.read_text(encoding="utf-8").splitlines()[0])


def test_a_filter_that_refuses_everything_ends_the_run_with_a_report(tmp_path: Path, model: Path) -> None:
    (tmp_path / "strict.py").write_text(
        "def never(args, samples, **_):\n    return False\n", encoding="utf-8"
    )
    options = {
        "rollout.dynamic_sampling_filter_path": f"{tmp_path / 'strict.py'}:never",
        "rollout.max_refused_per_step": 12,
    }
    run = run_inside(tmp_path, model, options)
    assert run.code == ExitCode.FAILED
    detail = run.detail
    assert detail.partition(" ")[2].startswith("groups in a row were refused by the filters")
    (report,) = (run.path / "doctor").glob("*.json")
    found = json.loads(report.read_bytes())
    assert detail.startswith(found["cause"])
    assert members(found)["buffer"]["facts"]["desk"]["refused"] > 12
