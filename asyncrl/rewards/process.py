"""One child of a sandbox: its process, its pipe, its deadline.

Owns the process from start to reaping and is the only one that kills it. It runs one message at a time and
says, when that goes wrong, how (`Loss`); who is to blame is the sandbox's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from asyncrl.errors import ConfigError, ProtocolError, RewardError
from asyncrl.obs.metrics import Waits
from asyncrl.rewards.base import FailureKind, RewardSpec
from asyncrl.rewards.wire import (
    HEADER_BYTES,
    Done,
    FromChild,
    Job,
    Ready,
    Refused,
    Reply,
    Setup,
    Started,
    Work,
    frame_length,
)
from asyncrl.rewards.wire import frame as framed

GRACE_S = 0.5
"""The child cancels a late coroutine itself; only what outlives this is killed."""
LAST_LOOK_S = 0.05
"""After a deadline, what already lies in the pipe still counts: this process may have been the slow one."""
REAP_TIMEOUT_S = 5.0
"""SIGKILL ends a process at once unless it hangs in the kernel."""
LAST_WORDS_S = 1.0
"""For reading what a dead child wrote; a process that it started and that got away may hold the pipe open."""
READ_BYTES = 1 << 18
MAX_OUTPUT_CHARS = 4000
"""How much of what a child wrote is kept to explain its death."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A message that a child did not finish."""

    kind: FailureKind
    """TIMEOUT or CRASH."""
    message: str
    started: frozenset[int]
    """Jobs whose user code had begun and has not returned."""
    output: str
    """The end of what the child wrote to stderr."""


class _Ended(Exception):  # noqa: N818
    """The child's pipe ended or broke."""


