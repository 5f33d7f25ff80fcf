"""Bodies on disk: append-only files, synced before the row that names them commits.

Bodies inside SQLite would be written twice (log and page); here they are written once. What no row names is
garbage: a crash between sync and commit leaves some at the end of a file, and nothing ever reads it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from asyncrl.errors import DamagedError, StorageError

IOV_MAX = 512
"""Buffers handed to one writev; below every kernel's limit."""


class Location(NamedTuple):
    """Where a body lies."""

    file: int
    offset: int
    length: int


class Segments:
    """Append, sync, read back. One writer; readers may open the same directory."""

    def __init__(self, directory: Path, *, segment_bytes: int = 256 << 20, writable: bool = True) -> None:
        self.directory = directory
        self.segment_bytes = segment_bytes
        self._readers: dict[int, int] = {}
        self._writer = -1
        self._offset = 0
        if writable:
            directory.mkdir(parents=True, exist_ok=True)
        self._file = max((int(p.stem.split("-")[1]) for p in directory.glob("bodies-*.bin")), default=0)

    def append(self, bodies: list[bytes]) -> list[Location]:
        """Write bodies at the end and sync them. Raises OSError; then none of them counts as written."""
        if not bodies:
            return []
        if self._writer < 0 or self._offset >= self.segment_bytes:
            self._roll()
        start = self._offset
        locations = []
        for body in bodies:
            locations.append(Location(self._file, self._offset, len(body)))
            self._offset += len(body)
        try:
            self._write_all(bodies, start)
            os.fdatasync(self._writer)
        except OSError:
            # After a failed sync nobody knows what is on disk: what comes next goes to another file.
            self._offset = self.segment_bytes
            raise
        return locations

    def _write_all(self, bodies: list[bytes], offset: int) -> None:
        for first in range(0, len(bodies), IOV_MAX):
            chunk = bodies[first : first + IOV_MAX]
            size = sum(map(len, chunk))
            written = os.pwritev(self._writer, chunk, offset)
            if written < size:  # a short write: finish it plainly
                rest = memoryview(b"".join(chunk))
                while written < size:
                    written += os.pwrite(self._writer, rest[written:], offset + written)
            offset += size

    def _roll(self) -> None:
        """Start a new file: a writer never appends to a file of an earlier life."""
        if self._writer >= 0:
            writer, self._writer = self._writer, -1
            os.close(writer)
        self._file += 1
        writer = os.open(self.path(self._file), os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        except OSError:
            os.close(writer)
            raise
        finally:
            os.close(directory)
        self._writer, self._offset = writer, 0

    def path(self, file: int) -> Path:
        """The file with this number."""
        return self.directory / f"bodies-{file:06d}.bin"

    def read(self, location: Location) -> bytes:
        """One body. Raises StorageError when the file is gone, DamagedError when it is too short."""
        try:
            descriptor = self._readers.get(location.file)
            if descriptor is None:
                descriptor = os.open(self.path(location.file), os.O_RDONLY)
                self._readers[location.file] = descriptor
            data = os.pread(descriptor, location.length, location.offset)
        except OSError as error:
            raise StorageError(f"{self.path(location.file)}: cannot read a body: {error}") from error
        if len(data) != location.length:
            raise DamagedError(
                f"{self.path(location.file)}: {len(data)} of {location.length} bytes at offset "
                f"{location.offset}; the file was cut short after it was recorded"
            )
        return data

    def delete_before(self, file: int) -> list[int]:
        """Delete files with a smaller number; returns them. One that is gone already is no error."""
        doomed = [number for number in self.files() if number < file]
        for number in doomed:
            descriptor = self._readers.pop(number, -1)
            if descriptor >= 0:
                os.close(descriptor)
            self.path(number).unlink(missing_ok=True)
        return doomed

    def files(self) -> list[int]:
        """Numbers of the files there are."""
        return sorted(int(path.stem.split("-")[1]) for path in self.directory.glob("bodies-*.bin"))

    def close(self) -> None:
        """Close every descriptor; may be called twice."""
        for descriptor in [*self._readers.values(), self._writer]:
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._readers.clear()
        self._writer = -1


class Recent:
    """The newest bodies, in memory: most are asked for soon after they are written. The oldest leave."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._bodies: dict[Location, bytes] = {}

    def keep(self, location: Location, body: bytes) -> None:
        """A body that has just been written."""
        self._bodies[location] = body
        self._num_bytes += location.length
        while self._num_bytes > self._max_bytes:
            self.forget(next(iter(self._bodies)))

    def get(self, location: Location) -> bytes | None:
        """The body, if it is still here."""
        return self._bodies.get(location)

    def forget(self, location: Location) -> None:
        """Nobody will ask for this body soon."""
        if self._bodies.pop(location, None) is not None:
            self._num_bytes -= location.length
