"""A JSONL file, read by row: scanned once, never held in memory.

Owns 20 bytes per row (offset, line number, digest) and an open file only while it reads. Never decides what a
row means: `check` does. Invariants: memory does not grow with the length of the file beyond the index, nor
with a line beyond `max_line_bytes`; `row(i)` returns what the scan saw or fails, never something else.
Blank lines are no rows; CRLF and a byte order mark are accepted.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from asyncrl.errors import DataError

Row = dict[str, Any]
Check = Callable[[Row], str | None]
OnBadLine = Literal["fail", "skip"]

# A longer line is a bad line: it bounds the memory of a scan over a file that is not JSONL at all.
MAX_LINE_BYTES = 64 * 1024 * 1024
# Bad lines that are remembered and shown; all are counted.
SHOWN_BAD_LINES = 5
_BOM = b"\xef\xbb\xbf"
_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that is no usable row."""

    line: int
    """1-based, as editors count."""
    reason: str


class LineError(ValueError):
    """Why one line is no usable row; the text is the reason alone."""


def split_slice(path: str) -> tuple[Path, slice]:
    """The file and the rows that `path` names: "data.jsonl@[0:100]" is its first 100 rows, as in slime."""
    match = _SLICE.fullmatch(path)
    if match is None:
        return Path(path), slice(None)
    start, stop = (int(part) if part not in ("", "-") else None for part in match.group("start", "stop"))
    return Path(match["path"]), slice(start, stop)


