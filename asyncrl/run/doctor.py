"""`asyncrl doctor` from outside: ask a live run's supervisor; where it is mute, look; where it is dead, read.

supervisor answers          its report
it does not                 what /proc and SIGUSR1 say of it and of the members in buffer.db (this host only)
nobody holds the run        what the records tell: how it ended, its last events, who was last silent
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from asyncrl.actor.examine import look_at
from asyncrl.errors import StalledError
from asyncrl.messages.supervision import Diagnose
from asyncrl.obs.doctor import Report, report_on, save
from asyncrl.obs.vitals import Case, Member
from asyncrl.run.remote import Place, question
from asyncrl.run.rundir import Status, read_status

NUM_EVENTS = 20
"""Of the records, the newest."""
EVENTS = (
    "select joined_at, name || ' joined, pid ' || pid from members",
    "select left_at, name || ' left: ' || coalesce(reason, '?') from members where left_at is not null",
    "select cut_at, 'batch ' || batch || ' was cut' from batches",
    "select ended, 'batch ' || batch || ' was trained' from trained",
    "select published_at, 'version ' || version || ' was published' from versions",
    "select saved_at, 'checkpoint of step ' || rollout_step || ' was saved' from checkpoints",
    "select at, name || ' loaded version ' || version from swaps",
    "select granted_at, worker || ' got a lease to ' || kind from leases order by fence desc limit 3",
    """select ended_at, worker || ' ended a lease to ' || kind || ': ' || coalesce(outcome, '?')
    from leases where ended_at is not null order by ended_at desc limit 3""",
    """select settled_at, 'group ' || group_id || ' was ' || reason || ': ' || note from groups
    where note <> '' and reason is not null order by settled_at desc limit 3""",
)
"""Queries for (Unix seconds, what happened)."""
OPEN_LEASES = (
    "select worker || ' held ' || count(*) || ' leases to ' || kind || ', the oldest since ' ||"
    " strftime('%H:%M:%S', min(granted_at), 'unixepoch') from leases where ended_at is null"
    " group by worker, kind order by min(granted_at)"
)


def examine(place: Place, *, key: Path | None) -> Report:
    """The report about a run. Raises RunError, DataError."""
    if place.address:
        try:
            reply = question(place, Diagnose(), key=key)
            return msgspec.json.decode(reply.data, type=Report)
        except StalledError:
            if place.path is None:
                raise
            return save(report_on(_mute(place.path)), place.path)
    assert place.path is not None, "a run that is not live was found by its directory"
    return save(report_on(_dead(place.path)), place.path)


def _mute(path: Path) -> Case:
    """The supervisor does not answer: what this host tells of the processes of the run."""
    status = read_status(path)
    supervisor = Member(name="supervisor", role="supervisor", pid=status.pid)
    members = [
        Member(name=name, role=role, pid=pid, host=host, local=host in {"", os.uname().nodename}, asked=False)
        for name, role, pid, host in _rows(
            path, "select name, role, pid, host from members where left_at is null order by joined_at"
        )
    ]
    looked = look_at([supervisor, *members])
    return msgspec.structs.replace(_case(path, status), live=True, supervisor=looked[0], members=looked[1:])


def _dead(path: Path) -> Case:
    return _case(path, read_status(path))


def _case(path: Path, status: Status) -> Case:
    trained = _rows(path, "select count(distinct batch), max(ended) from trained")
    step, last = trained[0] if trained else (0, None)
    return Case(
        run=str(path),
        at=time.time(),
        live=False,
        phase=status.phase,
        detail=status.detail,
        step=step,
        since_step_s=None if last is None else max(0.0, time.time() - last),
        events=[*_events(path), *(words for (words,) in _rows(path, OPEN_LEASES))],
    )


def _events(path: Path) -> Iterator[str]:
    """The newest things that happened, oldest first."""
    found = [row for query in EVENTS for row in _rows(path, query) if row[0]]
    for at, words in sorted(found)[-NUM_EVENTS:]:
        yield f"{time.strftime('%H:%M:%S', time.gmtime(at))} {words}"


def _rows(path: Path, query: str) -> list[tuple]:  # type: ignore[type-arg]
    """Rows of the run's tables; none where there are no tables, or the page that holds them is broken."""
    database = path / "buffer.db"
    if not database.exists():
        return []
    db = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=2.0)
    try:
        return db.execute(query).fetchall()
    except sqlite3.DatabaseError:
        return []
    finally:
        db.close()
