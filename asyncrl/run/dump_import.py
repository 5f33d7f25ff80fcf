"""From a dump to a run directory whose recorded batches the trainer can be given (`asyncrl replay`).

The run has groups, samples, bodies and batches like any other, and nothing of what made them: no leases, no
versions, no trainings. `meta.imported` says so, and audit, replay and resume heed it. The directory appears
whole or not at all. Only lines that the trainer would accept get in; the first other one is named.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from asyncrl.buffer.states import (
    BATCHED,
    PROMPT_INDEX,
    BodyRow,
    GroupRecord,
    SampleRecord,
    Transaction,
    group_row,
    sample_row,
)
from asyncrl.buffer.store import Store
from asyncrl.buffer.tables import IMPORTED
from asyncrl.errors import ConfigError, DataError
from asyncrl.messages.parts import Body, encode_body
from asyncrl.messages.sample import Lane, Sample, Segment, Span, Status
from asyncrl.run import rundir
from asyncrl.run.dump_format import Line, sample_of
from asyncrl.topology.plan import Plan, compile_plan
from asyncrl.topology.schema import Topology
from asyncrl.train.rows import decode

WORKER = "import"
"""Who handed the bodies in."""


class Imported(NamedTuple):
    """What an import did."""

    plan: Plan
    batches: int
    groups: int
    samples: int
    tokens: int
    left_out: int
    """Groups that were in no batch, or did not fill one."""


class _Group(NamedTuple):
    """Consecutive lines of one group."""

    where: str
    """File and line, and the group."""
    lines: list[tuple[int, Line]]
    """With their numbers in the file."""
    samples: list[Sample]
    """The same, once they are checked."""

    @property
    def batch(self) -> int | None:
        return self.lines[0][1].batch


def import_dump(file: Path, out: Path, topology: Topology, *, source: str = "") -> Imported:
    """Make the run directory `out` of a dump in JSON lines.

    Args:
        file: the dump, see `dump.Line`.
        out: must not exist.
        topology: what to train with. Where it names no prompts or no number of rollout steps, the dump gives
            them. rollout_batch_size and n_samples_per_prompt are those of the dump's batches.
        source: the topology's text, kept as run.toml.

    Raises:
        ConfigError: `out` exists, or the topology cannot be used.
        DataError: the dump cannot be read, or a line of it cannot be trained on; names file and line.
        StorageError: the run directory cannot be written.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists; name a directory that does not")
    plan = compile_plan(_completed(topology, file, out))
    temporary = out.with_name(f".{out.name}.importing-{os.getpid()}")
    writer = _Writer(temporary, file, plan)
    try:
        for batch in _batches(file, plan):
            writer.write(batch)
        if not writer.batch:
            raise DataError(
                f"{file}: its lines do not fill one batch of rollout_batch_size ="
                f" {plan.topology.rollout.rollout_batch_size} groups"
            )
        run = rundir.RunDir(temporary)
        plan = _counted(plan, topology, writer.batch)
        run.write_plan(plan, source=source)
        run.set_status(phase=rundir.IMPORTED, detail=writer.finish(), started_at=time.time())
        temporary.rename(out)
    finally:
        writer.store.close()
        shutil.rmtree(temporary, ignore_errors=True)
    left_out = writer.num_groups_read - writer.num_groups
    return Imported(plan, writer.batch, writer.num_groups, writer.num_samples, writer.num_tokens, left_out)


def _completed(topology: Topology, file: Path, out: Path) -> Topology:
    """The topology with what the dump stands for."""
    replace = msgspec.structs.replace
    run, source = topology.run, topology.source
    if run.num_rollout is None:
        run = replace(run, num_rollout=1)  # counted when the dump has been read
    if source.prompt_data is None and source.data_source_path is None:
        source = replace(source, prompt_data=str(file.absolute()))
    run = replace(run, name=out.name, dir=str(out.absolute().parent))
    return replace(topology, run=run, source=source)


def _counted(plan: Plan, topology: Topology, batches: int) -> Plan:
    if topology.run.num_rollout is not None:
        return plan
    run = msgspec.structs.replace(plan.topology.run, num_rollout=batches)
    return msgspec.structs.replace(plan, topology=msgspec.structs.replace(plan.topology, run=run))


# Reading.


def _groups(file: Path) -> Iterator[_Group]:
    """Consecutive lines of one group_id; each group once."""
    seen: set[int] = set()
    for group_id, lines in groupby(_lines(file), key=lambda pair: pair[1].group_id):
        members = list(lines)
        where = f"{file}:{members[0][0]}: group {group_id}"
        if group_id in seen:
            raise DataError(
                f"{where} again; the lines of a group stand together, and no group is in two batches"
            )
        seen.add(group_id)
        yield _Group(where, members, [])


