"""Metrics: what is not declared cannot be written, what is written can be read, and waits add up."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from asyncrl.messages.sample import Settled
from asyncrl.obs.metrics import CATALOGUE, Catalogue, Metric, MetricsWriter, Waits, read


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_undeclared_name_is_refused_with_the_closest(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=r'"train/pg_los" is not declared.*train/pg_loss'):
        writer.write({"train/loss": 1.0, "train/pg_los": 1.0})
    assert read(tmp_path / "m.jsonl") == []


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("eval/gsm8k", "eval/{name}"),
        ("eval/gsm8k-truncated_ratio", "eval/{name}-truncated_ratio"),
        ("eval/gsm8k-pass@4", "eval/{name}-pass@{k}"),
        ("eval/lag_steps", "eval/lag_steps"),
        ("rollout/zero_std/count_1.0", "rollout/zero_std/count_{reward}"),
        ("train/lr-pg_0", "train/lr-pg_{i}"),
        ("ledger/settled/trained", "ledger/settled/trained"),
    ],
)
def test_a_name_finds_its_most_specific_declaration(name: str, declared: str) -> None:
    assert CATALOGUE.require(name).name == declared


def test_a_placeholder_does_not_cross_a_slash() -> None:
    assert CATALOGUE.find("eval/a/b") is None


def test_every_way_to_settle_has_its_counter() -> None:
    assert {CATALOGUE.require(f"ledger/settled/{reason.value}").kind for reason in Settled} == {"counter"}


def test_declarations_are_complete_and_unique() -> None:
    for metric in CATALOGUE:
        assert "/" in metric.name, metric
        assert metric.unit, metric
        assert metric.help.endswith("."), metric
    with pytest.raises(ValueError, match="twice"):
        Catalogue((Metric("a/b", "1", "x."), Metric("a/b", "s", "y.")))


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "trainer.jsonl"
    writer = MetricsWriter(path, clock=Clock())
    assert writer.write({"train/loss": np.float32(0.5), "train/step": 3}, step=2)
    assert writer.write({"train/grad_norm": math.nan})
    writer.close()
    first, second = read(path)
    assert first == {"t": 100.0, "step": 2, "train/loss": 0.5, "train/step": 3}
    assert math.isnan(second["train/grad_norm"])
    assert "step" not in second


def test_a_full_disk_is_counted_and_not_raised() -> None:
    writer = MetricsWriter(Path("/dev/full"))
    assert not writer.write({"train/loss": 1.0})
    assert writer.num_failed == 1
    writer.close()


def test_a_row_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = MetricsWriter(path)
    writer.write({"train/loss": 1.0})
    writer.close()
    with path.open("ab") as file:
        file.write(b'{"t": 1, "train/lo')
    again = MetricsWriter(path)
    again.write({"train/loss": 2.0})
    again.close()
    assert [row["train/loss"] for row in read(path)] == [1.0, 2.0]


def test_busy_and_waits_add_up_to_the_wall() -> None:
    clock = Clock()
    waits = Waits(clock=clock)
    for name, seconds in (("lease", 3.0), ("commit", 1.0), ("lease", 0.5)):
        clock.now += 2.0
        with waits(name):
            clock.now += seconds
    assert waits.snapshot() == {"lease": 3.5, "commit": 1.0}
    assert waits.busy_s() == 6.0
    assert waits.busy_s() + sum(waits.snapshot().values()) == waits.wall_s()


def test_a_running_wait_counts_and_is_named() -> None:
    clock = Clock()
    waits = Waits(clock=clock)
    assert waits.longest() is None
    with waits("batch"):
        clock.now += 4.0
        assert waits.snapshot() == {"batch": 4.0}
        assert waits.now() == [("batch", 100.0)]
        assert waits.longest() == ("batch", 4.0)
        assert waits.busy_s() == 0.0
    assert waits.now() == []


def test_overlapping_waits_are_idle_once() -> None:
    clock = Clock()
    waits = Waits(clock=clock)
    with waits("a"):
        clock.now += 1.0
        with waits("b"):
            clock.now += 2.0
    clock.now += 5.0
    assert waits.snapshot() == {"a": 3.0, "b": 2.0}
    assert waits.busy_s() == 5.0


def test_a_wait_that_fails_is_charged_and_closed() -> None:
    clock = Clock()
    waits = Waits(clock=clock)

    def fail() -> None:
        with waits("push"):
            clock.now += 1.0
            raise TimeoutError

    with pytest.raises(TimeoutError):
        fail()
    assert waits.snapshot() == {"push": 1.0}
    assert waits.now() == []
