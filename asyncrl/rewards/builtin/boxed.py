r"""Finding the answer that a response puts into \boxed{}."""

from __future__ import annotations

_OPENINGS = ("\\boxed{", "\\fbox{")


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} (or \fbox{...}), braces balanced; None where there is none."""
    start, length = max((text.rfind(opening), len(opening)) for opening in _OPENINGS)
    if start < 0:
        return None
    depth = 1
    for position in range(start + length, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + length : position]
    return None
