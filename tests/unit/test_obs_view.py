"""The view of a run: rates, ETA, history and the bottleneck are what the updates say."""

from __future__ import annotations

import pytest

from asyncrl.obs.diagnosis import Shares, bottleneck
from asyncrl.obs.lines import eval_text, step_text, waiting_text
from asyncrl.obs.text import duration, short, size, sparkline
from asyncrl.obs.view import (
    EvalUpdate,
    MemberUpdate,
    NoteUpdate,
    PlanUpdate,
    QueueUpdate,
    RunView,
    StepUpdate,
)


def step(number: int, *, reward: float = 0.5) -> StepUpdate:
    return StepUpdate(
        step=number, version=number, reward=reward, num_tokens=3000, staleness_mean=1.4, staleness_max=2
    )


def member(name: str, *, wall_s: float, state: str = "running", **fields: object) -> MemberUpdate:
    role = name.partition("-")[0]
    return MemberUpdate(name=name, role=role, state=state, wall_s=wall_s, **fields)  # type: ignore[arg-type]


def stepping(*, steps: int, every_s: float, total: int | None = 100) -> RunView:
    view = RunView(now=0.0)
    view.apply(PlanUpdate(run="demo", run_dir="runs/demo", total_steps=total, max_staleness=2), now=0.0)
    for number in range(1, steps + 1):
        view.apply(step(number), now=number * every_s)
    return view


def test_the_eta_is_the_remaining_steps_at_the_recent_pace() -> None:
    view = stepping(steps=10, every_s=2.0)
    assert view.step_s == 2.0
    assert view.eta_s(now=20.0) == 180.0
    assert view.eta_s(now=21.0) == 179.0
    assert view.eta_s(now=1000.0) == 178.0


def test_the_eta_follows_the_recent_pace_not_the_first_one() -> None:
    view = stepping(steps=5, every_s=60.0)
    for number in range(6, 41):
        view.apply(step(number), now=300.0 + (number - 5) * 1.0)
    assert view.eta_s(now=335.0) == pytest.approx(60.0)


def test_an_unknown_pace_or_end_has_no_eta_and_a_finished_run_has_none_left() -> None:
    assert stepping(steps=1, every_s=1.0).eta_s(now=1.0) is None
    assert stepping(steps=9, every_s=1.0, total=None).eta_s(now=9.0) is None
    assert stepping(steps=100, every_s=1.0).eta_s(now=500.0) == 0.0


def test_a_trainer_that_goes_back_rewrites_the_history() -> None:
    view = stepping(steps=10, every_s=1.0)
    view.apply(step(8, reward=0.9), now=30.0)
    assert view.step == 8
    assert view.rewards == [0.5] * 7 + [0.9]
    eta = view.eta_s(now=30.0)
    assert eta is not None
    assert eta > 0


def test_rates_are_those_of_the_window() -> None:
    view = stepping(steps=21, every_s=2.0)
    assert view.trained_per_s == 1500.0
    for second in range(60):
        tokens = 100 * second if second < 30 else 3000 + 1000 * (second - 30)
        view.apply(member("generator-0", wall_s=second, generated_tokens=tokens), now=float(second))
        view.apply(member("generator-1", wall_s=second, generated_tokens=0), now=float(second))
    assert view.generated_per_s == pytest.approx(1000.0)


def test_a_restarted_or_dead_generator_never_makes_a_rate_negative() -> None:
    view = RunView(now=0.0)
    view.apply(member("generator-0", wall_s=10.0, generated_tokens=9000), now=10.0)
    view.apply(member("generator-0", wall_s=0.5, generated_tokens=10), now=12.0)
    assert view.generated_per_s == 0.0
    view.apply(member("generator-0", wall_s=1.5, generated_tokens=110), now=13.0)
    assert view.generated_per_s == 100.0
    view.apply(member("generator-0", wall_s=1.5, state="dead", generated_tokens=110), now=14.0)
    assert view.generated_per_s == 0.0


def test_members_are_in_order_and_those_that_left_are_gone() -> None:
    view = RunView(now=0.0)
    for name in ("reward-0", "generator-10", "generator-2", "trainer"):
        view.apply(member(name, wall_s=1.0), now=1.0)
    assert [m.report.name for m in view.present] == ["trainer", "generator-2", "generator-10", "reward-0"]
    view.apply(member("generator-2", wall_s=2.0, state="left"), now=2.0)
    assert "generator-2" not in [m.report.name for m in view.present]


