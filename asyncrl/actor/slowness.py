"""Which members are slow, measured against the others, and how many may be killed for it. Pure.

A generator is slow when, over a window in which it had work, it samples far fewer tokens per second than the
median of the other generators, and also far fewer per second and sample in work: one with little to do has a
low rate of the first kind, one with much to do of the second kind, and neither is ill. An event loop that
stands still once is no sign of anything, three times within a quarter of a minute it is.

Where many are slow at once the cause is not in them: then nobody is killed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from asyncrl.actor.health import Doubt
from asyncrl.obs.view import MemberUpdate

WINDOW_S = 10.0
"""Speeds are taken over this much of the past."""
BUSY = 0.5
"""A speed says something when there was work for this share of the window."""
SLOW = 0.25
"""Below this share of the others' median a generator becomes slow ..."""
STILL_SLOW = 0.5
"""... and stays so up to this share."""
LOAD_S = 5.0
"""A load of weights that takes less is never slow ..."""
LOAD_FACTOR = 4.0
"""... and is slow beyond so many times the others' median."""
LAG_S = 2.0
"""A standstill of an event loop that is worth counting."""
LAGS = 3
"""So many of them within LAG_WINDOW_S are a doubt."""
LAG_WINDOW_S = 15.0


class Speed(NamedTuple):
    """What a generator did while it had work."""

    tokens_per_s: float
    tokens_per_sample_s: float
    """Per second and sample in work."""


class Pace:
    """The recent past of one member."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, int, int]] = deque()
        """(when, tokens generated so far, samples in work) of each report."""
        self._lags: deque[float] = deque(maxlen=LAGS)
        """When its event loop was reported to have stood still."""
        self.load_s: float | None = None
        """How long its last load of weights took."""
        self.speed: Speed | None = None
        """Over the window; None while it says nothing."""
        self.slow = False

    def report(self, update: MemberUpdate, now: float) -> None:
        """It reported."""
        if self._past and update.generated_tokens < self._past[-1][1]:
            self._past.clear()  # another life
        self._past.append((now, update.generated_tokens, update.held))
        while len(self._past) > 2 and now - self._past[1][0] >= WINDOW_S:
            self._past.popleft()
        self.load_s = update.load_s if update.load_s is not None else self.load_s
        if update.lag_s >= LAG_S:
            self._lags.append(now)
        self.speed = self._measure()

    def _measure(self) -> Speed | None:
        busy = in_work = 0.0
        tokens = 0
        for before, after in zip(self._past, list(self._past)[1:], strict=False):
            if before[2]:
                busy += after[0] - before[0]
                in_work += (after[0] - before[0]) * before[2]
                tokens += after[1] - before[1]
        if busy < BUSY * WINDOW_S or self._past[-1][0] - self._past[0][0] < WINDOW_S:
            return None
        return Speed(tokens / busy, tokens / in_work)

    def lagging(self, now: float) -> bool:
        """Whether its event loop stood still LAGS times lately."""
        return len(self._lags) == LAGS and now - self._lags[0] <= LAG_WINDOW_S


class Paces:
    """All members against each other."""

    def __init__(self) -> None:
        self._paces: dict[str, Pace] = {}

    def forget(self, name: str) -> None:
        """Its life has ended: what it was like says nothing of the next one."""
        self._paces.pop(name, None)

    def report(self, update: MemberUpdate, now: float) -> dict[Doubt, str]:
        """A member reported; what is wrong with it, in words."""
        pace = self._paces.setdefault(update.name, Pace())
        pace.report(update, now)
        found = {}
        if pace.lagging(now):
            found[Doubt.LAGGING] = (
                f"its event loop stood still for {LAG_S:g} s or more, {LAGS} times within {LAG_WINDOW_S:g} s"
            )
        if update.role == "generator":
            others = [p for name, p in self._paces.items() if name != update.name]
            found |= {doubt: words for doubt, words in self._compared(update, pace, others) if words}
        return found

    def _compared(
        self, update: MemberUpdate, pace: Pace, others: Sequence[Pace]
    ) -> Sequence[tuple[Doubt, str]]:
        return ((Doubt.SLOW, _slow(pace, others)), (Doubt.LOADING, _loading(update, others)))


def _slow(pace: Pace, others: Sequence[Pace]) -> str:
    own = pace.speed
    speeds = [other.speed for other in others if other.speed is not None]
    if own is None or not speeds:
        return ""  # whether that was slow, nobody can tell now
    usual = Speed(
        median(speed.tokens_per_s for speed in speeds), median(speed.tokens_per_sample_s for speed in speeds)
    )
    limit = STILL_SLOW if pace.slow else SLOW
    pace.slow = all(mine < limit * theirs for mine, theirs in zip(own, usual, strict=True))
    if not pace.slow:
        return ""
    return (
        f"slow: {own.tokens_per_s:.3g} tokens/s where others have {usual.tokens_per_s:.3g}, per sample in "
        f"work {own.tokens_per_sample_s:.3g} to {usual.tokens_per_sample_s:.3g}"
    )


def _loading(update: MemberUpdate, others: Sequence[Pace]) -> str:
    times = [other.load_s for other in others if other.load_s is not None]
    if not times or update.loading_s < max(LOAD_S, LOAD_FACTOR * median(times)):
        return ""
    return f"has been loading weights for {update.loading_s:.1f} s where others take {median(times):.1f} s"


class Culling:
    """Who is killed for being slow; see the module's docstring."""

    def __init__(self, *, after_s: float | None, share: float, window_s: float) -> None:
        """`after_s`: how long one is slow before it is killed, None: never; `share` of all, at least one."""
        self._after_s = after_s
        self._share = share
        self._window_s = window_s
        self._killed: deque[float] = deque()

    def choose(
        self, slow: Mapping[str, float], *, own: Container[str], num_generators: int, now: float
    ) -> tuple[list[str], str]:
        """Names to kill now, and why nobody is where somebody was due; counts those named.

        Args:
            slow: name -> since when it is a suspect for being slow, of all generators.
            own: names of processes that may be killed.
            num_generators: present ones, slow or not.
            now: the present time.
        """
        if self._after_s is None:
            return [], ""
        while self._killed and now - self._killed[0] > self._window_s:
            self._killed.popleft()
        due = sorted(n for n, since in slow.items() if n in own and now - since >= self._after_s)
        if not due:
            return [], ""
        cap = max(1, int(self._share * num_generators))
        if len(slow) + len(self._killed) > cap:
            return [], self._words(sorted(slow), cap)
        self._killed.extend(now for _ in due)
        return due, ""

    def _words(self, slow: Sequence[str], cap: int) -> str:
        number = len(self._killed)
        before = f", {number} were killed for it within {self._window_s:g} s" if number else ""
        return (
            f"slow: {', '.join(slow)}{before}; nobody is killed for it, as at most {cap} may be at a time "
            "(run.max_slow_kills): the cause is likely one that they share"
        )
