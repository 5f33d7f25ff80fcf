"""Executes transactions: bodies to segment files, rows to SQLite, in that order, each synced.

`write` returns only after both are on disk; whoever sends a message sends it after that. One thread uses a
Store. Readers of a live or finished run open `records` instead.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash

from asyncrl.buffer.segments import Location, Recent, Segments
from asyncrl.buffer.states import PROMPT_INDEX, BodyRow, Transaction
from asyncrl.buffer.tables import SCHEMA, STATEMENTS
from asyncrl.errors import DamagedError, StorageError
from asyncrl.messages.parts import GroupParts
from asyncrl.messages.sample import Lane, Status

DATABASE = "buffer.db"
BODIES = "bodies"

RECENT_BYTES = 64 << 20
"""Bodies that a store keeps in memory beside their files."""
MANY = 64
"""Rows of one statement. SQLite steps once for all of them, and the interpreter's lock, which a busy event
loop gives back late, changes hands once."""
MANY_STATEMENTS = {
    name: f"{head} values {','.join([row] * MANY)}"
    for name in ("group", "sample", "body", "lease", "batch_group")
    for head, _, row in [STATEMENTS[name].partition(" values ")]
}


DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def damage(path: Path, error: BaseException) -> DamagedError | None:
    """What to tell of an error that says that the database is not what was written; None for another one."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in DAMAGE:
        return None
    return DamagedError(
        f"{path}: the ledger is damaged: {error}. Nothing is repaired: put back a copy of the run directory, "
        "if there is one, or start a new run with trainer.hf_checkpoint at one of its checkpoints"
    )


