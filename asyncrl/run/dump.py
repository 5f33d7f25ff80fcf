"""Samples of a run are written to a file, as lines of JSON or as Parquet.

Reads records and writes one file, which appears whole or not at all. The format is `dump_format`'s, the way
back `dump_import`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncrl.buffer.contents import GroupRow, groups, samples
from asyncrl.buffer.records import Records
from asyncrl.errors import ConfigError, DataError, StorageError
from asyncrl.run import dump_parquet
from asyncrl.run.dump_format import Line, altered, line_of

FORMATS = ("jsonl", "parquet")


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
