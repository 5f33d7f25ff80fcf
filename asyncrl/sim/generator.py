"""A simulated generator: many samples at once, token by token in virtual time, over pushes of new weights.

Time is counted in tokens that every slot has produced (`_tokens`): it stands still while weights are loaded
and runs slower on a slow machine, so one number tells where every running sample is.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from typing import Any

import msgspec

from asyncrl.messages import control
from asyncrl.messages.control import Kind, Lease
from asyncrl.messages.sample import Lane, Span, Status
from asyncrl.messages.version import Manifest
from asyncrl.sim import bodies
from asyncrl.sim.peers import Peer, Stage

MODES = ("keep", "keep", "recompute", "finish", "abort")
"""What generators do with running samples when new weights come, by their number."""
PAUSE_S = {"keep": 0.2, "recompute": 1.5, "finish": 0.2, "abort": 0.2}


@dataclass(slots=True)
class Job:
    """One sample on a generator's hands."""

    fence: int
    group_id: int
    index: int
    lane: Lane
    version: int
    """Of the lease."""
    length: int
    offset: int
    """Tokens handed in."""
    num_bytes: int
    start: float | None = None
    """The generator's count when token 0 would have been produced; None: not started."""
    ours: bool = True
    """Its last report is not on its way: the desk counts it against our credit."""
    unacked: list[tuple[control.Report, bytes]] = field(default_factory=list)
    """The report under way, if there is one."""
    end: Status | None = None
    """How it ended, while that waits for an acknowledgement of progress."""


