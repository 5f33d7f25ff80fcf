"""Who sampled which token: the marks that an engine leaves at each swap, and the spans made of them."""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.messages.sample import Span


@dataclass(frozen=True)
class Mark:
    """From this position on, tokens are sampled by this version."""

    version: int
    incarnation: int
    position: int


def spans_between(marks: list[Mark], start: int, end: int) -> list[Span]:
    """Who sampled positions start .. end - 1; `marks` in order of position."""
    ends = [*(mark.position for mark in marks), end][1:]
    spans = []
    for mark, stop in zip(marks, ends, strict=True):
        num_tokens = min(stop, end) - max(mark.position, start)
        if num_tokens > 0:
            spans.append(Span(mark.version, mark.incarnation, num_tokens))
    return spans
