"""The process that runs a reward: `python -m asyncrl.rewards.child`, started by `sandbox`.

Owns the user's code and nothing else; it may be killed at any moment. It keeps no deadline that matters: the
parent does. Invariants: the two ends of the protocol are private copies of stdin and stdout, so user code may
print and read; `Started` is on its way before the user's code is; the process ends, with everything it
started, when its parent does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any

import msgspec

from asyncrl.errors import AsyncrlError, ConfigError, RewardError
from asyncrl.messages.sample import Score
from asyncrl.obs.stacks import Answering
from asyncrl.rewards.base import FailureKind, RewardFailure, check_group, name_of, normalise
from asyncrl.rewards.judge import Judge
from asyncrl.rewards.wire import (
    HEADER_BYTES,
    Done,
    Job,
    Ready,
    Refused,
    Reply,
    Setup,
    Started,
    ToChild,
    Work,
    frame_length,
)
from asyncrl.rewards.wire import frame as framed

MAX_TRACEBACK_CHARS = 4000
"""The end of a traceback is what people read."""
PR_SET_PDEATHSIG = 1
"""Linux's prctl option: this signal when the parent dies."""


class Pipe:
    """The parent's end: a thread reads (so that a parent's death is seen at any time), the caller writes."""

    def __init__(self) -> None:
        """Takes stdin and stdout away from user code: stdin is empty from here on, stdout is stderr."""
        self._in = os.fdopen(os.dup(0), "rb")
        self._out = os.dup(1)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Setup | Work] = msgspec.msgpack.Decoder(ToChild)
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        threading.Thread(target=self._read, name="reward-pipe", daemon=True).start()

    def _read(self) -> None:
        while header := self._in.read(HEADER_BYTES):
            self._inbox.put(self._in.read(frame_length(int.from_bytes(header, "little"))))
        # The parent closed the pipe or died: end with all that user code started.
        with contextlib.suppress(OSError):
            os.killpg(os.getpgrp() if os.getpgrp() == os.getpid() else 0, signal.SIGKILL)
        os._exit(1)

    def receive(self) -> Setup | Work:
        """Wait for the next message; the reader thread ends the process where none can come."""
        return self._decoder.decode(self._inbox.get())

    def send(self, message: Any) -> None:
        """Write a message whole; it is the kernel's when this returns."""
        data = memoryview(framed(self._encoder.encode(message)))
        while data:
            data = data[os.write(self._out, data) :]


class Bench:
    """Runs jobs: coroutines side by side, plain functions one after the other."""

    def __init__(self, judge: Judge, pipe: Pipe, *, timeout_s: float) -> None:
        self._judge = judge
        self._pipe = pipe
        self._timeout_s = timeout_s

    async def run(self, jobs: list[Job]) -> None:
        """Do all jobs; every one is answered."""
        async with asyncio.TaskGroup() as tasks:
            for number, job in enumerate(jobs):
                tasks.create_task(self._run_one(number, job))

    async def _run_one(self, number: int, job: Job) -> None:
        self._pipe.send(Started(number))
        self._pipe.send(Done(number, await self._guarded(job)))

    async def _guarded(self, job: Job) -> Reply:
        """The job's reply, whatever user code does short of ending the process."""
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return await self._do(job)
        except RewardError as error:
            return _failed(job, FailureKind.INVALID, str(error))
        # User code may raise anything; here it becomes the named failure of this job. sys.exit() as well.
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001
            late = limit.expired() or isinstance(error, TimeoutError)
            kind = FailureKind.TIMEOUT if late else FailureKind.EXCEPTION
            what = (
                f"took over {self._timeout_s:g} s" if limit.expired() else f"{type(error).__name__}: {error}"
            )
            shown = "".join(traceback.format_exception(error))[-MAX_TRACEBACK_CHARS:]
            return _failed(job, kind, f'reward "{self._judge.spec.use}": {_name(job)}: {what}', shown)

    async def _do(self, job: Job) -> Reply:
        spec = self._judge.spec
        hooks = spec.hook_samples(job.samples)
        if job.kind == "verdict":
            return Reply(verdict=await self._judge.verdict(hooks))
        if job.kind == "sample":
            value = await self._judge.score(hooks[0])
            return Reply.of([normalise(value, job.samples[0], hooks[0], spec=spec)])
        values = check_group(await self._judge.score_group(hooks), job.samples, spec=spec)
        results: list[Score | RewardFailure] = []
        for value, sample, hook in zip(values, job.samples, hooks, strict=True):
            try:
                results.append(normalise(value, sample, hook, spec=spec))
            except RewardError as error:
                results.append(RewardFailure(kind=FailureKind.INVALID, message=str(error)))
        return Reply.of(results)


def _name(job: Job) -> str:
    first = job.samples[0]
    return name_of(first) if job.kind == "sample" else f"group {first.group_id} ({job.kind})"


def _failed(job: Job, kind: FailureKind, message: str, shown: str = "") -> Reply:
    failure = RewardFailure(kind=kind, message=message, traceback=shown)
    return Reply.of([failure] * len(job.samples))


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, even while it hangs in C code (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prepare(pipe: Pipe, setup: Setup) -> Judge:
    sys.path += [path for path in setup.spec.search_paths if path not in sys.path]
    try:
        return Judge(setup.spec)
    except ConfigError as error:
        pipe.send(Refused(problems=error.problems))
    except AsyncrlError as error:
        pipe.send(Refused(problems=[str(error)]))
    raise SystemExit(2)


def main() -> None:
    """Load what Setup names, then do Work until killed."""
    die_with_parent()
    faulthandler.enable()
    # Never closed: a doctor may ask until the kernel ends this process.
    Answering().open()
    pipe = Pipe()
    setup = pipe.receive()
    assert isinstance(setup, Setup)
    bench = Bench(_prepare(pipe, setup), pipe, timeout_s=setup.timeout_s)
    pipe.send(Ready())
    with asyncio.Runner() as runner:
        while True:
            work = pipe.receive()
            assert isinstance(work, Work)
            runner.run(bench.run(work.jobs))


if __name__ == "__main__":
    main()
