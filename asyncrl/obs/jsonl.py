"""Append-only JSON-lines files that never raise at the writer.

Owns one file per object. Every row is one write of one whole line, on disk (in the page cache) when `append`
returns. A row that could not be written whole is counted and given up; the next one starts on a line of its
own, so at most the torn row is lost. Safe to use from several threads.
"""

from __future__ import annotations

import os
import threading
from io import FileIO
from pathlib import Path


class JsonlFile:
    """One append-only file of JSON rows; made, with its directories, at the first row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._torn = False
        self._closed = False
        self._num_failed = 0

    @property
    def num_failed(self) -> int:
        """Rows that could not be written."""
        return self._num_failed

    def append(self, row: bytes) -> bool:
        """Write one row, given without its newline. False, and counted, when the disk refused it."""
        with self._lock:
            written = not self._closed and self._write(row)
            self._num_failed += not written
            return written

    def close(self) -> None:
        """Close the file; later rows are counted as failed. May be called twice."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, row: bytes) -> bool:
        # Observability must never kill training: a full or broken disk costs rows, and `num_failed` says so.
        try:
            if self._file is None:
                self._file = self._open()
            line = b"\n" * self._torn + row + b"\n"
            self._torn = self._file.write(line) != len(line)
        except OSError:
            self._torn = self._file is not None
            return False
        return not self._torn

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(self.path, "ab+")
        # A writer killed in mid-row leaves half a line behind; ours must not be glued to it.
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            self._torn = file.read(1) != b"\n"
        return file
