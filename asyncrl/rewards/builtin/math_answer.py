"""`math`: is the response's answer mathematically the label? Judged by the math-verify library, 0 or 1."""

from __future__ import annotations

from typing import Any

import math_verify
from math_verify.errors import TimeoutException

from asyncrl.messages.hooks import HookSample
from asyncrl.rewards.builtin.boxed import last_boxed

STEP_TIMEOUT_S = 5
"""math-verify's limit for one parse or comparison; past it the sample fails by name and never scores 0."""


def math_reward(args: Any, sample: HookSample) -> float:  # noqa: ARG001
    r"""1.0 when the last \boxed{} of the response (without one: what math-verify finds) equals the label.

    The label may be boxed itself. Raises ValueError when it is missing or has no mathematical reading,
    TimeoutError when an expression takes too long.
    """
    label = "" if sample.label is None else str(sample.label)
    gold = _parse(f"\\boxed{{{last_boxed(label) or label}}}") or _parse(label) if label.strip() else []
    if not gold:
        raise ValueError(f"label {sample.label!r:.80} cannot be read as an answer")
    boxed = last_boxed(sample.response)
    answers = _parse(sample.response if boxed is None else f"\\boxed{{{boxed}}}")
    return float(any(_equal(one, answer) for one in gold for answer in answers))


def _parse(text: str) -> list[Any]:
    """Candidate readings of an answer, [] where there is none."""
    try:
        return list(math_verify.parse(text, parsing_timeout=STEP_TIMEOUT_S, raise_on_error=True))
    except TimeoutException as error:
        raise TimeoutError(f"math-verify took over {STEP_TIMEOUT_S} s to read {text[-80:]!r}") from error
    # sympy and its parser raise anything at text that is no mathematics; such an answer has no reading.
    except Exception:  # noqa: BLE001
        return []


def _equal(gold: Any, answer: Any) -> bool:
    try:
        return bool(math_verify.verify(gold, answer, timeout_seconds=STEP_TIMEOUT_S, raise_on_error=True))
    except TimeoutException as error:
        raise TimeoutError(f"math-verify took over {STEP_TIMEOUT_S} s to compare") from error
    # Expressions that sympy cannot compare (sets with numbers, relations) are not equal.
    except Exception:  # noqa: BLE001
        return False