def _lines(file: Path) -> Iterator[tuple[int, Line]]:
    """Lines with their numbers; empty ones are passed over."""
    decoder = msgspec.json.Decoder(Line)
    try:
        with file.open("rb") as text:
            for number, data in enumerate(text, start=1):
                if data.strip():
                    yield number, _line(decoder, data, f"{file}:{number}")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _line(decoder: msgspec.json.Decoder[Line], data: bytes, where: str) -> Line:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{where}: not a sample: {error}; every line is one JSON object with group_id, prompt_tokens, "
            "tokens, logprobs and reward, as `asyncrl buffer export` writes them"
        ) from error


def _batches(file: Path, plan: Plan) -> Iterator[list[_Group]]:
    """Groups by batch, each of the size that the plan trains on; [] for a group that is left out."""
    size = plan.topology.rollout.rollout_batch_size
    smaller = plan.topology.trainer.allow_partial_train_step
    batch: list[_Group] = []
    given: bool | None = None
    for group in _groups(file):
        if given is None:
            given = group.batch is not None
        if group.batch is None and given:
            yield []
            continue
        if group.batch is not None and not given:
            raise DataError(f"{group.where}: is of batch {group.batch}, and lines before it of none")
        if batch and group.batch != batch[0].batch:
            if (group.batch or 0) < (batch[0].batch or 0):
                raise DataError(
                    f"{group.where}: is of batch {group.batch}, after batch {batch[0].batch}; sort the"
                    " lines by batch"
                )
            _check_size(batch, size, file)
            yield batch
            batch = []
        batch.append(_checked(group, file, plan.topology.rollout.n_samples_per_prompt))
        if not given and len(batch) == size:
            yield batch
            batch = []
    if len(batch) < size and not given and not smaller:
        yield from ([] for _ in batch)
    elif batch:
        _check_size(batch, size, file, smaller=smaller)
        yield batch


def _check_size(batch: list[_Group], size: int, file: Path, *, smaller: bool = False) -> None:
    if len(batch) != size and not (smaller and len(batch) < size):
        raise DataError(
            f"{file}: batch {batch[0].batch} has {len(batch)} groups, and rollout.rollout_batch_size is"
            f" {size}; set it to the size of the batches (a smaller last one needs"
            " trainer.allow_partial_train_step = true)"
        )


def _checked(group: _Group, file: Path, size: int) -> _Group:
    """The group with its samples, if the trainer would take them."""
    for place, (number, line) in enumerate(group.lines):
        where = f"{file}:{number}"
        try:
            sample = sample_of(line, index=place, version=line.batch or 0)
            decode(sample, group_size=size)
        except (ValueError, DataError) as error:
            raise DataError(f"{where}: {error}") from error
        _check_trainable(sample, where)
        group.samples.append(sample)
        if sample.index != place or sample.prompt != group.samples[0].prompt:
            raise DataError(
                f"{where}: sample {line.group_id}.{sample.index} is number {place} of its group; samples are"
                " numbered from 0 in order, and share one prompt"
            )
    if len(group.samples) != size:
        raise DataError(
            f"{group.where} has {len(group.samples)} samples, and rollout.n_samples_per_prompt is {size}; a"
            " group is trained whole"
        )
    return group


def _check_trainable(sample: Sample, where: str) -> None:
    name = f"{sample.group_id}.{sample.index}"
    if sample.lane is not Lane.TRAIN or sample.status not in {Status.COMPLETED, Status.TRUNCATED}:
        raise DataError(
            f"{where}: sample {name} is {sample.status} in lane {sample.lane}; only completed and truncated"
            " samples of the lane train can be trained on (export without --settled gives those)"
        )
    if sample.group_id < 0:
        raise DataError(f"{where}: sample {name}: groups are numbered from 0")


# Writing.


