"""A desk without a network, and the peers that talk to it, for the tests of the ledger.

The peers are scripts: they keep the protocol, do what a test tells them to, and check what reaches them.
Token values say which sample and which position they belong to, so that a lost, repeated or misplaced token
shows wherever samples arrive.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from asyncrl.buffer.book import Frame
from asyncrl.buffer.config import LedgerConfig
from asyncrl.buffer.delivery import Courier
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.pump import Pump
from asyncrl.buffer.restore import release_all, restore
from asyncrl.buffer.store import Store
from asyncrl.messages import control
from asyncrl.messages.control import Kind, Lease
from asyncrl.messages.parts import encode_body, unpack
from asyncrl.messages.sample import (
    Lane,
    Prompt,
    Sample,
    Score,
    Segment,
    Span,
    Status,
    pack_logprobs,
    pack_tokens,
    tokens_of,
)
from asyncrl.messages.version import Manifest

GROUP_SIZE = 2
EVAL_PROMPTS = 2
WINDOW = 4000
"""Bytes on the way to the trainer; some batches are larger."""


def frame(data: bytes) -> Frame:
    return Frame(data, xxhash.xxh3_128_hexdigest(data))


def token(group_id: int, index: int, position: int) -> int:
    return group_id * 10_000 + index * 1_000 + position


def check_tokens(sample: Sample) -> None:
    """What arrives is what was generated for this very sample, from its first token on, without a gap."""
    expected = [token(sample.group_id, sample.index, p) for p in range(sample.num_tokens)]
    assert tokens_of(sample.tokens).tolist() == expected
    assert sum(span.num_tokens for span in sample.spans) == sample.num_tokens


class Desk:
    """Ledger, members, pump, store and courier, driven by hand as the buffer's role drives them."""

    def __init__(self, run_dir: Path, config: LedgerConfig) -> None:
        self.run_dir, self.config = run_dir, config
        self.now = 1000.0
        self.open()

    def open(self) -> None:
        self.store = Store(self.run_dir, synchronous="off", segment_bytes=20_000)
        self.ledger = Ledger(self.config)
        self.members = Members(self.ledger, run_id="run")
        self.pump = Pump(self.ledger)
        restore(self.ledger, self.members, self.store)
        self.courier = Courier(self.store, window_bytes=WINDOW)

    def restart(self, *, resumed: bool) -> None:
        """The process is gone; a new one is made from what is on disk."""
        self.store.close()
        self.open()
        if resumed:
            release_all(self.ledger, "the run was resumed", self.now)

    def take(self, peer: bytes, message: Any, frames: list[bytes]) -> None:
        """One message, as the role dispatches it."""
        ledger, members, now = self.ledger, self.members, self.now
        if isinstance(message, control.Hello):
            members.join(peer, message, now)
            return
        worker = ledger.fleet.workers.get(peer)
        if worker is None:
            return  # refused: say hello first
        ledger.fleet.heard_of(worker)
        bodies = [frame(data) for data in frames]
        match message:
            case control.Want():
                ledger.fleet.want(worker, message)
                if message.kind in {Kind.TRAIN, Kind.EVALUATE}:
                    self.courier.credit(message.num_bytes, peer=peer)
            case control.Reports():
                for report, body in zip(message.reports, bodies, strict=True):
                    ledger.report(worker, report, body, now)
            case control.Scores():
                for scored, body in zip(message.scores, bodies, strict=True):
                    ledger.score(worker, scored, body, now)
            case control.Verdict():
                ledger.verdict(worker, message, now)
            case control.Issue():
                ledger.issue(message, bodies, now)
            case control.Trained():
                members.trained(worker, message, now)
            case control.Published():
                members.published(worker, message, now)
            case control.Saved():
                members.saved(worker, message, now)
            case control.EvaluationSeen():
                members.evaluation_seen(message.version, message.incarnation)
            case control.Goodbye():
                members.leave(worker, "goodbye", now)

    def commit(self) -> list[tuple[bytes, Any, list[bytes]]]:
        """One round of the role's commit loop; returns what may leave."""
        self.pump.run(self.now)
        transaction = self.ledger.book.take()
        self.store.write(transaction)
        out = [(item, self.store.read(item.bodies)) for item in transaction.sends]
        trainer, evaluator = self.ledger.fleet.only("trainer"), self.ledger.fleet.only("evaluator")
        for _, batch in transaction.deliver:
            assert trainer is not None
            self.courier.queue_batch(trainer.peer, batch)
        for version, incarnation in transaction.evaluated:
            if evaluator is not None:
                self.courier.queue_evaluation(evaluator.peer, version, incarnation)
        out += self.courier.take()
        return [(item.peer, item.message, frames) for item, frames in out]


