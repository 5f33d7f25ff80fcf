"""The doctor: the cause is what the facts say, stacks are what runs, and strangers are never signalled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.actor.examine import Doctor
from asyncrl.actor.roster import Roster
from asyncrl.obs import stacks, vitals
from asyncrl.obs.causes import cause
from asyncrl.obs.doctor import Report, report_on, save, text
from asyncrl.obs.stacks import Frame, Stack
from asyncrl.obs.view import QueueUpdate
from asyncrl.obs.vitals import Case, Desk, Facts, LoopLag, Member, Process, Spoken, Traffic, Wait, Worker
from asyncrl.topology import load
from asyncrl.topology.plan import compile_plan
from tests.support.processes import wait_until

LAUNCHERS = Path(__file__).parents[2] / "launchers"

USER = Frame(file="/home/me/mine.py", line=7, function="grade", kind="user")
OURS = Frame(file="/opt/x/asyncrl/engines/scripted.py", line=40, function="Engine._run", kind="ours")
SWAP = Frame(file="/opt/x/asyncrl/roles/generator.py", line=9, function="GeneratorRole._swap", kind="ours")
FETCH = Frame(file="/opt/x/asyncrl/weights/stream.py", line=88, function="fetch", kind="ours")
LOOP = Frame(file="/usr/lib/python3.11/asyncio/base_events.py", line=1, function="run", kind="library")
RECEIVE = Frame(file="/opt/x/asyncrl/rewards/child.py", line=90, function="Pipe.receive", kind="ours")


def thread(*frames: Frame, name: str = "main") -> Stack:
    return Stack(kind="thread", name=name, frames=[LOOP, *frames])


def task(*frames: Frame) -> Stack:
    return Stack(kind="task", name="Task-1", frames=list(frames))


def facts(name: str, **changes: Any) -> Facts:
    given = {"name": name, "role": name.partition("-")[0], "uptime_s": 100.0, **changes}
    return Facts(**given)


def member(name: str, *, answers: bool = True, **changes: Any) -> Member:
    own = set(Facts.__struct_fields__) - {"state"}
    known = {key: changes.pop(key) for key in list(changes) if key in own}
    role = name.partition("-")[0]
    given = {"pid": 10, "heard_s": 0.4, "facts": facts(name, **known) if answers else None, **changes}
    return Member(name=name, role=role, **given)


def waits(name: str, seconds: float) -> list[Wait]:
    return [Wait(name=name, seconds=seconds)]


def case(*others: Member, desk: Desk | None = None, **changes: Any) -> Case:
    """A run in which everybody is well, but for those who are given."""
    well = {
        "trainer": member("trainer", waits=waits("batch", 0.2)),
        "generator-0": member("generator-0", held=4, spoken=[said("Reports", 0.1)]),
        "reward-0": member("reward-0", waits=waits("lease", 0.2)),
        "source": member("source", waits=waits("need", 500.0)),
        "buffer": member("buffer", desk=desk or Desk(batch_size=4, tickets_total=8)),
    }
    well |= {other.name: other for other in others}
    given = {"phase": "training", "step": 3, "since_step_s": 1.0, "stall_s": 300.0, **changes}
    return Case(run="runs/x", members=list(well.values()), **given)


def said(kind: str, age_s: float, way: str = "said") -> Spoken:
    return Spoken(kind=kind, way=way, count=1, age_s=age_s)


HUNGRY = member("trainer", waits=waits("batch", 40.0))
STOPPED = Process(pid=10, state="T")
SLEEPS = Process(pid=10, state="S", stacks=[thread(USER)])
IDLE_LOOP = Process(pid=10, state="S", stacks=[task(FETCH), thread()])
CHILD = Process(pid=11, state="S", stacks=[thread(USER)])
IDLE_CHILD = Process(pid=12, state="S", stacks=[thread(RECEIVE)])

CASES = {
    "healthy": (case(), "nothing is wrong: everybody answers, 3 rollout steps"),
    "trainer stopped": (
        case(member("trainer", answers=False, process=STOPPED, heard_s=12.0)),
        "trainer (pid 10) is stopped by a signal (SIGSTOP), silent for 12s; `kill -CONT 10` lets it go on",
    ),
    "a reward's child is stopped": (
        case(member("reward-0", children=[Process(pid=11, state="T")])),
        "a child of reward-0 (pid 11) is stopped",
    ),
    "trainer dead": (
        case(member("trainer", answers=False, process=Process(pid=10, state="Z"), last_words="NaN")),
        "trainer (pid 10) is dead, silent for 400ms; its last words: NaN",
    ),
    "dies again and again": (
        case(member("generator-0", restarts=3, uptime_s=1.0, last_words="digest of version 2 is wrong")),
        "generator-0 dies again and again, 3 times so far; its last words: digest of version 2 is wrong",
    ),
    "event loop blocked": (
        case(member("generator-0", answers=False, process=SLEEPS, heard_s=42.0)),
        "the event loop of generator-0 (pid 10) is blocked for 42s in grade at /home/me/mine.py:7",
    ),
    "hangs in the kernel": (
        case(member("buffer", answers=False, process=Process(pid=10, state="D"))),
        "buffer (pid 10) hangs in the kernel",
    ),
    "mute although its loop turns": (
        case(member("generator-0", answers=False, process=IDLE_LOOP, heard_s=9.0)),
        "generator-0 does not answer, silent for 9.0s",
    ),
    "another host does not answer": (
        case(member("generator-9", answers=False, local=False, host="far", heard_s=30.0)),
        "generator-9 on far does not answer, silent for 30s",
    ),
    "not ready yet": (
        case(
            msgspec.structs.replace(
                member("trainer"),
                facts=facts("trainer", state="starting", stacks=[thread(OURS, name="trainer-compute_0")]),
            )
        ),
        "trainer is not ready yet, in Engine._run",
    ),
    "disk full": (
        case(HUNGRY, desk=Desk(low_on_disk=True, free_bytes=10**6, min_free_bytes=10**9)),
        "the disk of the run is full: 1.0 MB are free and buffer.min_free_bytes wants 1.0 GB",
    ),
    "commit hangs": (
        case(member("buffer", waits=waits("disk", 20.0))),
        "the disk does not finish a commit: buffer has waited 20s for it",
    ),
    "all refused": (
        case(HUNGRY, desk=Desk(refused=30, batch_size=4)),
        "30 groups in a row were refused by the filters or failed, and no batch of 4 was cut",
    ),
    "the buffer knows": (case(desk=Desk(failure="41 groups in a row were refused")), "41 groups in a row"),
    "push that nobody can load": (
        case(
            HUNGRY,
            member("generator-0", version=2, announced=3, announced_s=12.0, stacks=[task(SWAP, FETCH)]),
        ),
        "no generator can load version 3, announced 12s ago: generator-0 is in fetch at",
    ),
    "reward hangs": (
        case(
            HUNGRY,
            member("reward-0", held=2, oldest_held_s=9.0, children=[IDLE_CHILD, CHILD]),
            reward_timeout_s=30.0,
        ),
        (
            "the reward hangs in user code: reward-0 has been in grade at /home/me/mine.py:7 (pid 11) for "
            "9.0s; reward.timeout_s = 30 ends it"
        ),
    ),
    "no credit, a worker is silent": (
        case(
            HUNGRY,
            desk=Desk(
                workers=[
                    Worker(name="generator-0", role="generator", silent_s=9.0, leases=3, oldest_lease_s=20.0),
                    Worker(name="generator-1", role="generator", silent_s=0.1),
                ]
            ),
        ),
        (
            "generator-0 is silent: the buffer has heard nothing of it for 9.0s and it holds 3 "
            "leases, the oldest for 20s; the other 1 of its role have room for 0 samples"
        ),
    ),
    "generator hung": (
        case(
            HUNGRY,
            member("generator-0", held=4, spoken=[said("Reports", 50.0)], stacks=[task(OURS)]),
        ),
        "generator-0 hangs: it holds 4 samples and has handed in no token for 50s, in Engine._run at",
    ),
    "generator hung from the start": (
        case(HUNGRY, member("generator-0", held=4, spoken=[said("Leases", 20.0, "heard")])),
        "generator-0 hangs: it holds 4 samples and has handed in no token for 20s",
    ),
    "data ended": (
        case(
            HUNGRY,
            member("generator-0", waits=waits("lease", 39.0)),
            desk=Desk(source_ended=True, outstanding=2, batch_size=4, num_trained=3, target=9),
        ),
        "there is nothing to do: the data have ended after 3 of 9 rollout steps; 2 groups are left",
    ),
    "two wait for each other": (
        case(
            HUNGRY,
            member("generator-0", waits=waits("lease", 39.0)),
            desk=Desk(tickets_used=8, tickets_total=8, counts={"scored": 6, "ready": 1}),
        ),
        (
            "trainer and generator-0 wait for each other: trainer 40s for a batch, generator-0 39s for work "
            "(8 of 8 tickets are used; samples: 1 ready, 6 scored)"
        ),
    ),
    "lag": (
        case(member("trainer", loop_lag_s=4.0, waits=waits("batch", 0.1))),
        "the event loop of trainer stood still for 4.0s",
    ),
    "trainer computes": (
        case(member("trainer", stacks=[thread(OURS, name="trainer-compute_0")]), since_step_s=90.0),
        "trainer computes, the last step 1m30s ago, in Engine._run",
    ),
    "a long wait": (
        case(member("trainer", waits=waits("checkpoint", 70.0)), since_step_s=90.0),
        "trainer has waited 1m10s for the buffer to commit a checkpoint",
    ),
    "ended by SIGKILL": (
        case(live=False, events=["12:00:00 batch 3 was cut"]),
        'the supervisor ended without a word while the run was "training"',
    ),
    "failed": (case(live=False, phase="failed", detail="out of disk"), "the run has failed: out of disk"),
    "drained": (case(live=False, phase="drained"), "the run has drained: nothing is wrong"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_what_the_facts_say(name: str) -> None:
    given, words = CASES[name]
    assert cause(given).startswith(words)


@pytest.mark.parametrize("name", CASES)
def test_a_report_begins_with_its_cause_and_survives_json(name: str, tmp_path: Path) -> None:
    report = save(report_on(CASES[name][0]), tmp_path)
    kept = Path(report.path)
    assert text(report).splitlines()[0] == cause(CASES[name][0])
    assert kept.read_text(encoding="utf-8") == text(report)
    assert msgspec.json.decode(kept.with_suffix(".json").read_bytes(), type=Report) == report
    assert save(report, tmp_path).path != report.path, "an older report is kept"


def test_a_disk_that_refuses_costs_the_files_only(tmp_path: Path) -> None:
    (tmp_path / "doctor").write_text("in the way")
    report = report_on(CASES["healthy"][0])
    assert save(report, tmp_path) == report


def test_surer_causes_win_over_their_consequences() -> None:
    """A stopped trainer leaves everybody waiting: the waits are not the cause."""
    both = case(
        member("trainer", answers=False, process=STOPPED),
        member("generator-0", waits=waits("lease", 39.0)),
        member("reward-0", held=2, oldest_held_s=9.0, children=[CHILD]),
    )
    assert cause(both).startswith("trainer (pid 10) is stopped")


# Stacks.


async def inner() -> None:
    await asyncio.Event().wait()


async def outer() -> None:
    await inner()


async def test_a_task_is_shown_down_to_what_it_awaits() -> None:
    """`Task.get_stack` ends at the first coroutine; the culprit is the last one."""
    waiting = asyncio.create_task(outer(), name="waiting")
    await asyncio.sleep(0)
    (found,) = [stack for stack in stacks.task_stacks() if stack.name == "waiting"]
    assert [frame.function for frame in found.frames] == ["outer", "inner", "Event.wait"]
    assert [frame.kind for frame in found.frames] == ["user", "user", "library"]
    assert vitals.place([found]) == found.frames[1]
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting


def test_a_thread_is_shown_by_name() -> None:
    go = threading.Event()
    worker = threading.Thread(target=go.wait, name="patient")
    worker.start()
    found = {stack.name: stack for stack in stacks.thread_stacks()}
    go.set()
    worker.join()
    assert "Event.wait" in [frame.function for frame in found["patient"].frames]


async def test_a_loop_that_is_blocked_shows_as_lag() -> None:
    lag = LoopLag(tick_s=0.01)
    watching = asyncio.create_task(lag.watch())
    await asyncio.sleep(0.02)
    assert lag.worst_s < 0.2
    time.sleep(0.3)  # noqa: ASYNC251 - that is the fault
    await asyncio.sleep(0.02)
    assert lag.worst_s >= 0.25
    watching.cancel()


def test_traffic_counts_kinds_and_ages() -> None:
    now = [100.0]
    traffic = Traffic(clock=lambda: now[0])
    traffic.said("a")
    now[0] = 103.0
    traffic.said("b")
    traffic.heard(1)
    now[0] = 105.0
    assert {(s.way, s.kind, s.count, s.age_s) for s in traffic.snapshot()} == {
        ("said", "str", 2, 2.0),
        ("heard", "int", 1, 2.0),
    }


# From outside.

BLOCKED = """
import asyncio, sys, time
from asyncrl.obs.stacks import answering
def stuck():
    print("there", flush=True)
    time.sleep(600)
