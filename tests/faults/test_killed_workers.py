"""SIGKILL of a generator and of a reward worker at work costs their current work, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncrl.chaos import Order
from asyncrl.errors import ExitCode
from tests.support.books import assert_closed, one, pairs, reasons, rows
from tests.support.command import Run, launched
from tests.support.processes import alive, descendants, kill, wait_until
from tests.support.recovery import gated, let_go, standing

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

NOTICED_S = 5.0
"""A death is noticed, and its leases are free again, within this time."""
AT_WORK = {
    "generate": "select l.incarnation from leases l join bodies b using (fence) where l.worker = ?"
    " and l.kind = 'generate' and l.ended_at is null and b.kind = 'segment' and b.num_tokens > 0",
    "score": "select incarnation from leases where worker = ? and kind = 'score' and ended_at is null",
}
"""Whether a worker holds a lease; a generator's has at least one committed token."""


ORDERS = [
    # A sample ends only after its first progress was acknowledged: none of those acknowledged has ended.
    Order(actor="generator-0", at="received:Acks", action="stop"),
    Order(actor="reward-0", at="received:Leases", where={"kind": "score"}, action="stop"),
]


def kill_at_work(run: Run, name: str, kind: str, *, pid: int) -> None:
    """SIGKILL a worker that holds a lease; the rows show that it did, who noticed when, and who took over."""
    incarnation = one(run.path, AT_WORK[kind], name)
    assert incarnation, "it holds no lease"
    assert one(run.path, "select pid from members where incarnation = ?", incarnation) == pid
    family = descendants(pid)
    killed = kill(pid)
    gone = "select 1 from members where incarnation = ? and left_at is not null"
    run.until(gone, incarnation)
    left = one(run.path, "select left_at from members where incarnation = ?", incarnation)
    assert 0 <= left - killed < NOTICED_S
    lost = rows(
        run.path,
        "select fence, group_id, ended_at from leases where incarnation = ? and outcome like '%signal 9%'",
        incarnation,
    )
    assert lost, "the victim held no lease when it died"
    assert all(0 <= ended - killed < NOTICED_S for _, _, ended in lost)
    if kind == "generate":
        fences = [fence for fence, _, _ in lost]
        assert any(one(run.path, "select sum(num_tokens) from bodies where fence = ?", f) for f in fences)
    # Others, or its next life, take what it held.
    for fence, group, _ in lost:
        run.until("select 1 from leases where group_id = ? and fence > ? and kind = ?", group, fence, kind)
    # It is started again, and works again; nothing of its old life is left.
    run.until("select 1 from members where name = ? and incarnation != ?", name, incarnation)
    wait_until(lambda: not any(map(alive, family)), "the children of the victim to end")


def test_killed_workers_cost_their_current_work_only(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    # The run is not over before both are back; and once the other reward worker waits at the gate with all it
    # can hold, this one is given work.
    options = {**slow, **gated(tmp_path, 20), "run.num_rollout": 8}
    with launched(tmp_path, model, options, orders=ORDERS) as run:
        kill_at_work(run, "generator-0", "generate", pid=standing(run, 0))
        kill_at_work(run, "reward-0", "score", pid=standing(run, 1))
        let_go(tmp_path)
        assert run.end() == ExitCode.FINISHED, run.text
        assert "generator-0 was killed by signal 9" in run.text
    assert_closed(run.path)
    assert reasons(run.path)["trained"] == 8 * 4
    assert set(reasons(run.path)) <= {"trained", "unneeded"}
    lives = pairs(run.path, "select name, count(*) from members where role != 'trainer' group by name")
    assert lives["generator-0"] == lives["reward-0"] == 2
    assert lives["generator-1"] == lives["reward-1"] == 1
