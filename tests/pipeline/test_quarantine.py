"""What failed for good is shown with its error, fails again on request, and is tried again as a new group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from asyncrl.buffer.audit_story import story
from asyncrl.buffer.records import Records
from asyncrl.chaos import Order
from asyncrl.errors import DataError, ExitCode
from asyncrl.run import quarantine
from tests.support.books import assert_closed, one, reasons, rows
from tests.support.command import Said, asyncrl, launched, resumed
from tests.support.inside import run_inside
from tests.support.processes import kill
from tests.support.recovery import assert_replays, held, standing

REWARD = '''"""A reward that cannot grade one prompt as long as its file says so."""
import pathlib

BROKEN = pathlib.Path(__file__).with_name("broken")


def grade(sample):
    if BROKEN.exists() and sample.group_index == 1:
        return parse(sample.response)
    return float(sample.index % 2)


def parse(text):
    print("looking at an answer")
    raise LookupError(f"no number in {len(text)} characters")
'''
FILTER = '''"""A filter that cannot judge one group."""


def keep(args, samples, **kwargs):
    if samples[0].group_index == 1:
        raise ZeroDivisionError("no spread")
    return True
'''


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A finished run with group 1 in quarantine; its reward is still broken."""
    place = tmp_path_factory.mktemp("failed")
    options = with_reward(place)
    run = run_inside(place, model, options)
    assert run.code == ExitCode.FINISHED
    return run.path


def with_reward(place: Path) -> dict[str, Any]:
    (place / "mine.py").write_text(REWARD, encoding="utf-8")
    (place / "broken").touch()
    return {"reward.use": f"{place / 'mine.py'}:grade", "rollout.max_attempts": 2}


def command(run: Path, name: str, *arguments: str) -> Said:
    return asyncrl("quarantine", name, run, *arguments, cwd=run.parent.parent)


def test_what_failed_is_listed_with_its_stage_and_error(stopped: Path) -> None:
    with Records(stopped) as records:
        (failed,) = quarantine.failed(records)
    assert (failed.row.group_id, failed.stage, failed.attempts, failed.pending) == (1, "score", 2, False)
    assert "LookupError: no number in" in failed.error
    told = command(stopped, "ls")
    assert told.code == 0
    assert f"1.{failed.sample}" in told.out
    (row,) = json.loads(command(stopped, "ls", "--json").out)
    assert (row["group_id"], row["stage"], row["sample"]) == (1, "score", failed.sample)
    assert f"1 failed; asyncrl quarantine ls {stopped}" in asyncrl("status", stopped, cwd=stopped).out


def test_show_tells_the_error_the_texts_and_one_command_that_fails_here(stopped: Path) -> None:
    told = command(stopped, "show", "1").out
    with Records(stopped) as records:
        (failed,) = quarantine.failed(records)
    assert "error: exception: reward" in told
    assert "prompt, " in told
    assert told.count("no reward") >= 1
    line = f"asyncrl quarantine try {stopped} {failed.uid} --here"
    assert line in told
    ended = asyncrl(*line.split()[1:], cwd=stopped.parent.parent)
    assert ended.code == ExitCode.FAILED
    assert 'raise LookupError(f"no number in {len(text)} characters")' in ended.err
    assert "in grade" in ended.err, "the whole traceback of the user's function"
    assert "looking at an answer" in ended.out


def test_in_the_sandbox_the_failure_is_named_and_the_traceback_told(stopped: Path) -> None:
    with Records(stopped) as records:
        (failed,) = quarantine.failed(records)
    ended = command(stopped, "try", failed.uid)
    assert ended.code == ExitCode.FAILED
    assert f"1.{failed.sample}: exception: reward" in ended.out
    assert "in parse" in ended.out
    assert "looking at an answer" in ended.out


def test_a_mended_reward_gives_its_score(stopped: Path, tmp_path: Path) -> None:
    flag = stopped.parent.parent / "broken"
    flag.rename(tmp_path / "away")
    try:
        outcomes = [
            quarantine.run_reward(stopped, 1, index, here=False, on_output=print).results for index in (0, 1)
        ]
        ended = command(stopped, "try", "1.1", "--here")
    finally:
        shutil.move(tmp_path / "away", flag)
    assert [(name, score.reward) for ((name, score),) in outcomes] == [("1.0", 0.0), ("1.1", 1.0)]
    assert (ended.code, "1.1: reward 1" in ended.out) == (0, True)


@pytest.mark.parametrize(
    ("group", "words"),
    [("0", "group 0 is not in quarantine: it is trained"), ("400", "there is no such group")],
)
def test_what_is_not_in_quarantine_is_refused_by_name(stopped: Path, group: str, words: str) -> None:
    for name in ("show", "try"):
        ended = command(stopped, name, group)
        assert (ended.code, words in ended.err) == (1, True), ended.text


def test_a_finished_run_tries_nothing_again(stopped: Path) -> None:
    ended = command(stopped, "retry", "1")
    assert ended.code == ExitCode.FAILED
    assert "no group can be tried again: all its 3 batches are cut" in ended.err
    assert not (stopped / "retries.jsonl").exists()


