"""What has to hold after a run that was interfered with, and the ways to interfere."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asyncrl.chaos import read_journal
from asyncrl.errors import ExitCode
from asyncrl.run.replay import Replay
from tests.support.books import assert_closed, one, rows
from tests.support.command import RUN_S, Run
from tests.support.processes import stat, wait_until

BACK_S = 20.0
"""A new life is there, and knows where it is, within this time (imports of torch on busy cores included)."""


def assert_recovered(run: Run, *, steps: int, batch_size: int = 4) -> None:
    """It finished; the books close, every batch is in the weights once and trains to them; no litter."""
    assert run.end() == ExitCode.FINISHED, run.text
    assert "Traceback" not in run.text
    assert_closed(run.path)
    assert one(run.path, "select count(*) from groups where reason = 'trained'") == steps * batch_size
    differing = rows(run.path, "select batch from trained group by batch having count(distinct digest) > 1")
    assert differing == [], "what was trained again came out differently"
    assert_replays(run.path, steps=steps)
    assert list((run.path.parent.parent / "weights").glob("*")) == [], "published weights are left"


def assert_replays(run_dir: Path, *, steps: int | None = None) -> None:
    """An uninterrupted training on the recorded batches has the recorded weights after each, to the bit."""
    replay = Replay(run_dir)
    try:
        replay.start()
        outcomes = list(replay.steps())
    finally:
        replay.close()
    assert [outcome.batch for outcome in outcomes] == list(range(len(outcomes) if steps is None else steps))
    assert outcomes
    assert all(outcome.equal for outcome in outcomes), outcomes


GATED = '''"""A reward that takes its time; groups from a certain one on wait until there is a file."""
import hashlib
import pathlib
import time

GO = pathlib.Path(__file__).with_name("go")


def grade(sample):
    while sample.group_index >= {group} and not GO.exists():
        time.sleep(0.02)
    time.sleep({seconds})
    return float(hashlib.sha256(sample.response.encode()).digest()[0] % 2)
'''


def gated(place: Path, group: int, *, seconds: float = 0.1) -> dict[str, Any]:
    """Options of a run that comes as far as the groups before this one let it, and waits for `let_go`.

    Answers are equally long: they come in the order of their groups, so that none waits behind the gate.
    """
    (place / "gated.py").write_text(GATED.format(group=group, seconds=seconds), encoding="utf-8")
    return {
        "reward.use": f"{place / 'gated.py'}:grade",
        "reward.timeout_s": 250.0,
        "generator.scripted": {
            "median": 50.0, "sigma": 0.0, "max_tokens": 100, "vocab_size": 90, "token_latency_s": 0.01
        },
        # Nobody is given up meanwhile.
        "run.dead_after_s": 60.0,
        "run.stall_s": 250.0,
    }  # fmt: skip


def let_go(place: Path) -> None:
    """Open the gate."""
    (place / "go").touch()


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes under SIGSTOP; they are continued at the end, where they still are there."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def catch(pid: int, state: Callable[[], bool], what: str, *, deadline_s: float = 60.0) -> None:
    """Stop a process in a state that is asserted while it stands still; it is left standing."""

    def caught() -> bool:
        if not state():
            return False
        os.kill(pid, signal.SIGSTOP)
        if state():
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    wait_until(caught, what, deadline_s=deadline_s)


def carried_out(run: Run, index: int) -> dict[str, Any]:
    """The journal's line about an order of the run, once it is carried out."""

    def line() -> dict[str, Any] | None:
        found = [line for line in read_journal(run.path) if line.get("order") == index]
        assert found or run.process.poll() is None, f"the run ended before order {index}: {run.text}"
        return found[0] if found else None

    found = wait_until(line, f"order {index}", deadline_s=RUN_S, show=lambda: run.text)
    assert found is not None
    return found


def standing(run: Run, index: int) -> int:
    """Process id of an actor that was ordered to stop, once it stands still."""
    pid = int(carried_out(run, index)["pid"])
    wait_until(lambda: (stat(pid) or (0, ""))[1] == "T", f"process {pid} to stand still")
    return pid


@contextmanager
def held(run: Run, index: int) -> Iterator[int]:
    """An actor that was ordered to stop stands still, under this process id; at the end it goes on."""
    pid = standing(run, index)
    yield pid
    os.kill(pid, signal.SIGCONT)


def new_pid(run: Run, name: str, old: int) -> int:
    """Process id of the next life."""

    def found() -> int:
        pid = run.pid(name)
        return pid if pid != old else 0

    return wait_until(found, f"another life of {name}", deadline_s=BACK_S)
