"""A dump's format: one sample is one line (`Line`) of JSON that any program can read, complete in itself.

Owns the format and its equivalence with `Sample`; knows no file. Nothing in a dump can execute.

Invariant: `sample_of(line_of(sample))` is `sample`, for every sample whose label, messages and metadata are
what JSON can hold; `altered` names those that are not. Log-probs are written as the exact decimal value of
the float32, so no bit of a number is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from asyncrl.messages.sample import (
    Lane,
    Prompt,
    Sample,
    Score,
    Span,
    Status,
    logprobs_of,
    mask_of,
    pack_logprobs,
    pack_mask,
    pack_routing,
    pack_tokens,
    tokens_of,
)

Number = float | str
"""A finite number, or one of "nan", "inf", "-inf", for which JSON has no word."""


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sample. Whoever writes a dump elsewhere must give group_id, prompt_tokens, tokens, logprobs and
    reward; all else may be left out.
    """

    group_id: int
    """Samples of one prompt have the same; their lines stand together."""
    index: int | None = None
    """Position in the group, from 0; left out: the order of the lines."""
    batch: int | None = None
    """The recorded batch, ascending; null: in none. No line has one: batches are cut in the order given."""
    lane: Lane = Lane.TRAIN
    dataset: str = ""
    settled: str | None = None
    """How its group ended (trained, filtered, ...); null: it is in flight. Import does not look at it."""
    issue_version: int = -1
    """Version that the group's first lease was given for; -1: nobody said."""
    status: Status = Status.COMPLETED
    prompt: str = ""
    """The prompt's text."""
    prompt_tokens: list[int]
    messages: list[dict[str, Any]] | None = None
    """The OpenAI messages that the prompt was rendered from."""
    label: Any = None
    """Ground truth."""
    metadata: dict[str, Any] = {}
    """The prompt's, as the data had it."""
    response: str = ""
    """The response's text."""
    tokens: list[int]
    """[R], the response's tokens."""
    logprobs: list[Number]
    """[R], log-softmax of logits / temperature at each token, by the engine that sampled it."""
    loss_mask: list[int] | None = None
    """[R] of 0 and 1; null: all ones."""
    spans: list[Span] | None = None
    """[version, incarnation, number of tokens] of consecutive tokens; null: all of its batch's version."""
    response_metadata: dict[str, Any] = {}
    """What a custom generate function added to the metadata."""
    reward: float | None = None
    """null: nobody scored it."""
    reward_detail: Any = None
    """What the reward returned, when that was a dict."""
    reward_metadata: dict[str, Any] = {}
    """What the reward added to the metadata."""
    remove_sample: bool = False
    """Out of the loss, but part of its group's statistics."""
    teacher_logprobs: list[Number] | None = None
    """[R], of a teacher."""
    routed_experts: list[int] | None = None
    """(P + R - 1) x L x K expert numbers, in that order."""
    routed_top_k: int = 0
    """K."""


def line_of(
    sample: Sample, *, batch: int | None = None, settled: str | None = None, issue_version: int = -1
) -> Line:
    """A sample as a line."""
    prompt, score = sample.prompt, sample.score
    return Line(
        group_id=sample.group_id,
        index=sample.index,
        batch=batch,
        lane=sample.lane,
        dataset=prompt.dataset,
        settled=settled,
        issue_version=issue_version,
        status=sample.status,
        prompt=prompt.text,
        prompt_tokens=tokens_of(prompt.tokens).tolist(),
        messages=prompt.messages,
        label=prompt.label,
        metadata=prompt.metadata,
        response=sample.text,
        tokens=tokens_of(sample.tokens).tolist(),
        logprobs=_numbers(sample.logprobs),
        loss_mask=mask_of(sample.loss_mask).tolist(),
        spans=sample.spans,
        response_metadata=_added(sample),
        reward=None if score is None else score.reward,
        reward_detail=None if score is None else score.detail,
        reward_metadata={} if score is None else score.metadata,
        remove_sample=score is not None and score.remove_sample,
        teacher_logprobs=_numbers(score.teacher_logprobs) if score and score.teacher_logprobs else None,
        routed_experts=_experts(sample),
        routed_top_k=sample.routed_top_k,
    )


def _added(sample: Sample) -> dict[str, Any]:
    """What is in the sample's metadata beyond the prompt's, before what the reward added."""
    known = sample.prompt.metadata | (sample.score.metadata if sample.score is not None else {})
    return {
        key: value for key, value in sample.metadata.items() if key not in known or not _is(known[key], value)
    }


def _is(one: Any, other: Any) -> bool:
    """Equal in type, too: 1, 1.0 and True are three values."""
    return msgspec.msgpack.encode(one) == msgspec.msgpack.encode(other)


def sample_of(line: Line, *, index: int | None = None, version: int = 0) -> Sample:
    """A line as a sample.

    Args:
        line: what was read.
        index: the position in the group of a line that names none.
        version: of all tokens, for a line without spans.

    Raises:
        ValueError: a token, a mask's entry or an expert does not fit its type.
    """
    prompt = Prompt(
        tokens=_pack("prompt_tokens", pack_tokens, line.prompt_tokens),
        text=line.prompt,
        messages=line.messages,
        label=line.label,
        metadata=line.metadata,
        dataset=line.dataset,
    )
    spans = line.spans
    if spans is None:
        spans = [Span(version, 0, len(line.tokens))] if line.tokens else []
    mask = [1] * len(line.tokens) if line.loss_mask is None else line.loss_mask
    return Sample(
        group_id=line.group_id,
        index=line.index if line.index is not None else index or 0,
        prompt=prompt,
        status=line.status,
        tokens=_pack("tokens", pack_tokens, line.tokens),
        logprobs=_floats(line.logprobs),
        loss_mask=_pack("loss_mask", pack_mask, mask),
        spans=spans,
        text=line.response,
        metadata={**line.metadata, **line.response_metadata, **line.reward_metadata},
        score=_score(line),
        lane=line.lane,
        routed_experts=_pack("routed_experts", pack_routing, line.routed_experts or []),
        routed_top_k=line.routed_top_k,
    )


def _score(line: Line) -> Score | None:
    if line.reward is None:
        return None
    return Score(
        reward=line.reward,
        detail=line.reward_detail,
        remove_sample=line.remove_sample,
        metadata=line.reward_metadata,
        teacher_logprobs=_floats(line.teacher_logprobs or []),
    )


def _numbers(packed: bytes) -> list[Number]:
    values = logprobs_of(packed).tolist()
    return [value if math.isfinite(value) else str(value) for value in values]


def _floats(values: Sequence[Number]) -> bytes:
    return pack_logprobs([float(value) for value in values])


def _experts(sample: Sample) -> list[int] | None:
    return np.frombuffer(sample.routed_experts, dtype="<i2").tolist() if sample.routed_experts else None


def _pack(name: str, pack: Callable[[Any], bytes], values: Sequence[int]) -> bytes:
    try:
        return pack(values)
    except OverflowError as error:
        raise ValueError(f"{name}: {error}") from error


def altered(sample: Sample) -> str:
    """The first value of a sample that JSON gives back as another one, in words; empty when there is none."""
    prompt, score = sample.prompt, sample.score
    values = {"messages": prompt.messages, "label": prompt.label, "metadata": sample.metadata}
    if score is not None:
        values |= {"reward detail": score.detail}
    for name, value in values.items():
        try:
            same = msgspec.json.decode(msgspec.json.encode(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            return f"group {sample.group_id} sample {sample.index}: {name}"
    return ""
