"""The files of published versions: names, the lock of their publisher, what becomes of them without it.

    PREFIX-RUN.iI.lock                  held by the living publisher of the trainer's life I (RUN: `run_id`)
    PREFIX-RUN.iI.vV.weights (.tmp)     version V of that life

Needs no torch: whoever ends a run may look after what a dead trainer left behind.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import IO

import xxhash

PREFIX = "asyncrl"
"""Start of the names of a run's files."""
SHM = Path("/dev/shm")  # noqa: S108 - shared memory is what versions of one host travel through


def run_id(name: str, run_dir: Path | str) -> str:
    """What tells this run's files from those of another one of the same name, elsewhere on this host."""
    place = os.fsencode(Path(run_dir).resolve())
    return f"{name}-{xxhash.xxh32_hexdigest(place)}"


def directory_of(configured: str | None, run_dir: Path | str) -> Path:
    """Where a run's versions are written: weights.directory, else /dev/shm, else the run directory."""
    if configured is not None:
        return Path(configured)
    return SHM if SHM.is_dir() else Path(run_dir) / "weights"


def try_lock(file: IO[bytes]) -> bool:
    """Take a lock that the kernel gives back when this process dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def files_of(directory: Path, stem: str) -> list[tuple[int, Path]]:
    """The files of a run, whoever made them, with the trainer's life that did. `stem` is PREFIX-RUN.i"""
    name = re.compile(re.escape(stem) + r"(\d+)\.(lock|v\d+\.(weights|tmp))")
    matches = [(name.fullmatch(path.name), path) for path in directory.iterdir()]
    return [(int(match[1]), path) for match, path in matches if match]


def remove_files_of(directory: Path, stem: str, *, life: int) -> None:
    """Remove the versions of one life; its lock stays."""
    for owner, path in files_of(directory, stem):
        if owner == life and path.suffix != ".lock":
            path.unlink(missing_ok=True)


def remove_dead(directory: Path, stem: str, *, alive: int | None = None) -> None:
    """Remove the files of this run whose publisher is dead: nobody holds its lock any more.

    Args:
        directory: where the versions are.
        stem: PREFIX-RUN.i
        alive: life whose lock the caller holds itself; what lies under its name is of nobody yet.
    """
    for life in sorted({life for life, _ in files_of(directory, stem)}):
        if life == alive:
            remove_files_of(directory, stem, life=life)
            continue
        with (directory / f"{stem}{life}.lock").open("ab") as lock:
            if try_lock(lock):
                remove_files_of(directory, stem, life=life)
                Path(lock.name).unlink(missing_ok=True)