class JsonlIndex:
    """Where the usable rows of a JSONL file are. Made by `build`; `len()` is the number of rows."""

    def __init__(
        self,
        path: Path,
        *,
        offsets: NDArray[np.int64],
        lines: NDArray[np.uint32],
        digests: NDArray[np.uint64],
        bad: list[BadLine],
        num_bad: int,
        max_line_bytes: int,
    ) -> None:
        """`offsets`, `lines`, `digests` [N]: byte offset, 1-based line number, xxh3-64 of each row's line."""
        self.path = path
        self.bad = bad
        """The first `SHOWN_BAD_LINES` bad lines."""
        self.num_bad = num_bad
        """Bad lines in the whole file."""
        self._offsets = offsets
        self._lines = lines
        self._digests = digests
        self._max_line_bytes = max_line_bytes

    @classmethod
    def build(
        cls,
        path: str | Path,
        *,
        on_bad_line: OnBadLine = "fail",
        check: Check | None = None,
        option: str = "prompt_data",
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> JsonlIndex:
        """Scans the file once; blocks for its whole length, so call it outside an event loop.

        `check(row)` returns why a row cannot be used, or None. DataError (naming `option`): the file cannot
        be read, has no usable row, or has bad lines while `on_bad_line` is "fail".
        """
        file, rows = split_slice(str(path))
        scan = _Scan(check=check, max_line_bytes=max_line_bytes)
        try:
            with file.open("rb") as stream:
                scan.run(stream)
        except OSError as error:
            raise DataError(
                f'{option}: "{file}" cannot be read: {error.strerror}; give a JSONL file.'
            ) from error
        index = cls(
            file,
            offsets=np.array(scan.offsets, dtype=np.int64)[rows],
            lines=np.array(scan.lines, dtype=np.uint32)[rows],
            digests=np.array(scan.digests, dtype=np.uint64)[rows],
            bad=scan.bad,
            num_bad=scan.num_bad,
            max_line_bytes=max_line_bytes,
        )
        index._refuse(option=option, on_bad_line=on_bad_line, num_rows=len(scan.offsets))
        return index

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def fingerprint(self) -> str:
        """xxh3-128, hex, of the rows in order: equal only for an index over the same rows."""
        return xxhash.xxh3_128_hexdigest(self._digests.tobytes())

    def line_number(self, i: int) -> int:
        """1-based line of row `i` in the file."""
        return int(self._lines[i])

    def row(self, i: int) -> Row:
        """Reads row `i`, 0-based. DataError if the file is no longer what was indexed."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(int(self._offsets[i]))
                line = stream.readline(self._max_line_bytes)
        except OSError as error:
            raise DataError(f"{self.path}: row {i} cannot be read any more: {error.strerror}.") from error
        if xxhash.xxh3_64_intdigest(_body(line)) != int(self._digests[i]):
            raise DataError(
                f"{self.path}, line {self.line_number(i)}: changed since the run indexed it; a run needs its "
                "prompt file unchanged. Put the old file back, or start a new run."
            )
        return _parse(line)

    def _refuse(self, *, option: str, on_bad_line: OnBadLine, num_rows: int) -> None:
        shown = "".join(f"\n  line {bad.line}: {bad.reason}" for bad in self.bad)
        if self.num_bad > len(self.bad):
            shown += f"\n  and {self.num_bad - len(self.bad)} more"
        if self.num_bad and (on_bad_line == "fail" or not num_rows):
            raise DataError(
                f"{option}: {self.path} has {self.num_bad} bad lines beside {num_rows} good ones; correct "
                f"them{', or leave them out with on_bad_line = skip' if num_rows else ''}:{shown}"
            )
        if not num_rows:
            raise DataError(f"{option}: {self.path} is empty; it must have one JSON object per line.")
        if not len(self):
            raise DataError(f"{option}: the slice selects none of the {num_rows} rows of {self.path}.")


class _Scan:
    """One pass over a file."""

    def __init__(self, *, check: Check | None, max_line_bytes: int) -> None:
        self.offsets = array("q")
        self.lines = array("I")
        self.digests = array("Q")
        self.bad: list[BadLine] = []
        self.num_bad = 0
        self._check = check
        self._max_line_bytes = max_line_bytes

    def run(self, stream: BinaryIO) -> None:
        offset = 0
        for number, (line, num_bytes) in enumerate(_lines(stream, self._max_line_bytes), start=1):
            self._take(line, number=number, offset=offset)
            offset += num_bytes

    def _take(self, line: bytes | None, *, number: int, offset: int) -> None:
        reason = self._problem(line)
        if reason is not None:
            self.num_bad += 1
            if len(self.bad) < SHOWN_BAD_LINES:
                self.bad.append(BadLine(line=number, reason=reason))
        elif line is not None and _body(line):
            self.offsets.append(offset)
            self.lines.append(number)
            self.digests.append(xxhash.xxh3_64_intdigest(_body(line)))

    def _problem(self, line: bytes | None) -> str | None:
        if line is None:
            return f"longer than {self._max_line_bytes} bytes"
        if not _body(line):
            return None
        try:
            row = _parse(line)
        except LineError as error:
            return str(error)
        return self._check(row) if self._check is not None else None


def _lines(stream: BinaryIO, max_line_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """Each line (None for one that is too long) and how many bytes it takes in the file."""
    while line := stream.readline(max_line_bytes):
        num_bytes = len(line)
        if num_bytes < max_line_bytes or line.endswith(b"\n"):
            yield line, num_bytes
            continue
        del line
        while rest := stream.readline(max_line_bytes):
            num_bytes += len(rest)
            if rest.endswith(b"\n"):
                break
        yield None, num_bytes


def _body(line: bytes) -> bytes:
    """The line without its end, blanks around it and a byte order mark."""
    return line.removeprefix(_BOM).strip()


def _parse(line: bytes) -> Row:
    # Decoded here and not by json.loads, which would guess UTF-16 from the first bytes. The json module and
    # not a faster one: it keeps long integers exact and takes NaN, which pandas writes.
    try:
        value = json.loads(_body(line).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise LineError("not JSON that can be read (nested too deeply)") from None
    except ValueError as error:  # an integer of thousands of digits
        raise LineError(f"not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise LineError(f"not a JSON object but {type(value).__name__}")
    return value
