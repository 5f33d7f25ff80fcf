"""Replays from a later step, in another order, with other rewards, of an imported dump."""

# ruff: noqa: F811 -- fixtures of test_replay are parameters here
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.buffer.audit import audit
from asyncrl.buffer.records import Records
from asyncrl.cli import records as command
from asyncrl.errors import ConfigError, DataError, RewardError
from asyncrl.run.dump import export
from asyncrl.run.dump_import import import_dump
from asyncrl.run.replay import Order, Outcome, Replay, compare
from asyncrl.run.rescore import shuffled
from asyncrl.run.rundir import RunDir, read_plan
from asyncrl.topology.load import parse
from asyncrl.train.backend import train_plan
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend
from tests.desk import TOPOLOGY
from tests.pipeline.test_replay import (  # noqa: F401 -- recorded and run are fixtures
    NUM_ROLLOUT,
    ROOT,
    TRAINER,
    cut_bodies_before,
    recorded,
    run,
)

LOWER_LR = "trainer.lr=1e-3"


def replayed(run: Path, **options: object) -> tuple[Replay, list[Outcome]]:
    job = Replay(run, **options)  # type: ignore[arg-type]
    try:
        job.start()
        return job, list(job.steps())
    finally:
        job.close()


def digests(outcomes: list[Outcome]) -> list[str]:
    return [outcome.replayed for outcome in outcomes]


def recorded_digests(run: Path) -> list[str]:
    with Records(run) as records:
        return [row.digest for row in records.lineage()]


# From a later step.