class Child:
    """A process that runs one reward. `start`, then `work` as often as wanted, then `kill`."""

    def __init__(
        self, spec: RewardSpec, *, timeout_s: float, name: str,
        on_output: Callable[[str], None] | None = None, waits: Waits | None = None,
    ) -> None:  # fmt: skip
        """Waiting for it, which has deadlines, is charged to `waits`."""
        self._setup = Setup(spec=spec, timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._name = name
        self._on_output = on_output
        self._waits = waits or Waits()
        self._process: asyncio.subprocess.Process | None = None
        self._stderr: asyncio.Task[None] | None = None
        self._stderr_pipe: asyncio.ReadTransport | None = None
        self._output = ""
        self._buffer = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)
        self._busy = False
        self._num_messages = 0
        self._killed = False

    @property
    def is_alive(self) -> bool:
        """Whether the process runs, as far as is known."""
        return self._process is not None and self._process.returncode is None

    @property
    def is_idle(self) -> bool:
        """Whether the last message was answered in full."""
        return self.is_alive and not self._busy

    @property
    def is_fresh(self) -> bool:
        """Whether it has not been given any work yet."""
        return self._num_messages == 0

    async def start(self, timeout_s: float) -> None:
        """Start the process and wait for its imports. Raises ConfigError, RewardError."""
        await self._spawn()
        use = self._setup.spec.use
        try:
            await self._send(self._setup)
            with self._waits("import"):
                message = await self._receive(asyncio.get_running_loop().time() + timeout_s)
        except TimeoutError as error:
            raise RewardError(f'{self._name}: "{use}" was not imported within {timeout_s:g} s') from error
        except _Ended as error:
            raise RewardError(
                f'{self._name}: importing "{use}" ended the process: {await self._epitaph()}'
            ) from error
        if isinstance(message, Refused):
            raise ConfigError(*message.problems)
        assert isinstance(message, Ready)

    async def _spawn(self) -> None:
        read_fd, write_fd = os.pipe()
        # Our own pipe for stderr: what user code started may keep the other end open for ever.
        reader = asyncio.StreamReader()
        self._stderr_pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", buffering=0)
        )
        self._stderr = asyncio.create_task(self._keep_output(reader), name=f"{self._name}-stderr")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "asyncrl.rewards.child"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=write_fd,
                start_new_session=True,
            )
        finally:
            os.close(write_fd)

    async def work(self, jobs: Mapping[int, Job], replies: dict[int, Reply]) -> Loss | None:
        """Do `jobs` and put their outcomes into `replies`; None when all were done.

        Each job has `timeout_s` from its start, the first start too. After a loss the child is useless.
        """
        numbers = list(jobs)
        started: dict[int, float] = {}
        self._busy = True
        try:
            await self._send(Work(jobs=list(jobs.values())))
            with self._waits("reward"):
                await self._collect(numbers, replies, started)
        except TimeoutError:
            kind, message = FailureKind.TIMEOUT, f"no answer within {self._timeout_s:g} s"
        except (_Ended, ProtocolError, msgspec.MsgspecError) as error:
            kind, message = FailureKind.CRASH, f"{error or 'its process ended'}: {await self._epitaph()}"
        else:
            self._busy = False
            self._num_messages += 1
            return None
        return Loss(kind=kind, message=message, started=frozenset(started), output=self._output)

    async def _collect(
        self, numbers: list[int], replies: dict[int, Reply], started: dict[int, float]
    ) -> None:
        """Read until every job has its reply; `started` holds the running ones with their starts."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        missing = len(numbers)
        while missing:
            oldest = min(
                started.values(), default=last
            )  # insertion order is start order, so this is the first
            message = await self._receive(oldest + self._timeout_s + GRACE_S)
            last = loop.time()
            if isinstance(message, Started):
                started[numbers[message.job]] = last
            elif isinstance(message, Done):
                started.pop(numbers[message.job])
                replies[numbers[message.job]] = message.reply
                missing -= 1
            else:
                raise ProtocolError(f"the child sent {type(message).__name__} in the middle of its work")

    async def _send(self, message: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(framed(self._encoder.encode(message)))
        try:
            with self._waits("reading"):
                async with asyncio.timeout(self._timeout_s + GRACE_S):
                    await self._process.stdin.drain()
        except OSError as error:
            raise _Ended("its pipe broke") from error

    async def _receive(self, deadline: float) -> FromChild:
        """The next message; reads only when none is buffered. Raises TimeoutError, _Ended, ProtocolError."""
        while (body := self._next_frame()) is None:
            try:
                async with asyncio.timeout_at(deadline):
                    data = await self._read()
            except TimeoutError:
                async with asyncio.timeout(LAST_LOOK_S):
                    data = await self._read()
            self._buffer += data
        return self._decoder.decode(body)

    async def _read(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        data = await self._process.stdout.read(READ_BYTES)
        if not data:
            raise _Ended("its process ended")
        return data

    def _next_frame(self) -> bytes | None:
        if len(self._buffer) < HEADER_BYTES:
            return None
        end = HEADER_BYTES + frame_length(int.from_bytes(self._buffer[:HEADER_BYTES], "little"))
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        return body

    async def _keep_output(self, reader: asyncio.StreamReader) -> None:
        """Pass on what user code writes and keep its end. consumes: stderr   ends: with its last writer"""
        while data := await reader.read(READ_BYTES):
            text = data.decode(errors="replace")
            self._output = (self._output + text)[-MAX_OUTPUT_CHARS:]
            if self._on_output is not None:
                self._on_output(text)

    async def _epitaph(self) -> str:
        """How the process ended, once it is reaped and its last words are read."""
        await self.kill()
        assert self._process is not None
        code = self._process.returncode
        if code is None:
            return "it cannot be reaped"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    async def kill(self) -> None:
        """Kill the process and all it started, and reap it. May be called twice."""
        if self._process is not None:
            if not self._killed:  # once: later the number may be another group's
                self._killed = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError), self._waits("end"):
                async with asyncio.timeout(REAP_TIMEOUT_S):
                    await self._process.wait()
        if self._stderr is not None and self._stderr_pipe is not None:
            with self._waits("end"):
                await asyncio.wait([self._stderr], timeout=LAST_WORDS_S)
            self._stderr.cancel()
            self._stderr_pipe.close()
