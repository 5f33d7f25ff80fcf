"""Executes transactions: bodies to segment files, rows to SQLite, in that order, each synced.

`write` returns only after both are on disk; whoever sends a message sends it after that. One thread uses a
Store. Readers of a live or finished run open `records` instead.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from asyncrl.buffer.segments import Location, Segments
from asyncrl.buffer.states import BodyRow, Transaction
from asyncrl.buffer.tables import SCHEMA, STATEMENTS
from asyncrl.errors import StorageError
from asyncrl.messages.control import GroupParts
from asyncrl.messages.sample import Lane, Status

DATABASE = "buffer.db"
BODIES = "bodies"


class Store:
    """See the module's docstring."""

    def __init__(self, run_dir: Path, *, segment_bytes: int = 256 << 20, synchronous: str = "full") -> None:
        """Open or create the tables of a run.

        Raises:
            StorageError: the directory cannot be written, or the file is not a database.
        """
        self.path = run_dir / DATABASE
        self._locations: dict[int, Location] = {}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.segments = Segments(run_dir / BODIES, segment_bytes=segment_bytes)
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._db.execute("pragma journal_mode = wal")
            self._db.execute(f"pragma synchronous = {synchronous}")
            self._db.execute("pragma cache_size = -65536")
            self._db.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{self.path}: cannot open the ledger: {error}") from error

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, for reads on the store's own thread."""
        return self._db

    def write(self, transaction: Transaction) -> None:
        """Commit everything in the transaction. Raises StorageError; then none of it counts as written."""
        try:
            locations = self.segments.append([body.data for body in transaction.bodies])
            self._db.execute("begin immediate")
            try:
                self._write_rows(transaction, locations)
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:  # a full disk makes SQLite roll back by itself
                    self._db.execute("rollback")
                raise
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"{self.path}: a commit failed ({error}); nothing of it was acknowledged. Free some disk space "
                "and go on with `asyncrl launch --resume`: everything acknowledged before is safe."
            ) from error
        for body, location in zip(transaction.bodies, locations, strict=True):
            self._locations[body.id] = location
        for body_id in transaction.forget:
            self._locations.pop(body_id, None)

    def _write_rows(self, transaction: Transaction, locations: list[Location]) -> None:
        execute = self._db.executemany
        execute(STATEMENTS["group"], transaction.groups)
        execute(STATEMENTS["sample"], transaction.samples)
        bodies = zip(transaction.bodies, locations, strict=True)
        execute(STATEMENTS["body"], (_body_row(body, location) for body, location in bodies))
        for name, rows in groupby(self._expand(transaction.rows), key=lambda row: row[0]):
            execute(STATEMENTS[name], (values for _, values in rows))

    def _expand(self, rows: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterable[tuple[str, tuple[Any, ...]]]:
        """A batch's row gets the digest over its bodies, which only the store can see in order."""
        for name, values in rows:
            if name == "batch":
                batch, groups, samples, tokens, seq, at = values
                yield name, (batch, groups, samples, tokens, batch_digest(self._db, batch), seq, at)
            else:
                yield name, values

    def read(self, body_ids: Iterable[int]) -> list[bytes]:
        """Bodies by id, in order. Raises StorageError."""
        return [self.segments.read(self._location(body_id)) for body_id in body_ids]

    def _location(self, body_id: int) -> Location:
        location = self._locations.get(body_id)
        if location is None:
            row = self._db.execute(
                "select file, offset, length from bodies where body = ?", (body_id,)
            ).fetchone()
            if row is None:
                raise StorageError(f"{self.path}: there is no body {body_id}")
            location = Location(*row)
        return location

    def size_of(self, body_ids: Iterable[int]) -> int:
        """Bytes of these bodies."""
        return sum(self._location(body_id).length for body_id in body_ids)

    def remember(self, body_id: int, location: Location) -> None:
        """The place of a live body, when the ledger is rebuilt."""
        self._locations[body_id] = location

    def close(self) -> None:
        """Close files and the database; may be called twice."""
        self.segments.close()
        self._db.close()


def batch_parts(db: sqlite3.Connection, batch: int) -> list[tuple[GroupParts, list[int]]]:
    """Every group of a recorded batch with the ids of its bodies, in the recorded order."""
    ids = [row[0] for row in db.execute(
        "select group_id from batch_groups where batch = ? order by position", (batch,)
    )]  # fmt: skip
    return [group_parts(db, group_id) for group_id in ids]


def evaluation_parts(
    db: sqlite3.Connection, version: int, incarnation: int
) -> list[tuple[GroupParts, list[int]]]:
    """Every group an evaluation finished, by ordinal."""
    rows = db.execute(
        "select group_id from groups where lane = 'eval' and version = ? and incarnation = ?"
        " and reason = 'evaluated' order by group_id",
        (version, incarnation),
    )
    return [group_parts(db, row[0]) for row in rows.fetchall()]


def group_parts(db: sqlite3.Connection, group_id: int) -> tuple[GroupParts, list[int]]:
    """One complete (scored) group and its bodies' ids."""
    lane, version, prompt = db.execute(
        "select lane, version, prompt_body from groups where group_id = ?", (group_id,)
    ).fetchone()
    samples = db.execute(
        "select idx, status, removed, score_body from samples where group_id = ? order by idx", (group_id,)
    ).fetchall()
    segments: dict[int, list[int]] = {}
    for body, idx in db.execute(
        "select body, idx from bodies where group_id = ? and kind = 'segment' and dropped = 0 order by body",
        (group_id,),
    ):
        segments.setdefault(idx, []).append(body)
    bodies = [prompt]
    for idx, _, _, score in samples:
        bodies += [*segments.get(idx, []), score]
    parts = GroupParts(
        group_id=group_id,
        lane=Lane(lane),
        issue_version=version,
        indices=[row[0] for row in samples],
        statuses=[Status(row[1]) for row in samples],
        segments=[len(segments.get(row[0], [])) for row in samples],
        scored=True,
        removed=[row[0] for row in samples if row[2]],
    )
    return parts, bodies


def batch_digest(db: sqlite3.Connection, batch: int) -> str:
    """xxh3-128 over the digests of every body of a batch, in the order it is delivered."""
    digest = xxhash.xxh3_128()
    for parts, bodies in batch_parts(db, batch):
        digest.update(f"{parts.group_id}:{parts.removed}".encode())
        for body in bodies:
            row = db.execute("select digest from bodies where body = ?", (body,)).fetchone()
            digest.update(row[0].encode() if row else b"missing")
    return digest.hexdigest()


def _body_row(b: BodyRow, at: Location) -> tuple[Any, ...]:
    spans = msgspec.json.encode(b.spans).decode() if b.spans else "[]"
    return (
        b.id, b.kind, b.group_id, b.index, b.num_tokens, spans, b.fence, b.worker, at.file, at.offset, at.length,
        b.digest,
    )  # fmt: skip
