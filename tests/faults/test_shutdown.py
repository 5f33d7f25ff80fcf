"""The end of a run is a protocol: last step, last evaluation, last push, drain; whenever it is asked for."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncrl.actor.reports import DRAIN_S
from asyncrl.cli.run import launch
from asyncrl.errors import ExitCode
from asyncrl.weights.publisher import Publisher
from tests.support.books import assert_closed, one, reasons, rows
from tests.support.inside import run_inside
from tests.support.recovery import assert_replays
from tests.support.world import write_prompts

STEPS = 3
POLL_S = 0.005
HELD_OUT = 6
LEFT = "select 1 from members where role = 'evaluator' and left_at is not null"
REWARD = f'''"""A reward that keeps the last evaluation from ending before the run is interrupted."""
import pathlib
import time

GO = pathlib.Path(__file__).with_name("go")


def grade(sample):
    held_out = sample.label == "0"
    while held_out and sample.weight_versions[0].startswith("{STEPS}.") and not GO.exists():
        time.sleep({POLL_S})
    return float(sample.index % 2)
'''

PHASES = {
    # Nothing is published yet, somebody may not even have said hello.
    "while it starts": "select 1 from members where role = 'source'",
    "in the first evaluation": "select 1 from leases join groups using (group_id) where lane = 'eval'",
    "while answers are sampled": "select 1 from bodies where kind = 'segment'",
    "between two steps": "select 1 from trained where batch = 0",
    "when a checkpoint is saved": "select 1 from checkpoints where rollout_step = 1",
    "after the last step": "select 1 from trained where batch = 2",
    "in the last evaluation": (
        "select 1 from leases join groups using (group_id)"
        " where lane = 'eval' and groups.version = 3 and leases.ended_at is null"
    ),
}
"""What is true of the records when Ctrl-C comes."""


@contextmanager
def interrupted(run_dir: Path, query: str) -> Iterator[list[float]]:
    """Ctrl-C to this process, whose run is inside it, as soon as the query gives a row; the list tells when.

    The last evaluation waits for it, so that it always comes in time; and that evaluation goes on when nobody
    is left to take note of its end, so that the run never finishes first.
    """
    asked: list[float] = []
    over = threading.Event()
    go = run_dir.parents[1] / "go"

    def watch() -> None:
        while not over.wait(POLL_S):
            if one(run_dir, LEFT if asked else query):
                if asked:
                    go.touch()
                    return
                asked.append(time.time())
                os.kill(os.getpid(), signal.SIGINT)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield asked
    finally:
        over.set()
        watching.join()
        go.touch()


def patient(place: Path) -> dict[str, Any]:
    """Answers that take a quarter of a second, and six held-out prompts."""
    held_out = place / "held-out.jsonl"
    held_out.write_text(
        "".join(json.dumps({"prompt": f"{n}+2", "label": "0"}) + "\n" for n in range(HELD_OUT)),
        encoding="utf-8",
    )
    return {
        "run.num_rollout": STEPS,
        "trainer.save_interval": 1,
        "eval.eval_prompt_data": ["held-out", str(held_out)],
        "generator.scripted": {
            "median": 12.0, "sigma": 0.3, "max_tokens": 16, "vocab_size": 90, "token_latency_s": 0.02
        },
    }  # fmt: skip


def assert_whole(run_dir: Path) -> None:
    """It has finished as if nobody had interrupted it."""
    assert_closed(run_dir)
    assert reasons(run_dir)["trained"] == STEPS * 4
    assert_replays(run_dir, steps=STEPS)
    last = rows(
        run_dir, "select version from evaluations where done_at is not null and seen = 1 order by version"
    )
    assert last[-1][0] == STEPS, "the last version was not evaluated"
    per_version = (
        "select count(*) from groups where lane = 'eval' and version = ? and reason = 'evaluated'"
        " group by incarnation order by incarnation desc"
    )
    assert one(run_dir, per_version, STEPS) == HELD_OUT
    assert one(run_dir, "select max(rollout_step) from checkpoints") == STEPS


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_drains_whenever_it_comes(tmp_path: Path, model: Path, phase: str) -> None:
    run_dir = tmp_path / "runs" / "run"
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    options = {**patient(tmp_path), "reward.use": f"{tmp_path / 'mine.py'}:grade"}
    with interrupted(run_dir, PHASES[phase]) as asked:
        done = run_inside(tmp_path, model, options)
        ended = time.time()
    assert asked, "the run was over before that"
    assert done.code == ExitCode.DRAINED, done.detail
    # Who waits for an acknowledgement that has come already waits all of that.
    assert ended - asked[0] < DRAIN_S, "somebody waited for an acknowledgement that had come"
    assert_closed(run_dir, finished=False)
    saved, trained = (
        one(run_dir, "select coalesce(max(rollout_step), 0) from checkpoints"),
        one(run_dir, "select count(*) from trained"),
    )
    assert saved == trained, "a drained trainer leaves with what it trained"
    code = launch(None, overrides=[], resume=run_dir, in_process=True, name=None, plain=True)
    assert code == ExitCode.FINISHED
    assert_whole(run_dir)


def test_the_run_ends_after_its_last_evaluation(tmp_path: Path, model: Path) -> None:
    """Fails when the end does not wait for it: the version would be served by nobody any more."""
    done = run_inside(tmp_path, model, patient(tmp_path))
    assert done.code == ExitCode.FINISHED, done.detail
    assert_whole(done.path)
    trained = one(done.path, "select ended from trained order by batch desc limit 1")
    evaluated = one(done.path, "select done_at from evaluations order by version desc limit 1")
    left = one(done.path, "select min(left_at) from members where role != 'buffer' and left_at is not null")
    assert trained < evaluated
    assert left is None or left >= evaluated, "somebody left before the last evaluation was done"


@pytest.mark.parametrize("interval", [1, 2], ids=["pushed before", "not pushed before"])
def test_data_that_end_while_a_push_is_under_way(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    """The word that the data have ended arrives while a version is written: it is published all the same.

    Fails when the trainer leaves, or saves, instead of publishing what it has.
    """
    plain_write = Publisher.write
    writing: list[float] = []

    def slow_write(self: Publisher, *args: Any, **options: Any) -> Any:
        writing.append(time.time())
        time.sleep(0.5)  # a slow disk
        return plain_write(self, *args, **options)

    monkeypatch.setattr(Publisher, "write", slow_write)
    write_prompts(tmp_path / "prompts.jsonl", count=12)
    (tmp_path / "mine.py").write_text(
        "def later(args, samples, **kwargs):\n    return samples[0].group_index >= 5\n", encoding="utf-8"
    )
    options = {
        **patient(tmp_path),
        "run.num_rollout": None,
        "source.num_epoch": 1,
        "rollout.update_weights_interval": interval,
        "rollout.dynamic_sampling_filter_path": f"{tmp_path / 'mine.py'}:later",
        "generator.scripted": {"median": 8.0, "max_tokens": 16, "vocab_size": 90},
    }
    done = run_inside(tmp_path, model, options)
    assert done.code == ExitCode.FINISHED, done.detail
    assert_closed(done.path)
    assert int(one(done.path, "select value from meta where key = 'target'")) == 1
    assert rows(done.path, "select version from versions order by version") == [(0,), (1,)]
    assert rows(done.path, "select version, seen from evaluations order by version") == [(0, 1), (1, 1)]
    assert one(done.path, "select max(rollout_step) from checkpoints") == 1
    ended = one(done.path, "select ended from trained where batch = 0")
    published = one(done.path, "select published_at from versions where version = 1")
    assert published - max(ended, writing[-1]) >= 0.4, "the push was not under way"
