"""Records are read as they were written: rows, bodies with their digests, and figures that add up."""

# ruff: noqa: S608 -- the damage is SQL put together here
from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from asyncrl.buffer.figures import compute
from asyncrl.buffer.records import Records, TrainedRow
from asyncrl.errors import DataError, StorageError
from tests.desk import Desk, make_plan, played


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played(tmp_path_factory.mktemp("finished") / "run", num_rollout=6)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(run: Path, statement: str) -> None:
    with sqlite3.connect(run / "buffer.db") as db:
        db.execute(statement)
    db.close()


def test_a_batch_comes_back_as_the_trainer_was_handed_it(tmp_path: Path) -> None:
    seen = {}

    def train(batch: int, groups: list) -> tuple[str, int, int]:
        seen[batch] = groups
        return f"weights {batch}", batch + 1, 1

    Desk(tmp_path / "run", make_plan(), train=train).play().close()
    with Records(tmp_path / "run") as records:
        assert {row.batch: records.batch(row.batch) for row in records.batches()} == seen
        assert [row.digest for row in records.lineage()] == [f"weights {batch}" for batch in range(4)]
        with pytest.raises(DataError, match="no recorded batch 4"):
            records.batch(4)


def test_a_body_that_was_altered_is_named(run: Path) -> None:
    with Records(run) as records:
        body, file, offset = records.db.execute(
            "select b.body, b.file, b.offset from bodies b join groups g using (group_id)"
            " where g.batch = 1 and b.kind = 'segment'"
        ).fetchone()
    path = run / "bodies" / f"bodies-{file:06d}.bin"
    data = bytearray(path.read_bytes())
    data[offset + 12] ^= 1
    path.write_bytes(data)
    with Records(run) as records:
        with pytest.raises(
            StorageError, match=rf"bodies-{file:06d}.bin: body {body} \(segment of group \d+ sample"
        ):
            records.batch(1)
        assert records.batch(0)


def test_a_file_that_was_cut_short_is_named(run: Path) -> None:
    path = next((run / "bodies").iterdir())
    path.write_bytes(path.read_bytes()[:40])
    with Records(run) as records, pytest.raises(StorageError, match=path.name):
        records.batch(0)


def test_the_lineage_is_what_no_later_life_of_the_trainer_has_undone(finished: Path) -> None:
    with Records(finished) as records:
        lineage = records.lineage()
        every = records.db.execute("select count(*) from trained").fetchone()[0]
        assert [row.batch for row in lineage] == list(range(6))
        assert [row.incarnation for row in lineage] == [1, 1, 2, 2, 2, 2]
        assert every > len(lineage)
        assert records.versions()[-1].digest == lineage[-1].digest


def test_a_restarted_trainer_undoes_batches_it_has_not_trained_again_yet(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "run", make_plan(num_rollout=8))
    while desk.ledger.batches.num_trained < 5:
        desk.round()
    desk.start_trainer()
    desk.commit()
    with Records(tmp_path / "run") as records:
        assert [row.batch for row in records.lineage()] == [0, 1, 2, 3], "the checkpoint is of step 4"
    desk.close()


def test_a_snapshot_does_not_move_while_the_run_goes_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "run", make_plan())
    desk.play(rounds=4)
    with Records(tmp_path / "run") as records:
        before = (records.totals(), records.states(), records.leases())
        desk.play(rounds=4)
        assert (records.totals(), records.states(), records.leases()) == before
    with Records(tmp_path / "run") as records:
        assert records.totals() != before[0]
        assert len(records.leases(open_only=True)) < len(records.leases())
    desk.close()


def test_reading_a_finished_run_leaves_no_files_behind(finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    with Records(finished) as records:
        records.figures()
        assert [member.role for member in records.members()].count("generator") == 3
        assert sorted(finished.rglob("*")) == before
    assert sorted(finished.rglob("*")) == before
    assert [path.name for path in finished.glob("buffer.db*")] == ["buffer.db"]


def test_nothing_can_be_written(finished: Path) -> None:
    with Records(finished) as records, pytest.raises(sqlite3.OperationalError, match="readonly"):
        records.db.execute("delete from groups")


def test_no_run_and_no_database_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run here"):
        Records(tmp_path / "nowhere")
    (tmp_path / "buffer.db").write_bytes(b"this is not a database, whatever its name may be")
    with pytest.raises(StorageError, match="cannot be read"):
        Records(tmp_path)


def test_evaluations_are_means_over_their_samples(finished: Path) -> None:
    with Records(finished) as records:
        told = records.evaluations()
        rewards = records.db.execute(
            "select s.reward from samples s join groups g using (group_id) where g.lane = 'eval' and"
            " g.version = 0"
        ).fetchall()
    assert set(told) == {0, 6}
    assert told[0] == {"held": sum(r for (r,) in rewards) / len(rewards)}


def test_staleness_is_weighed_by_tokens(finished: Path) -> None:
    with Records(finished) as records:
        ages = [
            (row.batch - span.version, span.num_tokens)
            for row in records.lineage()
            for group in records.batch(row.batch)
            for sample in group
            for span in sample.spans
        ]
        figures = records.figures()
    assert figures.staleness_mean == pytest.approx(sum(a * n for a, n in ages) / sum(n for _, n in ages))
    assert figures.staleness_max == max(a for a, _ in ages) == 2
    assert figures.trained_tokens == sum(n for _, n in ages)


def test_figures_count_what_each_generator_finished(finished: Path) -> None:
    with Records(finished) as records:
        figures = records.figures()
        totals = records.totals()
    assert figures.received_tokens == totals["received.tokens"] > figures.trained_tokens
    assert figures.regenerated_tokens == totals["regenerated.tokens"] > 0
    train = totals["settled.trained.samples"] + totals["settled.filtered.samples"]
    assert sum(worker.samples for worker in figures.workers.values()) == train
    assert set(figures.workers) == {"generator-0", "generator-1"}
    assert [member.name for member in figures.members] == ["generator-0", "generator-1", "generator-0"]
    assert figures.members[0].left_at is not None
    assert all(member.groups for member in figures.members)
    assert figures.mixed_samples > 0
    assert figures.resumed_samples > 0
    assert set(figures.reward_by_batch) == set(range(6))


LAST = """(select max(l.fence) from leases l join groups g using (group_id)
           where l.kind = 'generate' and g.lane = 'train')"""
OTHERS = "kind = 'score' or group_id in (select group_id from groups where lane = 'eval')"


def test_a_step_overlaps_only_with_leases_of_the_lane_train_that_were_open(run: Path) -> None:
    edit(run, "update leases set granted_at = 10.0, ended_at = 20.0 where kind = 'generate'")
    edit(run, f"update leases set granted_at = 30.0, ended_at = 40.0 where fence = {LAST}")
    edit(run, f"update leases set granted_at = 0.0, ended_at = 99.0 where {OTHERS}")
    spans = [(1.0, 2.0), (5.0, 11.0), (12.0, 13.0), (20.0, 30.0), (21.0, 29.0), (35.0, 50.0), (41.0, 50.0)]
    steps = [TrainedRow(i, 1, i + 1, "", started, ended, 1) for i, (started, ended) in enumerate(spans)]
    with Records(run) as records:
        assert compute(records.db, steps, warmup=0).overlap_share == pytest.approx(4 / 7)
        assert compute(records.db, steps, warmup=6).overlap_share == 0
        assert compute(records.db, steps, warmup=7).overlap_share is None