async def waits():
    await asyncio.Event().wait()
async def main():
    other = asyncio.create_task(waits(), name="other")
    await asyncio.sleep(0)
    BODY
with answering():
    asyncio.run(main())
"""


@contextlib.contextmanager
def process(code: str) -> Iterator[int]:
    """A Python process that has said that it is there."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"there\n"
            yield child.pid
        finally:
            child.kill()


def waiting(found: list[Stack], blocked: str) -> list[Stack]:
    """The stacks, once the main thread is where it is to stay."""
    where = vitals.blocking(next(stack for stack in found if stack.kind == "thread"))
    return found if (where.function if where is not None else "") == blocked else []


@pytest.mark.parametrize(
    ("body", "blocked"), [("stuck()", "stuck"), ("print('there', flush=True); await other", "")]
)
def test_a_process_gives_up_its_stacks_by_signal(body: str, blocked: str) -> None:
    """Also while its loop is blocked; and a loop that only waits is not taken for a blocked one."""
    with process(BLOCKED.replace("BODY", body)) as pid:
        # From its word to its wait it has some way to go.
        found = wait_until(lambda: waiting(stacks.ask([pid], deadline_s=10.0)[pid], blocked), "its wait")
        tasks = {stack.name: [f.function for f in stack.frames] for stack in found if stack.kind == "task"}
        assert tasks["other"] == ["waits", "Event.wait"]
        assert waiting(stacks.ask([pid], deadline_s=10.0)[pid], blocked), "it answers more than once"
        os.kill(pid, signal.SIGSTOP)
        assert stacks.ask([pid], deadline_s=0.3)[pid] == [], "a stopped process answers nobody"
        assert vitals.process_of(pid).state == "T"


