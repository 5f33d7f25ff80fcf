"""The staleness study: exact lags, arms that do not count, files that are kept, plain verdicts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from asyncrl.errors import ConfigError, RunError
from asyncrl.messages.sample import Prompt, Sample, Span
from tools.bench import staleness_study, study_arm, study_report
from tools.bench.study_plan import (
    METHODS,
    Arm,
    ArmResult,
    Point,
    Settings,
    behaviour_version,
    digest_of,
    expected_lag,
    finished,
    make_arms,
    make_plan,
    path_of,
    read_result,
    write_result,
)

SETTINGS = Settings(steps=5, prompts=2, answers=2, eval_every=2, model="m")


def result(arm: Arm, *accuracies: float, **changed: Any) -> ArmResult:
    given: dict[str, Any] = {
        "arm": arm,
        "settings": SETTINGS,
        "curve": [Point(20 * i, value) for i, value in enumerate(accuracies or (0.5,))],
        "rewards": [0.5],
        "lag": float(arm.lag),
        "metrics": {},
        "algorithm": {},
        "cpu_s": 1.0,
        "wall_s": 2.0,
        "commit": "c",
        "versions": {},
    }
    return ArmResult(**{**given, **changed})


# ---- the lag


@pytest.mark.parametrize("lag", [0, 1, 2, 8])
def test_the_ring_samples_with_the_weights_of_exactly_lag_steps_ago(lag: int) -> None:
    ring, live = study_arm.WeightRing(lag), torch.zeros(2)
    ring.push(0, {"w": live})
    for step in range(20):
        version, tensors = ring.behaviour()
        assert version == behaviour_version(step, lag=lag) == max(0, step - lag)
        assert tensors["w"].tolist() == [float(version)] * 2
        assert ring.newest()[0] == step
        live += 1  # the backend trains in place
        ring.push(step + 1, {"w": live})


def test_the_ring_refuses_a_version_out_of_turn() -> None:
    ring = study_arm.WeightRing(2)
    ring.push(0, {})
    with pytest.raises(ValueError, match="version: 2; 1 is next"):
        ring.push(2, {})


def test_the_expected_lag_counts_the_first_steps() -> None:
    assert expected_lag(4, lag=2) == (0 + 1 + 2 + 2) / 4
    assert expected_lag(300, lag=0) == 0
    assert expected_lag(300, lag=32) / 32 > 0.94
    assert expected_lag(60, lag=32) / 32 < 0.9


def test_the_realised_lag_is_a_mean_over_tokens() -> None:
    ages = study_arm.AgeCount()
    prompt = Prompt(tokens=b"")
    old = Sample(group_id=0, index=0, prompt=prompt, spans=[Span(0, 1, 3), Span(3, 1, 1)])
    ages.add([old], step=4)
    ages.add([Sample(group_id=1, index=0, prompt=prompt, spans=[Span(5, 1, 4)])], step=5)
    assert ages.mean == (3 * 4 + 1 * 1 + 4 * 0) / 8


@pytest.fixture(scope="module")
def ran(model: Path) -> ArmResult:
    return study_arm.run_arm(Arm(2, "none", 1), settings=SETTINGS, model=model)


def test_an_arm_trains_on_answers_of_the_nominal_lag(ran: ArmResult) -> None:
    assert ran.failure is None
    # Answers of this random model all have the greatest length, so steps weigh the same.
    assert ran.lag == pytest.approx(expected_lag(5, lag=2), abs=0.15)
    assert ran.metrics["staleness/max"] == expected_lag(5, lag=2)
    assert [point.step for point in ran.curve] == [0, 2, 4, 5]
    assert len(ran.rewards) == 5
    assert ran.metrics["train/global_batch_size"] == 2  # 4 samples in 2 optimizer steps


def test_the_same_seed_gives_the_same_arm(ran: ArmResult, model: Path) -> None:
    again = study_arm.run_arm(ran.arm, settings=SETTINGS, model=model)
    assert (again.curve, again.rewards, again.metrics) == (ran.curve, ran.rewards, ran.metrics)
    other = study_arm.run_arm(Arm(2, "none", 2), settings=SETTINGS, model=model)
    assert other.metrics != ran.metrics


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_valid_topology_with_the_clip_range_of_none(method: str) -> None:
    plans = {
        name: make_plan(Arm(8, name, 0), settings=Settings(), model=Path("tiny_model")).topology
        for name in ("none", method)
    }
    algorithm, plain = plans[method].algorithm, plans["none"].algorithm
    assert (algorithm.eps_clip, algorithm.eps_clip_high) == (plain.eps_clip, plain.eps_clip_high)
    assert (algorithm == plain) == (method == "none")
    assert not plain.use_tis
    assert not plain.use_opsm
    assert plans[method].trainer.num_steps_per_rollout == 2


# ---- arms and their files


def test_the_whole_study_has_three_seeds_of_every_arm_and_lag_0_no_correction() -> None:
    arms = make_arms([], seeds=(0, 1, 2))
    assert len(arms) == 3 + 3 * 6 * 3
    assert {arm.method for arm in arms if arm.lag == 0} == {"none"}
    assert {arm.method for arm in arms if arm.lag == 8} == set(METHODS)
    assert [arm.seed for arm in arms] == sorted(arm.seed for arm in arms)


@pytest.mark.parametrize("name", ["8", "tis", "8-tiss", "x-tis", "-1-tis"])
def test_an_unknown_arm_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--arms {name}: write LAG-METHOD.*icepop"):
        make_arms([name], seeds=(0,))


def test_an_arm_below_90_percent_of_its_lag_does_not_count() -> None:
    arm = Arm(10, "tis", 0)
    assert result(arm, lag=9.0).counts
    assert not result(arm, lag=8.99).counts
    assert result(Arm(0, "none", 0), lag=0.0).counts


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    kept = result(Arm(8, "opsm-0.1", 2), 0.1, 0.2, failure="NaN")
    assert write_result(kept, tmp_path).name == "arm-8-opsm-0.1-2.json"
    assert read_result(kept.arm, tmp_path) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["arm-8-opsm-0.1-2.json"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_torn_file_is_no_finished_arm(tmp_path: Path, share: float) -> None:
    arm = Arm(2, "tis", 0)
    path = write_result(result(arm), tmp_path)
    data = path.read_bytes().rstrip()
    path.write_bytes(data[: int(share * len(data))])
    assert finished([arm], tmp_path, settings=SETTINGS) == {}


def test_a_file_of_another_arm_is_no_finished_arm(tmp_path: Path) -> None:
    path = write_result(result(Arm(2, "tis", 0)), tmp_path)
    path.rename(path_of(Arm(2, "tis", 1), tmp_path))
    assert read_result(Arm(2, "tis", 1), tmp_path) is None


def test_arms_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    arm = Arm(2, "tis", 0)
    write_result(result(arm), tmp_path)
    other = msgspec.structs.replace(SETTINGS, steps=7)
    with pytest.raises(ConfigError, match=r"was made with steps 5 \(now 7\); give the same settings"):
        finished([arm], tmp_path, settings=other)


def test_finished_arms_are_skipped_and_torn_ones_redone(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(steps=20, model=digest_of(model))
    arms = make_arms(["0-none", "2-none"], seeds=(0, 1))
    for arm in arms[:3]:
        write_result(result(arm, 0.9, settings=settings), tmp_path)
    torn = path_of(arms[0], tmp_path)
    torn.write_bytes(torn.read_bytes()[:50])
    started = []

    def run(self: staleness_study.Children, arm: Arm) -> ArmResult:
        started.append(arm)
        if arm == arms[3]:
            raise RunError("arm 2-none-1: exit code 1")
        return result(arm, 0.8, settings=settings)

    monkeypatch.setattr(staleness_study.Children, "run", run)
    given = ["--arms", "0-none", "2-none", "--seeds", "0", "1", "--steps", "20"]
    code = staleness_study.main([*given, "--out", str(tmp_path), "--model", str(model)])
    printed = capsys.readouterr().out
    assert sorted(started) == sorted([arms[0], arms[3]])
    assert code == 1
    assert "4 arms of 20 steps, 2 finished before" in printed
    assert "lag 0 none seed 0: accuracy 0.800 -> 0.800  realised lag 0.00 (100%)" in printed
    assert "arm 2-none-1: exit code 1" in printed
    assert "| 2 | none |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_an_arm_runs_in_a_process_of_its_own(tmp_path: Path, model: Path) -> None:
    children = staleness_study.Children(tmp_path, settings=SETTINGS, model=model)
    arm = Arm(0, "none", 0)
    found = children.run(arm)
    assert found == read_result(arm, tmp_path)
    assert found is not None
    assert found.cpu_s > 0


def test_an_arm_that_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    children = staleness_study.Children(tmp_path, settings=SETTINGS, model=tmp_path)
    with pytest.raises(RunError, match=r"arm 0-none-0: exit code 3\nno such model"):
        children.run(Arm(0, "none", 0))


@pytest.fixture
def _keyboard() -> Iterator[None]:
    """Python's own handling of SIGINT: a suite that a shell started in the background inherits none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_keyboard")
