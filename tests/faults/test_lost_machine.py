"""Every process is gone at once: `launch --resume` goes on, and trains the same batches."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.books import assert_closed, one, rows
from tests.support.command import Run, launched, resumed
from tests.support.processes import alive, descendants, kill, wait_until
from tests.support.recovery import assert_recovered, catch

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

GONE_S = 5.0
"""How long processes may take to go after a SIGKILL."""
AT_WORK = (
    "select count(distinct kind) = 2 from leases where ended_at is null and kind in ('generate', 'score')"
)
AHEAD = "select max(version) from versions having max(version) > (select max(rollout_step) from checkpoints)"


def lose_everything(run: Run) -> None:
    """SIGKILL of every process of a run while answers are on their way and a checkpoint is behind."""
    catch(
        run.pid("trainer"),
        lambda: bool(one(run.path, AT_WORK) and one(run.path, AHEAD)),
        "work out, and versions beyond the checkpoint",
    )
    family = [run.process.pid, *descendants(run.process.pid)]
    assert len(family) >= 7
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    for pid in family:
        kill(pid)
    assert run.end() == -signal.SIGKILL
    wait_until(lambda: not any(map(alive, family)), "every process to be gone", deadline_s=GONE_S)
    assert rows(run.path, "select fence from leases where ended_at is null"), "nothing was out"
    assert_closed(run.path, finished=False)


def test_a_lost_machine(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    steps = 7
    options = {**slow, "run.num_rollout": steps, "trainer.save_interval": 3}
    with launched(tmp_path, model, options) as run:
        run.until("select 1 from checkpoints where rollout_step = 3")
        lose_everything(run)
    with resumed(run.path) as again:
        assert_recovered(again, steps=steps)
    started = rows(run.path, "select rollout_step from incarnations order by incarnation")
    assert started == [(0,), (3,)]
