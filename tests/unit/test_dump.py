"""A dump gives back what went in, to the bit; what cannot be trained on is refused by file, line and name."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.buffer.audit import NEED_HISTORY, audit
from asyncrl.buffer.contents import IN_FLIGHT, groups, samples
from asyncrl.buffer.records import Records
from asyncrl.cli import buffer as options
from asyncrl.cli import contents as command
from asyncrl.errors import ConfigError, DataError
from asyncrl.messages.sample import (
    Lane,
    Prompt,
    Sample,
    Score,
    Settled,
    Span,
    Status,
    pack_logprobs,
    pack_mask,
    pack_routing,
    pack_tokens,
)
from asyncrl.run import dump, dump_format, dump_parquet
from asyncrl.run.dump_import import Imported, import_dump
from asyncrl.topology.load import parse
from tests.desk import Desk, make_plan, played

TOPOLOGY = """
[rollout]
rollout_batch_size = {size}
n_samples_per_prompt = 2
[trainer]
hf_checkpoint = "model"
{trainer}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played(tmp_path_factory.mktemp("finished") / "run", num_rollout=4)


def imported(file: Path, out: Path, *, size: int = 2, trainer: str = "") -> Imported:
    return import_dump(file, out, parse(TOPOLOGY.format(size=size, trainer=trainer), source="test"))


# One line.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
METADATA = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)
FLOATS = st.floats(width=32, allow_nan=False) | st.just(float("nan"))


@st.composite
def any_sample(draw: st.DrawFn) -> Sample:
    length = draw(st.integers(0, 4))

    def many(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=length, max_size=length))

    prompt = Prompt(
        tokens=pack_tokens(draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))), text=draw(st.text()),
        messages=draw(st.none() | st.lists(METADATA, max_size=2)), label=draw(JSON),
        metadata=draw(METADATA), dataset=draw(st.text(max_size=3)),
    )  # fmt: skip
    score = Score(
        reward=draw(st.floats(allow_nan=False, allow_infinity=False)), detail=draw(JSON),
        remove_sample=draw(st.booleans()), metadata=draw(METADATA),
        teacher_logprobs=pack_logprobs(many(FLOATS) if draw(st.booleans()) else []),
    )  # fmt: skip
    score_or_none = draw(st.none() | st.just(score))
    added = draw(METADATA)
    routed = draw(st.booleans())
    return Sample(
        group_id=draw(st.integers(0, 2**60)), index=draw(st.integers(0, 9)), prompt=prompt,
        status=draw(st.sampled_from(Status)), tokens=pack_tokens(many(st.integers(0, 2**31 - 1))),
        logprobs=pack_logprobs(many(FLOATS)), loss_mask=pack_mask(many(st.integers(0, 1))),
        spans=[Span(draw(st.integers(0, 9)), 1, length)] if length else [], text=draw(st.text()),
        metadata=prompt.metadata | added | (score_or_none.metadata if score_or_none else {}),
        score=score_or_none, lane=draw(st.sampled_from(Lane)),
        routed_experts=pack_routing(draw(st.lists(st.integers(-1, 99), min_size=2))) if routed else b"",
        routed_top_k=2 if routed else 0,
    )  # fmt: skip


@given(any_sample())
def test_a_sample_survives_its_line(sample: Sample) -> None:
    text = msgspec.json.encode(dump_format.line_of(sample))
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    again = dump_format.sample_of(msgspec.json.decode(text, type=dump_format.Line))
    assert again == sample
    assert msgspec.msgpack.encode(again.score) == msgspec.msgpack.encode(sample.score), "types, too"


def test_every_bit_of_a_log_prob_survives() -> None:
    values = np.array([-0.1, 1e-45, 3.4e38, -0.0, np.inf, -np.inf, 16777217], dtype="<f4")
    sample = Sample(group_id=0, index=0, prompt=Prompt(tokens=b""), logprobs=values.tobytes())
    line = json.loads(msgspec.json.encode(dump_format.line_of(sample)))
    assert line["logprobs"][4:6] == ["inf", "-inf"]
    again = dump_format.sample_of(msgspec.convert(line, dump_format.Line))
    assert again.logprobs == values.tobytes()


