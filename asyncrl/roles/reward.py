"""A reward worker: scores finished samples, and judges complete groups by the run's filters.

User code runs in killable children (`rewards.sandbox`); a failing reward is a named failure of that sample,
never a zero and never a lost sample. A teacher, where the table names one, is asked from here, after the
reward: what is no score needs no teacher.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor, Statement
from asyncrl.errors import ExitCode
from asyncrl.messages.control import Acks, Hello, Kind, Lease, Leases, Welcome
from asyncrl.messages.parts import leased_bytes, unpack
from asyncrl.messages.sample import Sample
from asyncrl.obs.vitals import Facts
from asyncrl.rewards.base import RewardFailure
from asyncrl.rewards.held import Held
from asyncrl.rewards.results import scores_of, verdict_of
from asyncrl.rewards.sandbox import Sandbox
from asyncrl.rewards.spec import reward_spec
from asyncrl.rewards.teacher import Teacher
from asyncrl.topology.plan import Plan
from asyncrl.topology.schema import RewardConfig

DRAIN_S = 20.0
"""How long a leaving worker waits for what it is scoring."""


class RewardRole(DeskActor):
    """See the module's docstring.

    consumes: leases of `generated` samples and complete groups    waits for: work    unblocked by: generators
    produces: scores and verdicts                                  waits for: its children, with a deadline
    """

    role = "reward"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        assert context.index is not None, "a reward worker has a table"
        self.table = self.plan.topology.reward[context.index]
        self._sandbox = Sandbox(
            reward_spec(self.plan, context.index),
            timeout_s=self.table.timeout_s,
            concurrency=self.table.concurrency,
            name=self.name,
            on_output=lambda text: self.log.info("reward output", text=text),
            waits=self.side_waits,
        )
        self._teacher = _teacher(self.plan, self.table)
        self._jobs: asyncio.Queue[tuple[Lease, list[Sample], int]] = asyncio.Queue()
        self.held = Held(batch=self.table.batch, window_bytes=self.plan.topology.buffer.window_bytes)
        self._scored = self._failed = 0

    async def open(self) -> None:
        await self._sandbox.start()

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._ask(), self._score_all()]

    async def _ask(self) -> None:
        """produces: the first credit; the rest follows results"""
        await self.say(*((want, ()) for want in self.held.wants()))
        await asyncio.Event().wait()

    def introduce(self, hello: Hello) -> Hello:
        return msgspec.structs.replace(hello, leases=self.held.fences)

    def restate(self, welcome: Welcome) -> list[Statement]:
        """Results that are not acknowledged, and the room we have; what is being scored goes on."""
        del welcome
        return [*self.held.unsaid, *((want, ()) for want in self.held.wants())]

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case Leases():
                sizes = iter(frames)
                groups = unpack([lease.parts for lease in message.leases], frames)
                for lease, samples in zip(message.leases, groups, strict=True):
                    num_bytes = leased_bytes(lease.parts, sizes)
                    # What a desk that could not know it arrived has sent again gives its charge back only.
                    new = self.held.take(lease, samples=len(samples), num_bytes=num_bytes)
                    self._jobs.put_nowait((lease, samples if new else [], num_bytes))
            case Acks():
                for ack in message.acks:  # a refused score belongs to somebody else now: nothing to do here
                    self.held.acknowledged(ack.fence)

    async def _score_all(self) -> None:
        """consumes: leases    waits for: leases    produces: one task per lease, bounded by our credit"""
        async with asyncio.TaskGroup() as tasks:
            while True:
                with self.idle("lease"):
                    job = await self._jobs.get()
                tasks.create_task(self._do(*job))

    async def _do(self, lease: Lease, samples: list[Sample], num_bytes: int) -> None:
        if not samples:
            await self.send(self.held.credit(lease.kind, len(lease.parts.indices), num_bytes))
            return
        began = time.monotonic()
        if lease.kind is Kind.FILTER:
            result = await self._judge(lease, samples)
        else:
            result = await self._score(lease, samples)
        self.gauges["reward/latency_s"] = time.monotonic() - began
        self.held.done(lease.fence, result)
        await self.say(result, (self.held.credit(lease.kind, len(samples), num_bytes), ()))
        self.held.said()

    async def _score(self, lease: Lease, samples: list[Sample]) -> Statement:
        whole = self.table.group_rm and samples[0].lane == "train"
        results = await (self._sandbox.score_group(samples) if whole else self._sandbox.score(samples))
        if self._teacher is not None:
            results = await self._teacher.complete(samples, results)
        for result in results:
            if isinstance(result, RewardFailure):
                self._failed += 1
                self.log.warning(
                    "reward failed", kind=result.kind, error=result.message, trace=result.traceback
                )
        self._scored += len(results)
        self.gauges |= {"reward/scored": self._scored, "reward/failures": self._failed}
        return scores_of(lease.fence, samples, results)

    async def _judge(self, lease: Lease, samples: list[Sample]) -> Statement:
        verdict = await self._sandbox.verdict(samples)
        if isinstance(verdict, RewardFailure):
            self.log.warning(
                "filter failed", group_id=lease.parts.group_id, kind=verdict.kind, error=verdict.message
            )
        return verdict_of(lease, samples, verdict), ()

    async def drain(self) -> None:
        """What is being scored is finished; leases that arrive later go back with our goodbye."""
        try:
            with self.side_waits("rewards"):
                async with asyncio.timeout(DRAIN_S):
                    await self.held.idle.wait()
        except TimeoutError:
            self.log.warning("left with work undone", leases=len(self.held))
        self.leave(ExitCode.DRAINED)

    def vitals(self) -> Facts:
        return msgspec.structs.replace(
            super().vitals(),
            held=len(self.held),
            capacity=self.table.batch,
            oldest_held_s=self.held.oldest_s,
        )

    async def close(self) -> None:
        self.metrics.write(self.gauges)
        if self._teacher is not None:
            await self._teacher.close()
        await self._sandbox.close()


def _teacher(plan: Plan, table: RewardConfig) -> Teacher | None:
    if table.teacher_url is None:
        return None
    temperature = plan.topology.rollout.rollout_temperature
    return Teacher(table.teacher_url, temperature=temperature, timeout_s=table.timeout_s)