def test_a_step_between_checkpoints_is_reached_in_silence(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.replay(run, overrides=[], num_threads=None, from_step=3) == 0
    out = capsys.readouterr().out
    assert "step-000002 at step 2" in out
    assert "steps up to 3 as recorded" in out
    assert re.findall(r"^step (\d)", out, re.MULTILINE) == ["4", "5", "6"]
    assert "all 3 steps end in the recorded weights" in out


def test_a_step_with_a_checkpoint_starts_from_it(run: Path) -> None:
    job = Replay(run, from_step=4)
    assert "step-000004 at step 4, " in job.start()
    outcomes = list(job.steps())
    job.close()
    assert (job.approach, [o.batch for o in outcomes]) == ([], [4, 5])
    assert all(outcome.equal for outcome in outcomes)


def test_a_torn_checkpoint_is_passed_over(run: Path) -> None:
    (run / "checkpoints" / "step-000002" / "config.json").write_text("{}")
    job, outcomes = replayed(run, from_step=3)
    assert [o.batch for o in job.approach] == [0, 1, 2]
    assert all(outcome.equal for outcome in [*job.approach, *outcomes])


def test_a_counterfactual_branches_off_the_recorded_weights(run: Path) -> None:
    """As if that checkpoint had been saved at step 3 and training had gone on from it with other settings."""
    job, outcomes = replayed(run, from_step=3, overrides=[LOWER_LR])
    assert all(outcome.equal for outcome in job.approach)
    plan = train_plan(read_plan(run).topology)
    trainer = Trainer(make_backend(plan))
    trainer.start()
    with Records(run) as records:
        for batch in range(3):
            trainer.train_batch(batch, records.batch(batch))
        path = trainer.save(run / "by_hand")
        trainer = Trainer(make_backend(train_plan(job.topology)))
        trainer.start(checkpoint=path)
        by_hand = [trainer.train_batch(batch, records.batch(batch))[1] for batch in range(3, NUM_ROLLOUT)]
    assert digests(outcomes) == by_hand
    assert by_hand != recorded_digests(run)[3:]
    assert by_hand != digests(replayed(run, overrides=[LOWER_LR])[1])[3:], "the change holds from step 3 only"
    assert sorted(path.name for path in job.directory.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("step", [-1, NUM_ROLLOUT])
def test_a_step_that_the_run_does_not_have_is_refused(run: Path, step: int) -> None:
    with pytest.raises(ConfigError, match=rf"--from-step {step}: .*0 to {NUM_ROLLOUT - 1} are allowed"):
        Replay(run, from_step=step)
    assert not (run / "replays").exists()


def test_bodies_that_are_gone_bound_the_step(run: Path) -> None:
    cut_bodies_before(run, 3)
    assert all(outcome.equal for outcome in replayed(run, from_step=5)[1])
    with pytest.raises(
        DataError, match="bodies of batch 2 are gone and no checkpoint of rollout step 3 or up"
    ):
        replayed(run, from_step=2)


# In another order.


def test_another_order_is_a_function_of_its_seed(run: Path) -> None:
    # With an optimizer step for each group the order decides which comes first.
    steps = ["trainer.num_steps_per_rollout=2", "trainer.global_batch_size=2"]
    seen = {
        seed: [
            digests(replayed(run, overrides=steps, order=Order.SHUFFLED, order_seed=seed)[1]) for _ in "ab"
        ]
        for seed in (1, 2)
    }
    assert seen[1][0] == seen[1][1] != seen[2][0] == seen[2][1]
    job, outcomes = replayed(run, order=Order.SHUFFLED)
    assert job.changes == ["groups shuffled (seed 0)"]
    assert len(outcomes) == NUM_ROLLOUT
    with Records(run) as records:
        groups = records.batch(0)
    orders = {tuple(g[0].group_id for g in shuffled(groups, seed=s, batch=0)) for s in range(8)}
    own = tuple(group[0].group_id for group in groups)
    assert orders == {own, own[::-1]}, "whole groups, none lost"


# With other rewards.


@pytest.fixture
def rewards(run: Path, tmp_path: Path) -> Path:
    """A module of rewards: `same` gives what was recorded, `flipped` 3 less that, `picky` fails on one."""
    with Records(run) as records:
        table = {
            f"{sample.group_id}.{sample.index}": sample.score.reward
            for batch in range(NUM_ROLLOUT)
            for group in records.batch(batch)
            for sample in group
            if sample.score is not None
        }
        refused = next(name for name in table if int(name.split(".")[0]) == records.batch(1)[0][0].group_id)
    (tmp_path / "table.json").write_text(json.dumps(table))
    path = tmp_path / "table_rewards.py"
    path.write_text(f"""
import json
TABLE = json.load(open({str(tmp_path / "table.json")!r}))
def name_of(sample):
    return f"{{sample.group_index}}.{{sample.index % 2}}"
def same(args, sample):
    return TABLE[name_of(sample)]
def flipped(args, sample):
    return {{"score": 3.0 - TABLE[name_of(sample)]}}
def picky(args, sample):
    if name_of(sample) == "{refused}":
        raise RuntimeError("not this one")
    return 1.0
""")
    return path


def test_the_recorded_rewards_given_anew_make_the_recorded_weights(run: Path, rewards: Path) -> None:
    job, outcomes = replayed(run, rescore=f"{rewards}:same")
    assert job.counterfactual
    assert digests(outcomes) == recorded_digests(run)
    assert [outcome.rewards.changed for outcome in outcomes if outcome.rewards] == [0] * NUM_ROLLOUT


def test_new_rewards_are_compared_with_the_recorded_ones(
    run: Path, rewards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"overrides": ["reward.reward_key=score"], "num_threads": None, "from_step": 2}
    assert command.replay(run, rescore=f"{rewards}:flipped", **options) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"digest different, reward \S+ -> \S+ \(4 of 4 samples changed\)", out)) == 4
    row = next(line.split() for line in out.splitlines() if line.startswith("reward/mean"))
    with Records(run) as records:
        scores = [s.score for b in range(2, NUM_ROLLOUT) for group in records.batch(b) for s in group]
    mean = sum(score.reward for score in scores if score) / len(scores)
    assert [float(value) for value in row[1:3]] == pytest.approx([mean, 3 - mean], rel=1e-4)
    assert f"4 steps with reward.reward_key=score, rewards of {rewards}:flipped" in out
    assert "of 2 steps before them" not in out, "it began at a checkpoint"


