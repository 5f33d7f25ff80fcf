"""SIGSTOP: shorter than run.dead_after_s, nothing happens; longer, the process is killed and replaced."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from asyncrl.errors import ExitCode
from tests.support.books import assert_closed, one, pairs
from tests.support.command import Run, launched
from tests.support.processes import alive, wait_until
from tests.support.recovery import assert_replays, new_pid, stopped

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

DEAD_AFTER_S = 6.0


def stop_for_good(run: Run, *names: str) -> None:
    """SIGSTOP until they are replaced; when a successor is there, its predecessor is gone."""
    pids = {name: run.pid(name) for name in names}
    with stopped(*pids.values()):
        at = time.monotonic()
        for name, pid in pids.items():
            new_pid(run, name, pid)
            assert not alive(pid), "two lives of one name"
            run.says(f"{name} was killed by signal 9: silent for")
        assert time.monotonic() - at > DEAD_AFTER_S / 2


def stop_for_a_moment(*pids: int, seconds: float) -> None:
    """SIGSTOP for so long, whatever the others do meanwhile."""
    with stopped(*pids):
        ends = time.monotonic() + seconds
        wait_until(lambda: time.monotonic() > ends, "the time to pass")
    assert all(map(alive, pids))


def test_stopped_processes(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    options = {
        **slow,
        "run.num_rollout": 10_000,
        "run.dead_after_s": DEAD_AFTER_S,
        "trainer.save_interval": 2,
    }
    with launched(tmp_path, model, options) as run:
        run.until("select 1 from checkpoints where rollout_step = 2")
        pids = [run.pid(name) for name in ("trainer", "buffer", "generator-0", "source")]
        stop_for_a_moment(*pids, seconds=DEAD_AFTER_S / 2)
        # Nobody is blamed for the time in which the supervisor itself stood still.
        stop_for_a_moment(run.process.pid, seconds=DEAD_AFTER_S * 1.3)
        assert "killed" not in run.text
        stop_for_good(run, "buffer")
        stop_for_good(run, "trainer", "generator-1")
        trained = one(run.path, "select max(batch) from trained")
        run.until("select 1 from trained where batch > ?", trained)
        run.interrupt()
        assert run.end() == ExitCode.DRAINED, run.text
    assert_closed(run.path, finished=False)
    assert_replays(run.path)
    lives = pairs(run.path, "select name, count(*) from members group by name")
    assert (lives["trainer"], lives["generator-1"], lives["generator-0"]) == (2, 2, 1), lives
    assert one(run.path, "select count(*) from incarnations") == 2