@pytest.mark.parametrize(
    ("label", "same"), [({"a": [1, None]}, True), (float("nan"), False), (b"x", False), ({1: 2}, False)]
)
def test_what_json_cannot_hold_is_named(label: Any, same: bool) -> None:
    sample = Sample(group_id=3, index=1, prompt=Prompt(tokens=b"", label=label))
    assert dump_format.altered(sample) == ("" if same else "group 3 sample 1: label")


# Export.


def test_an_export_holds_the_batches_as_the_trainer_got_them(finished: Path, tmp_path: Path) -> None:
    done = dump.export(finished, tmp_path / "d.jsonl")
    lines = [json.loads(text) for text in (tmp_path / "d.jsonl").read_text().splitlines()]
    with Records(finished) as records:
        expected = [
            (batch, sample.group_id, sample.index) for batch in range(4)
            for group in records.batch(batch) for sample in group
        ]  # fmt: skip
    assert [(line["batch"], line["group_id"], line["index"]) for line in lines] == expected
    assert (done.samples, done.groups, done.altered) == (16, 8, "")
    assert done.tokens == sum(len(line["tokens"]) for line in lines)
    assert {line["settled"] for line in lines} == {"trained"}
    with pytest.raises(ConfigError, match=r"d\.jsonl: exists"):
        dump.export(finished, tmp_path / "d.jsonl")


def test_an_export_may_be_of_some_batches_or_of_what_was_not_trained(finished: Path, tmp_path: Path) -> None:
    def exported(name: str, **which: Any) -> list[dict[str, Any]]:
        dump.export(finished, tmp_path / name, **which)
        return [json.loads(text) for text in (tmp_path / name).read_text().splitlines()]

    assert {line["batch"] for line in exported("b", batches=range(1, 3))} == {1, 2}
    filtered = exported("f", settled=["filtered"])
    assert {(line["settled"], line["batch"]) for line in filtered} == {("filtered", None)}
    assert {line["group_id"] % 5 for line in filtered} == {4}, "those the filter refused"
    assert {line["lane"] for line in exported("e", settled=["evaluated"])} == {"eval"}
    with pytest.raises(DataError, match="there is no such group"):
        exported("none", batches=range(50, 60))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "e", "f"], "no half a file is left"


def test_bodies_that_were_removed_are_named_before_anything_is_written(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "buffer.db") as db:
        db.execute("update bodies set file = 900 where group_id = (select min(group_id) from groups)")
    db.close()
    with pytest.raises(DataError, match=r'bodies of batch 0 were removed .* buffer.keep = "all" keeps them'):
        dump.export(tmp_path / "run", tmp_path / "d.jsonl")
    dump.export(tmp_path / "run", tmp_path / "d.jsonl", batches=range(1, 4))


def test_what_is_in_flight_is_exported_as_far_as_it_came(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "run", make_plan())
    desk.play(rounds=1)
    desk.close()
    with Records(tmp_path / "run") as records:
        rows = list(groups(records, settled=[IN_FLIGHT]))
        found = [sample for row in rows for sample in samples(records, row)]
    assert {sample.status for sample in found} >= {Status.PENDING}
    assert 0 < sum(sample.num_tokens for sample in found) == sum(row.num_tokens for row in rows)
    dump.export(tmp_path / "run", tmp_path / "open.jsonl", settled=[IN_FLIGHT])
    with pytest.raises(DataError, match=r"open\.jsonl:1: .*(has no score|is pending)"):
        imported(tmp_path / "open.jsonl", tmp_path / "again")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_names_the_extra(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"asyncrl\[parquet\]"):
        dump.export(finished, tmp_path / "d.parquet")


def test_parquet_has_the_columns_of_a_line() -> None:
    assert list(dump_parquet.COLUMNS) == list(dump_format.Line.__struct_fields__)


