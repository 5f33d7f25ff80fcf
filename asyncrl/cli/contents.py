"""What `asyncrl buffer` prints: batches, groups and samples of a run, in words. Owns no judgement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from asyncrl.buffer.contents import GroupRow, group, groups, samples
from asyncrl.buffer.records import Records
from asyncrl.cli.records import group_and_sample
from asyncrl.errors import ConfigError, DataError
from asyncrl.messages.sample import Sample, Status, logprobs_of, mask_of, tokens_of
from asyncrl.run import dump
from asyncrl.run.dump_format import line_of
from asyncrl.run.dump_import import import_dump
from asyncrl.topology.load import load
from asyncrl.topology.paths import absolute


def list_(run: Path, *, batches: range | None, settled: Sequence[str], all_groups: bool) -> None:
    """Print the batches of a run, or its groups.

    Raises:
        DataError: there is no such run.
        StorageError: its ledger cannot be read.
    """
    console = _console()
    with Records(run) as records:
        if records.imported:
            console.print(records.imported, markup=False)
        if settled or all_groups:
            console.print(_group_table(groups(records, settled=settled, batches=batches)))
        else:
            console.print(_batch_table(records, batches))
            for line in _outside(records):
                console.print(line, markup=False)


def _batch_table(records: Records, batches: range | None) -> Table:
    trained = {row.batch: row for row in records.lineage()}
    table = _table("batch", "groups", "samples", "tokens", "reward", "versions", "trained", "bodies")
    inside: dict[int, list[GroupRow]] = {}
    for row in groups(records, batches=batches):
        inside.setdefault(row.batch, []).append(row)
    for batch in records.batches():
        members = inside.get(batch.batch, [])
        if not members:
            continue
        done = trained.get(batch.batch)
        table.add_row(
            str(batch.batch), str(batch.num_groups), str(batch.num_samples), str(batch.num_tokens),
            _mean(members), _versions(members), "" if done is None else done.digest[:12],
            "on disk" if records.has_bodies(batch.batch) else "removed",
        )  # fmt: skip
    return table


def _mean(rows: Sequence[GroupRow]) -> str:
    values = [(row.mean_reward, row.num_samples) for row in rows if row.mean_reward is not None]
    count = sum(number for _, number in values)
    return f"{sum(mean * number for mean, number in values) / count:.4g}" if count else ""


def _versions(rows: Sequence[GroupRow]) -> str:
    oldest = [row.oldest for row in rows if row.oldest is not None]
    newest = [row.newest for row in rows if row.newest is not None]
    if not oldest:
        return ""
    low, high = min(oldest), max(newest)
    return f"v{low}" if low == high else f"v{low}-v{high}"


def _outside(records: Records) -> Iterator[str]:
    """How many samples are in no batch, by lane and state."""
    for lane, states in records.states().items():
        rest = {state: count for state, count in states.items() if state not in {"batched", "trained"}}
        if rest:
            counts = ", ".join(f"{count} {state}" for state, count in rest.items())
            yield f"samples in no batch, lane {lane}: {counts} (--settled lists their groups)"


def _group_table(rows: Iterator[GroupRow]) -> Table:
    table = _table("group", "lane", "state", "batch", "samples", "tokens", "reward", "versions", "note")
    for row in rows:
        table.add_row(
            str(row.group_id), f"{row.lane} {row.dataset}".strip(), row.state,
            str(row.batch) if row.batch >= 0 else "", str(row.num_samples), str(row.num_tokens),
            _mean([row]), _versions([row]), row.note,
        )  # fmt: skip
    return table


def show(run: Path, uid: str, *, as_json: bool) -> None:
    """Print GROUP or GROUP.SAMPLE with everything in it.

    Raises:
        ConfigError: `uid` is neither.
        DataError: there is no such run, group or sample.
        StorageError: a body is gone or was altered.
    """
    group_id, index = group_and_sample(uid, command="buffer show")
    console = _console()
    with Records(run) as records:
        row = group(records, group_id)
        found = [] if row is None else samples(records, row)
        chosen = [sample for sample in found if index is None or sample.index == index]
        if row is None or not chosen:
            what = f"group {group_id}" if row is None else f"sample {uid}"
            raise DataError(f"{run}: there is no {what}; `asyncrl buffer ls {run} --groups` lists groups")
        if as_json:
            batch = row.batch if row.batch >= 0 else None
            for sample in chosen:
                line = line_of(sample, batch=batch, settled=row.reason, issue_version=row.version)
                console.out(msgspec.json.encode(line).decode(), highlight=False)
            return
        for text in described(row, chosen):
            console.out(text, highlight=False)


def described(row: GroupRow, chosen: Sequence[Sample]) -> Iterator[str]:
    """A group and some of its samples, line by line."""
    prompt = chosen[0].prompt
    where = f", batch {row.batch}" if row.batch >= 0 else ""
    note = f" ({row.note})" if row.note else ""
    yield f"group {row.group_id} of lane {row.lane}: {row.state}{where}{note}, {row.num_samples} samples"
    yield f"prompt, {len(tokens_of(prompt.tokens))} tokens:"
    yield _indented(prompt.text)
    if prompt.label is not None:
        yield f"label: {msgspec.json.encode(prompt.label).decode()}"
    if prompt.metadata:
        yield f"metadata: {msgspec.json.encode(prompt.metadata).decode()}"
    for sample in chosen:
        yield ""
        yield f"sample {sample.group_id}.{sample.index}: {', '.join(_facts(sample))}"
        yield _indented(sample.text)


def _facts(sample: Sample) -> Iterator[str]:
    yield "unfinished" if sample.status is Status.PENDING else str(sample.status)
    yield f"{sample.num_tokens} tokens"
    if sample.spans:
        yield " ".join(f"v{span.version}.{span.incarnation} ({span.num_tokens})" for span in sample.spans)
    masked = sample.num_tokens - int(mask_of(sample.loss_mask).sum())
    if masked:
        yield f"{masked} tokens out of the loss"
    if sample.num_tokens:
        yield f"mean log-prob {float(logprobs_of(sample.logprobs).mean()):.4g}"
    if sample.score is None:
        yield "no reward"
        return
    yield f"reward {sample.score.reward:g}"
    if sample.score.detail is not None:
        yield f"detail {msgspec.json.encode(sample.score.detail).decode()}"
    if sample.score.remove_sample:
        yield "kept out of the loss"


def export(
    run: Path, file: Path, *, format: str | None, batches: range | None, settled: Sequence[str]  # noqa: A002
) -> None:  # fmt: skip
    """Write a dump, and say what is in it. Raises what `dump.export` raises."""
    done = dump.export(run, file, format=format, batches=batches, settled=settled)
    console = _console()
    console.print(
        f"{file}: {done.samples} samples of {done.groups} groups, {done.tokens} response tokens,"
        f" {file.stat().st_size} bytes",
        markup=False,
    )
    if done.altered:
        console.print(
            f"warning: {done.altered} holds what JSON has no word for (bytes, NaN, keys that are no text);"
            " it comes back as something else",
            markup=False,
        )


def import_(file: Path, *, topology: Path, out: Path, overrides: Sequence[str]) -> None:
    """Make a run of a dump, and say what to do with it. Raises what `import_dump` raises, and ConfigError."""
    try:
        text = topology.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--topology {topology}: cannot be read: {error}") from error
    done = import_dump(file, out, absolute(load(topology, overrides)), source=text)
    console = _console()
    console.print(
        f"{out}: {done.batches} batches, {done.groups} groups, {done.samples} samples, {done.tokens} response"
        " tokens",
        markup=False,
    )
    if done.left_out:
        console.print(f"{done.left_out} groups were left out: they fill no batch", markup=False)
    console.print(f"train on them with: asyncrl replay {out} --save", markup=False)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        right = column in {"batch", "groups", "samples", "tokens", "reward", "group"}
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    return table


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)
