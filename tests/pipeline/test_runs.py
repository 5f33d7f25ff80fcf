"""Whole runs in one process, on the memory link, with a real trainer of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncrl.buffer.records import Records
from asyncrl.errors import ExitCode
from tests.support.books import assert_closed, due, one, reasons, rows
from tests.support.inside import Finished, run_inside
from tests.support.world import write_prompts

EMBEDDED = {"generator.engine": "embedded", "generator.scripted": None}
SYNCHRONOUS = {"rollout.max_staleness": 0, "generator.on_new_weights": "finish"}
UNLIKE_ANSWERS = {
    # A quarter of a second to two and a half: a push that follows the short ones meets long ones half done.
    # Answers of one length all end at once, and whatever is pushed then meets none that has a token.
    "generator.scripted": {
        "median": 32.0, "sigma": 0.6, "max_tokens": 64, "vocab_size": 90, "token_latency_s": 0.04
    },
    "rollout.rollout_max_response_len": 64,
}  # fmt: skip


def spans(run: Finished) -> list[tuple[int, set[int]]]:
    """(batch, versions) of every trained sample."""
    with Records(run.path) as records:
        return [
            (row.batch, {span.version for span in sample.spans})
            for row in records.batches()
            for group in records.batch(row.batch)
            for sample in group
        ]


def test_a_run_finishes_and_its_books_close(tmp_path: Path, model: Path) -> None:
    run = run_inside(tmp_path, model)
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    assert reasons(run.path)["trained"] == 3 * 4
    assert [row[0] for row in rows(run.path, "select batch from trained order by batch")] == [0, 1, 2]
    assert all(batch - min(versions) <= 1 for batch, versions in spans(run))
    assert (run.path / "checkpoints").is_dir()


def test_a_synchronous_run_is_exactly_on_policy(tmp_path: Path, model: Path) -> None:
    run = run_inside(tmp_path, model, SYNCHRONOUS)
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    found = spans(run)
    assert len(found) == 3 * 8
    assert all(versions == {batch} for batch, versions in found)


def test_embedded_engine_and_trainer_agree_on_log_probs(tmp_path: Path, model: Path) -> None:
    run = run_inside(tmp_path, model, {**EMBEDDED, **SYNCHRONOUS})
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    distances = [
        row["train/train_rollout_logprob_abs_diff"] for row in run.metrics("trainer") if "train/loss" in row
    ]
    assert len(distances) == 3
    assert max(distances) < 1e-4


def test_aborted_answers_are_resumed_under_the_next_version(tmp_path: Path, model: Path) -> None:
    run = run_inside(
        tmp_path,
        model,
        {
            **UNLIKE_ANSWERS,
            "generator.on_new_weights": "abort",
            "generator.concurrency": 16,
            "rollout.max_staleness": 2,
            "run.num_rollout": 5,
        },
    )
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    assert one(run.path, "select sum(aborted) from swaps") > 0
    assert any(len(versions) > 1 for _, versions in spans(run))
    resumed = (
        "select group_id, idx from bodies where kind = 'segment' group by 1, 2"
        " having count(distinct fence) > 1"
    )
    assert rows(run.path, resumed)


def test_dynamic_sampling_replaces_what_it_refuses(tmp_path: Path, model: Path) -> None:
    run = run_inside(tmp_path, model, {"rollout.dynamic_sampling_filter_path": "plugins.filters:nonzero_std"})
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    assert reasons(run.path)["filtered"] > 0
    assert reasons(run.path)["trained"] == 12
    equal = (
        "select group_id from samples join groups using (group_id) where reason = ?"
        " group by 1 having count(distinct reward) = 1"
    )
    assert rows(run.path, equal, "trained") == []
    assert len(rows(run.path, equal, "filtered")) == reasons(run.path)["filtered"]


def test_a_group_reward_sees_whole_groups(tmp_path: Path, model: Path) -> None:
    (tmp_path / "ranks.py").write_text(
        "def ranks(samples):\n    return [float(i * len(samples)) for i in range(len(samples))]\n",
        encoding="utf-8",
    )
    run = run_inside(
        tmp_path,
        model,
        {
            "reward.use": f"{tmp_path / 'ranks.py'}:ranks",
            "reward.group_rm": True,
            "rollout.n_samples_per_prompt": 3,
            "run.num_rollout": 2,
        },
    )
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    assert rows(
        run.path, "select distinct idx, reward from samples where state = 'trained' order by idx"
    ) == [(0, 0.0), (1, 3.0), (2, 6.0)]


def test_a_custom_generate_function_writes_the_answers(tmp_path: Path, model: Path) -> None:
    (tmp_path / "generate.yaml").write_text(
        "hint_tokens: [7, 8]\nhint_text: '?!'\nis_done: '####'\n", encoding="utf-8"
    )
    run = run_inside(
        tmp_path,
        model,
        {
            "rollout.custom_generate_function_path": "plugins.generate:generate",
            "run.custom_config_path": str(tmp_path / "generate.yaml"),
            "generator.scripted": {"median": 5.0, "max_tokens": 6, "vocab_size": 90},
        },
    )
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    with Records(run.path) as records:
        samples = [sample for batch in range(3) for group in records.batch(batch) for sample in group]
    assert all("?!" in sample.text for sample in samples)
    assert all(sample.loss_mask.count(0) == 2 for sample in samples)


@pytest.mark.parametrize("partial", [False, True])
def test_the_remainder_of_the_data(tmp_path: Path, model: Path, *, partial: bool) -> None:
    """10 prompts in batches of 4: the last two are left over, or trained as a smaller batch."""
    write_prompts(tmp_path / "prompts.jsonl", count=10)
    run = run_inside(
        tmp_path,
        model,
        {
            "run.num_rollout": None,
            "source.num_epoch": 1,
            "trainer.allow_partial_train_step": partial,
        },
    )
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    sizes = [row[0] for row in rows(run.path, "select num_groups from batches order by batch")]
    assert sizes == ([4, 4, 2] if partial else [4, 4])
    trained = reasons(run.path)
    assert trained.pop("trained") == sum(sizes)
    # What the run did not need was either never asked for or is named.
    assert set(trained) <= {"unneeded"}


def test_data_that_end_early_end_the_run(tmp_path: Path, model: Path) -> None:
    """12 prompts would fill 3 batches; the filter refuses 5 of them, so one batch is trained."""
    write_prompts(tmp_path / "prompts.jsonl", count=12)
    (tmp_path / "mine.py").write_text(
        "def later(args, samples, **kwargs):\n    return samples[0].group_index >= 5\n", encoding="utf-8"
    )
    run = run_inside(
        tmp_path,
        model,
        {
            "run.num_rollout": None,
            "source.num_epoch": 1,
            "rollout.dynamic_sampling_filter_path": f"{tmp_path / 'mine.py'}:later",
        },
    )
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    assert reasons(run.path) == {"filtered": 5, "trained": 4, "unneeded": 3}


def test_an_evaluation_names_one_version_and_trains_nothing(tmp_path: Path, model: Path) -> None:
    run = run_inside(
        tmp_path,
        model,
        {
            "eval.eval_prompt_data": ["held-out", str(model / "eval.jsonl")],
            "eval.eval_interval": 2,
            "eval.n_samples_per_eval_prompt": 2,
        },
    )
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    done = rows(run.path, "select version from evaluations where done_at is not null and seen = 1 order by 1")
    versions = [row[0] for row in done]
    # 0, 2, 3 unless the buffer was so slow that it announced 2 and 3 as one.
    assert versions == due(run.path, 2, 3)
    assert (versions[0], versions[-1]) == (0, 3)
    with Records(run.path) as records:
        found = {version: set(values) for version, values in records.evaluations().items()}
    assert found == {version: {"held-out"} for version in versions}
    mixed = (
        "select g.group_id from groups g join bodies b using (group_id), json_each(b.spans) s"
        " where g.lane = 'eval' and b.kind = 'segment' and json_extract(s.value, '$[0]') != g.version"
    )
    assert rows(run.path, mixed) == []
    assert rows(run.path, "select 1 from batch_groups join groups using (group_id) where lane = 'eval'") == []


def test_the_same_seed_gives_the_same_records_and_weights(tmp_path: Path, model: Path) -> None:
    """On policy with one generator nothing depends on timing, so nothing may differ."""
    # One report an answer: where progress is cut depends on when the last report was acknowledged. One answer
    # at a time: the last bits of log probs depend on what is computed with them, hence on who came when.
    alone = {"rollout.progress_every_tokens": 256, "generator.concurrency": 1}
    options = {**EMBEDDED, **SYNCHRONOUS, **alone}
    first, second = (
        run_inside(tmp_path, model, {**options, "weights.directory": str(tmp_path / name)}, name=name)
        for name in ("first", "second")
    )
    for query in (
        "select batch, step, digest from trained order by batch",
        "select batch, digest, num_tokens from batches order by batch",
        "select group_id, reason, version, due, batch from groups where reason = 'trained' order by group_id",
        "select group_id, idx, tokens, reward from samples where state = 'trained' order by 1, 2",
    ):
        assert rows(first.path, query) == rows(second.path, query) != []


def test_weights_travel_by_stream_when_that_is_asked_for(tmp_path: Path, model: Path) -> None:
    """Fails when carrier = "stream" still lets receivers of this host map the publisher's file."""
    run = run_inside(tmp_path, model, {**EMBEDDED, "weights.carrier": "stream"})
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    manifests = [json.loads(row[0]) for row in rows(run.path, "select manifest from versions")]
    assert len(manifests) == 4
    assert all(not m["path"] and m["address"] == "memory://publisher" for m in manifests)