class Store:
    """See the module's docstring."""

    def __init__(self, run_dir: Path, *, segment_bytes: int = 256 << 20, synchronous: str = "full") -> None:
        """Open or create the tables of a run.

        Raises:
            StorageError: the directory cannot be written, or the file is not a database.
        """
        self.path = run_dir / DATABASE
        self._locations: dict[int, Location] = {}
        self._recent = Recent(max_bytes=RECENT_BYTES)
        self._cut: dict[int, list[RecordedGroup]] = {}
        """Batches of the last transaction: they are delivered right after it."""
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.segments = Segments(run_dir / BODIES, segment_bytes=segment_bytes)
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._db.execute("pragma journal_mode = wal")
            self._db.execute(f"pragma synchronous = {synchronous}")
            self._db.execute("pragma cache_size = -8192")
            self._db.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise damage(self.path, error) or StorageError(
                f"{self.path}: cannot open the ledger: {error}"
            ) from error

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, for reads on the store's own thread."""
        return self._db

    def write(self, transaction: Transaction) -> None:
        """Commit everything in the transaction. Raises StorageError; then none of it counts as written."""
        self._cut.clear()
        try:
            locations = self.segments.append([body.data for body in transaction.bodies])
            self._db.execute("begin immediate")
            try:
                self._write_rows(transaction, locations)
                self._db.execute("commit")
            except BaseException:
                # Whatever it was, also a cancellation: an open transaction would block every later one.
                if self._db.in_transaction:  # a full disk makes SQLite roll back by itself
                    self._db.execute("rollback")
                raise
        except (OSError, sqlite3.Error) as error:
            raise damage(self.path, error) or StorageError(
                f"{self.path}: a commit failed ({error}); nothing of it was acknowledged. Free some disk "
                "space and go on with `asyncrl launch --resume`: everything acknowledged before is safe."
            ) from error
        for body, location in zip(transaction.bodies, locations, strict=True):
            self._locations[body.id] = location
            self._recent.keep(location, body.data)
        for body_id in transaction.forget:
            self._locations.pop(body_id, None)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around whatever reads the tables. Raises StorageError, or DamagedError."""
        try:
            yield
        except sqlite3.Error as error:
            raise damage(self.path, error) or StorageError(
                f"{self.path}: the ledger cannot be read: {error}"
            ) from error

    def _write_rows(self, transaction: Transaction, locations: list[Location]) -> None:
        self._execute("group", transaction.groups)
        self._execute("sample", transaction.samples)
        bodies = zip(transaction.bodies, locations, strict=True)
        self._execute("body", (_body_row(body, location) for body, location in bodies))
        for name, rows in groupby(transaction.rows, key=lambda row: row[0]):
            # Expanded run by run: a batch's digest needs the rows before it to be there.
            self._execute(name, (values for _, values in self._expand(rows)))

    def _execute(self, name: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """One statement for every row, or for every MANY rows where a statement takes as many."""
        left = iter(rows)
        if name in MANY_STATEMENTS:
            while len(chunk := list(islice(left, MANY))) == MANY:
                self._db.execute(MANY_STATEMENTS[name], [value for row in chunk for value in row])
            left = iter(chunk)
        self._db.executemany(STATEMENTS[name], left)

    def _expand(self, rows: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterable[tuple[str, tuple[Any, ...]]]:
        """A batch's row gets the digest over its bodies, which only the store can see in order."""
        for name, values in rows:
            if name == "batch":
                batch, groups, samples, tokens, seq, at = values
                self._cut[batch] = batch_groups(self._db, batch)
                yield name, (batch, groups, samples, tokens, digest_of(self._cut[batch]), seq, at)
            else:
                yield name, values

    def read(self, body_ids: Iterable[int]) -> list[bytes]:
        """Bodies by id, in order. Raises StorageError."""
        return [self._read(self._location(body_id)) for body_id in body_ids]

    def read_last(self, places: Iterable[Location]) -> list[bytes]:
        """Bodies by place, in order; memory lets go of them. Raises StorageError."""
        bodies = []
        for place in places:
            bodies.append(self._read(place))
            self._recent.forget(place)
        return bodies

    def _read(self, place: Location) -> bytes:
        body = self._recent.get(place)
        return self.segments.read(place) if body is None else body

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

    def batch(self, batch: int) -> list[RecordedGroup]:
        """The groups of a recorded batch, in order."""
        cut = self._cut.get(batch)
        return batch_groups(self._db, batch) if cut is None else cut

    def places(self, group: RecordedGroup) -> list[Location]:
        """Where a recorded group's bodies lie, in order. Raises StorageError when one has no row."""
        for body, place in zip(group.bodies, group.places, strict=True):
            if place is None:
                raise StorageError(f"{self.path}: there is no body {body}")
        return [place for place in group.places if place is not None]

    def remember(self, body_id: int, location: Location) -> None:
        """The place of a live body, when the ledger is rebuilt."""
        self._locations[body_id] = location

    def prune(self, rollout_step: int) -> list[int]:
        """Delete body files that only batches before `rollout_step` and settled groups need; returns them."""
        # A group's prompt is its first body, and files are written one after the other.
        oldest = self._db.execute(
            "select min(file) from bodies where idx = ? and group_id in"
            " (select group_id from groups where batch >= ? and batch >= 0 union all"
            " select group_id from groups indexed by groups_open where batch < 0 and reason is null)",
            (PROMPT_INDEX, rollout_step),
        ).fetchone()[0]
        return self.segments.delete_before(oldest) if oldest is not None else []

    def close(self) -> None:
        """Close files and the database; may be called twice."""
        self.segments.close()
        self._db.close()


class RecordedGroup(NamedTuple):
    """A complete (scored) group as the tables have it."""

    parts: GroupParts
    bodies: list[int]
    """Ids, in the order of the frames."""
    digests: list[str]
    """Of the bodies; "missing" for one without a row."""
    places: list[Location | None]
    """Of the bodies; None for one without a row."""


def batch_groups(db: sqlite3.Connection, batch: int) -> list[RecordedGroup]:
    """Every group of a recorded batch, in the recorded order."""
    return _recorded(db, "select group_id, position as place from batch_groups where batch = ?", (batch,))


def evaluation_groups(db: sqlite3.Connection, version: int, incarnation: int) -> list[RecordedGroup]:
    """Every group an evaluation finished, by ordinal."""
    chosen = (
        "select group_id, group_id as place from groups where lane = 'eval' and version = ?"
        " and incarnation = ? and reason = 'evaluated'"
    )
    return _recorded(db, chosen, (version, incarnation))


