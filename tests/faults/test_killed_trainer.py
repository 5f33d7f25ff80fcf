"""The trainer dies: by an error of its own, killed in the middle of a checkpoint, and with its generators."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from asyncrl.chaos import Order
from asyncrl.errors import ExitCode
from tests.support.books import assert_closed, one, pairs, rows
from tests.support.command import RUN_S, Run, launched
from tests.support.inside import run_inside
from tests.support.processes import kill
from tests.support.recovery import assert_recovered, carried_out, gated, let_go, standing

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

PUBLISHED = "select max(version) from versions"
LIVES = "select count(*) from incarnations"
SAVED = "select coalesce(max(rollout_step), 0) from checkpoints"
NO_SPACE, IN_CHECKPOINT = range(2)
ORDERS = [
    Order(actor="trainer", at="file:os.mkdir:*/.step-000003.tmp/*", action="errno:ENOSPC"),
    Order(actor="trainer", at="file:os.rename:*/.step-000006.tmp", action="stop"),
]


def behind(run: Run) -> int:
    """Rollout steps between the newest committed checkpoint and the newest published version."""
    return int((one(run.path, PUBLISHED) or 0) - (one(run.path, SAVED) or 0))


def assert_never_back(run: Run, *, since: float, published: int) -> None:
    """Whatever was published since is no older than what had been; no generator was told anything older."""
    run.until("select 1 from versions where published_at > ?", since)
    assert one(run.path, "select min(version) from versions where published_at > ?", since) >= published
    told: dict[str, int] = {}
    for name, version in rows(run.path, "select name, version from swaps order by at"):
        assert version >= told.get(name, 0), (name, version, told)
        told[name] = version


def fail(run: Run) -> None:
    """The trainer ends by an error of its own: for its first checkpoint there is no space on the disk."""
    carried_out(run, NO_SPACE)
    run.says("trainer ended with exit code 1: checkpoint", deadline_s=RUN_S)
    run.until("select 1 from checkpoints where rollout_step = 3 and incarnation > 1")
    # What it said before its end has arrived by then.
    back = one(run.path, "select started_at from incarnations where incarnation = 2")
    published = one(run.path, f"{PUBLISHED} where published_at <= ?", back)
    assert published >= 1, "nothing to go back from"
    assert_never_back(run, since=back, published=published)


def kill_in_checkpoint(run: Run) -> None:
    """SIGKILL while a checkpoint is being written; the generators live and keep the newer version."""
    pid = standing(run, IN_CHECKPOINT)
    torn = run.path / "checkpoints" / ".step-000006.tmp"
    assert torn.exists()
    assert not torn.with_name("step-000006").exists()
    run.until(f"select ({PUBLISHED}) > ({SAVED})")  # else there is nothing to go back from
    published, before = one(run.path, PUBLISHED), one(run.path, LIVES)
    at = kill(pid)
    run.until("select 1 from checkpoints where rollout_step = 6")
    # The batches from the checkpoint on came as recorded.
    assert one(run.path, "select min(batch) from trained where incarnation > ?", before) == 3
    assert_never_back(run, since=at, published=published)
    lives = pairs(run.path, "select name, count(*) from members where role = 'generator' group by name")
    assert set(lives.values()) == {1}
    assert not torn.exists()


def kill_with_generators(run: Run) -> tuple[float, int]:
    """SIGKILL of the trainer and of everybody who has the newest version; when, and which that was."""
    run.until("select 1 from versions where version = 7")
    pids = [*map(run.pid, ("trainer", "generator-0", "generator-1"))]
    published = one(run.path, PUBLISHED)
    assert (published, behind(run)) == (7, 1), "no version beyond the checkpoint"
    at = time.time()
    for pid in pids:
        kill(pid)
    return at, published


def test_a_trainer_fails_is_killed_and_is_killed_with_its_generators(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    steps = 9
    # Seven batches, and no more as long as this test looks at it.
    options = {**slow, **gated(tmp_path, 7 * 4), "run.num_rollout": steps, "trainer.save_interval": 3}
    with launched(tmp_path, model, options, orders=ORDERS) as run:
        fail(run)
        kill_in_checkpoint(run)
        at, published = kill_with_generators(run)
        let_go(tmp_path)
        # Nobody has that version; it is there again once the trainer has come to it.
        assert_recovered(run, steps=steps)
    assert_never_back(run, since=at, published=published)
    assert one(run.path, LIVES) >= 4


def test_a_failure_that_would_come_again_ends_the_run_at_once(tmp_path: Path, model: Path) -> None:
    run = run_inside(tmp_path, model, {"trainer.lr": 1e30, "trainer.clip_grad": 1e30})
    assert run.code == ExitCode.FAILED
    assert "trainer.on_nan" in run.detail
    assert "restarted" not in run.detail
    assert one(run.path, LIVES) == 1
    assert_closed(run.path, finished=False)
