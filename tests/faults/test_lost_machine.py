"""Every process is gone at once: `launch --resume` goes on, and trains the same batches."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from asyncrl.chaos import Order
from tests.support.books import assert_closed, one, rows
from tests.support.command import Run, launched, resumed
from tests.support.processes import alive, descendants, kill, wait_until
from tests.support.recovery import assert_recovered, gated, let_go

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

GONE_S = 5.0
"""How long processes may take to go after a SIGKILL."""
AT_WORK = (
    "select count(distinct kind) = 2 from leases where ended_at is null and kind in ('generate', 'score')"
)
AHEAD = "select max(version) from versions having max(version) > (select max(rollout_step) from checkpoints)"
SAVED = "select max(rollout_step) from checkpoints"
FIRST_CLOSED = 16
"""Of the groups that wait for their scores: four batches can be trained, three are in the checkpoint."""
ORDERS = [
    Order(
        actor=f"generator-{number}", at="sent:Reports", where={"group_id": FIRST_CLOSED, "status": "pending"},
        action="stop",
    )
    for number in range(2)
]  # fmt: skip
"""Whoever has that group stands still with a part of it; the other goes on."""


def lose_everything(run: Run) -> None:
    """SIGKILL of every process of a run while answers are on their way and a checkpoint is behind."""
    run.until(AT_WORK)
    run.until(AHEAD)
    assert one(run.path, SAVED) == 3
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
    options = {
        **slow, **gated(tmp_path, FIRST_CLOSED), "run.num_rollout": steps, "trainer.save_interval": 3
    }  # fmt: skip
    with launched(tmp_path, model, options, orders=ORDERS) as run:
        run.until("select 1 from trained where batch = 3")
        lose_everything(run)
    let_go(tmp_path)
    with resumed(run.path) as again:
        assert_recovered(again, steps=steps)
    started = rows(run.path, "select rollout_step from incarnations order by incarnation")
    assert started == [(0,), (3,)]