def test_a_filter_that_fails_is_run_again_over_the_whole_group(tmp_path: Path, model: Path) -> None:
    (tmp_path / "filters.py").write_text(FILTER, encoding="utf-8")
    path = f"{tmp_path / 'filters.py'}:keep"
    run = run_inside(tmp_path, model, {"rollout.dynamic_sampling_filter_path": path})
    with Records(run.path) as records:
        (failed,) = quarantine.failed(records)
    assert (failed.stage, failed.uid) == ("filter", "1")
    ((name, result),) = quarantine.run_reward(run.path, 1, None, here=False, on_output=print).results
    assert name == "1"
    assert "ZeroDivisionError: no spread" in result.message
    with pytest.raises(ZeroDivisionError, match="no spread"):
        quarantine.run_reward(run.path, 1, None, here=True, on_output=print)


@pytest.mark.timeout(300)
def test_a_live_run_tries_a_failed_group_again_as_a_new_one(tmp_path: Path, model: Path) -> None:
    """Fails when the cursor forgets the requests: the source's restart would issue them again."""
    options = {**with_reward(tmp_path), **LONG}
    orders = [EARLY, Order(actor="source", at="sent:Issue", where={"retry_of": 1}, action="stop")]
    with launched(tmp_path, model, options, orders=orders) as run:
        with held(run, 0):
            run.until("select 1 from groups where reason = 'failed'")
            (tmp_path / "broken").unlink()
            asked = command(run.path, "retry", "1")
            assert (asked.code, "with the next prompts it needs" in asked.out) == (0, True), asked.text
            twice = command(run.path, "retry", "1")
            assert twice.code == ExitCode.FAILED
        source = standing(run, 1)
        new = run.until("select group_id from retries where retry_of = 1")
        kill(source)
        assert run.end() == ExitCode.FINISHED, run.text
    assert one(run.path, "select count(*) from members where name = 'source'") == 2
    assert rows(run.path, "select retry_of, group_id from retries") == [(1, new)]
    assert_tried_again(run.path, new)
    again = command(run.path, "ls").out
    assert f"as {new}" in again


@pytest.mark.timeout(300)
def test_a_stopped_run_tries_it_again_when_it_is_resumed(tmp_path: Path, model: Path) -> None:
    options = {**with_reward(tmp_path), **LONG}
    with launched(tmp_path, model, options, orders=[EARLY]) as run:
        with held(run, 0):
            run.until("select 1 from groups where reason = 'failed'")
            run.interrupt()
            run.says("draining")
        assert run.end() == ExitCode.DRAINED, run.text
    (tmp_path / "broken").unlink()
    asked = command(run.path, "retry", "1")
    assert (asked.code, f"asyncrl launch --resume {run.path}" in asked.out) == (0, True), asked.text
    with pytest.raises(DataError, match="group 1 waits for its next try already"):
        quarantine.ask_again(run.path, [1])
    with resumed(run.path) as back:
        assert back.end() == ExitCode.FINISHED, back.text
    new = one(run.path, "select group_id from retries where retry_of = 1")
    assert rows(run.path, "select retry_of, group_id from retries") == [(1, new)]
    assert_tried_again(run.path, new)
    with pytest.raises(DataError):
        quarantine.ask_again(run.path, [1])


LONG = {
    "run.num_rollout": 8,
    "rollout.max_staleness": 1,
    # Who stands still may do so for as long as this test takes to look at it.
    "run.dead_after_s": 60.0,
    "generator.scripted": {"median": 8.0, "max_tokens": 16, "vocab_size": 90, "token_latency_s": 0.02},
}
EARLY = Order(actor="trainer", at="sent:Trained", where={"batch": 1}, action="stop")
"""Most batches are still to come, and most of their prompts to be issued."""


def assert_tried_again(path: Path, new: int) -> None:
    """The new group has the old one's prompt and its own answers; the books close; replay is exact."""
    assert_closed(path)
    assert reasons(path)["trained"] == 8 * 4
    assert one(path, "select reason from groups where group_id = ?", new) in {"trained", "unneeded"}
    digests = rows(
        path, "select distinct b.digest from bodies b join groups g on g.prompt_body = b.body"
        " where g.group_id in (1, ?)", new,
    )  # fmt: skip
    assert len(digests) == 1
    # No other prompt was lost or came twice for it: the file's order goes on where it was.
    fresh = one(path, "select count(*) from groups where lane = 'train'") - 1
    prompts = (path.parent.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    with Records(path) as records:
        labels = [
            label(records, body)
            for group, body in rows(
                path, "select group_id, prompt_body from groups where lane = 'train' order by 1"
            )
            if group != new
        ]
    assert labels == [json.loads(prompts[i % len(prompts)])["label"] for i in range(fresh)]
    assert any(f"tried again as group {new}" in line for line in story(path, 1))
    assert any("which tries group 1 again" in line for line in story(path, new))
    assert_replays(path, steps=8)


def label(records: Records, body: int) -> Any:
    import msgspec

    from asyncrl.messages.sample import Prompt

    return msgspec.msgpack.decode(records.body(body), type=Prompt).label
