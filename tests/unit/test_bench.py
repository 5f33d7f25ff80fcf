"""The frame of the benchmarks: figures, verdicts and tables; and that every benchmark fits it."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path

import pytest

from asyncrl.topology.load import load
from asyncrl.topology.plan import compile_plan
from tools.bench import __main__ as command
from tools.bench import buffer, overlap, plain_loop, report
from tools.bench.buffer import bare_loop
from tools.bench.peers import Bodies
from tools.bench.report import Options, Section, Table, Target


def target(value: float, bound: float, *, at_least: bool) -> Target:
    return Target(what="rate", value=value, bound=bound, unit=" MB/s", at_least=at_least)


def test_a_target_that_is_reached_is_met() -> None:
    assert target(100, 100, at_least=True).verdict == "met"
    assert target(100, 100, at_least=False).verdict == "met"


def test_a_target_that_is_missed_says_by_how_much() -> None:
    assert target(75, 100, at_least=True).verdict == "missed by 25.0 MB/s (25%)"
    assert target(1.32, 1.1, at_least=False).verdict == "missed by 0.22 MB/s (20%)"


def test_a_target_tells_what_was_asked_and_measured() -> None:
    line = target(12_345, 10_000, at_least=True).line()
    assert line == "target: rate >= 10,000 MB/s: measured 12,345 MB/s, met"


@pytest.mark.parametrize(
    ("value", "text"), [(0.123, "0.12"), (9.876, "9.88"), (98.76, "98.8"), (12_345.6, "12,346")]
)
def test_figures_have_about_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_repeats_are_told_as_median_and_range() -> None:
    assert report.spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)"
    assert report.spread([5.0]) == "5.00"


def test_columns_of_a_table_are_as_wide_as_their_widest_cell() -> None:
    table = Table(title="", columns=["side", "rate"], rows=[["engine", "1"], ["x", "12,345"]])
    assert table.lines() == ["  side      rate", "  engine       1", "  x       12,345"]


def test_a_section_is_kept_with_its_machine_and_its_verdicts(tmp_path: Path) -> None:
    section = Section(name="some", title="t", targets=[target(1, 2, at_least=True)], data={"raw": [1, 2]})
    path = report.write(tmp_path / "results", section, machine={"cpu": "x"}, options=Options(seed=7))
    kept = json.loads(path.read_bytes())
    assert (path.name, kept["machine"], kept["seed"]) == ("some.json", {"cpu": "x"}, 7)
    assert kept["verdicts"] == {"rate": "missed by 1.00 MB/s (50%)"}
    assert kept["section"]["data"] == {"raw": [1, 2]}


def test_the_machine_is_told_without_importing_what_is_measured() -> None:
    machine = report.machine()
    assert {"cpu", "cores", "memory", "python", "sqlite", "torch", "transformers"} <= set(machine)
    assert report.versions(["no-such-distribution"]) == {"no-such-distribution": "missing"}


def test_a_missing_model_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["faults", "--model", str(tmp_path / "none")])
    assert "none holds no model; make one with `python tools/make_tiny_model.py" in capsys.readouterr().err
    command.check_model(command.parse(["buffer", "--model", str(tmp_path / "none")]))


@pytest.mark.parametrize("name", command.NAMES)
def test_every_benchmark_has_a_quick_path(name: str) -> None:
    given = command.parse([name, "--quick"])
    assert (given.names, given.quick) == ([name], True)
    module = importlib.import_module(f"tools.bench.{name}")
    assert module.__doc__
    assert callable(module.run)


def test_benchmarks_run_in_one_order_whatever_order_they_are_named_in() -> None:
    assert command.parse([]).names == list(command.NAMES)
    assert command.parse(["cli", "engine"]).names == ["engine", "cli"]


def test_an_unknown_benchmark_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.parse(["enigne"])
    assert left.value.code == 2
    assert "enigne" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quick", "full", "expected"), [(True, True, 1), (False, False, 3), (False, True, 9)]
)
def test_quick_wins_over_full(quick: bool, full: bool, expected: int) -> None:
    assert Options(quick=quick, full=full).choose(quick=1, normal=3, full=9) == expected


def test_the_topology_of_an_overlap_run_compiles(tmp_path: Path) -> None:
    path = tmp_path / "overlap.toml"
    path.write_text(overlap.topology(Path("tiny_model"), bound=8, train_s=0.5, seed=1), encoding="ascii")
    plan = compile_plan(load(path, []), source=str(path))
    assert plan.topology.trainer.backend == "scripted"
    assert plan.topology.trainer.scripted_step_s == 0.5
    assert plan.tickets == 9 * overlap.GROUPS


def test_the_longest_answer_fits_the_bound_that_has_a_target() -> None:
    step_tokens = overlap.GROUPS * overlap.GROUP_SIZE * overlap.mean_tokens(2_000)
    longest = overlap.FACTOR * overlap.LONGEST * overlap.GENERATORS * overlap.CONCURRENCY
    assert longest / step_tokens < overlap.FITS


def test_the_bare_loop_writes_what_the_buffer_would() -> None:
    bodies = Bodies(tokens=100, group_size=8)
    assert bodies.bytes_per_sample > 100 * 8
    assert buffer.plan(10).tickets == (buffer.MAX_STALENESS + 1) * buffer.BATCH_GROUPS


def test_the_bare_loop_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "bare.bin"
    assert bare_loop(path, Bodies(tokens=10, group_size=8), [8, 16]) > 0
    assert not path.exists()


def test_a_buffer_takes_samples_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "DEADLINE_S", 60.0)
    run = asyncio.run(buffer.measure(Options(work=tmp_path), tokens=10, batches=6, attempt=0))
    assert run.samples_per_s > 0
    assert len(run.rss_mib) == 3


def test_the_plain_loop_takes_its_numbers_from_the_topology(tmp_path: Path) -> None:
    path = tmp_path / "overlap.toml"
    path.write_text(overlap.topology(Path("tiny_model"), bound=2, train_s=0.0, seed=1), encoding="ascii")
    parsed = plain_loop.arguments().parse_args(
        ["--topology", str(path), "--out", "x", "--threads", "2", "--num-rollout", "3"]
    )
    plan = plain_loop.make_plan(parsed)
    assert (plan.num_rollout, plan.topology.trainer.num_threads) == (3, 2)
    assert plan.samples_per_rollout == overlap.GROUPS * overlap.GROUP_SIZE
