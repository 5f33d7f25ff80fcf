"""Bodies between messages and samples: encode a part, and put samples together from a message's frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from asyncrl.errors import ProtocolError
from asyncrl.messages.numbers import Count, CountOrNone
from asyncrl.messages.sample import (
    Lane,
    Prompt,
    Sample,
    Score,
    Segment,
    Status,
    assemble,
    check_segment,
)

Body = Prompt | Segment | Score
T = TypeVar("T")


class GroupParts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Some samples of one group and how their bodies lie in the frames.

    Frames of one group, in order: the prompt; then for each sample its segments, then its score when
    `scored` is set.
    """

    group_id: Count
    lane: Lane = Lane.TRAIN
    issue_version: CountOrNone = 0
    """Version the group's first lease was given for."""
    indices: list[Count]
    """Positions of the samples in the group."""
    statuses: list[Status]
    segments: list[Count]
    """Frames of each sample's response so far."""
    scored: bool = False
    """Whether every sample carries a score frame."""
    removed: list[Count] = []
    """Indices a filter took out of the loss."""

    @property
    def num_frames(self) -> int:
        """Frames that belong to this group."""
        return 1 + sum(self.segments) + (len(self.indices) if self.scored else 0)


def encode_body(body: Body) -> bytes:
    """Msgpack bytes of a part."""
    return msgspec.msgpack.encode(body)


def unpack(groups: Iterable[GroupParts], frames: Iterable[bytes]) -> list[list[Sample]]:
    """The samples of each group, in the order of the parts. Raises ProtocolError when frames do not fit."""
    stream = iter(frames)
    unpacked = [_unpack_group(parts, stream) for parts in groups]
    if next(stream, None) is not None:
        raise ProtocolError("a message has more frames than its groups name")
    return unpacked


def leased_bytes(parts: GroupParts, frames: Iterator[bytes]) -> int:
    """Takes a group's frames off `frames`; returns what a lease on them is charged, which is all of them."""
    total = len(_next(frames))
    for num_segments in parts.segments:
        total += sum(len(_next(frames)) for _ in range(num_segments))
        if parts.scored:
            total += len(_next(frames))
    return total


def _unpack_group(parts: GroupParts, stream: Iterator[bytes]) -> list[Sample]:
    if not len(parts.indices) == len(parts.statuses) == len(parts.segments):
        raise ProtocolError(
            f"group {parts.group_id}: {len(parts.indices)} indices, {len(parts.statuses)} statuses and "
            f"{len(parts.segments)} counts of segments; one each per sample is needed"
        )
    prompt = _decode(_next(stream), Prompt)
    if len(prompt.tokens) % 4:
        raise ProtocolError(
            f"group {parts.group_id}: {len(prompt.tokens)} bytes of prompt tokens are no int32 array"
        )
    samples = []
    for index, status, num_segments in zip(parts.indices, parts.statuses, parts.segments, strict=True):
        segments = [_decode(_next(stream), Segment) for _ in range(num_segments)]
        for segment in segments:
            check_segment(segment, where=f"sample {parts.group_id}.{index}")
        score = _decode(_next(stream), Score) if parts.scored else None
        if score is not None and index in parts.removed:
            score = msgspec.structs.replace(score, remove_sample=True)
        samples.append(
            assemble(
                group_id=parts.group_id,
                index=index,
                prompt=prompt,
                segments=segments,
                score=score,
                status=status,
                lane=parts.lane,
            )
        )
    return samples


def _next(stream: Iterator[bytes]) -> bytes:
    frame = next(stream, None)
    if frame is None:
        raise ProtocolError("a message has fewer frames than its groups name")
    return frame


def _decode(frame: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(frame, type=kind)
    # As in `codec`: UnicodeDecodeError and RecursionError are the writer's fault, too.
    except Exception as error:
        raise ProtocolError(f"a body is not a {kind.__name__}: {error}") from error
