"""Whether training sees the answers that were generated, or only the short ones of them.

Every sample of the lane train is counted once, when its group leaves the desk: into the lengths *issued*
whatever became of it, and into the lengths *trained* when its group entered a batch. Generation that
is cut short is counted with the tokens it had, a lower bound of its length. Groups left over at the end of a
run, and those never leased, are not counted.

A histogram has one bucket per power of two: bucket 0 holds length 0, bucket b lengths 2^(b-1) .. 2^b - 1.
Memory is fixed: `WINDOW` slots, one per recent batch. A restarted desk begins with empty slots.

Pure: no clock, no file. It decides nothing about samples.
"""

from __future__ import annotations

import math
import sqlite3
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from asyncrl.messages.sample import Settled

WINDOW = 16
"""Recent batches, the one that gathers included."""
BUCKETS = 49
"""Lengths up to 2^48 - 1; longer ones count as that."""
FAR = 0.1
"""Distance from which long answers count as starving, where it is no chance."""
NEAR = 0.05
"""Distance below which they do not any more."""
CHANCE = 1.63
"""Kolmogorov-Smirnov: CHANCE / sqrt(n) is reached by chance in one of 100 cases."""
QUANTILES = (0.5, 0.9, 0.99)
UNCOUNTED = (Settled.TRAINED, Settled.EVALUATED)
"""Reasons that threw no token away."""


class Histogram:
    """Counts of lengths by powers of two, and their exact sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total = 0

    @property
    def count(self) -> int:
        """Lengths counted."""
        return sum(self.counts)

    def add(self, length: int, times: int = 1) -> None:
        """Count a length."""
        self.counts[min(length.bit_length(), BUCKETS - 1)] += times
        self.total += length * times

    def merge(self, other: Histogram) -> None:
        """Count whatever the other one counted."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def mean(self) -> float:
        """Exact; NaN where nothing was counted."""
        count = self.count
        return self.total / count if count else math.nan

    def quantile(self, share: float) -> float:
        """The length that `share` of all do not exceed, linear inside its bucket; NaN without any."""
        wanted, seen = share * self.count, 0
        for bucket, count in enumerate(self.counts):
            if count and seen + count >= wanted:
                low, high = (1 << bucket) >> 1, max(0, (1 << bucket) - 1)
                return low + (high - low) * max(0.0, wanted - seen) / count
            seen += count
        return math.nan


def distance(issued: Histogram, trained: Histogram) -> float:
    """Max over b of F_trained(b) - F_issued(b), F(b) the share of lengths in buckets up to b.

    The one-sided Kolmogorov-Smirnov distance over the buckets, in 0 .. 1: 0 where training sees all lengths
    as they come (or rather long ones); the share of answers left out where all of these are longer than the
    trained ones. 0 without counts on both sides.
    """
    if not issued.count or not trained.count:
        return 0.0
    pairs = zip(accumulate(issued.counts), accumulate(trained.counts), strict=True)
    return max(0.0, *(short / trained.count - every / issued.count for every, short in pairs))


@dataclass(slots=True)
class Slot:
    """What left the desk between two cuts."""

    issued: Histogram = field(default_factory=Histogram)
    trained: Histogram = field(default_factory=Histogram)
    lost: Counter[str] = field(default_factory=Counter)
    """Tokens thrown away by reason."""


