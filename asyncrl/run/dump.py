"""A dump: the samples of a run as lines of JSON that any program can read, and how they are written.

One sample is one line (`Line`), complete in itself. Owns the format and its equivalence with `Sample`; reads
records and writes one file. Importing is `load`'s side (`dump_import`). Nothing in a dump can execute.

Invariant: `sample_of(line_of(sample))` is `sample`, for every sample whose label, messages and metadata are
what JSON can hold; `line_of` names those that are not. Log-probs are written as the exact decimal value of
the float32, so no bit of a number is lost.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from asyncrl.buffer.contents import GroupRow, groups, samples
from asyncrl.buffer.records import Records
from asyncrl.errors import ConfigError, DataError, StorageError
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

FORMATS = ("jsonl", "parquet")

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


class Exported(NamedTuple):
    """What a dump holds."""

    groups: int
    samples: int
    tokens: int
    altered: str
    """The first value that JSON cannot hold, so that it comes back as another one; empty: there is none."""


def export(
    run_dir: Path,
    file: Path,
    *,
    format: str | None = None,  # noqa: A002 -- the option's name
    batches: range | None = None,
    settled: Sequence[str] = (),
) -> Exported:
    """Write samples of a run to `file`, which must not exist; it appears whole or not at all.

    Args:
        run_dir: a live or finished run.
        file: where to.
        format: "jsonl" or "parquet"; None: by the file's suffix.
        batches: only samples of these batches.
        settled: only groups that ended so; none: the groups of recorded batches, as the trainer got them.

    Raises:
        DataError: there is no run, nothing in it is asked for, or the bodies were removed.
        ConfigError: the file exists, or Parquet cannot be written here.
        StorageError: a body was altered, or the file cannot be written.
    """
    if file.exists():
        raise ConfigError(f"{file}: exists; remove it, or name another file")
    write = _writer(format or ("parquet" if file.suffix == ".parquet" else "jsonl"))
    temporary = file.with_name(f".{file.name}.tmp")
    with Records(run_dir) as records:
        rows = list(groups(records, settled=settled, batches=batches))
        if not rows:
            raise DataError(f"{run_dir}: there is no such group; `asyncrl buffer ls {run_dir}` lists them")
        _check_bodies(records, rows)
        lines = _Lines(records, rows)
        try:
            write(temporary, iter(lines))
            os.replace(temporary, file)  # noqa: PTH105 - the atomic one
        except OSError as error:
            raise StorageError(f"{file}: cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
    return Exported(len(rows), lines.samples, lines.tokens, lines.altered)


class _Lines:
    """The lines of some groups, counted as they pass."""

    def __init__(self, records: Records, rows: list[GroupRow]) -> None:
        self._records, self._rows = records, rows
        self.samples = self.tokens = 0
        self.altered = ""

    def __iter__(self) -> Iterator[Line]:
        for row in self._rows:
            for sample in samples(self._records, row):
                self.samples += 1
                self.tokens += sample.num_tokens
                self.altered = self.altered or altered(sample)
                yield line_of(
                    sample,
                    batch=row.batch if row.batch >= 0 else None,
                    settled=row.reason,
                    issue_version=row.version,
                )


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


def _check_bodies(records: Records, rows: Sequence[GroupRow]) -> None:
    for batch in sorted({row.batch for row in rows if row.batch >= 0}):
        if not records.has_bodies(batch):
            raise DataError(
                f"{records.run_dir}: the bodies of batch {batch} were removed when a checkpoint covered them;"
                ' --batches names later ones, and buffer.keep = "all" keeps them'
            )


def _writer(format: str) -> Callable[[Path, Iterator[Line]], None]:  # noqa: A002 -- the option's name
    if format == "jsonl":
        return _write_jsonl
    if format == "parquet":
        from asyncrl.run import dump_parquet

        dump_parquet.require()
        return dump_parquet.write
    raise ConfigError(f"--format {format}: unknown; known: {', '.join(FORMATS)}")


def _write_jsonl(file: Path, lines: Iterator[Line]) -> None:
    encoder = msgspec.json.Encoder()
    with file.open("wb") as out:
        for line in lines:
            out.write(encoder.encode(line))
            out.write(b"\n")
        out.flush()
        os.fsync(out.fileno())
