"""The buffer dies with leases out and a recorded batch untrained: nobody else does, and no answer is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncrl.chaos import Order
from tests.support.books import due, one, pairs, rows
from tests.support.command import RUN_S, Run, launched
from tests.support.processes import kill
from tests.support.recovery import assert_recovered, carried_out, standing

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

STEPS = 8
EVAL_INTERVAL = 2
UNTRAINED = "select count(*) from batches where batch not in (select batch from trained)"
EVALUATING = (
    "select 1 from evaluations e join groups g on g.lane = 'eval' and g.version = e.version"
    " join leases l using (group_id) where e.done_at is null and l.kind = 'generate' and l.ended_at is null"
)
# Each comes when the acknowledgements of its commit are out: what is handed in again was not committed. A
# commit that fails is in tests/pipeline/test_bad_input.py, one that nobody hears of in the chaos matrix.
ORDERS = [
    Order(actor="buffer", life=1, at="sent:Committed", where={"what": "trained"}, action="exit"),
    Order(
        actor="buffer", life=2, at="sent:Leases", where={"kind": "generate", "parts.lane": "eval"},
        action="stop",
    ),
    Order(actor="buffer", life=3, at="sent:BatchPart", action="stop"),
]  # fmt: skip
"""An error of its own; a kill with an evaluation under way; one with a batch delivered and not trained."""


def kill_buffer(run: Run, order: int, *others: str, query: str) -> set[int]:
    """SIGKILL of the buffer (and of others) where it stands; returns the leases that were out."""
    pids = [standing(run, order), *(run.pid(name) for name in others)]
    assert one(run.path, query), query
    held = pairs(run.path, "select fence, worker from leases where ended_at is null")
    for pid in pids:
        kill(pid)
    return set(held)


def test_a_killed_buffer_costs_no_answer(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    options = {
        **slow,
        "run.num_rollout": STEPS,
        # Who stands still may do so for as long as this test takes to look at it.
        "run.dead_after_s": 60.0,
        "eval.eval_prompt_data": ["held-out", str(model / "eval.jsonl")],
        "eval.eval_interval": EVAL_INTERVAL,
        "eval.n_samples_per_eval_prompt": 1,
    }
    with launched(tmp_path, model, options, orders=ORDERS) as run:
        carried_out(run, 0)
        address = run.status["buffer_address"]
        run.says("buffer ended with exit code 1: buffer: ordered to fail", deadline_s=RUN_S)
        held = kill_buffer(run, 1, query=EVALUATING)
        held |= kill_buffer(run, 2, "source", query=UNTRAINED)
        assert run.status["buffer_address"] == address
        assert_recovered(run, steps=STEPS)
    # Nothing was taken from a worker and begun again elsewhere.
    outcomes = pairs(run.path, "select fence, outcome from leases")
    ended = {outcomes[fence] for fence in held}
    assert held
    assert ended <= {"completed", "truncated", "scored", "group unneeded"}, ended
    assert run.text.count("buffer was killed by signal 9") == 2
    lives = pairs(run.path, "select name, count(*) from members group by name")
    assert lives.pop("source") == lives.pop("evaluator") == 2
    assert set(lives.values()) == {1}, lives
    assert rows(run.path, "select 1 from totals where key = 'refused.results' and value > 0") == []
    # Versions published while nobody was there are announced as one: 7 may be evaluated for 6.
    done = pairs(run.path, "select version, seen from evaluations where done_at is not null order by 1")
    assert [*done] == due(run.path, EVAL_INTERVAL, STEPS)
    assert ({*done.values()}, min(done), max(done)) == ({1}, 0, STEPS)