def test_an_interrupt_ends_the_arms_that_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # An arm that never ends by itself, started the moment before the keyboard is touched.
    endless = tmp_path / "python"
    endless.write_text("#!/bin/sh\nkill -INT $PPID\nexec sleep 600\n", encoding="utf-8")
    endless.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(endless))
    out = tmp_path / "out"
    given = ["--arms", "0-none", "2-none", "--seeds", "0", "--steps", "20"]
    code = staleness_study.main([*given, "--workers", "1", "--out", str(out), "--model", str(model)])
    assert code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["arm-0-none-0.log"]


def test_nothing_starts_after_a_stop(tmp_path: Path, model: Path) -> None:
    children = staleness_study.Children(tmp_path, settings=SETTINGS, model=model)
    children.stop()
    assert children.run(Arm(0, "none", 0)) is None
    assert read_result(Arm(0, "none", 0), tmp_path) is None


# ---- figures and verdicts


def test_the_final_accuracy_is_the_mean_of_the_last_three_evaluations() -> None:
    assert result(Arm(0, "none", 0), 0.0, 0.3, 0.6, 0.9).final == pytest.approx(0.6)
    assert result(Arm(0, "none", 0), 0.9, failure="NaN").final == 0.0


def results_of(finals: dict[tuple[int, str], list[float]]) -> list[ArmResult]:
    return [
        result(Arm(lag, method, seed), value)
        for (lag, method), values in finals.items()
        for seed, value in enumerate(values)
    ]