class Peer:
    """One life of an actor."""

    role = ""

    def __init__(self, name: str, life: int, send: Any) -> None:
        self.name, self.incarnation = name, f"life{life}"
        self.peer = f"{name}.{self.incarnation}".encode()
        self.inbox: deque[tuple[Any, list[bytes]]] = deque()
        self._send = send
        self.finished = False

    def send(self, message: Any, *frames: bytes) -> None:
        self._send(self.peer, message, list(frames))

    def hello(self) -> None:
        hello = control.Hello(
            name=self.name, role=self.role, incarnation=self.incarnation, protocol=1, schema=""
        )
        self.send(hello)

    def read(self) -> None:
        """Take in everything that has arrived."""
        while self.inbox:
            message, frames = self.inbox.popleft()
            if isinstance(message, control.Finish):
                self.on_finish()
            else:
                self.handle(message, frames)

    def on_finish(self) -> None:
        self.finished = True

    def handle(self, message: Any, frames: list[bytes]) -> None:
        raise NotImplementedError

    def work(self) -> None:
        """Do everything that can be done now."""

    def reconnect(self) -> None:
        """The desk was restarted: what was on the way, in either direction, is lost."""
        self.inbox.clear()
        self.hello()


class Source(Peer):
    role = "source"

    def __init__(self, name: str, life: int, send: Any, *, prompts: int) -> None:
        super().__init__(name, life, send)
        self.prompts = prompts
        self.given = self.next_group = 0

    def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case control.Welcome():
                self.given, self.next_group = int(message.cursor or b"0"), message.next_group
            case control.Need(lane=Lane.EVAL):
                self.issue(Lane.EVAL, EVAL_PROMPTS, ended=True, version=message.version)
            case control.Need():
                count = min(message.groups, self.prompts - self.given)
                self.given += count
                self.issue(Lane.TRAIN, count, ended=self.given >= self.prompts)

    def issue(self, lane: Lane, count: int, *, ended: bool, version: int = 0) -> None:
        prompt = encode_body(Prompt(tokens=pack_tokens([1, 2, 3])))
        issue = control.Issue(
            lane=lane,
            first_group=self.next_group,
            prompts=[control.Issued(GROUP_SIZE, 3, "set")] * count,
            cursor=str(self.given).encode() if lane is Lane.TRAIN else b"",
            ended=ended,
            version=version,
        )
        self.next_group += count
        self.send(issue, *[prompt] * count)


class Job(msgspec.Struct):
    """One sample at a generator."""

    lease: Lease
    sample: Sample
    num_bytes: int
    length: int
    """Tokens the answer will have."""
    done: int
    """Tokens generated and reported."""
    acked: bool = True
    """The last report is acknowledged."""
    last: tuple[control.Report, bytes] | None = None
    ours: bool = True
    """Whether the desk counts it against our credit."""