def batch_parts(db: sqlite3.Connection, batch: int) -> list[tuple[GroupParts, list[int]]]:
    """Every group of a recorded batch with the ids of its bodies, in the recorded order."""
    return [(group.parts, group.bodies) for group in batch_groups(db, batch)]


def batch_digest(db: sqlite3.Connection, batch: int) -> str:
    """xxh3-128 over the digests of every body of a batch, in the order it is delivered."""
    return digest_of(batch_groups(db, batch))


def digest_of(groups: Iterable[RecordedGroup]) -> str:
    """The same, of groups that have been read."""
    digest = xxhash.xxh3_128()
    for group in groups:
        digest.update(f"{group.parts.group_id}:{group.parts.removed}".encode())
        for body in group.digests:
            digest.update(body.encode())
    return digest.hexdigest()


_GroupRow = tuple[int, int, str, int, int]
_SampleRow = tuple[int, int, str, int, int]
_PlacedRow = tuple[int, int, int, str, int, int, int, int, str]


def _recorded(db: sqlite3.Connection, chosen: str, values: tuple[int, ...]) -> list[RecordedGroup]:
    """The groups that `chosen` (group_id, place) selects, by place: three queries, whatever their number."""
    groups = _rows(db, chosen, values, "groups", "c.place, t.group_id, lane, version, prompt_body", _GroupRow)
    columns = "t.group_id, idx, status, removed, score_body"
    samples: dict[int, list[_SampleRow]] = {}
    for sample in _rows(db, chosen, values, "samples", columns, _SampleRow):
        samples.setdefault(sample[0], []).append(sample)
    columns = "body, t.group_id, idx, kind, dropped, file, offset, length, digest"
    placed: dict[int, _PlacedRow] = {}
    segments: dict[tuple[int, int], list[int]] = {}
    for row in _rows(db, chosen, values, "bodies", columns, _PlacedRow):
        placed[row[0]] = row
        if row[3] == "segment" and not row[4]:
            segments.setdefault((row[1], row[2]), []).append(row[0])
    return [_group(group, samples.get(group[1], []), segments, placed) for group in groups]


def _rows(
    db: sqlite3.Connection, chosen: str, values: tuple[int, ...], table: str, columns: str, kind: Any
) -> list[Any]:
    """Rows of a table for the chosen groups, sorted. They come as one JSON value: one step, as with MANY."""
    sql = (
        f"with c as ({chosen}) select json_group_array(json_array({columns}))"  # noqa: S608 - our own names
        f" from c cross join {table} t on t.group_id = c.group_id"
    )
    found: str = db.execute(sql, values).fetchone()[0]
    return sorted(msgspec.json.decode(found, type=list[kind]))


def _group(
    group: _GroupRow,
    samples: list[_SampleRow],
    segments: dict[tuple[int, int], list[int]],
    placed: dict[int, _PlacedRow],
) -> RecordedGroup:
    _, group_id, lane, version, prompt = group
    own = [segments.get((group_id, sample[1]), []) for sample in samples]
    bodies = [prompt]
    for sample, ids in zip(samples, own, strict=True):
        bodies += [*ids, sample[4]]
    rows = [placed.get(body) for body in bodies]
    parts = GroupParts(
        group_id=group_id,
        lane=Lane(lane),
        issue_version=version,
        indices=[sample[1] for sample in samples],
        statuses=[Status(sample[2]) for sample in samples],
        segments=[len(ids) for ids in own],
        scored=True,
        removed=[sample[1] for sample in samples if sample[3]],
    )
    digests = ["missing" if row is None else row[8] for row in rows]
    return RecordedGroup(
        parts, bodies, digests, [None if row is None else Location(*row[5:8]) for row in rows]
    )


def _body_row(b: BodyRow, at: Location) -> tuple[Any, ...]:
    spans = msgspec.json.encode(b.spans).decode() if b.spans else "[]"
    return (
        b.id, b.kind, b.group_id, b.index, b.num_tokens, spans, b.fence, b.worker, at.file, at.offset,
        at.length, b.digest,
    )  # fmt: skip