def test_a_sample_without_a_new_reward_ends_the_replay_by_name(run: Path, rewards: Path) -> None:
    job = Replay(run, rescore=f"{rewards}:picky")
    job.start()
    seen = []
    with Records(run) as records:
        group = records.batch(1)[0][0].group_id
    with pytest.raises(RewardError, match=rf"1 of 4 samples got no reward(.|\n)*group {group} sample \d"):
        seen += list(job.steps())
    job.close()
    assert job.trainer.rollout_step == 1, "batch 1 was not trained with what was left of it"


def test_a_reward_that_cannot_be_loaded_is_an_error_of_configuration(run: Path) -> None:
    job = Replay(run, rescore="no_such_module:grade")
    with pytest.raises(ConfigError, match="no_such_module"):
        job.start()
    job.close()
    assert not (run / "replays").exists()


# Of a dump.


@pytest.fixture
def imported(run: Path, tmp_path: Path) -> Path:
    """The run again, out of a dump of it."""
    export(run, tmp_path / "dump.jsonl")
    model = read_plan(run).topology.trainer.hf_checkpoint
    text = TOPOLOGY.format(
        num_rollout=NUM_ROLLOUT, batch_size=2, num_samples=2, max_staleness=2, model=model, rollout="",
        trainer=TRAINER, evals="",
    )  # fmt: skip
    import_dump(tmp_path / "dump.jsonl", tmp_path / "again", parse(text, source="again"), source=text)
    return tmp_path / "again"


def test_a_dump_of_a_run_trains_to_the_same_weights(run: Path, imported: Path) -> None:
    outcomes = replayed(imported)[1]
    assert digests(outcomes) == recorded_digests(run)
    assert {outcome.recorded for outcome in outcomes} == {""}
    with Records(run) as old, Records(imported) as new:
        for batch in range(NUM_ROLLOUT):
            assert new.batch(batch) == old.batch(batch)
    shutil.copytree(run / "metrics", imported / "metrics")
    job, outcomes = replayed(imported)
    differing = {row.name for row in compare(job.recorded_metrics(), outcomes) if row[1::2] != row[2::2]}
    assert differing == set(), "not even a metric is another one"


def test_an_imported_run_is_told_from_others(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = audit(imported, deep=True)
    assert report.broken == []
    assert report.imported.startswith("imported from ")
    assert "equations about leases, versions and staleness are skipped" in report.text()
    with pytest.raises(ConfigError, match=r"asyncrl replay .*again --save"):
        RunDir.resume(imported)
    assert command.replay(imported, overrides=[LOWER_LR], num_threads=None) == 0
    assert f"{NUM_ROLLOUT} steps with {LOWER_LR}; the weights are " in capsys.readouterr().out


def test_the_commands_take_a_dump_to_a_checkpoint(run: Path, tmp_path: Path) -> None:
    """export, a file without batch numbers, import, replay --save."""
    (tmp_path / "topo.toml").write_text(
        "[rollout]\nrollout_batch_size = 2\nn_samples_per_prompt = 2\n[trainer]\nlr = 1e-2\n"
        f'hf_checkpoint = "{read_plan(run).topology.trainer.hf_checkpoint}"\n'
    )

    def asyncrl(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "asyncrl.cli.main", *arguments],
            capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "12 samples of 6 groups" in asyncrl("buffer", "export", str(run), "d.jsonl", "--batches", "1:4")
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    foreign = [{key: line[key] for key in ("group_id", "prompt_tokens", "tokens", "logprobs", "reward")}
               for line in lines[:10]]  # fmt: skip
    (tmp_path / "foreign.jsonl").write_text("".join(json.dumps(line) + "\n" for line in foreign))
    said = asyncrl("buffer", "import", "foreign.jsonl", "--topology", "topo.toml", "--out", "again")
    assert "again: 2 batches, 4 groups, 8 samples" in said
    assert "1 groups were left out" in said
    said = asyncrl("replay", "again", "--save")
    assert (tmp_path / "again" / "replays" / "001" / "checkpoints" / "step-000002").is_dir()
    assert "step 2/2 digest " in said
    assert "imported" in asyncrl("status", "again")