class Lengths:
    """See the module's docstring."""

    def __init__(self, *, window: int = WINDOW) -> None:
        self._slots: deque[Slot] = deque([Slot()], maxlen=window)
        self._starving = False

    def batched(self, lengths: Iterable[int]) -> None:
        """A group enters a batch; its samples have these lengths."""
        slot = self._slots[-1]
        for length in lengths:
            slot.issued.add(length)
            slot.trained.add(length)

    def dropped(self, lengths: Iterable[int], reason: Settled) -> None:
        """A group settles without being trained."""
        slot = self._slots[-1]
        for length in lengths:
            slot.issued.add(length)
            slot.lost[str(reason)] += length

    def cut(self) -> None:
        """The batch is complete; the oldest slot may go."""
        self._slots.append(Slot())

    def sums(self) -> Slot:
        """All slots together."""
        whole = Slot()
        for slot in self._slots:
            whole.issued.merge(slot.issued)
            whole.trained.merge(slot.trained)
            whole.lost.update(slot.lost)
        return whole

    def metrics(self) -> dict[str, float]:
        """lengths/*: the window as numbers; nothing before the first sample."""
        return metrics(self.sums())

    def concern(self, *, oldest_batches: int, patience: int, on_straggler: str) -> str:
        """Why long answers are starving, in words; empty while they are not.

        Begins at `FAR` and where chance does not explain it, or when the oldest unfinished group is
        `patience` batches old; ends below `NEAR`, so that it does not come and go.
        """
        whole = self.sums()
        apart = distance(whole.issued, whole.trained)
        count = whole.trained.count
        limit = NEAR if self._starving else max(FAR, CHANCE / math.sqrt(count)) if count else math.inf
        biased, old = apart >= limit, oldest_batches >= patience
        self._starving = biased
        if biased:
            return _words(whole, apart, on_straggler)
        if old:
            return (
                f"long answers are starving: the oldest unfinished group was issued {oldest_batches} batches "
                f"ago; raise generation capacity, or set rollout.on_straggler to wait for it or to drop it"
            )
        return ""


def metrics(slot: Slot) -> dict[str, float]:
    """lengths/*: two histograms as numbers; nothing where both are empty."""
    if not slot.issued.count:
        return {}
    values = {"lengths/distance": distance(slot.issued, slot.trained)}
    for name, histogram in (("issued", slot.issued), ("trained", slot.trained)):
        if histogram.count:
            values[f"lengths/{name}/mean"] = histogram.mean()
            for share in QUANTILES:
                values[f"lengths/{name}/p{share * 100:.0f}"] = histogram.quantile(share)
    return values


def tokens_dropped(totals: Mapping[str, int]) -> dict[str, int]:
    """Response tokens thrown away since the run began, by reason, from the ledger's running totals.

    A reason is one of `Settled`, or "regenerated": received, given up, and sampled anew.
    """
    dropped = {str(r): totals.get(f"settled.{r}.tokens", 0) for r in Settled if r not in UNCOUNTED}
    return dropped | {"regenerated": totals.get("regenerated.tokens", 0)}


def of_records(db: sqlite3.Connection) -> Slot:
    """The same over a whole run, from its tables. Reads only."""
    whole = Slot()
    for length, trained, times in db.execute(
        "select s.tokens, g.batch >= 0, count(*) from samples s join groups g using (group_id)"
        " where g.lane = 'train' and g.version >= 0 and (g.batch >= 0 or g.reason is not null)"
        " and coalesce(g.reason, '') <> 'unneeded' group by 1, 2"
    ):
        whole.issued.add(length, times)
        if trained:
            whole.trained.add(length, times)
    return whole


def in_words(slot: Slot) -> str:
    """Both distributions in half a line; empty without samples."""
    if not slot.issued.count or not slot.trained.count:
        return ""
    half, most = QUANTILES[:2]
    both = (
        f"{name} {histogram.quantile(half):.0f} / {histogram.quantile(most):.0f}"
        for name, histogram in (("generated", slot.issued), ("trained", slot.trained))
    )
    apart = distance(slot.issued, slot.trained)
    return f"{', '.join(both)} tokens (median / 90%), distance {apart:.2f}"


def _words(whole: Slot, apart: float, on_straggler: str) -> str:
    trained, issued = whole.trained.quantile(0.9), whole.issued.quantile(0.9)
    reason, _ = max(whole.lost.items(), key=lambda item: item[1], default=("", 0))
    late = reason in {Settled.STALE, Settled.SURPLUS} and on_straggler == "drop"
    advice = (
        'rollout.on_straggler = "drop" leaves late groups out: raise rollout.max_staleness, or "wait"'
        if late
        else "see tokens_dropped/* for what throws them away"
    )
    return (
        f"long answers are starving: 90% of the trained answers have at most {trained:.0f} tokens, 90% of "
        f"the generated ones {issued:.0f} "
        f"(distance {apart:.2f} over the last {WINDOW} batches); most tokens were thrown away as "
        f"{reason or 'nothing'}; {advice}"
    )
