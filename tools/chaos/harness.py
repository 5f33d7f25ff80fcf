"""Many cases, some at a time: forks a driver for each, collects what they say, ends cleanly on Ctrl-C.

One thread, and torch is imported before the first fork: every process of every case is a copy of this one.
"""

from __future__ import annotations

import functools
import os
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from asyncrl.actor.forks import fork
from tools.chaos import kernel, world
from tools.chaos.checks import Outcome
from tools.chaos.driver import CASE_S, drive
from tools.chaos.spec import Case

PATIENCE_S = CASE_S + 45.0
"""How long a driver may take, its checks included, before it is killed."""
POLL_S = 0.5


class _Running:
    def __init__(self, number: int, case: Case, *, place: Path, model: Path) -> None:
        self.number, self.case, self.place = number, case, place
        self.began = time.monotonic()
        place.mkdir(parents=True)
        token = f"case-{os.getpid()}-{number}"
        self.pid = fork(
            functools.partial(drive, case, place=place, model=model, token=token),
            output=place / "driver.out",
        )
        self.watched = os.pidfd_open(self.pid)

    def outcome(self) -> Outcome:
        """What the driver left behind; one that died is a failed case."""
        try:
            return msgspec.json.decode((self.place / "outcome.json").read_bytes(), type=Outcome)
        except OSError:
            words = [p.read_text(encoding="utf-8") for p in self.place.glob("driver.*") if p.is_file()]
            text = " | ".join(" ".join(words).strip().splitlines()[-3:])
            return Outcome(
                spec=self.case.spec, name=self.case.name, role=self.case.role, place=str(self.place),
                run_dir="", verdict="failed", problems=[f"the driver died: {text}"],
                seconds=time.monotonic() - self.began,
            )  # fmt: skip


def run(
    cases: Sequence[Case], *, work: Path, jobs: int, told: Callable[[int, Outcome], None], keep: bool = False
) -> Iterator[Outcome]:
    """Run cases in their order, `jobs` at a time; `told` gets each outcome with its number as it ends.

    Directories of failed cases stay. A KeyboardInterrupt ends everything and goes on to the caller.
    """
    kernel.adopt_orphans()
    model = work / "model"
    _model(model)
    waiting = list(enumerate(cases))
    running: dict[int, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, case = waiting.pop(0)
                one = _Running(number, case, place=work / f"case-{number:04d}", model=model)
                running[one.watched] = one
            for done in _ended(running):
                one = running.pop(done)
                os.close(done)
                os.waitpid(one.pid, 0)
                outcome = one.outcome()
                if outcome.verdict in {"ok", "skipped"} and not keep:
                    shutil.rmtree(one.place, ignore_errors=True)
                told(one.number, outcome)
                yield outcome
    finally:
        for one in running.values():
            kernel.send({one.pid}, signal.SIGKILL)
            os.close(one.watched)
        _wait_for_all()
        for path in Path("/dev/shm").glob(f"*case-{os.getpid()}-*"):  # noqa: S108 - versions of killed cases
            path.unlink(missing_ok=True)
    kernel.reap()


def _model(model: Path) -> None:
    """In a process of its own: the harness itself never computes."""
    if not model.exists():
        _, status = os.waitpid(fork(functools.partial(world.make_model, model)), 0)
        if status:
            raise RuntimeError("the tiny model could not be made; see above")


def _ended(running: dict[int, _Running]) -> list[int]:
    """Whose drivers have ended; waits a little for one."""
    poller = select.poll()
    for watched in running:
        poller.register(watched, select.POLLIN)
    found = [watched for watched, _ in poller.poll(POLL_S * 1000)]
    for one in running.values():
        if time.monotonic() > one.began + PATIENCE_S:
            kernel.send({one.pid}, signal.SIGKILL)
    kernel.reap_others({one.pid for one in running.values()})
    return found


def _wait_for_all() -> None:
    """Everything that we forked dies with its driver; wait until it has."""
    ends = time.monotonic() + 10.0
    while kernel.descendants(os.getpid()) and time.monotonic() < ends:
        kernel.reap()
        time.sleep(0.02)
    kernel.send(kernel.descendants(os.getpid()), signal.SIGKILL)
    kernel.reap()