@dataclass
class _Writer:
    """Appends batches to the tables of a new run."""

    directory: Path
    file: Path
    plan: Plan
    batch: int = 0
    num_groups: int = 0
    num_groups_read: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_bodies: int = 0
    now: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.store = Store(self.directory)

    def write(self, groups: list[_Group]) -> None:
        """Record one batch; [] counts a group that is left out."""
        self.num_groups_read += len(groups) or 1
        if not groups:
            return
        todo = Transaction([], [], [], [], [], [], [], [])
        before = self.num_samples, self.num_tokens
        for position, group in enumerate(groups):
            record = self._group(todo, group)
            todo.groups.append(group_row(record))
            todo.samples += [sample_row(record.group_id, sample) for sample in record.samples]
            todo.rows.append(("batch_group", (self.batch, position, record.group_id)))
        counts = self.num_samples - before[0], self.num_tokens - before[1]
        todo.rows.append(("batch", (self.batch, len(groups), *counts, 2 * self.batch + 1, self.now)))
        self.store.write(todo)
        self.batch += 1

    def _group(self, todo: Transaction, group: _Group) -> GroupRecord:
        samples = self._samples(group)
        first = samples[0]
        prompt = self._body(todo, "prompt", first, first.prompt, len(first.prompt.tokens) // 4)
        self.num_groups += 1
        return GroupRecord(
            group_id=first.group_id,
            lane=Lane.TRAIN,
            dataset=first.prompt.dataset,
            prompt_body=prompt.id,
            prompt_tokens=prompt.num_tokens,
            prompt_bytes=len(prompt.data),
            samples=[self._sample(todo, sample) for sample in samples],
            created_at=self.now,
            state=BATCHED,
            version=group.lines[0][1].issue_version,
            batch=self.batch,
            note=f"imported from {self.file.name}",
            issued_seq=2 * self.batch,
        )

    def _samples(self, group: _Group) -> list[Sample]:
        """The group's samples, with its batch renumbered: their tokens stay as old as they were."""
        moved = 0 if group.batch is None else self.batch - group.batch
        for sample, (_, line) in zip(group.samples, group.lines, strict=True):
            if line.spans is None:
                sample.spans = [Span(self.batch, 0, sample.num_tokens)] if sample.num_tokens else []
            elif moved:
                sample.spans = [Span(s.version + moved, s.incarnation, s.num_tokens) for s in line.spans]
        return group.samples

    def _sample(self, todo: Transaction, sample: Sample) -> SampleRecord:
        assert sample.score is not None, "only scored samples get here"
        segment = Segment(
            tokens=sample.tokens, logprobs=sample.logprobs, loss_mask=sample.loss_mask, spans=sample.spans,
            text=sample.text, metadata=_beyond_prompt(sample), routed_experts=sample.routed_experts,
            routed_top_k=sample.routed_top_k,
        )  # fmt: skip
        body = self._body(todo, "segment", sample, segment, sample.num_tokens)
        score = self._body(todo, "score", sample, sample.score, 0)
        self.num_samples += 1
        self.num_tokens += sample.num_tokens
        versions = [span.version for span in sample.spans]
        return SampleRecord(
            index=sample.index, state=BATCHED, status=sample.status, tokens=sample.num_tokens,
            bodies=[body.id], worker=WORKER, oldest=min(versions, default=None),
            newest=max(versions, default=None), reward=sample.score.reward,
            removed=sample.score.remove_sample, score_body=score.id,
        )  # fmt: skip

    def _body(self, todo: Transaction, kind: str, sample: Sample, body: Body, tokens: int) -> BodyRow:
        self.num_bodies += 1
        data = encode_body(body)
        prompt = kind == "prompt"
        row = BodyRow(
            id=self.num_bodies, kind=kind, group_id=sample.group_id,
            index=PROMPT_INDEX if prompt else sample.index, num_tokens=tokens,
            spans=sample.spans if kind == "segment" else [], fence=0, worker="" if prompt else WORKER,
            data=data, digest=xxhash.xxh3_128_hexdigest(data),
        )  # fmt: skip
        todo.bodies.append(row)
        return row

    def finish(self) -> str:
        """Write the totals and where the run came from, which is returned in words."""
        words = f"imported from {self.file.absolute()}: {self.num_samples} samples in {self.batch} batches"
        totals = {
            "issued.groups": self.num_groups, "issued.samples": self.num_samples,
            "received.bodies": self.num_bodies, "received.segments": self.num_samples,
            "received.scores": self.num_samples, "received.tokens": self.num_tokens,
        }  # fmt: skip
        rows: list[tuple[str, tuple[object, ...]]] = [("total", item) for item in totals.items()]
        rows.append(("meta", (IMPORTED, words)))
        self.store.write(Transaction([], [], [], rows, [], [], [], []))
        self.store.close()
        return words


def _beyond_prompt(sample: Sample) -> dict[str, object]:
    """What generation added: the whole metadata, but for what is the prompt's or the reward's anyway."""
    rest = sample.score.metadata if sample.score is not None else {}
    known = {**sample.prompt.metadata, **rest}
    absent = object()
    return {key: value for key, value in sample.metadata.items() if known.get(key, absent) is not value}
