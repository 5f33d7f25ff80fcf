"""A run's records, read only: rows as they are, and bodies decoded and checked against their digests.

Works on a live run and on a finished one. A `Records` is one snapshot: everything it tells is as of the
moment it was opened. It writes nothing, takes no lock that a writer would wait for, and never repairs.

Invariant: no byte of a body leaves here unless it has the digest its row names.
"""

# ruff: noqa: S608 -- queries are put together from words of this module only
from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import msgspec
import xxhash

from asyncrl.buffer.deaths import DeathRow, deaths
from asyncrl.buffer.figures import Figures, compute
from asyncrl.buffer.segments import Location, Segments
from asyncrl.buffer.store import BODIES, DATABASE, batch_parts
from asyncrl.buffer.tables import IMPORTED
from asyncrl.errors import DataError, StorageError
from asyncrl.messages.parts import unpack
from asyncrl.messages.sample import Sample

SURVIVING = """
select t.batch, t.incarnation, t.step, t.digest, t.started, t.ended, t.tokens from trained t
where not exists (select 1 from incarnations i
                  where i.incarnation > t.incarnation and i.rollout_step <= t.batch)
order by t.batch, t.incarnation
"""
"""Trainings that no later life of the trainer has undone: a life starts again at its checkpoint, and what
earlier lives trained after that is lost."""


class BatchRow(msgspec.Struct, frozen=True):
    """A recorded batch."""

    batch: int
    num_groups: int
    num_samples: int
    num_tokens: int
    """Response tokens."""
    digest: str
    """Over its bodies' digests, in order."""
    seq: int
    """Ledger event at which it was cut."""
    cut_at: float
    """Unix seconds."""


class TrainedRow(msgspec.Struct, frozen=True):
    """One training of one batch."""

    batch: int
    incarnation: int
    step: int
    """Optimizer steps in the weights after it."""
    digest: str
    """Of those weights."""
    started: float
    """Unix seconds."""
    ended: float
    tokens: int
    """Response tokens that the loss saw."""


class VersionRow(msgspec.Struct, frozen=True):
    """A published version of the weights."""

    version: int
    incarnation: int
    step: int
    digest: str
    num_bytes: int
    published_at: float
    """Unix seconds."""


class CheckpointRow(msgspec.Struct, frozen=True):
    """A committed checkpoint; its directory may have been removed for newer ones."""

    rollout_step: int
    incarnation: int
    step: int
    path: str
    saved_at: float
    """Unix seconds."""


class MemberRow(msgspec.Struct, frozen=True):
    """One life of an actor at the desk."""

    name: str
    incarnation: str
    role: str
    host: str
    pid: int
    joined_at: float
    """Unix seconds."""
    left_at: float | None
    """None: still a member, or the run ended with it."""
    reason: str | None


class LeaseRow(msgspec.Struct, frozen=True):
    """One lease."""

    fence: int
    kind: str
    worker: str
    incarnation: str
    group_id: int
    indices: str
    """Positions in the group, separated by commas."""
    version: int
    granted_at: float
    """Unix seconds."""
    ended_at: float | None
    outcome: str | None


