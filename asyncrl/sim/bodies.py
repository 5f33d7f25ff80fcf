"""Bodies of simulated samples: a few bytes that say whose they are and which tokens they stand for.

The buffer never looks inside a body; both ends do, so a lost, repeated or misplaced token shows wherever
samples arrive.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from asyncrl.errors import RunError
from asyncrl.messages.parts import GroupParts
from asyncrl.messages.sample import Span

PROMPT, SEGMENT, SCORE = 1, 2, 3
_HEAD = struct.Struct("<Bqii")
"""Kind, group, index, offset in tokens."""
_SPAN = struct.Struct("<iii")


class InvariantError(RunError):
    """The simulation shows that a promise does not hold."""

    def __init__(self, invariant: str, detail: str) -> None:
        self.invariant = invariant
        super().__init__(f"{invariant}: {detail}")


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample as it arrived."""

    index: int
    num_tokens: int
    oldest: int
    """Smallest version among its tokens; -1 before the first one."""
    versions: frozenset[tuple[int, int]]
    """(version, incarnation) of its tokens."""


def prompt(group_id: int) -> bytes:
    """The body of a group's prompt."""
    return _HEAD.pack(PROMPT, group_id, -1, 0)


def score(group_id: int, index: int) -> bytes:
    """The body of a score."""
    return _HEAD.pack(SCORE, group_id, index, 0)


def segment(group_id: int, index: int, offset: int, spans: Sequence[Span]) -> bytes:
    """The body of a run of tokens that begins at `offset`."""
    return b"".join(
        [_HEAD.pack(SEGMENT, group_id, index, offset)]
        + [_SPAN.pack(span.version, span.incarnation, span.num_tokens) for span in spans]
    )


def read(parts: GroupParts, frames: Iterator[bytes]) -> list[Answer]:
    """Take a group's frames off `frames`. Raises InvariantError when they are not those of its samples."""
    group_id = parts.group_id
    _expect(next(frames), (PROMPT, group_id, -1, 0))
    answers = []
    for index, count in zip(parts.indices, parts.segments, strict=True):
        length, oldest, versions = 0, -1, set()
        for _ in range(count):
            frame = next(frames)
            _expect(frame, (SEGMENT, group_id, index, length))
            for version, incarnation, tokens in _SPAN.iter_unpack(memoryview(frame)[_HEAD.size :]):
                length += tokens
                oldest = version if oldest < 0 else min(oldest, version)
                versions.add((version, incarnation))
        if parts.scored:
            _expect(next(frames), (SCORE, group_id, index, 0))
        answers.append(Answer(index, length, oldest, frozenset(versions)))
    return answers


def read_all(groups: Iterable[GroupParts], frames: Sequence[bytes]) -> list[tuple[int, list[Answer]]]:
    """(group, its samples) of a message. Raises InvariantError."""
    stream = iter(frames)
    return [(parts.group_id, read(parts, stream)) for parts in groups]


def _expect(frame: bytes, head: tuple[int, int, int, int]) -> None:
    if _HEAD.unpack_from(frame) != head:
        raise InvariantError(
            "tokens arrive whole and in order",
            f"a frame says {_HEAD.unpack_from(frame)} (kind, group, index, offset) where {head} is due",
        )
