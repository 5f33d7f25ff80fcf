"""What has to hold of a case when it is over, each with words for when it does not.

Reads the run's records and the driver's course; the replay trains, so this comes last in a driver's life.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.buffer.audit import audit
from asyncrl.errors import AsyncrlError, ExitCode
from asyncrl.run.replay import Replay
from tools.chaos import world
from tools.chaos.driver import Course, Launch
from tools.chaos.spec import Case

LIFE_S = 8.0
"""From a fault to the next life of whom it hit; silence is noticed after 1.5 s, a back-off takes 0.2 s."""
PROGRESS_S = 15.0
"""From a fault to the next trained batch; includes hellos that are said again after 5 s."""
END_S = 15.0
"""From the last trained batch to the end of the launch: last evaluation, last push, farewells."""
LETHAL = ("kill", "exit")
SHM = Path("/dev/shm")  # noqa: S108 - where versions are published
STALLED = "no rollout step for"
"""How a stall by name begins (errors.StalledError)."""
ORDERED = "ordered to fail"
"""In the last words of an actor that was told to exit."""
UNNAMED = re.compile(r"\w*(Error|Exception|ExceptionGroup|Exit|Interrupt): ")
"""How the last words of an actor begin whose error is none of ours, and so says nothing to a user."""


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """From one fault on."""

    role: str
    life_s: float | None
    """To the next life of the actor; None where it survived."""
    progress_s: float | None
    """To the next trained batch; None where none came after it."""


class Outcome(msgspec.Struct, kw_only=True):
    """A judged case."""

    spec: str
    name: str
    role: str
    place: str
    run_dir: str
    verdict: str
    """ok, failed, missed or skipped."""
    problems: list[str]
    seconds: float
    start_s: float | None = None
    """From the start of the launch to the first life of its last process."""
    launches: int = 0
    unfired: int = 0
    """Orders that did not fire."""
    deaths: dict[str, int] = {}
    """Lives that were followed by another one or cut off, by role."""
    lost: int = 0
    """Groups that had to be trained and were not."""
    twice: int = 0
    """Groups in two batches."""
    differently: int = 0
    """Batches that came out differently when they were trained again."""
    recoveries: list[Recovery] = []


def judge(course: Course, *, seconds: float) -> Outcome:
    """Everything that is checked of a case."""
    case = course.case
    outcome = Outcome(
        spec=case.spec, name=case.name, role=case.role, place=course.place, run_dir=course.run_dir,
        verdict="ok", problems=[], seconds=seconds, launches=len(course.launches),
    )  # fmt: skip
    if course.skipped:
        outcome.verdict, outcome.problems = "skipped", [course.skipped]
        return outcome
    if course.hung:
        outcome.problems.append(f"hung: {course.hung}")
    outcome.start_s = _start(course)
    outcome.deaths = _deaths(course)
    outcome.problems += [
        *_endings(course),
        *_words(course),
        *surprises(course.case, Path(course.run_dir)),
        *_litter(course),
    ]
    missed = [n for n in range(len(case.orders)) if all(line["order"] != n for line in course.fired)]
    missing = [f"order {n} ({case.orders[n].at}) did not fire" for n in missed]
    books = Path(course.run_dir) / "buffer.db"
    if books.exists() and not case.lasting and not course.hung:
        _read_books(course, outcome)
    if case.expect == "finish":
        outcome.problems += _in_time(outcome.recoveries)
    outcome.unfired = len(missing)
    if case.may_miss:
        missing = []
    if outcome.problems or missing:
        outcome.verdict = "failed" if outcome.problems else "missed"
    outcome.problems += missing
    return outcome


def _start(course: Course) -> float | None:
    """Seconds until the last process of the first launch was born."""
    if not course.launches:
        return None
    first: dict[str, float] = {}
    for line in course.born:
        first.setdefault(str(line["born"]), float(str(line["time"])))
    return max(first.values(), default=course.launches[0].began) - course.launches[0].began


def _deaths(course: Course) -> dict[str, int]:
    """Lives less names that were alive at the end: everyone of the last launch ends in peace."""
    lives = Counter(role_of(str(line["born"])) for line in course.born)
    names = {str(line["born"]) for line in course.born}
    alive = Counter(role_of(name) for name in names)
    return {role: count - alive[role] for role, count in lives.items() if count > alive[role]}


def role_of(name: str) -> str:
    """The role of an actor's name: "attached-generator-0" is a generator's."""
    return name.removeprefix("attached-").partition("-")[0]


# How the launches ended, and what they said.


def _endings(course: Course) -> Iterator[str]:
    case = course.case
    cut_off = any(step.do == "lose" for step in case.steps) or any(
        o.actor == "supervisor" and o.action in {"kill", "stop"} for o in case.orders
    )
    failures = 0
    for number, launch in enumerate(course.launches, start=1):
        last = number == len(course.launches)
        if launch.code == ExitCode.FINISHED or (launch.code == -9 and cut_off and not last):
            continue
        failures += 1
        problem = _failure(case, launch)
        if problem and not course.hung:
            yield f"launch {number} ended with code {launch.code}, {problem}: {_tail(launch)}"
    if case.expect == "fail" and not failures:
        yield "no launch failed, and one had to"
    finished = bool(course.launches) and course.launches[-1].code == ExitCode.FINISHED
    if not finished and not case.lasting and not course.hung:
        yield f"the run did not finish in {len(course.launches)} launches"


def _failure(case: Case, launch: Launch) -> str:
    """What is wrong with this failure; empty when it is as it should be."""
    if case.expect == "finish":
        return "and had to finish"
    if launch.code != ExitCode.FAILED:
        return f"and had to end with {int(ExitCode.FAILED)}"
    words = case.says.split("|") if case.expect == "fail" else [STALLED]
    text = " ".join(launch.text.lower().split())  # the summary is wrapped
    if not any(word.lower() in text for word in words):
        return f"without naming the cause ({' or '.join(words)})"
    return ""


def _tail(launch: Launch) -> str:
    lines = [
        line for line in launch.text.splitlines() if re.search(r"asyncrl:|ended|killed|detail|fail", line)
    ]
    return " | ".join((lines or launch.text.strip().splitlines())[-3:])[:600]


def _words(course: Course) -> Iterator[str]:
    for number, launch in enumerate(course.launches, start=1):
        if "Traceback" in launch.text:
            yield f"launch {number} printed a traceback: {_around(launch.text)}"
    for path in sorted(Path(course.run_dir).glob("attempt-*/log/*.out")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "Traceback" in text:
            yield f"{path.parent.parent.name}/{path.name} has a traceback: {_around(text)}"


def surprises(case: Case, run_dir: Path) -> Iterator[str]:
    """A life that was ended by an error nobody ordered: a defect, even where the next life mends it.

    Where errors are what a case is about (a failing disk, a vanished message), by one that has no name.
    """
    calm = case.expect == "finish" and not any(order.action.startswith("errno") for order in case.orders)
    for path in sorted(run_dir.glob("attempt-*/log/supervisor.jsonl")):
        # Its last line may be torn where the supervisor was killed.
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                said = msgspec.json.decode(line, type=dict[str, Any])
                words = str(said["message"]) if said.get("event") == "died" and said["code"] > 0 else ""
                if UNNAMED.match(words) or (calm and words and ORDERED not in words):
                    yield f"{said['member']} died of {words}"


def _around(text: str) -> str:
    return " | ".join(text[text.index("Traceback") :].strip().splitlines()[-2:])[:400]


def _litter(course: Course) -> Iterator[str]:
    if course.left:
        yield f"left running: {', '.join(course.left)}"
    run_dir = Path(course.run_dir)
    if not course.launches or course.launches[-1].code != ExitCode.FINISHED:
        return
    files = [*SHM.glob(f"*{run_dir.name}*"), *run_dir.rglob("*.tmp"), *run_dir.glob("ipc-*")]
    if files:
        yield f"left on disk: {', '.join(str(path) for path in files[:5])}"


# The books.


def _read_books(course: Course, outcome: Outcome) -> None:
    run_dir = Path(course.run_dir)
    try:
        report = audit(run_dir, deep=True)
    except AsyncrlError as error:
        outcome.problems.append(f"audit: {error}")
        return
    for equation in report.broken[:3]:
        outcome.problems.append(f"audit: {equation.name}: {equation.broken or 'the sides differ'}")
    steps = int(course.case.options.get("run.num_rollout", world.STEPS))
    with sqlite3.connect(f"file:{run_dir / 'buffer.db'}?mode=ro", uri=True) as db:
        trained = _one(db, "select count(*) from groups where reason = 'trained'")
        outcome.lost = steps * world.BATCH - int(trained)
        outcome.twice = _count(db, "select 1 from batch_groups group by group_id having count(*) > 1")
        outcome.differently = _count(
            db, "select 1 from trained group by batch having count(distinct digest) > 1"
        )
        open_leases = _count(db, "select 1 from leases where ended_at is null")
        outcome.recoveries = [*_recoveries(course, db)]
        outcome.problems += _states(course, db)
        last = _one(db, "select max(ended) from trained")
        slow = course.launches[-1].ended - float(last or 0.0)
        clocks = any(order.action == "clock" for order in course.case.orders)
        if last and slow > END_S and not clocks and len(course.launches) == 1:
            outcome.problems.append(f"the launch ended {slow:.1f} s after the last batch, bound {END_S:g} s")
    db.close()
    counts = (
        (outcome.lost, "groups were not trained"),
        (outcome.twice, "groups are in two batches"),
        (outcome.differently, "batches came out differently when trained again"),
        (open_leases, "leases are open"),
    )
    outcome.problems += [f"{count} {words}" for count, words in counts if count]
    if not outcome.problems:
        outcome.problems += _replay(run_dir, steps)


def _one(db: sqlite3.Connection, query: str, values: dict[str, Any] | None = None) -> Any:
    row = db.execute(query, values or {}).fetchone()
    return row[0] if row else None


def _count(db: sqlite3.Connection, query: str) -> int:
    return len(db.execute(query).fetchall())


def _states(course: Course, db: sqlite3.Connection) -> Iterator[str]:
    """The moment was what the case says it is."""
    if not course.case.state or not course.fired:
        return
    line = course.fired[0]
    values = {"time": float(str(line["time"])), "actor": line["actor"]}
    if not _one(db, course.case.state, values):
        yield f"the moment was not the right one: no row of {course.case.state} at {line}"


def _recoveries(course: Course, db: sqlite3.Connection) -> Iterator[Recovery]:
    if any(order.action == "clock" for order in course.case.orders):
        return  # the times in the rows are those of several clocks
    lose = {step.order for step in course.case.steps if step.do == "lose"}
    for line in course.fired:
        at, name = float(str(line["time"])), str(line["actor"])
        lethal = line["action"] in LETHAL or line["order"] in lose
        later = [
            float(str(b["time"])) - at
            for b in course.born
            if float(str(b["time"])) > at and b["born"] == name
        ]
        if not later and not lethal:
            if line["action"] in {"drop", "duplicate", "delay", "swap", "cut", "freeze", "stop"}:
                yield Recovery(role=role_of(name), life_s=None, progress_s=_progress(db, at))
            continue
        role = "all" if line["order"] in lose else role_of(name)
        yield Recovery(role=role, life_s=min(later, default=None), progress_s=_progress(db, at))


def _progress(db: sqlite3.Connection, at: float) -> float | None:
    ended = _one(db, "select min(ended) from trained where ended > :at", {"at": at})
    return None if ended is None else float(ended) - at


def _in_time(recoveries: list[Recovery]) -> Iterator[str]:
    for recovery in recoveries:
        if recovery.life_s is not None and recovery.life_s > LIFE_S:
            yield f"{recovery.role}: the next life came after {recovery.life_s:.1f} s, bound {LIFE_S:g} s"
        if recovery.progress_s is not None and recovery.progress_s > PROGRESS_S:
            after = f"{recovery.progress_s:.1f} s, bound {PROGRESS_S:g} s"
            yield f"{recovery.role}: the next batch was trained after {after}"


def _replay(run_dir: Path, steps: int) -> Iterator[str]:
    """An uninterrupted training on the recorded batches has the recorded weights after each, to the bit."""
    replay = Replay(run_dir)
    try:
        replay.start()
        outcomes = list(replay.steps())
    finally:
        replay.close()
    if [outcome.batch for outcome in outcomes] != list(range(steps)):
        yield f"replay: batches {[outcome.batch for outcome in outcomes]}, expected {steps}"
    wrong = [outcome.batch for outcome in outcomes if not outcome.equal]
    if wrong:
        yield f"replay: other weights after batches {wrong}"
