"""The nouns of the pipeline as they travel and rest.

A sample is never rewritten: its *parts* are appended. The source writes one `Prompt` per group; generators
append `Segment`s to each sample (one per progress report, the last one when it is done); a reward worker
adds a `Score`. The buffer keeps the encoded parts as opaque bytes; only the two ends decode them. Token
arrays are packed little-endian bytes (int32 tokens, float32 log-probs, uint8 mask, int16 experts): encoding
8k tokens as lists costs hundreds of microseconds, as bytes under two.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl.errors import ProtocolError
from asyncrl.messages.numbers import Count, Version

Tokens = NDArray[np.int32]
Logprobs = NDArray[np.float32]
Mask = NDArray[np.uint8]


class Lane(StrEnum):
    """Which stream of work a group belongs to."""

    TRAIN = "train"
    EVAL = "eval"


class Status(StrEnum):
    """How a sample's generation stands; the names and meanings are slime's."""

    PENDING = "pending"
    """Not generated yet, or generated in part."""
    COMPLETED = "completed"
    """The engine stopped at an end token, a stop token or a stop string."""
    TRUNCATED = "truncated"
    """The engine stopped at the length limit."""
    ABORTED = "aborted"
    """Handed back before it was finished."""
    FAILED = "failed"
    """A tool or a service the generation depends on failed."""


class Settled(StrEnum):
    """A group's last event, exactly one."""

    TRAINED = "trained"
    FILTERED = "filtered"
    STALE = "stale"
    SURPLUS = "surplus"
    FAILED = "failed"
    EVALUATED = "evaluated"
    UNNEEDED = "unneeded"


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`num_tokens` consecutive response tokens that one version of the weights sampled."""

    version: Version
    """Rollout steps trained into those weights; 0 is the initial model."""
    incarnation: Count
    """Which life of the trainer made them."""
    num_tokens: Count
    """Response tokens in the span, at least 1."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question: what the source writes for a group, shared by its samples."""

    tokens: bytes
    """int32 [P], the tokenised prompt."""
    text: str = ""
    """The rendered prompt, after the chat template."""
    messages: list[dict[str, Any]] | None = None
    """The OpenAI messages it was rendered from, where the data had them."""
    label: Any = None
    """Ground truth as the data has it, for the reward."""
    metadata: dict[str, Any] = {}
    """The data's metadata object; `rm_type` in it selects a reward."""
    dataset: str = ""
    """Name of the data set the prompt is from (the evaluation set's name in the lane `eval`)."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run of response tokens handed in at once; a sample's response is its segments, concatenated."""

    tokens: bytes = b""
    """int32 [R]."""
    logprobs: bytes = b""
    """float32 [R], log-softmax of logits / temperature at each token, before top-p and top-k."""
    loss_mask: bytes = b""
    """uint8 [R]; empty means all ones."""
    spans: list[Span] = []
    """Which version sampled which tokens; their lengths add up to R."""
    text: str = ""
    """The decoded tokens. A segment that ends inside a character leaves it to the next one."""
    metadata: dict[str, Any] = {}
    """What a custom generate function wants the reward to see; merged over the prompt's metadata."""
    routed_experts: bytes = b""
    """int16 [rows, L, K]: the K experts that each of the L mixture-of-experts layers sent a token to, one row
    for every token whose forward pass sampled the next one: P + R - 1 rows in a first segment, R in a later
    one. Empty where nobody recorded it."""
    routed_top_k: Count = 0
    """K; L follows from it and from the number of rows."""

    @property
    def num_tokens(self) -> int:
        """Response tokens in this segment."""
        return len(self.tokens) // 4


class Score(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a reward worker says about one finished sample."""

    reward: float = 0.0
    """The number to train on (`reward_key` already applied)."""
    detail: Any = None
    """What the reward returned, when that was a dict."""
    remove_sample: bool = False
    """Out of the loss, but still part of its group's statistics (slime's `remove_sample`)."""
    metadata: dict[str, Any] = {}
    """Metadata the reward added."""
    teacher_logprobs: bytes = b""
    """float32 [R], a teacher's log-probs of the response, for on-policy distillation; empty without one."""