class Generator(Peer):
    role = "generator"

    def __init__(self, name: str, life: int, send: Any, *, capacity: int = 4, window: int = 1200) -> None:
        super().__init__(name, life, send)
        self.capacity, self.window = capacity, window
        self.version = (-1, 0)
        self.announced: Manifest | None = None
        self.jobs: dict[tuple[int, int], Job] = {}
        self.acknowledged: dict[tuple[int, int], int] = {}
        """(group, index) -> committed tokens, as acknowledgements said."""
        self.refused = 0

    def want(self, samples: int, num_bytes: int) -> None:
        version, incarnation = self.version
        self.send(
            control.Want(
                kind=Kind.GENERATE, samples=samples, num_bytes=num_bytes, version=version,
                incarnation=incarnation, capacity=self.capacity,
            )
        )  # fmt: skip

    def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case control.Welcome():
                self.announced = message.announced or self.announced
            case control.NewVersion():
                self.announced = message.manifest
            case control.Leases():
                self.take(message, frames)
            case control.Acks():
                for ack in message.acks:
                    self.on_ack(ack)

    def swap(self) -> None:
        """Load what was announced; the first time, ask for work."""
        if self.announced is None or self.version == (self.announced.version, self.announced.incarnation):
            return
        assert self.announced.version >= self.version[0], "the published step never goes back"
        first = self.version[0] < 0
        self.version = (self.announced.version, self.announced.incarnation)
        self.want(self.capacity if first else 0, self.window if first else 0)

    def take(self, message: control.Leases, frames: list[bytes]) -> None:
        stream = iter(frames)
        for lease, samples in zip(
            message.leases, unpack([x.parts for x in message.leases], frames), strict=True
        ):
            size = sum(len(next(stream)) for _ in range(lease.parts.num_frames))
            self.take_lease(lease, samples, size)

    def take_lease(self, lease: Lease, samples: list[Sample], size: int) -> None:
        known = [job for (fence, _), job in self.jobs.items() if fence == lease.fence]
        if known:  # told again after a reconnect
            for job in known:
                job.ours, job.num_bytes = job.sample.index in lease.parts.indices, 0
            known[0].num_bytes = size
            return
        if samples[0].lane is Lane.TRAIN:
            assert self.version[0] >= lease.version, "a sample goes only to its issue version or a newer one"
        for sample in samples:
            check_tokens(sample)
            length = 3 + (sample.group_id * 7 + sample.index * 3) % 5
            job = Job(lease, sample, 0, max(length, sample.num_tokens), sample.num_tokens)
            self.jobs[(lease.fence, sample.index)] = job
        self.jobs[(lease.fence, samples[0].index)].num_bytes = size

    def report(self, job: Job, status: Status, *, new: int) -> None:
        """Hand in `new` more tokens."""
        group_id, index = job.sample.group_id, job.sample.index
        tokens = [token(group_id, index, job.done + i) for i in range(new)]
        spans = [Span(*self.version, new)] if new else []
        segment = Segment(tokens=pack_tokens(tokens), logprobs=pack_logprobs([0.0] * new), spans=spans)
        report = control.Report(
            fence=job.lease.fence, group_id=group_id, index=index, status=status, offset=job.done,
            num_tokens=new, spans=spans, reason="" if status is not Status.FAILED else "tool failed",
        )  # fmt: skip
        job.done += new
        job.acked = False
        job.last = (report, encode_body(segment) if new else b"")
        self.repeat(job)

    def repeat(self, job: Job) -> None:
        """The last report, once more."""
        assert job.last is not None
        self.send(control.Reports(reports=[job.last[0]]), job.last[1])

    def on_ack(self, ack: control.Ack) -> None:
        job = self.jobs.get((ack.fence, ack.index))
        if ack.accepted and job is not None and job.sample.lane is Lane.TRAIN:
            self.acknowledged[(ack.group_id, ack.index)] = ack.offset
        if job is None or job.last is None:
            return
        if not ack.accepted or job.last[0].status is not Status.PENDING:
            self.refused += not ack.accepted
            del self.jobs[(ack.fence, ack.index)]
            self.want(int(job.ours), job.num_bytes)
        else:
            job.acked = True

    def free(self) -> list[Job]:
        """Jobs that may report."""
        return [job for job in self.jobs.values() if job.acked]

    def may_start(self, job: Job) -> bool:
        """An evaluation's sample belongs to exactly one version."""
        mine = job.sample.lane is Lane.TRAIN or job.lease.version == self.version[0]
        if not mine:
            self.report(job, Status.ABORTED, new=0)
        return mine

    def work(self) -> None:
        self.swap()
        for job in self.free():
            if self.may_start(job):
                self.report(job, Status.COMPLETED, new=job.length - job.done)

    def reconnect(self) -> None:
        super().reconnect()
        if self.version[0] >= 0:
            self.want(self.capacity, self.window)
        for job in self.jobs.values():
            job.ours, job.num_bytes = False, 0
            if not job.acked:
                self.repeat(job)


