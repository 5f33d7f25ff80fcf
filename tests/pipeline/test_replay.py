"""A replay makes the recorded weights again, to the bit, in a fresh process, and finds what was altered."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import xxhash

from asyncrl.buffer.audit import audit
from asyncrl.buffer.records import Records
from asyncrl.cli import records as command
from asyncrl.errors import ConfigError, DataError, StorageError
from asyncrl.messages.sample import Segment, pack_tokens, tokens_of
from asyncrl.obs import metrics
from asyncrl.train.backend import train_plan
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend
from tests.desk import Desk, make_plan
from tests.train_support import write_model

ROOT = Path(__file__).parents[2]
NUM_ROLLOUT = 6
TRAINER = "lr = 1e-2\nmax_tokens_per_gpu = 24"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with lag, a killed generator, partials, micro-batches, a trainer restarted at a checkpoint."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    model = write_model(tmp_path_factory.mktemp("model"))
    plan = make_plan(num_rollout=NUM_ROLLOUT, model=str(model), trainer=TRAINER)
    writer = metrics.MetricsWriter(run / "metrics" / "trainer.jsonl")
    trainer = Trainer(make_backend(train_plan(plan.topology)))
    trainer.start()

    def train(batch: int, groups: list) -> tuple[str, int, int]:
        report, digest = trainer.train_batch(batch, groups)
        writer.write(report.metrics, step=batch + 1)
        return digest, report.step, report.num_tokens

    desk = Desk(run, plan, train=train)
    desk.save = lambda step: trainer.save(run / "checkpoints")
    while desk.ledger.batches.num_trained < 3:
        desk.round()
    desk.kill("generator-0")
    desk.hand_back("generator-1")
    desk.start_trainer()
    trainer = Trainer(make_backend(train_plan(plan.topology)))
    trainer.start(checkpoint=run / "checkpoints" / "step-000002")
    desk.play()
    desk.close()
    writer.close()
    assert desk.ledger.finished
    return run


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


def records_of(run: Path) -> dict[str, bytes]:
    kept = ("buffer.db", "plan.json", "bodies", "checkpoints", "metrics")
    return {
        str(p): p.read_bytes() for name in kept for p in (run / name, *(run / name).rglob("*")) if p.is_file()
    }


def test_the_recorded_run_is_one_worth_replaying(recorded: Path) -> None:
    assert audit(recorded, deep=True).closes
    with Records(recorded) as records:
        figures = records.figures()
        assert figures.staleness_mean > 0
        assert figures.resumed_samples > 0
        assert len({row.incarnation for row in records.lineage()}) == 2
    rows = metrics.read(recorded / "metrics" / "trainer.jsonl")
    assert all(row["train/num_micro_batches"] > 1 for row in rows)
    assert len({row.digest for row in Records(recorded).lineage()}) == NUM_ROLLOUT


def test_a_replay_in_a_fresh_process_ends_in_the_recorded_weights(run: Path) -> None:
    before = records_of(run)
    done = subprocess.run(
        [sys.executable, "-m", "asyncrl.cli.main", "replay", str(run)],
        capture_output=True, text=True, timeout=100, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for step in range(1, NUM_ROLLOUT + 1):
        assert f"step {step}/{NUM_ROLLOUT} digest equal" in done.stdout
    with Records(run) as records:
        assert records.lineage()[-1].digest in done.stdout
    assert records_of(run) == before
    rows = metrics.read(run / "replays" / "001" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, NUM_ROLLOUT + 1))


def alter_token(run: Path, *, digest_too: bool) -> int:
    """Change one response token of batch 3 on disk; returns its body."""
    with sqlite3.connect(run / "buffer.db") as db:
        body, file, offset, length = db.execute(
            "select b.body, b.file, b.offset, b.length from bodies b join groups g using (group_id)"
            " where g.batch = 3 and b.kind = 'segment' and b.dropped = 0"
        ).fetchone()
        path = run / "bodies" / f"bodies-{file:06d}.bin"
        data = bytearray(path.read_bytes())
        segment = msgspec.msgpack.decode(data[offset : offset + length], type=Segment)
        tokens = tokens_of(segment.tokens).copy()
        tokens[0] = (tokens[0] + 1) % 64
        altered = msgspec.msgpack.encode(msgspec.structs.replace(segment, tokens=pack_tokens(tokens)))
        assert len(altered) == length
        data[offset : offset + length] = altered
        path.write_bytes(data)
        if digest_too:
            db.execute(
                "update bodies set digest = ? where body = ?", (xxhash.xxh3_128_hexdigest(altered), body)
            )
    db.close()
    return int(body)


def test_an_altered_token_is_named_by_its_digest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = alter_token(run, digest_too=False)
    with pytest.raises(StorageError, match=rf"body {body} \(segment of group \d+ sample \d+.* was altered"):
        command.replay(run, overrides=[], num_threads=None)
    assert f"step 3/{NUM_ROLLOUT} digest equal" in capsys.readouterr().out


def test_an_altered_token_with_its_digest_ends_in_other_weights(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alter_token(run, digest_too=True)
    assert command.replay(run, overrides=[], num_threads=None) == 1
    out = capsys.readouterr().out
    assert f"step 3/{NUM_ROLLOUT} digest equal" in out
    assert f"step 4/{NUM_ROLLOUT} digest different" in out
    assert f"step 5/{NUM_ROLLOUT}" not in out
    assert "batch 3: the weights differ from the recorded run" in out


def test_another_setting_is_a_counterfactual_with_both_metrics(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["algorithm.use_opsm=true", "trainer.lr=1e-3"]
    assert command.replay(run, overrides=overrides, num_threads=1) == 0
    out = capsys.readouterr().out
    assert f"step {NUM_ROLLOUT}/{NUM_ROLLOUT} digest different" in out
    row = next(line.split() for line in out.splitlines() if line.strip().startswith("train/lr-pg_0"))
    assert row[1:] == ["0.01", "0.001", "0.01", "0.001"]
    assert "rollout/raw_reward " not in out, "the data are the same"
    assert "other metrics are the same in both" in out


def test_a_wrong_override_is_an_error_of_configuration(run: Path) -> None:
    with pytest.raises(ConfigError, match="use_opsn"):
        command.replay(run, overrides=["algorithm.use_opsn=true"], num_threads=None)
    assert not (run / "replays").exists()


def cut_bodies_before(run: Path, batch: int) -> None:
    """As if bodies that no checkpoint needs had been removed: those of the batches move to a lost file."""
    with sqlite3.connect(run / "buffer.db") as db:
        db.execute(
            "update bodies set file = 900 where group_id in (select group_id from groups where batch between"
            " 0 and ?)",
            (batch - 1,),
        )
    db.close()


def test_without_the_first_bodies_a_replay_starts_at_a_checkpoint_and_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_bodies_before(run, 2)
    assert command.replay(run, overrides=[], num_threads=None) == 0
    out = capsys.readouterr().out
    assert "step-000002 at step 2" in out
    assert "no longer on disk" in out
    assert f"step 3/{NUM_ROLLOUT} digest equal" in out
    assert f"step 2/{NUM_ROLLOUT}" not in out


def test_without_bodies_and_checkpoints_nothing_is_pretended(run: Path) -> None:
    cut_bodies_before(run, 2)
    shutil.rmtree(run / "checkpoints")
    with sqlite3.connect(run / "buffer.db") as db:
        db.execute("update checkpoints set path = 'gone/' || rollout_step")
    db.close()
    with pytest.raises(DataError, match="the bodies of batch 1 are gone and no checkpoint of rollout step 2"):
        command.replay(run, overrides=[], num_threads=None)


def test_a_run_that_trained_nothing_is_refused(tmp_path: Path) -> None:
    Desk(tmp_path / "run", make_plan()).close()
    with pytest.raises(DataError, match="no batch of this run was trained"):
        command.replay(tmp_path / "run", overrides=[], num_threads=None)
