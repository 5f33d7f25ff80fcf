"""The buffer dies with leases out and a recorded batch untrained: nobody else does, and no answer is lost."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from tests.support.books import one, pairs, rows
from tests.support.command import RUN_S, Run, launched
from tests.support.processes import kill
from tests.support.recovery import assert_recovered, catch, new_pid

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

STEPS = 8
LEASES_OUT = "select count(*) from leases where kind = ? and ended_at is null"
UNTRAINED = "select count(*) from batches where batch not in (select batch from trained)"


def at_work(run: Run) -> bool:
    """Answers are being generated, others scored, and a recorded batch is not trained."""
    return bool(
        one(run.path, LEASES_OUT, "generate")
        and one(run.path, LEASES_OUT, "score")
        and one(run.path, UNTRAINED)
    )


def kill_buffer(run: Run, *others: str, query: str = "select 1") -> None:
    """SIGKILL of the buffer (and of others) at work; every lease that was out is ended by its holder."""
    pids = [run.pid(name) for name in ("buffer", *others)]
    catch(pids[0], lambda: at_work(run) and bool(one(run.path, query)), f"a buffer at work, and {query}")
    held = pairs(run.path, "select fence, worker from leases where ended_at is null")
    for pid in pids:
        kill(pid)
    new_pid(run, "buffer", pids[0])
    for fence in held:
        run.until("select 1 from leases where fence = ? and ended_at is not null", fence)
    outcomes = pairs(run.path, "select fence, outcome from leases")
    # Nothing was taken from a worker and begun again elsewhere.
    ended = {outcomes[fence] for fence in held}
    assert ended <= {"completed", "truncated", "scored", "group unneeded"}, ended


def fail_buffer(run: Run) -> None:
    """A commit fails, as on a full disk: the buffer ends by an error of its own."""
    pid = run.pid("buffer")
    size = (run.path / "buffer.db-wal").stat().st_size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
    run.says("buffer ended with exit code 1", deadline_s=RUN_S)
    new_pid(run, "buffer", pid)


def test_a_killed_buffer_costs_no_answer(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    options = {
        **slow,
        "run.num_rollout": STEPS,
        "eval.eval_prompt_data": ["held-out", str(model / "eval.jsonl")],
        "eval.eval_interval": 2,
        "eval.n_samples_per_eval_prompt": 1,
    }
    with launched(tmp_path, model, options) as run:
        run.until("select 1 from trained where batch = 0")
        address = run.status["buffer_address"]
        fail_buffer(run)
        kill_buffer(run, query="select 1 from evaluations where done_at is null")
        kill_buffer(run, "source")
        assert run.status["buffer_address"] == address
        assert_recovered(run, steps=STEPS)
    assert run.text.count("buffer was killed by signal 9") == 2
    lives = pairs(run.path, "select name, count(*) from members group by name")
    assert lives.pop("source") == lives.pop("evaluator") == 2
    assert set(lives.values()) == {1}, lives
    assert rows(run.path, "select 1 from totals where key = 'refused.results' and value > 0") == []
    done = rows(run.path, "select version from evaluations where done_at is not null and seen = 1 order by 1")
    assert [version for (version,) in done] == [0, 2, 4, 6, 8]
