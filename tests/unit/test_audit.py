"""An audit closes over whatever the real desk wrote, and names the equation that a damaged row breaks."""

# ruff: noqa: E501, S608, ISC004 -- the damage is SQL put together here
from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import msgspec
import pytest

from asyncrl.buffer.audit import CHECKS, AuditReport, audit
from asyncrl.buffer.audit_story import story
from asyncrl.buffer.records import Records
from asyncrl.cli import records as command
from asyncrl.errors import DataError
from tests.desk import Desk, make_plan, played


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played(tmp_path_factory.mktemp("finished") / "run", num_rollout=6)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(run: Path, *statements: str) -> None:
    with sqlite3.connect(run / "buffer.db") as db:
        for statement in statements:
            assert db.execute(statement).rowcount > 0, f"{statement} changed nothing"
    db.close()


def broken(report: AuditReport) -> dict[str, str]:
    return {equation.name: equation.broken for equation in report.broken}


def test_a_finished_run_closes(finished: Path) -> None:
    report = audit(finished, deep=True)
    assert broken(report) == {}
    assert report.closes
    assert report.finished
    assert [e.name for e in report.equations if e.skipped] == []
    assert len({e.name for e in report.equations}) == len(report.equations) == len(CHECKS)
    assert report.counts["groups"] > 12
    assert report.counts["trained"] > 6, "the restarted trainer trained some batches again"


def test_the_numbers_of_the_conservation_law_are_told(finished: Path) -> None:
    report = audit(finished)
    equation = next(e for e in report.equations if e.name == "conserved.tokens")
    held = dict(sqlite3.connect(finished / "buffer.db").execute("select key, value from totals"))
    assert equation.left == equation.right == held["received.tokens"]
    assert f"{held['settled.trained.tokens']} trained" in equation.sides
    assert f"{held['regenerated.tokens']} regenerated" in equation.sides


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 5, 8, 12])
def test_an_unfinished_run_closes_with_work_in_flight(tmp_path: Path, rounds: int) -> None:
    desk = Desk(tmp_path / "run", make_plan(num_rollout=8, evals=True))
    desk.play(rounds=rounds)
    desk.commit()
    report = audit(tmp_path / "run", deep=True)  # the desk is live: it holds the database
    desk.close()
    assert broken(report) == {}
    assert not report.finished
    assert next(e for e in report.equations if e.name == "run.end").skipped


def test_a_run_that_crashed_closes_before_and_after_it_goes_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "run", make_plan(num_rollout=6), seed=3)
    for _ in range(4):
        desk.play(rounds=3)
        desk.crash()
        desk.commit()
        assert broken(audit(tmp_path / "run", deep=True)) == {}
    desk.play()
    desk.close()
    report = audit(tmp_path / "run", deep=True)
    assert broken(report) == {}
    assert report.finished


@pytest.mark.parametrize(
    ("rollout", "keep"),
    [
        ('on_straggler = "drop"', True),
        ('on_straggler = "drop"\nover_sampling_batch_size = 4', True),
        ('on_straggler = "train"', True),
        ("partial_rollout = false", True),
        ('dynamic_sampling_filter_path = "plugins.filters:keep"', False),
    ],
)
def test_every_way_to_settle_closes(tmp_path: Path, rollout: str, keep: bool) -> None:
    plan = make_plan(num_rollout=5, rollout=rollout, evals=True)
    desk = Desk(tmp_path / "run", plan, keep=lambda group: keep or group % 3 != 1, seed=1)
    desk.play(rounds=3)
    desk.kill("generator-1")
    desk.hand_back("generator-0")
    desk.play()
    desk.close()
    report = audit(tmp_path / "run", deep=True)
    assert broken(report) == {}
    assert report.finished