DATA_SOURCE = '''
import json
from pathlib import Path


class Sample:
    def __init__(self, number):
        self.prompt, self.label, self.metadata = f"{number}+1", str(number + 1), {"number": number}


class Numbers:
    """slime's interface: counts up, and keeps its place in its own files."""

    def __init__(self, args):
        self.args, self.next = args, 10

    def get_samples(self, num_samples):
        groups = [[Sample(self.next + i)] * self.args.n_samples_per_prompt for i in range(num_samples)]
        self.next += num_samples
        return groups

    def add_samples(self, samples):
        raise AssertionError("the buffer keeps what is handed back")

    def save(self, rollout_id):
        (Path(self.args.save) / f"{rollout_id}.txt").write_text(str(self.next))

    def load(self, rollout_id=None):
        path = Path(self.args.load) / f"{rollout_id}.txt"
        if path.exists():
            self.next = int(path.read_text())
'''


def test_a_data_source_class_of_the_users_feeds_a_run(tmp_path: Path, model: Path) -> None:
    (tmp_path / "numbers.py").write_text(DATA_SOURCE, encoding="utf-8")
    options = {
        "source.prompt_data": None,
        "source.label_key": None,
        "source.data_source_path": f"{tmp_path / 'numbers.py'}:Numbers",
    }
    run = run_inside(tmp_path, model, options)
    assert run.code == ExitCode.FINISHED, run.detail
    assert_closed(run.path)
    with Records(run.path) as records:
        labels = {
            int(group[0].prompt.label) for row in records.batches() for group in records.batch(row.batch)
        }
    assert len(labels) == 3 * 4
    assert min(labels) == 11