class Reward(Peer):
    role = "reward"

    def __init__(self, name: str, life: int, send: Any, *, capacity: int = 4, window: int = 1200) -> None:
        super().__init__(name, life, send)
        self.capacity, self.window = capacity, window
        self.jobs: dict[int, tuple[Lease, list[Sample], int]] = {}
        self.unacked: dict[int, tuple[Any, list[bytes]]] = {}

    def want(self, kind: Kind, samples: int, num_bytes: int) -> None:
        self.send(control.Want(kind=kind, samples=samples, num_bytes=num_bytes, capacity=self.capacity))

    def hello(self) -> None:
        super().hello()
        self.want(Kind.SCORE, self.capacity, self.window)
        self.want(Kind.FILTER, self.capacity, 0)

    def handle(self, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, control.Acks):
            for ack in message.acks:
                self.unacked.pop(ack.fence, None)
        if not isinstance(message, control.Leases):
            return
        groups = unpack([lease.parts for lease in message.leases], frames)
        stream = iter(frames)
        for lease, samples in zip(message.leases, groups, strict=True):
            size = sum(len(next(stream)) for _ in range(lease.parts.num_frames))
            for sample in samples:
                check_tokens(sample)
            self.jobs[lease.fence] = (lease, samples, size)

    def do(self, fence: int, *, good: bool = True) -> None:
        """Score or judge a lease. `good` false: scoring fails, the filter refuses."""
        lease, samples, size = self.jobs.pop(fence)
        if lease.kind is Kind.FILTER:
            verdict = control.Verdict(
                fence=fence, group_id=samples[0].group_id, keep=good, reason="" if good else "all the same"
            )
            self.answer(fence, verdict)
        else:
            score = encode_body(Score(reward=1.0))
            scores = [
                control.Scored(
                    fence=fence,
                    group_id=s.group_id,
                    index=s.index,
                    reward=1.0,
                    error="" if good else "timeout",
                )
                for s in samples
            ]
            self.answer(fence, control.Scores(scores=scores), *[score if good else b"" for _ in scores])
        self.want(lease.kind, len(samples), size)

    def answer(self, fence: int, message: Any, *frames: bytes) -> None:
        self.unacked[fence] = (message, list(frames))
        self.send(message, *frames)

    def work(self) -> None:
        for fence in list(self.jobs):
            self.do(fence)

    def reconnect(self) -> None:
        self.jobs.clear()  # what the desk still counts as ours comes again, and is scored again
        super().reconnect()
        for message, frames in self.unacked.values():
            self.send(message, *frames)


class Evaluator(Peer):
    role = "evaluator"

    def __init__(self, name: str, life: int, send: Any) -> None:
        super().__init__(name, life, send)
        self.samples: list[Sample] = []
        self.seen: list[tuple[int, int]] = []

    def handle(self, message: Any, frames: list[bytes]) -> None:
        if not isinstance(message, control.Evaluated):
            return
        self.samples = [] if message.part == 0 else self.samples
        self.samples += [sample for group in unpack(message.groups, frames) for sample in group]
        if message.part + 1 == message.num_parts:
            for sample in self.samples:
                check_tokens(sample)
                assert {(s.version, s.incarnation) for s in sample.spans} == {
                    (message.version, message.incarnation)
                }, "an evaluation never mixes versions"
            self.seen.append((message.version, message.incarnation))
            self.send(control.EvaluationSeen(version=message.version, incarnation=message.incarnation))