TRAINED = "(select min(group_id) from groups where reason = 'trained')"
A_SEGMENT = "(select max(body) from bodies where kind = 'segment' and dropped = 0)"
DAMAGE = [
    # groups
    ("groups.ordinals", "delete from groups where group_id = 3"),
    ("totals.issued.groups", "delete from groups where group_id = (select max(group_id) from groups)"),
    ("groups.ordinals", "update groups set group_id = 400 where group_id = 3"),
    ("groups.settled", f"update groups set reason = null where group_id = {TRAINED}"),
    ("groups.settled", f"update groups set state = 'filtered', reason = 'filtered' where group_id = {TRAINED}"),
    ("totals.settled.trained", f"update groups set state = 'stale', reason = 'stale' where group_id = {TRAINED}"),
    ("totals.settled.filtered", "update groups set state = 'stale', reason = 'stale' where reason = 'filtered'"),
    ("groups.samples", f"update groups set num_samples = 3 where group_id = {TRAINED}"),
    ("groups.prompt", f"update groups set prompt_tokens = 4 where group_id = {TRAINED}"),
    ("staleness.due", f"update groups set due = due + 1 where group_id = {TRAINED}"),
    ("staleness.issue", "update groups set version = 9, due = 11 where batch = 0"),
    ("staleness.due", f"update groups set version = version + 1 where group_id = {TRAINED}"),
    ("batches.order", "update groups set issued_seq = 100000 where batch = 0"),
    ("batches.order", "update groups set settled_seq = 1 where batch = 3"),
    ("batches.groups", "update groups set batch = 2 where batch = 3"),
    ("staleness.feasible", "update groups set due = 0 where batch > 1"),
    ("groups.retries", f"insert into retries values ({TRAINED} + 1, {TRAINED})"),
    # samples
    ("groups.samples", f"delete from samples where group_id = {TRAINED} and idx = 1"),
    ("totals.issued.samples", f"delete from samples where group_id = {TRAINED} and idx = 1"),
    ("conserved.samples", f"delete from samples where group_id = {TRAINED} and idx = 1"),
    ("groups.samples", f"insert into samples select group_id, 7, state, status, 0, 0, 0, '', null, null, null, 0, 0"
                       f" from samples where group_id = {TRAINED} and idx = 0"),
    ("samples.tokens", f"update samples set tokens = tokens + 1 where group_id = {TRAINED} and idx = 0"),
    ("conserved.tokens", f"update samples set tokens = tokens - 1 where group_id = {TRAINED} and idx = 0"),
    ("samples.state", f"update samples set state = 'scored' where group_id = {TRAINED} and idx = 0"),
    ("samples.score", f"update samples set score_body = 0 where group_id = {TRAINED} and idx = 0"),
    ("samples.score", f"update samples set status = 'aborted' where group_id = {TRAINED} and idx = 0"),
    ("bodies.content", f"update samples set reward = reward + 1 where group_id = {TRAINED} and idx = 0"),
    ("samples.versions", f"update samples set oldest = oldest - 1 where group_id = {TRAINED} and idx = 0"),
    ("samples.versions", f"update samples set newest = null where group_id = {TRAINED} and idx = 0"),
    ("samples.worker", f"update samples set worker = 'nobody' where group_id = {TRAINED} and idx = 0"),
    ("leases.samples", "update samples set fence = 1 where group_id = (select max(group_id) from groups)"),
    ("batches.digest", f"update samples set removed = 1 where group_id = {TRAINED} and idx = 0"),
    # bodies
    ("bodies.ordinals", "delete from bodies where body = 20"),
    ("totals.received.bodies", "delete from bodies where body = (select max(body) from bodies)"),
    ("totals.received.tokens", f"delete from bodies where body = {A_SEGMENT}"),
    ("totals.received.segments", f"delete from bodies where body = {A_SEGMENT}"),
    ("totals.received.scores", "delete from bodies where body = (select max(body) from bodies where kind = 'score')"),
    ("totals.received.bodies", "insert into bodies select (select max(body) + 1 from bodies), kind, group_id, idx, 0,"
                               " '[]', fence, worker, file, offset, length, digest, 0 from bodies where body"
                               " = 20"),
    ("bodies.place", "update bodies set offset = offset - 1 where body = 20"),
    ("bodies.place", "update bodies set length = 100000000 where body = 20"),
    ("bodies.place", "update bodies set file = 77 where body = 20"),
    ("bodies.spans", f"update bodies set num_tokens = num_tokens + 1 where body = {A_SEGMENT}"),
    ("bodies.spans", f"update bodies set spans = 'not json' where body = {A_SEGMENT}"),
    ("versions.known", f"update bodies set spans = replace(spans, ']]', '],[3,9,1]]') where body = {A_SEGMENT}"),
    ("leases.results", f"update bodies set fence = 1 where body = {A_SEGMENT}"),
    ("leases.results", f"update bodies set worker = 'nobody' where body = {A_SEGMENT}"),
    ("bodies.owner", f"update bodies set idx = 9 where body = {A_SEGMENT}"),
    ("bodies.owner", "update bodies set kind = 'score' where body = 1"),
    ("totals.regenerated.tokens", "update bodies set dropped = 0 where dropped"),
    ("samples.tokens", f"update bodies set dropped = 1 where body = {A_SEGMENT}"),
    ("bodies.content", f"update bodies set digest = 'ff' where body = {A_SEGMENT}"),
    ("batches.digest", "update bodies set digest = 'ff' where kind = 'score' and group_id ="
                       " (select min(group_id) from groups where batch = 0)"),
    # leases
    ("leases.ordinals", "delete from leases where fence = 5"),
    ("leases.results", "delete from leases where fence = (select fence from bodies where kind = 'segment')"),
    ("leases.samples", "delete from leases where fence in (select fence from samples where fence <> 0 limit 1)"),
    ("leases.grant", "update leases set worker = 'nobody' where fence = 5"),
    ("leases.grant", "update leases set version = version + 1 where fence = 5"),
    ("leases.grant", "update leases set outcome = null where fence = 5"),
    ("leases.open", "update leases set ended_at = null, outcome = null where fence = 5"),
    ("leases.results", "update leases set indices = 'x' where fence in"
                       " (select fence from bodies where kind = 'segment')"),
    ("leases.filters", f"update groups set fence = 1 where group_id = {TRAINED}"),
    # totals
    ("totals.settled.trained", "delete from totals where key = 'settled.trained.groups'"),
    ("totals.settled.evaluated", "update totals set value = value + 1 where key = 'settled.evaluated.tokens'"),
    ("totals.settled.unneeded", "insert into totals values ('settled.unneeded.groups', 1)"),
    ("totals.settled.stale", "insert into totals values ('settled.stale.tokens', 1)"),
    ("totals.settled.surplus", "insert into totals values ('settled.surplus.samples', 1)"),
    ("totals.settled.failed", "insert into totals values ('settled.failed.samples', 1)"),
    ("conserved.groups", "update totals set value = value - 1 where key = 'issued.groups'"),
    ("conserved.samples", "update totals set value = value + 1 where key = 'issued.samples'"),
    ("conserved.tokens", "update totals set value = value + 1 where key = 'received.tokens'"),
    # batches and trainings
    ("batches.ordinals", "delete from batches where batch = 2"),
    ("batches.positions", "delete from batches where batch = 5"),
    ("batches.sizes", "update batches set num_tokens = num_tokens + 1 where batch = 2"),
    ("batches.positions", "update batches set num_groups = 3 where batch = 2"),
    ("batches.order", "update batches set seq = 1 where batch = 2"),
    ("batches.digest", "update batches set digest = 'ff' where batch = 2"),
    ("batches.positions", "delete from batch_groups where batch = 2 and position = 0"),
    ("batches.groups", "delete from batch_groups where batch = 2 and position = 1"),
    ("batches.groups", "insert into batch_groups values (2, 2, (select group_id from batch_groups where batch = 3))"),
    ("trained.lineage", "delete from trained where batch = 5"),
    ("trained.lives", "delete from trained where batch = 3"),
    ("trained.recorded", "insert into trained values (77, 2, 78, 'ff', 0, 0, 0)"),
    ("trained.lineage", "insert into trained select batch, 3, step, digest, started, ended, tokens from trained"
                        " where batch = 5"),
    ("trained.recorded", "update trained set tokens = 100000 where batch = 1"),
    ("trained.steps", "update trained set step = 50 where batch = 1"),
    ("versions.digest", "update trained set digest = 'ff' where batch = 4"),
    ("incarnations.ordinals", "delete from incarnations where incarnation = 1"),
    ("trained.recorded", "delete from incarnations where incarnation = 2"),
    ("trained.lives", "update incarnations set rollout_step = 1 where incarnation = 2"),
    ("trained.lives", "delete from checkpoints where rollout_step = 2"),
    ("checkpoints.trained", "insert into checkpoints values (9, 2, 9, 'x', 0)"),
    ("trained.steps", "update checkpoints set step = 50"),
    # versions, evaluations, members
    ("versions.known", "delete from versions where version = 0"),
    ("versions.published", "delete from versions where version = 4"),
    ("versions.digest", "update versions set digest = 'ff' where version = 3"),
    ("versions.digest", "update versions set manifest = x'7b7d' where version = 3"),
    ("versions.digest", "insert into versions select 99, incarnation, step, digest, num_bytes, manifest, 0"
                        " from versions where version = 3"),
    ("evaluations.groups", "delete from evaluations where version = 0"),
    ("evaluations.groups", "update evaluations set done_at = null where version = 0"),
    ("leases.grant", "delete from members where name = 'generator-1'"),
    ("swaps.known", "update swaps set version = 44"),
    # staleness
    ("staleness.tokens", "update samples set oldest = -1 where group_id in (select group_id from groups where batch = 5)"),
    ("staleness.issue", "update groups set version = 5 where lane = 'eval' and version = 0"),
    ("staleness.due", "update groups set due = 1, version = -1 where batch = 5"),
    ("run.end", "update groups set reason = null, state = 'open' where reason = 'filtered'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "statement"), DAMAGE, ids=lambda value: value[:60])
def test_one_damaged_row_breaks_the_equation_that_is_about_it(run: Path, name: str, statement: str) -> None:
    edit(run, statement)
    report = audit(run, deep=True)
    assert not report.closes
    assert name in broken(report), f"named were {broken(report)}"
    assert broken(report)[name]


def test_a_run_older_than_retries_and_deaths_closes(run: Path) -> None:
    with sqlite3.connect(run / "buffer.db") as db:
        db.executescript("drop table retries; drop table deaths")
    db.close()
    report = audit(run)
    assert report.closes
    assert [e.name for e in report.equations if e.skipped] == ["groups.retries", "bodies.content"]
    assert story(run, 3)
    with Records(run) as records:
        assert (records.retries(), records.deaths()) == ([], [])


def test_every_equation_has_a_row_that_breaks_it() -> None:
    assert {check.name for check in CHECKS} - {name for name, _ in DAMAGE} == set()


def test_the_first_broken_item_is_named_in_words(run: Path) -> None:
    edit(run, "update samples set tokens = 40 where group_id = 7 and idx = 1")
    held = sqlite3.connect(run / "buffer.db").execute(
        "select sum(num_tokens) from bodies where group_id = 7 and idx = 1 and kind = 'segment' and dropped"
        " = 0"
    )
    expected = f"group 7 sample 1: bodies hold {held.fetchone()[0]} tokens, the row says 40"
    assert broken(audit(run))["samples.tokens"] == expected


def test_a_flipped_byte_of_a_body_is_found_when_bodies_are_read(run: Path) -> None:
    path = next((run / "bodies").glob("bodies-*.bin"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "bodies.content" in broken(audit(run, deep=True))
    assert broken(audit(run)) == {}, "the rows alone are sound"


@pytest.mark.parametrize(
    "statement",
    [
        "drop table samples",
        "drop table bodies",
        "drop table leases",
        "drop table totals",
        "drop table trained",
        "drop table incarnations",
        "update groups set due = 'soon', version = 'new', issued_seq = 'x'",
        "update bodies set spans = '[[1,2]]', num_tokens = 'many'",
        "update bodies set spans = x'00', file = 'a', offset = 'b'",
        "update versions set manifest = 3, num_bytes = 'x', version = version || 'x'",
        "update batches set seq = 'x', batch = batch * -1",
        "update totals set value = 'much'",
        "update incarnations set rollout_step = 'x'",
    ],
)
def test_no_damage_is_an_exception(run: Path, statement: str) -> None:
    edit_freely(run, statement)
    report = audit(run, deep=True)
    assert not report.closes
    assert report.text()


def edit_freely(run: Path, statement: str) -> None:
    with sqlite3.connect(run / "buffer.db") as db:
        db.execute(statement)
    db.close()


def test_without_a_plan_only_what_needs_one_is_left_out(run: Path) -> None:
    (run / "plan.json").unlink()
    report = audit(run)
    assert report.closes
    assert {e.name for e in report.equations if "plan.json" in e.skipped} >= {
        "staleness.tokens",
        "staleness.feasible",
    }


def test_no_run_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run here"):
        audit(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_ledger_and_fails_when_it_does_not_close(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.audit(run, as_json=False) == 0
    assert f"the ledger closes: {len(CHECKS)} equations hold" in capsys.readouterr().out
    edit(run, "delete from groups where group_id = 3")
    assert command.audit(run, as_json=False) == 1
    out = capsys.readouterr().out
    assert "group 3 is missing" in out
    assert "does NOT close" in out
    assert command.audit(run, as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["closes"] is False
    assert msgspec.json.decode(json.dumps(told), type=AuditReport).broken


def test_a_story_tells_a_sample_from_issue_to_training(finished: Path) -> None:
    group = first(finished, "select group_id from groups where batch = 3")
    lines = [line[25:] for line in story(finished, group, 1)]
    words = ["handed in", "to generate under version", "tokens of v", "ended: completed", "to score", "reward",
             "recorded in batch 3", "trained in batch 3", "settled as trained"]  # fmt: skip
    places = [next(i for i, line in enumerate(lines) if word in line) for word in words]
    assert places == sorted(places)
    assert not any("sample 0:" in line for line in lines)
    times = [line[:23] for line in story(finished, group)]
    assert times == sorted(times)


def test_a_story_tells_why_a_group_was_refused(finished: Path) -> None:
    group = first(finished, "select group_id from groups where reason = 'filtered'")
    assert story(finished, group)[-1].endswith(f"group {group} settled as filtered: not kept")


def test_a_story_of_nothing_is_refused_by_name(finished: Path) -> None:
    with pytest.raises(DataError, match="there is no group 999"):
        story(finished, 999)
    with pytest.raises(DataError, match="has no sample 7"):
        story(finished, 0, 7)


def first(run: Path, sql: str) -> int:
    return int(sqlite3.connect(run / "buffer.db").execute(sql).fetchone()[0])