def test_parquet_holds_what_the_lines_hold(finished: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    dump.export(finished, tmp_path / "d.jsonl")
    dump.export(finished, tmp_path / "d.parquet")
    lines = [json.loads(text) for text in (tmp_path / "d.jsonl").read_text().splitlines()]
    rows = parquet.read_table(tmp_path / "d.parquet").to_pylist()
    for line, row in zip(lines, rows, strict=True):
        for name, kind in dump_parquet.COLUMNS.items():
            assert (json.loads(row[name]) if kind == "json" else row[name]) == line[name], name


# Import.


def test_an_imported_run_closes_and_says_what_it_is(finished: Path, tmp_path: Path) -> None:
    dump.export(finished, tmp_path / "d.jsonl")
    done = imported(tmp_path / "d.jsonl", tmp_path / "again")
    assert (done.batches, done.groups, done.samples, done.left_out) == (4, 8, 16, 0)
    report = audit(tmp_path / "again", deep=True)
    assert {e.name: e.broken for e in report.broken} == {}
    assert {e.name for e in report.equations if e.skipped} == NEED_HISTORY | {"run.end"}
    assert report.imported.endswith("d.jsonl: 16 samples in 4 batches")
    with Records(finished) as old, Records(tmp_path / "again") as new:
        for batch in range(4):
            assert new.batch(batch) == old.batch(batch)


def test_an_audit_of_an_imported_run_still_finds_damage(finished: Path, tmp_path: Path) -> None:
    dump.export(finished, tmp_path / "d.jsonl")
    imported(tmp_path / "d.jsonl", tmp_path / "again")
    with sqlite3.connect(tmp_path / "again" / "buffer.db") as db:
        db.execute("update samples set tokens = tokens + 1 where group_id = 0 and idx = 0")
    db.close()
    assert not audit(tmp_path / "again").closes


def test_no_mark_makes_a_run_that_was_made_here_an_imported_one(finished: Path, tmp_path: Path) -> None:
    """Fails when `View.imported` believes `meta` alone: then the lost lease would not be missed."""
    shutil.copytree(finished, tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "buffer.db") as db:
        db.execute("insert into meta values ('imported', 'imported from nowhere')")
        db.execute("update leases set worker = 'nobody' where fence = 1")
    db.close()
    report = audit(tmp_path / "run")
    assert report.imported == ""
    assert "leases.results" in {equation.name for equation in report.broken}


def test_a_part_of_a_run_is_numbered_anew_and_no_token_gets_older(finished: Path, tmp_path: Path) -> None:
    dump.export(finished, tmp_path / "d.jsonl", batches=range(2, 4))
    imported(tmp_path / "d.jsonl", tmp_path / "again")
    with Records(finished) as old, Records(tmp_path / "again") as new:
        for batch in range(2):
            pairs = zip(new.batch(batch), old.batch(batch + 2), strict=True)
            for mine, theirs in ((a, b) for x, y in pairs for a, b in zip(x, y, strict=True)):
                assert mine.tokens == theirs.tokens
                assert [s.version for s in mine.spans] == [s.version - 2 for s in theirs.spans]


MINIMAL = {"prompt_tokens": [5], "tokens": [1, 2], "logprobs": [-1, -0.5], "reward": 1}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(MINIMAL | line) + "\n" for line in lines))
    return path


