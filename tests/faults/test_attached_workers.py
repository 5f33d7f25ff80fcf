"""Processes that join a live run and leave it again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.errors import ExitCode
from asyncrl.messages.control import PROTOCOL
from asyncrl.messages.supervision import AttachReply, AttachRequest
from asyncrl.run.remote import ask
from tests.support.books import assert_closed, one, rows
from tests.support.command import Job, Run, asyncrl, launched
from tests.support.processes import wait_until

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

FINISHED_GROUPS = """
select count(distinct b.group_id) from bodies b join leases l using (fence) join members m
  on m.name = l.worker and m.incarnation = l.incarnation
where b.kind = 'segment' and l.worker = ? and l.outcome in ('completed', 'truncated')
  and l.granted_at >= m.joined_at and l.ended_at <= coalesce(m.left_at, 1e12)
"""
"""Groups that a worker finished answers of, between its coming and its going."""
ENDLESS = {"run.num_rollout": 1000, "generator.replicas": 1, "rollout.max_staleness": 3}


def attached(
    run: Run, where: str | Path, *arguments: str, role: str = "generator", name: str, forked: bool = True
) -> Job:
    """A process that joins under a name."""
    return Job(
        "attach", role, where, "--name", name, *arguments, cwd=run.path.parent.parent,
        output=run.path.parent.parent / f"{name}.out", forked=forked,
    )  # fmt: skip


def drain(run: Run) -> None:
    """End an endless run; its books close."""
    run.interrupt()
    assert run.end() == ExitCode.DRAINED, run.text
    assert_closed(run.path, finished=False)


def test_generators_and_rewards_come_and_go(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    with launched(tmp_path, model, {**slow, **ENDLESS}) as run:
        run.until("select 1 from members where role = 'generator'")
        address = run.status["address"]
        with (
            attached(run, run.path, name="near", forked=False) as near,
            attached(run, address, name="far") as far,
            attached(run, address, role="reward", name="judge") as judge,
        ):
            near.says(f"attached as near to {address}")
            run.until(FINISHED_GROUPS, "near")
            run.until(FINISHED_GROUPS, "far")
            run.until("select 1 from leases where worker = 'judge' and outcome = 'scored'")
            assert wait_until(lambda: run.members().get("far"), "the supervisor to answer")["attached"]
            said = asyncrl("detach", "near", "--run", run.path, "--drain", cwd=tmp_path)
            assert said.code == 0, said.text
            assert near.end() == 0, near.text
            far.interrupt()
            assert far.end() == 0, far.text
            assert asyncrl("detach", "judge", "--run", address, cwd=tmp_path).code == 0
            assert judge.end() == 0, judge.text
        for name in ("near", "far", "judge"):
            # Its goodbye may still be on its way when it has ended.
            gone = "select reason from members where name = ? and left_at is not null"
            assert run.until(gone, name) == "draining"
            assert rows(run.path, "select 1 from leases where worker = ? and ended_at is null", name) == []
        assert one(run.path, FINISHED_GROUPS, "near") > 0
        # Its going cost nobody an answer: what it had not finished, it handed back.
        assert rows(run.path, "select 1 from groups where reason = 'failed'") == []
        unknown = asyncrl("detach", "near", "--run", run.path, cwd=tmp_path)
        assert unknown.code == ExitCode.FAILED
        assert 'nobody here is called "near"' in unknown.err
        # Another version of the code is turned away before it gets a plan.
        reply = asyncio.run(
            ask(address, AttachRequest(role="generator", protocol=PROTOCOL, schema="other"), key=None)
        )
        assert isinstance(reply, AttachReply)
        assert "another version of asyncrl" in reply.problem
        assert msgspec.structs.replace(reply, problem="") == AttachReply()
        drain(run)


def test_with_a_key_only_its_holders_join(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    assert asyncrl("keys", "run.key", cwd=tmp_path).code == 0
    with launched(tmp_path, model, {**slow, **ENDLESS, "run.key": "run.key"}) as run:
        run.until("select 1 from members where role = 'generator'")
        address = run.status["address"]
        with (
            attached(run, address, "--key", "run.key", name="friend") as friend,
            attached(run, address, name="stranger") as stranger,
        ):
            assert stranger.end() == ExitCode.FAILED
            assert "Traceback" not in stranger.text
            assert stranger.text.count("asyncrl: ") == 1
            assert "no answer" in stranger.text
            assert "--key" in stranger.text
            run.until(FINISHED_GROUPS, "friend")
            said = asyncrl("detach", "friend", "--run", address, "--key", "run.key", cwd=tmp_path)
            assert said.code == 0, said.text
            assert friend.end() == 0, friend.text
        assert rows(run.path, "select 1 from members where name = 'stranger'") == []
        drain(run)