def test_verdicts_are_sentences() -> None:
    finals = {
        (0, "none"): [0.94, 0.95, 0.96],
        (8, "none"): [0.50, 0.60, 0.70],
        (8, "tis"): [0.90, 0.91, 0.93],
        (8, "opsm"): [0.61, 0.62, 0.63],
        (8, "decoupled"): [0.89, 0.92, 0.95],
        (8, "icepop"): [0.2, 0.3, 0.4],
    }
    rows = study_report.make_rows(results_of(finals))
    assert study_report.sentences(rows) == [
        "Lag 0 without correction ends at 0.950; a method holds when its median is at least 0.900.",
        "At lag 8, holds: tis (0.910), decoupled (0.920, not in every seed).",
        "At lag 8, does not hold: none (0.600), opsm (0.620), icepop (0.300).",
        "At lag 8, tis helps: +0.310 against no correction.",
        "At lag 8, opsm does not help: +0.020 against no correction, which is within 0.05.",
        "At lag 8, decoupled helps: +0.320 against no correction.",
        "At lag 8, icepop is worse than no correction, by 0.300.",
    ]


def test_where_no_correction_holds_none_is_needed_and_a_worse_one_is_named() -> None:
    finals = {(0, "none"): [0.95], (2, "none"): [0.94], (2, "tis"): [0.95], (2, "icepop"): [0.5]}
    assert study_report.sentences(study_report.make_rows(results_of(finals)))[1:] == [
        "At lag 2, holds: none (0.940), tis (0.950).",
        "At lag 2, does not hold: icepop (0.500).",
        "At lag 2 no correction is needed: none holds, and there is nothing to mend.",
        "At lag 2, icepop is worse than no correction, by 0.440.",
    ]


def test_exactly_the_margin_below_still_holds() -> None:
    rows = study_report.make_rows(results_of({(0, "none"): [0.95], (2, "none"): [0.90]}))
    assert study_report.verdicts(rows)[2, "none"].holds is True


def test_without_lag_0_there_is_no_verdict() -> None:
    rows = study_report.make_rows(results_of({(8, "none"): [0.5]}))
    assert study_report.verdicts(rows)[8, "none"].words == "-"
    assert study_report.sentences(rows)[0].startswith("No verdict")


def test_arms_that_do_not_count_are_in_the_table_and_out_of_the_figures() -> None:
    given = [
        *results_of({(0, "none"): [0.9]}),
        result(Arm(8, "tis", 0), 0.8),
        result(Arm(8, "tis", 1), 0.1, lag=7.0),
        result(Arm(32, "tis", 0), 0.9, lag=20.0),
    ]
    rows = study_report.make_rows(given)
    assert [row.finals for row in rows] == [[0.9], [0.8], []]
    lines = study_report.table(rows)
    assert lines[3] == "| 8 | tis | 7.50 | 0.800, 1 not counted | 0.000 | - | does not hold |"
    assert lines[4] == "| 32 | tis | 20.00 | not counted (1 short of 90%) | - | - | - |"
    assert any("At lag 32, without a verdict" in said for said in study_report.sentences(rows))


def test_the_table_shows_median_spread_and_what_a_method_did() -> None:
    metrics = [{"train/tis_clipfrac": value} for value in (0.01, 0.03)]
    given = [
        *results_of({(0, "none"): [0.9]}),
        *(result(Arm(2, "tis", i), 0.1, 0.8 + i / 10, metrics=metrics[i]) for i in range(2)),
    ]
    line = study_report.table(study_report.make_rows(given))[3]
    assert line == "| 2 | tis | 2.00 | 0.475 (0.450-0.500) | 0.850 | 2.00% | does not hold |"


def test_the_document_holds_command_cost_and_table() -> None:
    given = results_of({(0, "none"): [0.9], (2, "opsm"): [0.9]})
    text = "\n".join(study_report.document(given, command="python -m x", machine={"cpu": "some"}))
    assert "`python -m x`" in text
    assert "2 arms, 2 core-seconds (1 an arm); commit c; some" in text
    assert "- opsm: whole sequences masked" in text
    assert "\n| 2 | opsm |" in text


def test_plots_are_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    finals = {(0, "none"): [0.9, 0.8], (2, "none"): [0.7, 0.8], (2, "tis"): [0.9, 0.9]}
    paths = study_report.plot(results_of(finals), tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "final.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_nothing_is_plotted_when_nothing_counts(tmp_path: Path) -> None:
    assert study_report.plot([result(Arm(8, "tis", 0), lag=1.0)], tmp_path) == []
