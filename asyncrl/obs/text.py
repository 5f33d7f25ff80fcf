"""Numbers as people read them: short, of stable width, the same in the live view, in logs and in the summary.

Pure functions. `None` and NaN are written, never hidden: a missing number is "-", a broken one "nan".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Eighth blocks, lowest first."""
THICK, THIN, ELLIPSIS = "\u2501", "\u2500", "\u2026"
"""A bar's filled and empty part (also a rule), and the mark of cut text."""
MISSING = "-"
"""Stands for a number nobody has."""

_ASCII = str.maketrans(BARS + THICK + THIN + ELLIPSIS, "_.-=+*%#" + "=-~")


def short(value: float | None) -> str:
    """A count in at most five characters: 950, 5.2k, 31k, 1.2M; "-" for None."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.5 of a unit rounds to 1000 of it, which is 1.0 of the next.
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.1f}{suffix}" if abs(scaled) < 9.95 else f"{scaled:.0f}{suffix}"
    return f"{value:.0f}"


def decimal(value: float | None, *, digits: int = 2) -> str:
    """A number with a fixed count of digits after the point; "-" for None."""
    return MISSING if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share as a whole percentage; "-" for None."""
    return MISSING if value is None else f"{value:.0%}"


def duration(seconds: float | None) -> str:
    """Two leading units at most: 12ms, 4.2s, 42s, 1m40s, 2h05m, 3d04h; "-" for None."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING if seconds is None else str(seconds)
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def size(num_bytes: float | None) -> str:
    """Bytes in powers of 1000: 512 B, 1.3 MB; "-" for None."""
    if num_bytes is None:
        return MISSING
    text = short(num_bytes)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def sparkline(values: Sequence[float], *, width: int, bars: str = BARS) -> str:
    """One bar per value, scaled to the range of `values`; more values than `width` are averaged.

    A value that is not finite is a blank; values that are all equal draw the middle bar.
    """
    points = _squeeze(values, width)
    finite = [point for point in points if math.isfinite(point)]
    if not finite:
        return " " * len(points)
    low, high = min(finite), max(finite)
    return "".join(_bar(point, low, high, bars) for point in points)


def printable(text: str) -> str:
    """The text with control characters escaped, newlines kept: a terminal would obey what a model wrote."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def ascii_of(text: str) -> str:
    """The text for a terminal without Unicode: drawing characters replaced by kin, anything else by "?"."""
    return text.translate(_ASCII).encode("ascii", errors="replace").decode()


def _squeeze(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    edges = [len(values) * i // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _bar(point: float, low: float, high: float, bars: str) -> str:
    if not math.isfinite(point):
        return " "
    share = 0.5 if high == low else (point - low) / (high - low)
    return bars[min(int(share * len(bars)), len(bars) - 1)]
