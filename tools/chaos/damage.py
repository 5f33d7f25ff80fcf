"""What may happen to a disk: full, read-only, a flipped page, a torn or a cut segment, a torn log.

Everything here happens while no process of the run lives, but `fill`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tools.chaos import kernel
from tools.chaos.spec import Damage

FILLER = "filler"
PAGE = 4096


class Tampered(NamedTuple):
    """Damage that can be taken back."""

    undo: Callable[[], None] = lambda: None
    """Make the disk usable again."""
    filler: Path | None = None


def fill(disk: Path) -> None:
    """Leave no free byte."""
    with (disk / FILLER).open("ab", buffering=0) as file:
        for size in (1 << 20, PAGE, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def tamper(damage: Damage, run_dir: Path, *, disk: Path) -> Tampered:
    """Do it; returns the way back."""
    match damage:
        case "read-only":
            kernel.read_only(disk, on=True)
            return Tampered(undo=lambda: kernel.read_only(disk, on=False))
        case "corrupt page":
            _corrupt(run_dir / "buffer.db")
        case "torn segment":
            with _newest_segment(run_dir).open("ab") as file:
                file.write(b"\xa5" * 777)
        case "cut segment":
            segment = _newest_segment(run_dir)
            os.truncate(segment, segment.stat().st_size // 2)
        case "torn log":
            log = run_dir / "buffer.db-wal"
            os.truncate(log, max(0, log.stat().st_size - PAGE // 2))
    return Tampered()


def repair(tampered: Tampered, *, disk: Path | None = None) -> None:
    """Make the disk usable again."""
    tampered.undo()
    if disk is not None:
        (disk / FILLER).unlink(missing_ok=True)


def _corrupt(database: Path) -> None:
    """Flip the first bytes of the page that holds the newest groups, which every resumption reads."""
    db = sqlite3.connect(database)
    db.execute("pragma wal_checkpoint(truncate)")
    size = db.execute("pragma page_size").fetchone()[0]
    root = db.execute("select rootpage from sqlite_master where name = 'groups'").fetchone()[0]
    db.close()
    with database.open("r+b") as file:
        file.seek((root - 1) * size)
        page = file.read(64)
        file.seek((root - 1) * size)
        file.write(bytes(byte ^ 0xFF for byte in page))


def _newest_segment(run_dir: Path) -> Path:
    segments = [path for path in (run_dir / "bodies").rglob("*") if path.is_file() and path.stat().st_size]
    if not segments:
        raise OSError(errno.ENOENT, "no segment was written", str(run_dir / "bodies"))
    return max(segments, key=lambda path: path.stat().st_mtime)