def test_accuracy_is_that_of_the_newest_version_whatever_came_last() -> None:
    view = RunView(now=0.0)
    view.apply(EvalUpdate(version=20, values={"a": 0.8, "b": 0.6}), now=1.0)
    view.apply(EvalUpdate(version=0, values={"a": 0.4}), now=2.0)
    assert view.accuracy == (20, 0.7)
    assert view.first_accuracy == (0, 0.4)


def test_the_bottleneck_comes_from_recent_waits() -> None:
    view = RunView(now=0.0)
    assert view.bottleneck == "measuring who waits for whom"
    for second in (0.0, 10.0):
        view.apply(member("trainer", wall_s=second, waits={"batch": 0.43 * second}), now=second)
        view.apply(member("generator-0", wall_s=second, waits={"lease": 0.02 * second}), now=second)
    expected = "generation is the bottleneck: the trainer waits 43% of the time for a batch"
    assert view.bottleneck == expected
    for second in (30.0, 55.0):
        view.apply(member("trainer", wall_s=second, waits={"batch": 4.3}), now=second)
        view.apply(
            member("generator-0", wall_s=second, waits={"lease": 0.2 + 0.5 * (second - 10.0)}), now=second
        )
    assert view.bottleneck == "training is the bottleneck: generators wait 50% of the time for work"


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (Shares(trainer_wait=0.02, generator_wait=0.03), "balanced"),
        (Shares(trainer_wait=0.5, reward_busy=0.99, waiting_for_score=80), "scoring is the bottleneck"),
        (Shares(trainer_wait=0.5, reward_busy=0.99, waiting_for_score=0), "generation is the bottleneck"),
        (
            Shares(trainer_wait=0.3, generator_wait=0.4, max_staleness=1),
            "max_staleness = 1 is the bottleneck",
        ),
        (
            Shares(trainer_wait=0.3, generator_wait=0.4, tickets_free=9),
            "supply of work is the bottleneck",
        ),
        (Shares(trainer_wait=0.1, trainer_other=("publish", 0.3)), "publish is the bottleneck"),
    ],
)
def test_each_bottleneck_has_its_sentence(shares: Shares, words: str) -> None:
    assert words in bottleneck(shares)


def test_the_step_line_carries_every_number() -> None:
    view = stepping(steps=12, every_s=1.0, total=112)
    view.apply(QueueUpdate(counts={"ready": 32}, tickets_used=4, tickets_total=8), now=12.0)
    for second in (10.0, 12.0):
        tokens = int(5200 * second)
        view.apply(member("generator-0", wall_s=second, generated_tokens=tokens), now=second)
    assert step_text(view, now=12.0) == (
        "step 12/112 reward 0.50 gen 5.2k tok/s train 3.0k tok/s staleness 1.4 queue ready 32 eta 1m40s"
    )


def test_lines_before_anything_is_known() -> None:
    view = RunView(now=0.0)
    assert step_text(view, now=1.0).startswith("step 0 reward - gen - tok/s")
    view.apply(member("source-0", wall_s=9.0, waits_for="tickets", waits_for_s=9.0), now=9.0)
    assert "source-0 waits 9.0s for tickets" in waiting_text(view, now=9.0)
    assert eval_text(EvalUpdate(version=3, values={"b": 0.5, "a": 0.25}, num_samples=40)) == (
        "eval version 3 a 0.250 b 0.500 samples 40"
    )


def test_notes_are_kept() -> None:
    view = RunView(now=0.0)
    view.apply(NoteUpdate(text="generator-1 restarted"), now=1.0)
    assert view.note == "generator-1 restarted"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.0k"),
        (5234, "5.2k"),
        (31_000, "31k"),
        (999_700, "1.0M"),
        (None, "-"),
    ],
)
def test_short_numbers(value: float | None, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.012, "12ms"),
        (0.9996, "1.0s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (100, "1m40s"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (float("inf"), "inf"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert size(1_300_000) == "1.3 MB"
    assert size(512) == "512 B"


def test_a_sparkline_spans_its_range_and_its_width() -> None:
    assert sparkline([0.0, 1.0], width=9, bars="ab") == "ab"
    assert sparkline([float(i) for i in range(100)], width=4, bars="abcd") == "abcd"
    assert sparkline([2.0, 2.0], width=9, bars="abc") == "bb"
    assert sparkline([0.0, float("nan"), 1.0], width=9, bars="ab") == "a b"
    assert sparkline([], width=9) == ""