def test_batches_are_cut_where_no_line_names_one(tmp_path: Path) -> None:
    file = write(tmp_path / "d", *({"group_id": group} for group in (7, 3, 9, 4, 2) for _ in "ab"))
    done = imported(file, tmp_path / "run")
    assert (done.batches, done.left_out) == (2, 1)
    assert done.plan.num_rollout == 2
    with Records(tmp_path / "run") as records:
        ids = [[group[0].group_id for group in records.batch(batch)] for batch in range(2)]
        sample = records.batch(1)[0][1]
    assert ids == [[7, 3], [9, 4]]
    assert (sample.index, sample.loss_mask, sample.spans) == (1, b"\x01\x01", [Span(1, 0, 2)])
    assert audit(tmp_path / "run", deep=True).closes
    partial = imported(file, tmp_path / "partial", trainer="allow_partial_train_step = true")
    assert (partial.batches, partial.left_out) == (3, 0)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"group_id": 0, "logprobs": [-1]}], r"d:1: sample 0\.0: 2 response tokens, 1 log-probs"),
        ([{"group_id": 0}, {"group_id": 0, "reward": None}], r"d:2: sample 0\.1: has no score"),
        ([{"group_id": 0, "reword": 1}], r"d:1: not a sample: .*reword"),
        ([{"group_id": 0, "tokens": [1, 2**40]}], r"d:1: tokens: "),
        ([{"group_id": 0, "status": "aborted"}], r"d:1: sample 0\.0 is aborted in lane train"),
        ([{"group_id": 0, "lane": "eval"}], r"d:1: sample 0\.0 is completed in lane eval"),
        ([{"group_id": 0, "prompt_tokens": []}], r"d:1: sample 0\.0: has no prompt tokens"),
        ([{"group_id": 0}], r"d:1: group 0 has 1 samples, and rollout\.n_samples_per_prompt is 2"),
        ([{"group_id": 0}, {"group_id": 0, "prompt_tokens": [6]}], r"d:2: .*share one prompt"),
        ([{"group_id": 0, "index": 1}], r"d:1: sample 0\.1 is number 0 of its group"),
        ([{"group_id": 0}] * 2 + [{"group_id": 1}] * 2 + [{"group_id": 0}] * 2, r"d:5: group 0 again"),
        ([{"group_id": 0, "batch": 0}] * 2 + [{"group_id": 1, "batch": 1}] * 2, r"batch 0 has 1 groups"),
        ([{"group_id": 0}] * 2 + [{"group_id": 1, "batch": 1}] * 2, r"d:3: group 1: is of batch 1, and"),
        ([{"group_id": 0}] * 2, "do not fill one batch of rollout_batch_size = 2 groups"),
        ([], "do not fill one batch"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_by_name(
    tmp_path: Path, lines: list[dict[str, Any]], says: str
) -> None:
    file = write(tmp_path / "d", *lines)
    with pytest.raises(DataError, match=says):
        imported(file, tmp_path / "run")
    assert list(tmp_path.iterdir()) == [file], "no half a run is left"


def test_nothing_is_written_over(tmp_path: Path) -> None:
    file = write(tmp_path / "d", *({"group_id": group} for group in range(2) for _ in "ab"))
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"--out .*run: exists"):
        imported(file, tmp_path / "run")


# The commands.


@pytest.mark.parametrize(
    ("text", "batches"), [("2:5", range(2, 5)), (":3", range(3)), ("4", range(4, 5)), ("1:", range(1, 2**62))]
)
def test_batches_are_written_as_a_slice(text: str, batches: range) -> None:
    assert options.span(text) == batches


@pytest.mark.parametrize("text", ["", "5:2", "a:b", "-1", "3:3"])
def test_no_slice_is_an_error_of_configuration(text: str) -> None:
    with pytest.raises(ConfigError, match="--batches"):
        options.span(text)


def test_the_command_knows_every_way_a_group_ends() -> None:
    assert {str(one) for one in options.Settled} == {str(one) for one in Settled} | {IN_FLIGHT}


def test_ls_lists_batches_then_groups(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.list_(finished, batches=None, settled=[], all_groups=False)
    out = capsys.readouterr().out
    with Records(finished) as records:
        for row in records.lineage():
            assert row.digest[:12] in out
    assert "samples in no batch, lane train: " in out
    command.list_(finished, batches=None, settled=["filtered"], all_groups=False)
    listed = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    with Records(finished) as records:
        assert listed == [row.group_id for row in groups(records, settled=["filtered"])] != []


def test_show_prints_a_sample(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.show(finished, "0", as_json=False)
    out = capsys.readouterr().out
    assert "group 0 of lane train: trained, batch 0" in out
    assert "sample 0.1: completed, " in out
    command.show(finished, "0.1", as_json=True)
    line = msgspec.json.decode(capsys.readouterr().out, type=dump_format.Line)
    with Records(finished) as records:
        expected = next(s for g in records.batch(0) for s in g if (s.group_id, s.index) == (0, 1))
    assert dump_format.sample_of(line) == expected
    for wrong in ("0.7", "999"):
        with pytest.raises(DataError, match="buffer ls"):
            command.show(finished, wrong, as_json=False)
