"""One case, from outside: launches the run, watches the journal, does the deeds, damages the disk, resumes.

A driver is a process of its own, with one thread, and inherits every orphan of its case; so what it still has
below it when the case has ended got away from its supervisor. It imports nothing that a case needs: all of
that was imported before it was forked.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import time
import traceback
from pathlib import Path

import msgspec

from asyncrl.chaos import JOURNAL, ORDERS
from asyncrl.errors import ExitCode
from tools.chaos import kernel, launch, world
from tools.chaos.damage import Tampered, fill, repair, tamper
from tools.chaos.spec import Case, Step

CASE_S = 75.0
"""How long a case may take before it counts as hung; most take five seconds."""
POLL_S = 0.02
"""How often the journal is looked at; the end of a launch is noticed at once."""
MAX_LAUNCHES = 4
DISK_BYTES = 24 << 20
"""Of a case with a disk of its own: a run takes about a tenth."""
GONE_S = 5.0
"""How long descendants of a launch may outlive it: the kernel kills them one generation after the other."""


class Launch(msgspec.Struct, kw_only=True):
    """One launch of the run, or its resumption."""

    began: float
    """Unix seconds."""
    ended: float = 0.0
    code: int = 0
    text: str = ""
    """Everything it printed."""


class Course(msgspec.Struct, kw_only=True):
    """What happened in a case, before it is judged."""

    case: Case
    place: str
    run_dir: str
    launches: list[Launch] = []
    fired: list[dict[str, object]] = []
    """Lines of the journal about orders."""
    born: list[dict[str, object]] = []
    """Lines of the journal about lives."""
    left: list[str] = []
    """Processes that outlived their launch."""
    hung: str = ""
    skipped: str = ""


class Driver:
    """Runs one case; `run` blocks."""

    def __init__(self, case: Case, *, place: Path, model: Path, token: str) -> None:
        self.case = case
        self.place = place
        self.model = model
        self.token = token
        self.runs = place / "runs"
        self.run_dir = self.runs / token
        self.course = Course(case=case, place=str(place), run_dir=str(self.run_dir))
        self._deadline = time.monotonic() + CASE_S
        self._done: set[int] = set()
        """Steps done."""
        self._lost = False
        self._launch = 0
        """Process id of the present launch."""
        self._helpers: set[int] = set()

    def run(self) -> Course:
        """See the case through; what has to hold of it is the checks' to say."""
        kernel.adopt_orphans()
        self.runs.mkdir(parents=True)
        try:
            if self.case.disk:
                kernel.private_disk(self.runs, num_bytes=DISK_BYTES)
        except kernel.NotAllowed as error:
            self.course.skipped = f"no disk of its own can be mounted here: {error}"
            return self.course
        orders = self.place / "orders.json"
        orders.write_bytes(msgspec.json.encode(self.case.orders))
        topology = world.topology(self.place, self.model, {**self.case.options, "run.name": self.token})
        # Also without any order: the journal says who was born when.
        env = {ORDERS: str(orders), "COLUMNS": "160"}
        try:
            self._live(topology, env)
        except TimeoutError as error:
            self.course.hung = str(error)
        finally:
            kernel.send(kernel.descendants(os.getpid()), signal.SIGKILL)
            self._read_journal()
        return self.course

    def _live(self, topology: Path, env: dict[str, str]) -> None:
        code = self._see_through(topology, env)
        tampered = Tampered()
        if self.case.damage:
            tampered = tamper(self.case.damage, self.run_dir, disk=self.runs)
            code = self._see_through(None, env)
        if self.case.lasting:
            return
        repair(tampered, disk=self.runs if self.case.disk else None)
        while code != ExitCode.FINISHED and len(self.course.launches) < MAX_LAUNCHES:
            if code == ExitCode.CONFIG or not (self.run_dir / "plan.json").exists():
                return
            code = self._see_through(None, env)
        if self._helpers:
            self._dismiss_helpers()

    def _see_through(self, topology: Path | None, env: dict[str, str]) -> int:
        """One launch, to its end; returns its exit code."""
        output = self.place / f"launch-{len(self.course.launches) + 1}.out"
        record = Launch(began=time.time())
        self.course.launches.append(record)
        self._lost = False
        what = ["--resume", str(self.run_dir)] if topology is None else ["--topology", str(topology)]
        self._launch = launch.start(["launch", *what, "--plain"], place=self.place, output=output, env=env)
        watched = os.pidfd_open(self._launch)
        poller = select.poll()
        poller.register(watched, select.POLLIN)
        try:
            while not poller.poll(POLL_S * 1000):
                self._look()
                if time.monotonic() > self._deadline:
                    raise TimeoutError(self._hang(output))
        finally:
            os.close(watched)
        record.ended = time.time()
        record.code = self._reap()
        record.text = output.read_text(encoding="utf-8", errors="replace")
        self._look()
        return record.code

    def _reap(self) -> int:
        """The launch's exit code, once everything below it has gone as well."""
        codes: dict[int, int] = {}
        ends = time.monotonic() + GONE_S
        left = kernel.descendants(os.getpid()) - self._helpers
        while True:
            codes |= kernel.reap()
            left = kernel.descendants(os.getpid()) - self._helpers
            if (not left and self._launch in codes) or time.monotonic() > ends:
                break
            time.sleep(POLL_S / 4)
        self.course.left += [kernel.describe(pid) for pid in sorted(left)]
        kernel.send(left, signal.SIGKILL)
        return codes[self._launch]

    def _dismiss_helpers(self) -> None:
        """Attached workers leave by themselves when the run has ended."""
        ends = time.monotonic() + GONE_S
        while kernel.descendants(os.getpid()) and time.monotonic() < ends:
            kernel.reap()
            time.sleep(POLL_S)
        self.course.left += [kernel.describe(pid) for pid in sorted(kernel.descendants(os.getpid()))]

    def _hang(self, output: Path) -> str:
        text = output.read_text(encoding="utf-8", errors="replace")
        tail = " | ".join(text.strip().splitlines()[-4:])
        return f"not over after {CASE_S:.0f} s; the last it said: {tail}"

    # Deeds.

    def _look(self) -> None:
        self._read_journal()
        for number, step in enumerate(self.case.steps):
            if number in self._done:
                continue
            line = next((f for f in self.course.fired if f["order"] == step.order), None)
            if line is not None and time.time() >= float(str(line["time"])) + step.after_s:
                self._done.add(number)
                self._do(step, int(str(line["pid"])))

    def _do(self, step: Step, pid: int) -> None:
        match step.do:
            case "continue":
                kernel.send({pid}, signal.SIGCONT)
            case "lose":
                self._lose()
            case "fill":
                fill(self.runs)
            case "attach":
                output = self.place / f"attach-{len(self._helpers) + 1}.out"
                env = {ORDERS: str(self.place / "orders.json")}
                arguments = ["attach", "generator", str(self.run_dir)]
                self._helpers.add(launch.start(arguments, place=self.place, output=output, env=env))

    def _lose(self) -> None:
        """The machine is gone: everything at once."""
        everything = {self._launch} | kernel.descendants(self._launch)
        kernel.send(everything, signal.SIGSTOP)
        kernel.send(everything, signal.SIGKILL)
        self._lost = True

    def _read_journal(self) -> None:
        """Lines that are whole; the disk may be gone, full or read-only."""
        try:
            data = (self.run_dir / JOURNAL).read_bytes()
        except OSError:
            return
        lines = [json.loads(line) for line in data.splitlines() if line.endswith(b"}")]
        self.course.fired = [line for line in lines if "order" in line]
        self.course.born = [line for line in lines if "born" in line]


def drive(case: Case, *, place: Path, model: Path, token: str) -> int:
    """The body of a driver's process: writes PLACE/outcome.json."""
    from tools.chaos.checks import judge

    began = time.monotonic()
    try:
        course = Driver(case, place=place, model=model, token=token).run()
        outcome = judge(course, seconds=time.monotonic() - began)
        if case.disk and outcome.problems:
            # The disk goes with this process; what is on it is wanted.
            shutil.copytree(course.run_dir, place / "kept", dirs_exist_ok=True)
    except Exception:  # noqa: BLE001 - a fault of the driver itself is a failed case and not the end of all
        (place / "driver.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    (place / "outcome.json").write_bytes(msgspec.json.encode(outcome))
    return 0