class Trainer(Peer):
    """Trains what it is handed, in order; remembers unconfirmed words and repeats them after a reconnect."""

    role = "trainer"

    def __init__(
        self, name: str, life: int, send: Any, *, num_rollout: int | None, interval: int = 1,
        save_interval: int = 2, prefetch: int = 1, exact: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(name, life, send)
        self.num_rollout, self.interval, self.save_interval = num_rollout, interval, save_interval
        self.prefetch, self.exact = prefetch, exact
        self.number = 0
        self.step = self.saved = 0
        self.last_push = -1
        self.recorded: Manifest | None = None
        self.batches: deque[tuple[int, list[list[Sample]]]] = deque()
        self.parts: list[list[Sample]] = []
        self.words: dict[tuple[str, int], Any] = {}
        self.ending = False
        self.trained: list[tuple[int, list[list[Sample]]]] = []

    def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case control.Welcome(trainer=start):
                assert start is not None
                if self.number != start.incarnation:
                    self.begin(start)
                else:
                    for word in self.words.values():
                        self.send(word)
                self.send(control.Want(kind=Kind.TRAIN, samples=1 + self.prefetch, num_bytes=WINDOW))
            case control.BatchPart():
                self.parts = [] if message.part == 0 else self.parts
                self.parts += unpack(message.groups, frames)
                self.send(control.Want(kind=Kind.TRAIN, samples=0, num_bytes=message.num_bytes))
                if message.part + 1 == message.num_parts:
                    self.batches.append((message.batch, self.parts))
            case control.Committed():
                self.words.pop((message.what, message.number), None)

    def begin(self, start: control.TrainerStart) -> None:
        self.number, self.recorded = start.incarnation, start.published
        self.step = self.saved = int(start.checkpoint.rpartition("-")[2] or 0)
        self.push()

    def say(self, what: str, number: int, message: Any) -> None:
        self.words[(what, number)] = message
        self.send(message)

    def push(self) -> None:
        """Publish the present weights, if that is due; see `weights.pushes`."""
        recorded = self.recorded
        if self.step <= self.last_push or (recorded is not None and self.step < recorded.version):
            return
        self.last_push = self.step
        digest = f"digest{self.step}" + ("" if self.exact else f".{self.number}")
        incarnation = self.number
        if recorded is not None and (recorded.version, recorded.digest) == (self.step, digest):
            incarnation = recorded.incarnation
        manifest = Manifest(
            run_id="run", version=self.step, incarnation=incarnation, step=self.step, digest=digest,
            num_bytes=0, tensors=[], path=self.incarnation,
        )  # fmt: skip
        self.say("version", self.step, control.Published(manifest=manifest))

    def save(self) -> None:
        if self.step > self.saved:
            self.saved = self.step
            saved = control.Saved(
                rollout_step=self.step, incarnation=self.number, path=f"step-{self.step}", step=self.step
            )
            self.say("checkpoint", self.step, saved)

    def train(self) -> None:
        """One batch, if there is one."""
        if not self.batches:
            return
        batch, groups = self.batches.popleft()
        self.send(control.Want(kind=Kind.TRAIN, samples=1))
        if batch < self.step:
            return
        assert batch == self.step, "batches come in order"
        self.trained.append((batch, groups))
        self.step += 1
        message = control.Trained(
            batch=batch, incarnation=self.number, step=self.step, digest=f"digest{self.step}", started=0.0,
            ended=1.0,
        )  # fmt: skip
        self.say("trained", batch, message)
        last = self.step == self.num_rollout
        if self.step % self.interval == 0 or last:
            self.push()
        if self.step % self.save_interval == 0 or last:
            self.save()

    def reconnect(self) -> None:
        self.batches.clear()  # all that is not trained will come again
        super().reconnect()

    def on_finish(self) -> None:
        self.finished = self.ending or self.step == self.num_rollout
        self.ending = True

    def work(self) -> None:
        while self.batches:
            self.train()
        if self.ending and self.number:
            self.push()
            self.save()