class Records:
    """See the module's docstring."""

    def __init__(self, run_dir: Path) -> None:
        """Open a run's records.

        Raises:
            DataError: there is no run in this directory.
            StorageError: its ledger cannot be read.
        """
        self.run_dir = run_dir
        self.db = connect(run_dir)
        self._segments = Segments(run_dir / BODIES, writable=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; may be called twice."""
        self._segments.close()
        self.db.close()

    # Rows.

    @property
    def imported(self) -> str:
        """Where an imported run came from, in words; empty for a run that was made here."""
        rows = self._rows("select value from meta where key = ?", IMPORTED)
        return str(rows[0][0]) if rows else ""

    def totals(self) -> dict[str, int]:
        """The ledger's running sums by name ("received.tokens", "settled.trained.groups", ...)."""
        return dict(self._rows("select key, value from totals order by key"))

    def batches(self) -> list[BatchRow]:
        """Every recorded batch, in order."""
        return [BatchRow(*row) for row in self._rows("select * from batches order by batch")]

    def lineage(self) -> list[TrainedRow]:
        """The training of each batch that the surviving weights rest on, in order."""
        return [TrainedRow(*row) for row in self._rows(SURVIVING)]

    def versions(self) -> list[VersionRow]:
        """Every published version, in order."""
        columns = "version, incarnation, step, digest, num_bytes, published_at"
        rows = self._rows(f"select {columns} from versions order by version, incarnation")
        return [VersionRow(*row) for row in rows]

    def checkpoints(self) -> list[CheckpointRow]:
        """Every committed checkpoint, in order."""
        return [
            CheckpointRow(*row)
            for row in self._rows("select * from checkpoints order by rollout_step, incarnation")
        ]

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Mean reward by version and data set, over the samples of evaluated groups."""
        rows = self._rows(
            "select g.version, g.dataset, avg(s.reward) from groups g join samples s using (group_id)"
            " where g.lane = 'eval' and g.reason = 'evaluated' group by 1, 2 order by 1, min(g.group_id)"
        )
        means: dict[int, dict[str, float]] = {}
        for version, dataset, mean in rows:
            means.setdefault(version, {})[dataset] = mean
        return means

    def members(self) -> list[MemberRow]:
        """Every life of every actor, in the order they came."""
        return [MemberRow(*row) for row in self._rows("select * from members order by joined_at, name")]

    def deaths(self) -> list[DeathRow]:
        """Every worker the desk lost, and what that cost, in the order they went."""
        return deaths(self.db)

    def retries(self) -> list[tuple[int, int]]:
        """(failed group, group that tries it again), in order."""
        return retries(self.db)

    def leases(self, *, open_only: bool = False) -> list[LeaseRow]:
        """Leases in the order they were given."""
        which = "where ended_at is null" if open_only else ""
        return [LeaseRow(*row) for row in self._rows(f"select * from leases {which} order by fence")]

    def states(self) -> dict[str, dict[str, int]]:
        """Samples by lane and state."""
        found: dict[str, dict[str, int]] = {}
        for lane, state, count in self._rows(
            "select g.lane, s.state, count(*) from samples s join groups g using (group_id) group by 1, 2"
            " order by 1, 2"
        ):
            found.setdefault(lane, {})[state] = count
        return found

    def figures(self, *, warmup: int = 2) -> Figures:
        """What a run did, in numbers; the first `warmup` rollout steps are left out of the overlap."""
        return compute(self.db, self.lineage(), warmup=warmup)

    # Bodies.

    def batch(self, batch: int) -> list[list[Sample]]:
        """The samples of a recorded batch by group, exactly as the trainer was handed them.

        Raises:
            DataError: there is no such batch.
            StorageError: a body is missing or is not what was recorded.
        """
        parts = batch_parts(self.db, batch)
        if not parts:
            raise DataError(f"{self.run_dir}: there is no recorded batch {batch}")
        frames = self.bodies(body for _, bodies in parts for body in bodies)
        return unpack([part for part, _ in parts], frames)

    def bodies(self, body_ids: Iterable[int]) -> list[bytes]:
        """Bodies by id, each checked against its digest. Raises StorageError."""
        return [self.body(body_id) for body_id in body_ids]

    def body(self, body_id: int) -> bytes:
        """One body. Raises StorageError when it is missing or is not what was recorded."""
        rows = self._rows(
            "select kind, group_id, idx, file, offset, length, digest from bodies where body = ?", body_id
        )
        if not rows:
            raise StorageError(f"{self.run_dir / DATABASE}: there is no row of body {body_id}")
        kind, group_id, index, file, offset, length, digest = rows[0]
        data = self._segments.read(Location(file, offset, length))
        actual = xxhash.xxh3_128_hexdigest(data)
        if actual != digest:
            where = f"group {group_id}" + (f" sample {index}" if index >= 0 else "")
            raise StorageError(
                f"{self._segments.path(file)}: body {body_id} ({kind} of {where}, {length} bytes at"
                f" {offset}) has "
                f"digest {actual}, recorded was {digest}; the file or the row was altered after it was"
                f" written"
            )
        return data

    def has_bodies(self, batch: int) -> bool:
        """Whether every file that holds a body of this batch is still there."""
        files = self._rows(
            "select distinct b.file from batch_groups g join bodies b using (group_id) where g.batch = ?",
            batch,
        )
        return all(self._segments.path(row[0]).exists() for row in files)

    def _rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self.db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"{self.run_dir / DATABASE}: cannot be read: {error}") from error


def retries(db: sqlite3.Connection) -> list[tuple[int, int]]:
    """(failed group, group that tries it again), in order; none for a run older than the table."""
    if not db.execute("select 1 from sqlite_master where name = 'retries'").fetchone():
        return []
    return db.execute("select retry_of, group_id from retries order by group_id").fetchall()


def connect(run_dir: Path) -> sqlite3.Connection:
    """A read-only connection to a run's tables, in one read transaction. Raises DataError, StorageError."""
    path = run_dir / DATABASE
    if not path.is_file():
        raise DataError(
            f"{run_dir}: there is no run here (no {DATABASE}); give a run directory, such as runs/NAME"
        )
    # Without a log there is no writer and nothing to replay: `immutable` then keeps SQLite from making files.
    mode = "mode=ro" if os.path.exists(f"{path}-wal") else "mode=ro&immutable=1"  # noqa: PTH110
    try:
        db = sqlite3.connect(f"file:{quote(str(path.absolute()))}?{mode}", uri=True, isolation_level=None)
        db.execute("begin")
        db.execute("select count(*) from groups").fetchone()
    except sqlite3.Error as error:
        raise StorageError(f"{path}: the ledger cannot be read: {error}") from error
    return db
