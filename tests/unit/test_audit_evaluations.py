"""The audit's equation about evaluations: those that were given up are never done, and leave nothing open."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from asyncrl.buffer.audit import audit
from asyncrl.messages.control import Need
from asyncrl.messages.sample import Lane
from tests.desk import Desk, make_plan


def holds(run: Path) -> str:
    """What breaks the equation; empty when it holds."""
    found = next(e for e in audit(run).equations if e.name == "evaluations.groups")
    assert found.holds == (not found.broken)
    return found.broken


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run whose first evaluation is made to look as if its version was lost with the trainer."""
    desk = Desk(tmp_path / "run", make_plan(num_rollout=5, evals=True))
    desk.play()
    desk.close()
    assert holds(tmp_path / "run") == ""
    edit(
        tmp_path / "run",
        "update evaluations set done_at = null, seen = -1 where version = 0",
        "update groups set state = 'unneeded', reason = 'unneeded' where lane = 'eval' and version = 0",
    )
    return tmp_path / "run"


def edit(run: Path, *statements: str) -> None:
    """Change rows."""
    with sqlite3.connect(run / "buffer.db") as db:
        for statement in statements:
            assert db.execute(statement).rowcount > 0
    db.close()


def test_an_evaluation_that_was_given_up_closes(run: Path) -> None:
    assert holds(run) == ""


@pytest.mark.parametrize(
    "damage",
    [
        "update groups set state = 'fresh', reason = null where lane = 'eval' and version = 0",
        "update evaluations set done_at = 1.0 where version = 0",
        "update evaluations set seen = 1 where version = 0",
        "update evaluations set seen = 0 where version = 0",
    ],
)
def test_but_nothing_of_it_may_be_open_done_or_seen(run: Path, damage: str) -> None:
    edit(run, damage)
    assert holds(run).startswith("evaluation of version 0.")


def test_prompts_that_no_evaluation_waits_for_belong_to_none(tmp_path: Path) -> None:
    class Twice(Desk):
        """A source that is asked twice for an evaluation: a message came again."""

        def _issue(self, need: Need) -> None:
            super()._issue(need)
            if need.lane is Lane.EVAL:
                super()._issue(need)

    desk = Twice(tmp_path / "run", make_plan(num_rollout=5, evals=True))
    desk.play()
    desk.close()
    report = audit(tmp_path / "run", deep=True)
    assert report.closes, report.text()
    with sqlite3.connect(tmp_path / "run" / "buffer.db") as db:
        left = db.execute("select version from groups where lane = 'eval' and reason = 'unneeded'").fetchall()
    db.close()
    assert set(left) == {(-1,)}
    edit(tmp_path / "run", "update groups set reason = 'evaluated' where lane = 'eval' and version = -1")
    assert "was not started" in holds(tmp_path / "run")
