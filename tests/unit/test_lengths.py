"""Lengths issued and lengths trained: exact in hand-made cases, and telling apart who drops long answers.

Guards that these tests were seen to fail without: the hysteresis and the chance limit of `Lengths.concern`,
the count at the cut (`Lengths.batched`), the count at a drop (`Lengths.dropped`).
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.buffer.lengths import (
    BUCKETS,
    WINDOW,
    Histogram,
    Lengths,
    distance,
    in_words,
    of_records,
    tokens_dropped,
)
from asyncrl.buffer.records import Records
from asyncrl.messages.control import Lease
from asyncrl.messages.sample import Settled
from asyncrl.obs.catalogue import CATALOGUE
from asyncrl.run.overview import overview
from tests.desk import Desk, Generator, make_plan, played
from tests.support.inside import run_inside

LENGTHS = st.lists(st.integers(0, 2**50), max_size=60)


def histogram(*lengths: int) -> Histogram:
    made = Histogram()
    for length in lengths:
        made.add(length)
    return made


def concern(lengths: Lengths, *, oldest: int = 0, on_straggler: str = "drop") -> str:
    return lengths.concern(oldest_batches=oldest, patience=6, on_straggler=on_straggler)


def test_buckets_are_powers_of_two() -> None:
    counts = histogram(0, 1, 2, 3, 4, 7, 8, 2**60).counts
    assert counts[:5] == [1, 1, 2, 2, 1]
    assert counts[BUCKETS - 1] == 1
    assert len(counts) == BUCKETS


def test_quantiles_lie_in_their_bucket_and_the_mean_is_exact() -> None:
    made = histogram(*[10] * 50, *[100] * 50)
    assert made.mean() == 55.0
    assert made.quantile(0.5) == 15.0, "the upper end of 8 .. 15"
    assert made.quantile(0.75) == 64 + 63 * 0.5
    assert math.isnan(Histogram().quantile(0.5))
    assert math.isnan(Histogram().mean())


def test_the_distance_by_hand() -> None:
    issued, trained = histogram(10, 10, 10, 1000), histogram(10, 10, 10)
    assert distance(issued, trained) == pytest.approx(0.25)
    assert distance(trained, trained) == 0.0
    assert distance(issued, histogram(1000)) == 0.0, "only shorter ones count: nobody starves"
    assert distance(issued, Histogram()) == 0.0


@given(LENGTHS, LENGTHS)
def test_the_distance_is_a_share_and_zero_when_all_is_trained(kept: list[int], lost: list[int]) -> None:
    trained, issued = histogram(*kept), histogram(*kept, *lost)
    assert 0.0 <= distance(issued, trained) <= 1.0
    if not lost:
        assert distance(issued, trained) == 0.0
    if kept and lost and min(lost) > 2 * max(kept) + 2:
        assert distance(issued, trained) == pytest.approx(len(lost) / (len(kept) + len(lost)))


@given(LENGTHS.filter(bool), st.floats(0.01, 1.0))
def test_a_quantile_is_between_half_and_double_of_the_true_one(lengths: list[int], share: float) -> None:
    lengths = [min(length, 2**47) for length in lengths]
    true = sorted(lengths)[max(0, math.ceil(share * len(lengths)) - 1)]
    found = histogram(*lengths).quantile(share)
    assert true / 2 <= found <= max(2 * true, 1)


@given(st.lists(st.tuples(st.booleans(), LENGTHS), max_size=60))
def test_memory_is_fixed_and_old_batches_are_forgotten(events: list[tuple[bool, list[int]]]) -> None:
    lengths = Lengths(window=4)
    slots: list[int] = [0]
    for trained, values in events:
        if trained:
            lengths.batched(values)
        else:
            lengths.dropped(values, Settled.STALE)
        slots[-1] += len(values)
        lengths.cut()
        slots = [*slots, 0][-4:]
        assert len(lengths._slots) <= 4
    assert lengths.sums().issued.count == sum(slots)


@given(st.integers(0, 2**32), st.sampled_from(["drop", "wait"]))
def test_who_drops_long_answers_is_found_out_and_who_waits_is_not(seed: int, policy: str) -> None:
    """The distance grows and the warning fires under "drop", for any seed; under "wait" both stay away."""
    draw, lengths = random.Random(seed), Lengths()
    seen = [0.0]
    for _ in range(WINDOW):
        for _ in range(24):
            length = draw.choice([20, 30, 40, 400])
            if policy == "drop" and length == 400:
                lengths.dropped([length // 4], Settled.STALE)
            else:
                lengths.batched([length])
        lengths.cut()
        seen.append(lengths.metrics()["lengths/distance"])
    words = concern(lengths, on_straggler=policy)
    if policy == "drop":
        assert seen[-1] > 0.1
        assert words.startswith("long answers are starving: 90% of the trained answers")
        assert 'thrown away as stale; rollout.on_straggler = "drop"' in words
    else:
        assert seen[-1] == 0.0
        assert words == ""


def test_filters_that_look_at_no_length_are_not_accused() -> None:
    """Half of all answers refused at random: chance alone stays below the limit, in 40 seeds of 40."""
    for seed in range(40):
        draw, lengths = random.Random(seed), Lengths()
        for _ in range(60):
            length = draw.randrange(1, 2000)
            if draw.random() < 0.5:
                lengths.batched([length])
            else:
                lengths.dropped([length], Settled.FILTERED)
        assert concern(lengths) == ""


def test_a_warning_ends_only_well_below_where_it_began() -> None:
    lengths = Lengths(window=100)
    lengths.batched([10] * 800)
    lengths.dropped([1000] * 100, Settled.STALE)
    assert concern(lengths), "1 of 9: 0.11"
    lengths.batched([1000] * 50)
    assert distance(lengths.sums().issued, lengths.sums().trained) < 0.1
    assert concern(lengths), "still"
    lengths.batched([1000] * 3000)
    assert concern(lengths) == ""


def test_an_old_group_is_a_concern_of_its_own() -> None:
    lengths = Lengths()
    assert concern(lengths, oldest=5) == ""
    assert "the oldest unfinished group was issued 6 batches ago" in concern(lengths, oldest=6)


def test_tokens_thrown_away_by_reason() -> None:
    totals = {"settled.trained.tokens": 9, "settled.stale.tokens": 3, "regenerated.tokens": 2}
    dropped = tokens_dropped(totals)
    assert {reason: n for reason, n in dropped.items() if n} == {"stale": 3, "regenerated": 2}
    assert all(CATALOGUE.find(f"tokens_dropped/{reason}") for reason in dropped)


class Uneven(Desk):
    """One group in four has answers ten times as long."""

    def _take(self, generator: Generator, lease: Lease) -> None:
        before = len(generator.jobs)
        super()._take(generator, lease)
        for job in generator.jobs[before:]:
            job.length = max(60 if job.group_id % 4 == 1 else 6, job.offset + 1)


@pytest.mark.parametrize("policy", ["drop", "wait"])
def test_the_desk_tells_drop_from_wait(tmp_path: Path, policy: str) -> None:
    """A whole run at the real desk: long groups overtaken and dropped, or waited for."""
    plan = make_plan(
        num_rollout=24, batch_size=4, num_samples=2, max_staleness=1,
        rollout=f'on_straggler = "{policy}"' + ("\nover_sampling_batch_size = 8" if policy == "drop" else ""),
    )  # fmt: skip
    desk = Uneven(tmp_path, plan, generators=3)
    heard, ages = set(), []
    for _ in range(2000):
        desk.play(rounds=1)
        oldest = desk.ledger.book.oldest_unfinished()
        ages.append(0 if oldest is None else desk.ledger.batches.next_batch - oldest.version)
        heard.add(desk.ledger.lengths.concern(oldest_batches=ages[-1], patience=4, on_straggler=policy))
        if desk.ledger.finished:
            break
    assert desk.ledger.finished
    assert max(ages) <= 2, "the staleness bound is a bound of this age, too"
    dropped = tokens_dropped(desk.ledger.book.totals)
    whole = of_records(desk.store.db)
    apart = distance(whole.issued, whole.trained)
    desk.close()
    if policy == "drop":
        assert dropped["stale"] + dropped["surplus"] > 0
        assert apart > 0.1
        assert any(words.startswith("long answers are starving") for words in heard)
    else:
        assert dropped["stale"] == dropped["surplus"] == 0
        assert apart == 0.0
        assert heard == {""}


def test_status_says_what_was_thrown_away(tmp_path: Path) -> None:
    run = played(tmp_path)
    facts = overview(run)
    assert "filtered" in facts["dropped"]
    with Records(run) as records:
        assert facts["lengths"] == in_words(of_records(records.db))
    assert facts["lengths"].startswith("generated ")


def test_the_metrics_of_a_whole_run(tmp_path: Path, model: Path) -> None:
    run = run_inside(tmp_path, model, {"run.num_rollout": 12})
    assert run.code == 0
    rows = run.metrics("buffer")
    assert all("lengths/oldest_group_s" in row and "tokens_dropped/stale" in row for row in rows)
    measured = [row for row in rows if "lengths/distance" in row]
    assert measured, "batches were cut for longer than one tick"
    assert all(row["lengths/distance"] == 0.0 for row in measured), "whoever waits drops nobody"
    assert 1 <= measured[-1]["lengths/trained/p50"] <= 16
    summary = (run.path / "summary.json").read_text(encoding="utf-8")
    assert '"lengths": "generated ' in summary
    facts = overview(run.path)
    assert facts["lengths"]