class Sample(msgspec.Struct, kw_only=True):
    """One answer with everything known about it, assembled from its parts where it is used."""

    group_id: int
    index: int
    """Position in the group, 0-based."""
    prompt: Prompt
    status: Status = Status.PENDING
    tokens: bytes = b""
    """int32 [R], response tokens."""
    logprobs: bytes = b""
    """float32 [R]."""
    loss_mask: bytes = b""
    """uint8 [R], never empty once R > 0."""
    spans: list[Span] = []
    text: str = ""
    """The decoded response."""
    metadata: dict[str, Any] = {}
    """The prompt's metadata with what generation and reward added."""
    score: Score | None = None
    lane: Lane = Lane.TRAIN
    routed_experts: bytes = b""
    """int16 [P + R - 1, L, K], the segments' joined; empty where one of them has none."""
    routed_top_k: int = 0
    """K."""

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return len(self.tokens) // 4

    @property
    def oldest_version(self) -> int | None:
        """The smallest version among the spans; None before the first token."""
        return min((span.version for span in self.spans), default=None)


def pack_tokens(values: Any) -> bytes:
    """int32 little-endian bytes of a sequence of token ids."""
    return np.ascontiguousarray(values, dtype="<i4").tobytes()


def pack_logprobs(values: Any) -> bytes:
    """float32 little-endian bytes of a sequence of log-probabilities."""
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def pack_mask(values: Any) -> bytes:
    """uint8 bytes of a sequence of 0 and 1."""
    return np.ascontiguousarray(values, dtype="u1").tobytes()


def pack_routing(values: Any) -> bytes:
    """int16 little-endian bytes of expert indices [rows, L, K]."""
    return np.ascontiguousarray(values, dtype="<i2").tobytes()


def tokens_of(data: bytes) -> Tokens:
    """Read-only int32 view [T] of packed token ids."""
    return np.frombuffer(data, dtype="<i4")


def logprobs_of(data: bytes) -> Logprobs:
    """Read-only float32 view [T] of packed log-probabilities."""
    return np.frombuffer(data, dtype="<f4")


def mask_of(data: bytes) -> Mask:
    """Read-only uint8 view [T] of a packed mask."""
    return np.frombuffer(data, dtype="u1")


def check_segment(segment: Segment, *, where: str) -> None:
    """Accept a segment whose packed arrays belong together. Raises ProtocolError beginning with `where`."""
    count, rest = divmod(len(segment.tokens), 4)
    problem = ""
    if rest:
        problem = f"{len(segment.tokens)} bytes of tokens are no int32 array"
    elif len(segment.logprobs) != 4 * count:
        problem = f"{len(segment.logprobs)} bytes of log-probs for {count} tokens; 4 each are needed"
    elif len(segment.loss_mask) not in {0, count}:
        problem = f"a mask of {len(segment.loss_mask)} for {count} tokens; one each, or none at all"
    elif sum(span.num_tokens for span in segment.spans) != count:
        problem = f"spans of {sum(span.num_tokens for span in segment.spans)} tokens for {count}"
    if problem:
        raise ProtocolError(f"{where}: {problem}")


def merge_spans(spans: list[Span]) -> list[Span]:
    """The same record with neighbours of one version joined."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and (last.version, last.incarnation) == (span.version, span.incarnation):
            merged[-1] = Span(span.version, span.incarnation, last.num_tokens + span.num_tokens)
        else:
            merged.append(span)
    return merged


def join_routing(segments: list[Segment]) -> tuple[bytes, int]:
    """(`routed_experts`, `routed_top_k`) of consecutive segments; nothing where one of them has none."""
    filled = [segment for segment in segments if segment.num_tokens]
    widths = {segment.routed_top_k for segment in filled}
    if len(widths) != 1 or not all(segment.routed_experts for segment in filled):
        return b"", 0
    return b"".join(segment.routed_experts for segment in filled), widths.pop()


def assemble(
    *,
    group_id: int,
    index: int,
    prompt: Prompt,
    segments: list[Segment],
    score: Score | None = None,
    status: Status = Status.PENDING,
    lane: Lane = Lane.TRAIN,
) -> Sample:
    """A sample from its decoded parts, in the order they were committed."""
    metadata = dict(prompt.metadata)
    for segment in segments:
        metadata.update(segment.metadata)
    if score is not None:
        metadata.update(score.metadata)
    routed_experts, routed_top_k = join_routing(segments)
    return Sample(
        group_id=group_id,
        index=index,
        prompt=prompt,
        status=status,
        tokens=b"".join(s.tokens for s in segments),
        logprobs=b"".join(s.logprobs for s in segments),
        loss_mask=b"".join(s.loss_mask or b"\x01" * s.num_tokens for s in segments),
        spans=merge_spans([span for s in segments for span in s.spans]),
        text="".join(s.text for s in segments),
        metadata=metadata,
        score=score,
        lane=lane,
        routed_experts=routed_experts,
        routed_top_k=routed_top_k,
    )
