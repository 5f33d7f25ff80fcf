"""The run directory: what lies where, who may write it, and how a run ended.

    run.toml  plan.json  status.json  buffer.db  bodies/  checkpoints/  metrics/  attempt-001/log/

A lock file is held for as long as a run is live, so that two launches never share a directory and `status`
knows a live run from a dead one.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from pathlib import Path
from typing import IO

import msgspec

from asyncrl.errors import ConfigError, DataError, StorageError
from asyncrl.topology.plan import Plan

IMPORTED = "imported"
"""Phase of a run that `asyncrl buffer import` made."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """status.json: how to reach a live run, and how a finished one ended."""

    phase: str
    """starting, running, finished, drained, failed, imported."""
    address: str = ""
    """Of the supervisor, while live."""
    buffer_address: str = ""
    pid: int = 0
    exit_code: int | None = None
    detail: str = ""
    updated_at: float = 0.0
    started_at: float = 0.0


class RunDir:
    """One run directory; made by `create` or `resume`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None
        self.status = Status(phase="starting")

    @classmethod
    def create(cls, parent: str, name: str) -> RunDir:
        """A new run directory, locked. Raises ConfigError when it exists or cannot be made."""
        path = Path(parent) / free_name(Path(parent), name)
        if path.exists() and any(path.iterdir()):
            live = " by a live run" if is_live(path) else ""
            raise ConfigError(
                f"run.name: {path} is in use{live}; choose another name (a trailing -% takes the next free "
                f"number), or continue it with `asyncrl launch --resume {path}`"
            )
        run = cls(path)
        try:
            for folder in ("metrics", "checkpoints"):
                (path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.dir: {path} cannot be made: {error.strerror}") from error
        run.lock()
        return run

    @classmethod
    def resume(cls, path: Path) -> RunDir:
        """An interrupted run's directory, locked. Raises DataError, ConfigError."""
        if not (path / "plan.json").exists():
            raise DataError(
                f"{path}: not a run directory (it has no plan.json); `asyncrl launch --topology` starts one"
            )
        if (path / "status.json").exists() and read_status(path).phase == IMPORTED:
            raise ConfigError(
                f"{path}: an imported run has nothing to go on with but its batches; train on them with "
                f"`asyncrl replay {path} --save`, and launch a run with that as its trainer.hf_checkpoint"
            )
        run = cls(path)
        run.lock()
        return run

    def lock(self) -> None:
        """Hold the directory. Raises ConfigError when a live run has it, StorageError for a bad disk."""
        try:
            lock = (self.path / "lock").open("ab")
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written: {error.strerror}; make it writable, then go on with "
                f"`asyncrl launch --resume {self.path}`"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ConfigError(
                f"{self.path} is in use by a live run (see `asyncrl status {self.path}`); stop it first"
            ) from None
        self._lock = lock

    def new_attempt(self) -> Path:
        """The directory of this launch's logs. Raises StorageError."""
        numbers = [int(p.name.split("-")[1]) for p in self.path.glob("attempt-*")]
        attempt = self.path / f"attempt-{max(numbers, default=0) + 1:03d}"
        try:
            (attempt / "log").mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{attempt}: cannot be made: {error.strerror}") from error
        return attempt

    def write_plan(self, plan: Plan, *, source: str = "") -> None:
        """Keep the plan (and the topology's text, as given)."""
        self.write("plan.json", msgspec.json.format(msgspec.json.encode(plan), indent=1))
        if source:
            self.write("run.toml", source.encode())

    def read_plan(self) -> Plan:
        """The plan of this run. Raises DataError."""
        return read_plan(self.path)

    def set_status(self, **changes: object) -> None:
        """Change status.json."""
        self.status = msgspec.structs.replace(self.status, updated_at=time.time(), **changes)
        self.write("status.json", msgspec.json.encode(self.status))

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole. Raises StorageError."""
        path = self.path / name
        temporary = path.with_name(f".{name}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)  # noqa: PTH105 - the atomic one
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def free_name(parent: Path, name: str) -> str:
    """`name`, with a trailing -% replaced by the next free number."""
    if not name.endswith("-%"):
        return name
    base = name[:-2]
    pattern = re.compile(re.escape(base) + r"-(\d+)")
    taken = [int(m[1]) for p in parent.glob(f"{base}-*") if (m := pattern.fullmatch(p.name))]
    return f"{base}-{max(taken, default=0) + 1:03d}"


def is_live(path: Path) -> bool:
    """Whether a supervisor holds this run directory now."""
    try:
        with (path / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read_status(path: Path) -> Status:
    """status.json of a run. Raises DataError."""
    try:
        return msgspec.json.decode((path / "status.json").read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: not a run directory: {error}") from error


def read_plan(path: Path) -> Plan:
    """plan.json of a run. Raises DataError."""
    try:
        return msgspec.json.decode((path / "plan.json").read_bytes(), type=Plan)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: no readable plan.json: {error}") from error


def newest_run(parent: Path, *, live: bool) -> Path | None:
    """The run directory below `parent` that changed last."""
    runs = [p.parent for p in parent.glob("*/status.json") if not live or is_live(p.parent)]
    return max(runs, key=lambda p: (p / "status.json").stat().st_mtime, default=None)
