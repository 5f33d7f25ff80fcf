"""What is drawn fits where it is drawn, holds the numbers, and falls back to lines without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from asyncrl.errors import ExitCode
from asyncrl.obs.summary import RunSummary, SummaryTable, next_steps
from asyncrl.obs.top import QUIET_S, Frame, Top
from asyncrl.obs.view import (
    EvalUpdate,
    MemberUpdate,
    NoteUpdate,
    PlanUpdate,
    QueueUpdate,
    RunView,
    StepUpdate,
)


def a_run(*, generators: int, steps: int = 30) -> RunView:
    view = RunView(now=0.0)
    view.apply(
        PlanUpdate(run="a-run-with-a-long-name", run_dir="runs/r", total_steps=150, max_staleness=2), now=0
    )
    view.apply(EvalUpdate(version=0, values={"addition": 0.41}), now=1.0)
    for number in range(1, steps + 1):
        t = float(number)
        update = StepUpdate(
            step=number,
            version=number,
            reward=number / steps,
            num_tokens=123_456,
            staleness_mean=1.4,
            staleness_max=2,
            response_len=12_345.0,
            truncated_ratio=0.031,
        )
        view.apply(update, now=t)
        for name, role in [
            ("trainer", "trainer"),
            *((f"generator-{i}", "generator") for i in range(generators)),
        ]:
            state = "dead" if name == "generator-17" else "running"
            view.apply(
                MemberUpdate(
                    name=name,
                    role=role,
                    state=state,
                    version=number,
                    wall_s=t,
                    busy_s=t / 2,
                    waits={"batch": t / 2},
                    waits_for="batch",
                    waits_for_s=9.0,
                    generated_tokens=10_000_000 * number,
                    push_pause_s=0.012,
                ),
                now=t,
            )
    view.apply(EvalUpdate(version=30, values={"addition": 0.87}), now=steps)
    counts = dict.fromkeys(
        ("fresh", "generating", "generated", "scoring", "scored", "filtering", "ready"), 9999
    )
    view.apply(QueueUpdate(counts=counts, tickets_used=41, tickets_total=48), now=steps)
    view.apply(NoteUpdate(text="generator-17 was killed; " * 8), now=steps)
    return view


def drawn(renderable: object, *, width: int, height: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(record=True, width=width, height=height, force_terminal=True, file=file)
    console.print(renderable)
    return console.export_text().splitlines()


@pytest.mark.parametrize("generators", [1, 4, 200])
@pytest.mark.parametrize(("width", "height"), [(60, 18), (80, 24), (120, 40), (200, 60)])
def test_a_frame_fits_its_terminal(width: int, height: int, generators: int) -> None:
    lines = drawn(Frame(a_run(generators=generators), now=30.5), width=width, height=height)
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width


def test_a_frame_at_80_columns_shows_the_numbers() -> None:
    lines = drawn(Frame(a_run(generators=2), now=30.5), width=80, height=24)
    text = "\n".join(lines)
    for expected in (
        "step 30 of 150",
        "about 2m00s left",
        "1.00",
        "0.87  from 0.41 at version 30",
        "20M tok/s",
        "123k tok/s",
        "max 2, bound 2",
        "3% cut",
        "41 of 48 used",
        "10k",
        "batch, for 9.0s now",
        "generation is the bottleneck: the trainer waits 50% of the time for a batch",
    ):
        assert expected in text, expected


def test_many_members_are_summed_up_and_the_dead_one_is_shown() -> None:
    lines = drawn(Frame(a_run(generators=200), now=30.5), width=80, height=24)
    text = "\n".join(lines)
    assert "generator-17" in text
    shown = sum(line.startswith("generator-") and "dead" not in line for line in lines[:-1])
    (rest,) = [line for line in lines if line.startswith("and ")]
    assert f"{199 - shown} generator running" in rest


def test_a_frame_before_the_first_update_is_drawn() -> None:
    lines = drawn(Frame(RunView(now=0.0), now=0.1), width=80, height=24)
    assert "starting" in lines[0]


def test_a_terminal_without_unicode_gets_ascii() -> None:
    lines = drawn(Frame(a_run(generators=2), now=30.5), width=80, height=24, encoding="ascii")
    assert all(line.isascii() for line in lines)
    assert "====" in "\n".join(lines)


def test_without_a_terminal_steps_and_evaluations_are_lines() -> None:
    file = io.StringIO()
    with Top(RunView(now=0.0), console=Console(file=file, width=40)) as top:
        top.apply(PlanUpdate(run="r", run_dir="d", total_steps=9), now=0.0)
        top.apply(
            StepUpdate(step=1, version=1, reward=0.25, num_tokens=10, staleness_mean=0, staleness_max=0),
            now=1.0,
        )
        top.apply(EvalUpdate(version=1, values={"addition": 0.5}, num_samples=4), now=2.0)
        top.apply(NoteUpdate(text="said \x1b[2J"), now=2.5)
        top.refresh(now=3.0)
    first, second, third = file.getvalue().splitlines()
    assert first.startswith("step 1/9 reward 0.25 ")
    assert second == "eval version 1 addition 0.500 samples 4"
    assert third == r"said \x1b[2J"


def test_without_a_terminal_a_long_silence_is_broken() -> None:
    file = io.StringIO()
    with Top(RunView(now=0.0), console=Console(file=file)) as top:
        for now in (0.0, QUIET_S - 1, QUIET_S, QUIET_S + 1):
            top.refresh(now=now)
    assert file.getvalue().splitlines() == ["starting for 30s, step 0: measuring who waits for whom"]


def test_a_terminal_is_redrawn_no_more_often_than_the_eye_needs() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24)
    with Top(RunView(now=0.0), console=console) as top:
        top.refresh(now=1.0)
        size = len(file.getvalue())
        top.refresh(now=1.1)
        assert len(file.getvalue()) == size
        top.refresh(now=1.1, force=True)
        assert len(file.getvalue()) > size


def a_summary(**changes: object) -> RunSummary:
    fields: dict[str, object] = {
        "run": "quickstart",
        "run_dir": "runs/quickstart",
        "exit_code": ExitCode.FINISHED,
        "steps": 150,
        "total_steps": 150,
        "wall_s": 105.0,
        "num_samples": 38_400,
        "generated_tokens": 1_234_567,
        "trained_tokens": 1_200_000,
        "accuracy_before": 0.41,
        "accuracy_after": 0.945,
        "accuracy_exported": 0.94,
        "export_dir": "runs/quickstart/" + "x" * 90,
        "overlap": 0.97,
        "staleness_mean": 1.42,
        "staleness_max": 2,
        "max_staleness": 2,
        "audit_closes": True,
    }
    return RunSummary(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_summary_fits_and_cuts_no_path(width: int) -> None:
    lines = drawn(SummaryTable(a_summary()), width=width, height=24)
    assert max(len(line) for line in lines) <= width
    assert "x" * 90 in "".join(line.strip() for line in lines)


def test_the_summary_says_what_came_out() -> None:
    text = "\n".join(drawn(SummaryTable(a_summary()), width=80, height=24))
    for expected in ("finished", "38,400 trained", "1.2M generated", "0.410 to 0.945", "0.5 points apart"):
        assert expected in text, expected
    assert "closes" in text


def test_an_audit_that_does_not_close_is_not_overlooked() -> None:
    text = "\n".join(drawn(SummaryTable(a_summary(audit_closes=False)), width=80, height=24))
    assert "DOES NOT CLOSE" in text


def test_what_to_try_next_depends_on_the_end() -> None:
    drained = next_steps(a_summary(exit_code=ExitCode.DRAINED, run_dir="runs/my run"))
    assert drained == [("go on", "asyncrl launch --resume 'runs/my run'")]
    text = "\n".join(drawn(SummaryTable(a_summary(run_dir="runs/[red]")), width=80, height=24))
    assert "asyncrl audit 'runs/[red]'" in text
    assert any("replay" in command for _, command in next_steps(a_summary()))
