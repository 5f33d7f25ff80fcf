"""Rewards in killable children: a hang, a crash or a wrong answer costs one sample, by name.

    score / score_group / verdict --> [Job] --> a free child --> Started, Done ... --> results in order
                                                 |  silence past the deadline, or its death
                                                 +--> killed with its process group; the job it was at fails,
                                                      the others of the message go to a fresh child

Owns the children, their deadlines and who is to blame. Never imports user code or torch. Invariants: every
job handed in has exactly one result; a result is a Score only if the reward returned one; a child has one
message at a time; a child in an unknown state is killed, never used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from asyncrl.errors import RewardError
from asyncrl.messages.sample import Sample, Score
from asyncrl.obs.metrics import Waits
from asyncrl.rewards.base import DEFAULT_TIMEOUT_S, FailureKind, RewardFailure, RewardSpec, Verdict, name_of
from asyncrl.rewards.process import Child, Loss
from asyncrl.rewards.wire import Job, Reply

START_TIMEOUT_S = 120.0
"""A first import may bring torch from a cold disk."""
MAX_JOBS_PER_MESSAGE = 64
"""Enough to make a message's cost small, few enough that a crash has little to repeat."""

Result = Score | RewardFailure


class Sandbox:
    """A pool of children that run one reward; an async context manager, or `start` and `close` it."""

    def __init__(
        self,
        spec: RewardSpec,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        concurrency: int = 1,
        name: str = "reward",
        start_timeout_s: float = START_TIMEOUT_S,
        on_output: Callable[[str], None] | None = None,
        waits: Waits | None = None,
    ) -> None:
        """`timeout_s` bounds one call of the reward, `start_timeout_s` the imports before the first one.

        `concurrency` is the number of children; `on_output` gets what user code writes to stdout and stderr;
        waiting for a free child, and for its answers, is charged to `waits`.
        """
        if timeout_s <= 0 or concurrency < 1:
            raise ValueError(
                f"timeout_s {timeout_s} must be above 0 and concurrency {concurrency} at least 1"
            )
        self._spec = spec
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._name = name
        self._on_output = on_output
        self._waits = waits or Waits()
        self._concurrency = concurrency
        self._free: asyncio.Queue[Child | None] = asyncio.Queue()
        self._children: set[Child] = set()
        self._closed = False
        self._num_scored = 0
        self._num_restarts = 0

    async def start(self) -> None:
        """Start all children and wait for their imports.

        Raises ConfigError when the reward or a filter cannot be loaded, RewardError when a child
        dies or hangs before it is ready.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                started = [tasks.create_task(self._new_child()) for _ in range(self._concurrency)]
        except BaseException as error:
            # Cancelled or failed: nobody will call close for children that are up already.
            await self.close()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        for task in started:
            self._free.put_nowait(task.result())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def score(self, samples: Sequence[Sample]) -> list[Result]:
        """Judge each sample on its own; one result for each, in order.

        Waits for free children. Raises RewardError when a child cannot be started again.
        """
        size = max(1, min(MAX_JOBS_PER_MESSAGE, math.ceil(len(samples) / self._concurrency)))
        jobs = [Job(kind="sample", samples=_bare([sample])) for sample in samples]
        parts = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        replies = [reply for part in await self._gather(parts) for reply in part]
        return [result for reply in replies for result in reply.results()]

    async def score_group(self, samples: Sequence[Sample]) -> list[Result]:
        """Judge a whole group with one call (`group_rm`); one result for each sample, in order.

        A built-in reward judges the samples one by one. Raises RewardError as `score` does.
        """
        (reply,) = await self._run([Job(kind="group", samples=_bare(samples))])
        return reply.results()

    async def verdict(self, samples: Sequence[Sample]) -> Verdict | RewardFailure:
        """What the specification's filters say about a scored group. Raises RewardError as `score` does."""
        (reply,) = await self._run([Job(kind="verdict", samples=_bare(samples))])
        return (
            reply.verdict if reply.verdict is not None else next(f for f in reply.failures if f is not None)
        )

    def statistics(self) -> dict[str, int]:
        """Counts since the start: results, restarted children; and the children that are free now."""
        return {"results": self._num_scored, "restarts": self._num_restarts, "free": self._free.qsize()}

    async def close(self) -> None:
        """Kill all children with everything they started. May be called twice."""
        self._closed = True
        await asyncio.gather(*(child.kill() for child in self._children))
        self._children.clear()

    async def _new_child(self) -> Child:
        child = Child(
            self._spec, timeout_s=self._timeout_s, name=self._name, on_output=self._on_output,
            waits=self._waits,
        )  # fmt: skip
        self._children.add(child)
        try:
            await child.start(self._start_timeout_s)
        except BaseException:
            # Also when cancelled: nothing else would know of the process.
            await self._discard(child)
            raise
        return child

    async def _discard(self, child: Child) -> None:
        # In this order: where the kill is cancelled half-way, `close` does the rest.
        await child.kill()
        self._children.discard(child)

    @contextlib.asynccontextmanager
    async def _child(self) -> AsyncIterator[Child]:
        """A living child for one message; one in an unknown state does not return to the pool."""
        # Whoever has a child gives it back at its own deadline, so this ends by itself.
        with self._waits("child"):
            child = await self._free.get()
        try:
            if child is None or not child.is_alive:
                if child is not None:
                    await self._discard(child)
                child = None
                if self._closed:
                    raise RewardError(f"{self._name}: the sandbox is closed")
                self._num_restarts += 1
                child = await self._new_child()
            yield child
        finally:
            if child is not None and not child.is_idle:
                await self._discard(child)
                child = None
            self._free.put_nowait(child)

    async def _gather(self, parts: list[list[Job]]) -> list[list[Reply]]:
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._run(part)) for part in parts]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return [task.result() for task in running]

    async def _run(self, jobs: list[Job]) -> list[Reply]:
        """A reply for each job: those of a message that went wrong are tried again without the culprit."""
        replies: dict[int, Reply] = {}
        rounds = deque([list(range(len(jobs)))])
        while rounds:
            todo = rounds.popleft()
            async with self._child() as child:
                was_fresh = child.is_fresh
                loss = await child.work({i: jobs[i] for i in todo}, replies)
            if loss is None:
                continue
            suspects = [i for i in todo if i in loss.started]
            if not suspects and was_fresh:
                suspects = todo
            if len(suspects) == 1:
                replies[suspects[0]] = self._failure(jobs[suspects[0]], loss)
            else:  # several ran side by side: each gets a child of its own, and only the culprit fails there
                rounds.extend([i] for i in suspects)
            rounds.extend(
                [rest] if (rest := [i for i in todo if i not in replies and i not in suspects]) else []
            )
        self._num_scored += len(jobs)
        return [replies[i] for i in range(len(jobs))]

    def _failure(self, job: Job, loss: Loss) -> Reply:
        first = job.samples[0]
        who = name_of(first) if job.kind == "sample" else f"group {first.group_id} ({job.kind})"
        what = (
            f"took over {self._timeout_s:g} s and was killed"
            if loss.kind == FailureKind.TIMEOUT
            else loss.message
        )
        failure = RewardFailure(
            kind=loss.kind, message=f'reward "{self._spec.use}": {who}: {what}', traceback=loss.output
        )
        return Reply.of([failure] * len(job.samples))


def _bare(samples: Sequence[Sample]) -> list[Sample]:
    """The samples without their routing, which is larger than all the rest and no reward reads."""
    return [
        msgspec.structs.replace(sample, routed_experts=b"", routed_top_k=0)
        if sample.routed_experts
        else sample
        for sample in samples
    ]
