"""Whole jobs as a user starts them: the command line in its own process, looked at through its records.

Owns starting, watching and ending them. It reads run directories and changes nothing in them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from asyncrl.errors import RunError

POLL_S = 0.1
COMMAND = (sys.executable, "-m", "asyncrl.cli.main")
TRAINED = "select batch, started, ended, tokens from trained order by batch, incarnation"


class Job:
    """`asyncrl launch` on a topology, under a run directory of our choice."""

    def __init__(self, topology: Path, run_dir: Path, *, overrides: Sequence[str] = ()) -> None:
        self.run_dir = run_dir
        self.started = time.time()
        """Unix seconds, just before the process was started."""
        sets = [f"run.dir={run_dir.parent}", *overrides]
        arguments = [*COMMAND, "launch", "--topology", str(topology), "--name", run_dir.name, "--plain"]
        for text in sets:
            arguments += ["--set", text]
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.output = run_dir.parent / f"{run_dir.name}.out"
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def wait(self, *, deadline_s: float) -> int:
        """Waits for: its end. Raises RunError when it takes longer."""
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise RunError(
                f"{self.run_dir}: the job took more than {deadline_s:.0f} s\n{self.tail()}"
            ) from None

    def wait_trained(self, batches: int, *, deadline_s: float) -> list[tuple[float, float]]:
        """Waits for: so many trained batches. Returns (started, ended) of each. Raises RunError."""
        deadline = time.monotonic() + deadline_s
        while len(rows := self.trained()) < batches:
            if self._process.poll() is not None and len(self.trained()) < batches:
                raise RunError(f"{self.run_dir}: the job ended after {len(rows)} batches\n{self.tail()}")
            if time.monotonic() > deadline:
                raise RunError(
                    f"{self.run_dir}: {len(rows)} of {batches} batches in {deadline_s:.0f} s\n{self.tail()}"
                )
            time.sleep(POLL_S)
        return rows

    def trained(self) -> list[tuple[float, float]]:
        """(started, ended) in Unix seconds of every batch trained so far."""
        return [(row[1], row[2]) for row in rows(self.run_dir, TRAINED)]

    def tail(self) -> str:
        """The end of what it printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")[-2000:]

    def end(self) -> None:
        """Stop it at once, with everything it started; may be called twice."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                # Its children ask the kernel to die with it.
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextlib.contextmanager
def job(topology: Path, run_dir: Path, *, overrides: Sequence[str] = ()) -> Iterator[Job]:
    """A job that does not outlive the block."""
    started = Job(topology, run_dir, overrides=overrides)
    try:
        yield started
    finally:
        started.end()


def quickstart_overrides(model: Path) -> list[str]:
    """What makes the quickstart use this model directory and the prompts in it."""
    return [
        f"trainer.hf_checkpoint={model}",
        f"source.prompt_data={model / 'train.jsonl'}",
        f'eval.eval_prompt_data=["heldout", "{model / "eval.jsonl"}"]',
    ]


def rows(run_dir: Path, sql: str) -> list[tuple[float, ...]]:
    """Rows of a live or finished run; none while there is no table yet."""
    path = run_dir / "buffer.db"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as db:
        try:
            return db.execute(sql).fetchall()
        except sqlite3.OperationalError:
            return []  # not there yet, or being set up


def accuracies(run_dir: Path) -> list[tuple[float, float]]:
    """(when the evaluation was done, mean reward), by version."""
    sql = (
        "select e.done_at, avg(s.reward) from evaluations e"
        " join groups g on g.version = e.version and g.incarnation = e.incarnation"
        " join samples s using (group_id)"
        " where g.lane = 'eval' and g.reason = 'evaluated' and e.done_at is not null"
        " group by e.version order by e.version"
    )
    return [(row[0], row[1]) for row in rows(run_dir, sql)]