class Generator(Peer):
    """See the module's docstring."""

    role = "generator"

    def __init__(self, name: str, life: int, stage: Stage, *, number: int) -> None:
        super().__init__(name, life, stage)
        self.mode = MODES[number % len(MODES)]
        slow = number < stage.scenario.slow_share * stage.scenario.generators
        self.rate = stage.scenario.rate * (0.5 if slow else 1.0)
        self.streams = number % 4 == 0
        """Whether it fetches weights from the trainer's process; else from files, which outlive it."""
        self.version = (-1, 0)
        self.jobs: dict[tuple[int, int], Job] = {}
        self.waiting: list[Job] = []
        """Not started: new weights come first (mode "finish")."""
        self.bad_load: str = ""
        """"slow" or "corrupt": how the next load goes."""
        self._announced: Manifest | None = None
        self._loading: Manifest | None = None
        self._swapping = self.draining = False
        self._tokens = self._since = 0.0
        self._paused = True
        self._agenda: list[tuple[float, int, Job, bool]] = []
        """Heap of (count, tie-breaker, job, whether it ends then)."""
        self._number = self._alarm = 0
        self._armed = float("inf")
        self._log: list[tuple[float, int, int]] = []
        """(count, version, incarnation) of every swap, as far back as a job needs it."""

    # The count of tokens.

    def _count(self) -> float:
        if self._paused:
            return self._tokens
        return self._tokens + (self.stage.clock.now - self._since) * self.rate

    def _rebase(self, *, paused: bool | None = None, rate: float | None = None) -> None:
        self._tokens, self._since = self._count(), self.stage.clock.now
        self._paused = self._paused if paused is None else paused
        self.rate = self.rate if rate is None else rate
        self._alarm += 1
        self._armed = float("inf")
        self._arm()

    def slow_down(self, factor: float) -> None:
        """From now on it takes so many times longer for each token."""
        self._rebase(rate=self.rate / factor)

    def freeze(self) -> None:
        super().freeze()
        self._rebase(paused=True)

    def thaw(self) -> None:
        halted = self.version[0] < 0 or (self._swapping and self._loading is None)
        self._rebase(paused=halted)
        super().thaw()

    def _arm(self) -> None:
        if self._paused or not self._agenda or self._agenda[0][0] >= self._armed:
            return
        self._armed = self._agenda[0][0]
        self._alarm += 1
        self.after(max(0.0, self._armed - self._count()) / self.rate, self._wake, self._alarm)

    def _wake(self, alarm: int) -> None:
        if alarm != self._alarm or self._paused:
            return
        self._armed = float("inf")
        count = self._count() + 1e-6
        while self._agenda and self._agenda[0][0] <= count:
            _, _, job, ends = heapq.heappop(self._agenda)
            if job.end is None and self.jobs.get((job.fence, job.index)) is job:
                self._due(job, ends=ends)
        self._arm()

    def _due(self, job: Job, *, ends: bool) -> None:
        if not ends:
            self._report(job, Status.PENDING)
            return
        dice, scenario = self.stage.dice, self.stage.scenario
        if dice.random() < scenario.generation_failures:
            self._end(job, Status.FAILED)
        else:
            self._end(job, Status.TRUNCATED if job.length >= scenario.max_tokens else Status.COMPLETED)
        self._maybe_swap()

    # Leases.

    def want(self, samples: int, num_bytes: int) -> None:
        """Name room."""
        version, incarnation = self.version
        capacity = self.stage.scenario.slots
        want = control.Want(
            kind=Kind.GENERATE, samples=samples, num_bytes=num_bytes, version=version,
            incarnation=incarnation, capacity=capacity,
        )  # fmt: skip
        self.send(want)

    def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case control.NewVersion():
                self._announce(message.manifest)
            case control.Leases():
                stream = iter(frames)
                for lease in message.leases:
                    self._take_lease(lease, [next(stream) for _ in range(lease.parts.num_frames)])
                held = sum(job.ours and job.end is None for job in self.jobs.values())
                self.stage.checks.holds(self.name, held, self.stage.scenario.slots)
                self._arm()
            case control.Acks():
                for ack in message.acks:
                    self._acked(ack)

    def _take_lease(self, lease: Lease, frames: list[bytes]) -> None:
        size = sum(map(len, frames))
        answers = bodies.read(lease.parts, iter(frames))
        if any((lease.fence, index) in self.jobs for index in range(self.stage.scenario.group_size)):
            self.want(len(answers), size)  # told twice: only its charge is new
            return
        for answer in answers:
            self.stage.checks.leased(lease, answer, self.name)
            self._start(lease, answer, size)
            size = 0

    def _start(self, lease: Lease, answer: bodies.Answer, size: int) -> None:
        scenario = self.stage.scenario
        # Another generator that goes on with it ends where the first one would have.
        own = random.Random((scenario.seed << 40) ^ (lease.parts.group_id << 8) ^ answer.index)
        length = round(scenario.mean_tokens * own.lognormvariate(0.0, scenario.sigma))
        length = max(min(length, scenario.max_tokens), answer.num_tokens, 1)
        job = Job(
            lease.fence, lease.parts.group_id, answer.index, lease.parts.lane, lease.version, length,
            answer.num_tokens, size,
        )  # fmt: skip
        self.jobs[(job.fence, job.index)] = job
        if self.draining or (job.lane is Lane.EVAL and job.version != self.version[0]):
            self._end(job, Status.ABORTED)
        elif self._swapping:
            self.waiting.append(job)
        else:
            self._run(job)

    def _run(self, job: Job) -> None:
        job.start = self._count() - job.offset
        start, every = job.start, self.stage.scenario.progress_tokens
        self._schedule(job, start + job.length, ends=True)
        for tokens in range(job.offset + every, job.length, every):
            self._schedule(job, start + tokens, ends=False)

    def _schedule(self, job: Job, count: float, *, ends: bool) -> None:
        self._number += 1
        heapq.heappush(self._agenda, (count, self._number, job, ends))

    # Reports: one of each sample under way.

    def _end(self, job: Job, status: Status) -> None:
        job.end = status
        if status is Status.ABORTED and job.start is not None:
            job.length = max(job.offset, min(job.length, int(self._count() - job.start)))
        if not job.unacked:
            self._report(job, status)

    def _report(self, job: Job, status: Status) -> None:
        if job.unacked:
            return  # gathers
        new = 0
        if job.start is not None and status is not Status.FAILED:
            new = min(job.length, int(self._count() - job.start + 1e-6)) - job.offset
        if new <= 0 and status is Status.PENDING:
            return
        if status in {Status.COMPLETED, Status.TRUNCATED}:
            new = job.length - job.offset
        spans = self._spans(job, new) if new > 0 else []
        report = control.Report(
            fence=job.fence, group_id=job.group_id, index=job.index, status=status, offset=job.offset,
            num_tokens=max(new, 0), spans=spans, reason="a tool failed" if status is Status.FAILED else "",
        )  # fmt: skip
        frame = bodies.segment(job.group_id, job.index, job.offset, spans) if spans else b""
        job.offset += max(new, 0)
        job.unacked = [(report, frame)]
        wants_first = self.stage.dice.random() < 0.5  # two tasks of a generator: either may be quicker
        if status is not Status.PENDING and job.ours and wants_first:
            self._free(job)
        self.send(control.Reports(reports=[report]), frame)
        if status is not Status.PENDING and job.ours:
            self._free(job)
        if status in {Status.COMPLETED, Status.TRUNCATED} and job.lane is Lane.TRAIN:
            self.stage.finished_samples += 1

    def _free(self, job: Job) -> None:
        job.ours = False
        if not self.draining:
            self.want(1, job.num_bytes)

    def _spans(self, job: Job, new: int) -> list[Span]:
        """Which version made which of the next `new` tokens."""
        assert job.start is not None, "only a started sample has tokens"
        spans: list[Span] = []
        position, end = job.start + job.offset, job.start + job.offset + new
        marks = [mark for mark in self._log if mark[0] < end]
        left = new
        for number, (_, version, incarnation) in enumerate(marks):
            until = marks[number + 1][0] if number + 1 < len(marks) else end
            if until <= position:
                continue
            count = left if until >= end else min(left, int(until - position))
            if count > 0:
                spans.append(Span(version, incarnation, count))
                left -= count
                position += count
        return spans

    def _acked(self, ack: control.Ack) -> None:
        job = self.jobs.get((ack.fence, ack.index))
        if job is None or not job.unacked:
            return
        status = job.unacked[0][0].status
        last = status is not Status.PENDING
        if ack.accepted and not (ack.last if last else ack.offset >= job.offset):
            return  # of an earlier report
        if ack.accepted and job.lane is Lane.TRAIN:
            self.stage.checks.acknowledged(job.group_id, job.index, ack.offset)
        job.unacked = []
        if ack.accepted and status is Status.PENDING:
            if job.end is not None:
                self._report(job, job.end)
            return
        if job.ours:
            self._free(job)
        del self.jobs[(job.fence, job.index)]
        self._maybe_swap()
        if self.draining and not self.jobs:
            self.leave()

    def on_welcome(self, welcome: control.Welcome) -> None:
        if welcome.announced is not None:
            self._announce(welcome.announced)

    def introduce(self, hello: control.Hello) -> control.Hello:
        return msgspec.structs.replace(hello, leases=sorted({fence for fence, _ in self.jobs}))

    def restate(self, welcome: control.Welcome) -> None:
        """Running samples go on; those that have gone to others end, and their reports will be refused."""
        for job in self.jobs.values():
            for report, frame in job.unacked:
                self.send(control.Reports(reports=[report]), frame)
        held = [job for job in self.jobs.values() if job.ours]
        if self.version[0] >= 0 and not self.draining:
            scenario = self.stage.scenario
            self.want(scenario.slots - len(held), scenario.window_bytes - sum(j.num_bytes for j in held))
        fences = set(welcome.held)
        for job in [job for job in held if job.fence not in fences and job.end is None]:
            self._end(job, Status.ABORTED)
        self.on_welcome(welcome)
        if self.draining and not self.jobs:
            self.leave()

    # Versions.

    def _announce(self, manifest: Manifest) -> None:
        self.stage.checks.announced(self.name, self.version, manifest)
        self._announced = manifest
        self._load()

    def _load(self) -> None:
        manifest = self._announced
        if manifest is None or self._loading is not None or self._swapping:
            return
        if (manifest.version, manifest.incarnation) == self.version:
            return
        self._loading = manifest
        slower = 20.0 if self.bad_load == "slow" else 1.0
        self.after(slower * self.stage.about(self.stage.scenario.load_s, 0.5), self._loaded, manifest)

    def _loaded(self, manifest: Manifest) -> None:
        self._loading = None
        corrupt, self.bad_load = self.bad_load == "corrupt", ""
        gone = self.streams and not self.stage.has_bytes(manifest)
        if corrupt or (gone and manifest is self._announced):
            self.stage.exited(self, "the weights' bytes are gone or do not have their digest")
            return
        if gone:
            self._load()
            return
        self._swapping = True
        for job in list(self.jobs.values()):
            if job.end is None and (self.mode == "abort" or job.lane is Lane.EVAL):
                self._end(job, Status.ABORTED)
        self._loading = manifest
        self._maybe_swap()

    def _maybe_swap(self) -> None:
        if not self._swapping or self._loading is None:
            return
        if self.mode == "finish" and any(j.end is None and j.start is not None for j in self.jobs.values()):
            return
        manifest, self._loading = self._loading, None
        self._rebase(paused=True)
        self.after(self.stage.about(PAUSE_S[self.mode]), self._swapped, manifest)

    def _swapped(self, manifest: Manifest) -> None:
        first = self.version[0] < 0
        self.version, count = (manifest.version, manifest.incarnation), self._count()
        places = [job.start + job.offset for job in self.jobs.values() if job.start is not None]
        oldest = min(places, default=count)
        while len(self._log) > 1 and self._log[1][0] <= oldest:
            del self._log[0]
        self._log.append((count, *self.version))
        self._swapping = False
        swapped = control.Swapped(
            version=manifest.version, incarnation=manifest.incarnation, pause_s=PAUSE_S[self.mode],
            transfer_s=1.0, aborted=0, recomputed_tokens=0,
        )  # fmt: skip
        self.send(swapped)
        scenario = self.stage.scenario
        self.want(scenario.slots if first else 0, scenario.window_bytes if first else 0)
        waiting, self.waiting = self.waiting, []
        for job in waiting:
            if job.end is None and self.jobs.get((job.fence, job.index)) is job:
                self._run(job)
        self._rebase(paused=False)
        self._load()

    # The end.

    def drain(self) -> None:
        """Hand everything back, then leave."""
        self.draining = True
        for job in list(self.jobs.values()):
            if job.end is None:
                self._end(job, Status.ABORTED)
        if not self.jobs:
            self.leave()

    def leave(self) -> None:
        """Say goodbye. It is gone once the desk has heard it."""
        self.send(control.Goodbye(reason="drained"))

    def waits_for(self) -> str:
        if self._swapping:
            return f"its running samples, to load {self._loading and self._loading.name}"
        if self._loading is not None:
            return f"the bytes of {self._loading.name}"
        if self.version[0] < 0:
            return "a first version"
        unacked = sum(bool(job.unacked) for job in self.jobs.values())
        jobs = f"{len(self.jobs)} samples to end, {unacked} reports to be acknowledged"
        return jobs if self.jobs else super().waits_for()