def test_a_stranger_is_never_signalled() -> None:
    """SIGUSR1 would end it. Taking out either check of `ask` fails this test."""
    code = (
        "import os, time; f = os.memfd_create('asyncrl-stacks'); print('there', flush=True); time.sleep(600)"
    )
    catches = "import signal, time, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))\n"
    for text_ in (code, catches + "print('there', flush=True); time.sleep(600)"):
        with process(text_) as pid:
            assert stacks.ask([pid], deadline_s=0.2)[pid] == []
            assert vitals.process_of(pid).state in {"S", "R"}
    assert vitals.process_of(pid).state == "gone"


def test_descendants_are_found_level_by_level() -> None:
    code = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '600']);"
        "print('there', flush=True); time.sleep(600)"
    )
    with process(code) as pid:
        (child,) = stacks.descendants(pid)
        assert child in stacks.descendants(os.getpid())
        os.kill(child, signal.SIGKILL)


def test_a_signal_that_comes_too_late_ends_nobody() -> None:
    with stacks.answering():
        pass
    os.kill(os.getpid(), signal.SIGUSR1)


def test_answers_that_are_evaluated_put_a_stall_off_and_moving_leases_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails when only rollout steps count: a last evaluation longer than run.stall_s would fail its run."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    async def send(_peer: bytes, _message: msgspec.Struct) -> None:
        return

    doctor = Doctor(
        compile_plan(load.load(LAUNCHERS / "sync.toml")), run_dir=tmp_path, send=send,
        roster=Roster(max_restarts=0), phase=lambda: "training", fail=lambda _: None,
    )  # fmt: skip
    queue = QueueUpdate(counts={"generating": 3}, tickets_used=1, tickets_total=9)
    now = 50.0
    doctor.noticed(queue)
    assert doctor.since_step_s == 50.0
    doctor.noticed(msgspec.structs.replace(queue, evaluated=2))
    assert doctor.since_step_s == 0.0
    now = 90.0
    doctor.noticed(msgspec.structs.replace(queue, evaluated=2))
    assert doctor.since_step_s == 40.0
