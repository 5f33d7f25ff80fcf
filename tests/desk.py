"""A scripted conversation with the real desk: source, generators, rewards and trainer as plain objects.

The ledger, its members, pump and store are the package's own; only the peers are played. Time is a counter
and every choice comes from a seed, so two desks with the same script write the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from asyncrl.buffer.book import Frame
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.pump import Pump
from asyncrl.buffer.restore import release_all, restore
from asyncrl.buffer.states import WorkerRecord
from asyncrl.buffer.store import Store, batch_parts
from asyncrl.messages.control import (
    Hello,
    Issue,
    Issued,
    Kind,
    Lease,
    Leases,
    MemberLost,
    Need,
    NewVersion,
    Published,
    Report,
    Saved,
    Scored,
    Swapped,
    Trained,
    TrainerStart,
    Verdict,
    Want,
    Welcome,
)
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
)
from asyncrl.messages.version import Manifest
from asyncrl.roles.buffer import ledger_config
from asyncrl.topology.load import parse
from asyncrl.topology.plan import Plan, compile_plan

TrainFunction = Callable[[int, list[list[Sample]]], tuple[str, int, int]]
"""(batch, groups) -> (digest of the weights after it, optimizer steps, trained tokens)."""

TOPOLOGY = """
[run]
num_rollout = {num_rollout}
[source]
prompt_data = "prompts.jsonl"
[rollout]
rollout_batch_size = {batch_size}
n_samples_per_prompt = {num_samples}
max_staleness = {max_staleness}
{rollout}
[trainer]
hf_checkpoint = "{model}"
save_interval = 2
{trainer}
[eval]
{evals}
"""


def make_plan(
    *,
    num_rollout: int = 4,
    batch_size: int = 2,
    num_samples: int = 2,
    max_staleness: int = 2,
    model: str = "model",
    rollout: str = "",
    trainer: str = "",
    evals: bool = False,
) -> Plan:
    """A small plan; `rollout` and `trainer` are further lines of their tables."""
    text = TOPOLOGY.format(
        num_rollout=num_rollout, batch_size=batch_size, num_samples=num_samples, max_staleness=max_staleness,
        model=model, rollout=rollout, trainer=trainer,
        evals='eval_prompt_data = ["held", "h.jsonl"]' if evals else "",
    )  # fmt: skip
    return compile_plan(parse(text, source="desk"))


def frame(body: Prompt | Segment | Score) -> Frame:
    """A body as it arrives."""
    data = encode_body(body)
    return Frame(data, xxhash.xxh3_128_hexdigest(data))


@dataclass
class Job:
    """One sample on a generator's hands."""

    fence: int
    group_id: int
    index: int
    offset: int
    length: int


@dataclass
class Generator:
    """A generator: `chunk` tokens of each of its jobs a turn, under the version it has loaded."""

    worker: WorkerRecord
    chunk: int
    version: tuple[int, int] = (-1, 0)
    jobs: list[Job] = field(default_factory=list)


class Desk:
    """The desk of one run with its played peers; `play` runs it to its end."""

    def __init__(
        self,
        run_dir: Path,
        plan: Plan,
        *,
        generators: int = 2,
        seed: int = 0,
        vocab: int = 64,
        train: TrainFunction | None = None,
        keep: Callable[[int], bool] = lambda group_id: True,
        eval_prompts: int = 2,
    ) -> None:
        self.run_dir, self.plan, self.seed, self.vocab, self.keep = run_dir, plan, seed, vocab, keep
        self.eval_prompts = eval_prompts
        self.train = train or fake_train
        self.save: Callable[[int], Path] = lambda step: run_dir / "checkpoints" / f"step-{step:06d}"
        self.now = 1000.0
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "plan.json").write_bytes(msgspec.json.encode(plan))
        self.lives = 0
        self._open()
        self.generators = {}
        self.join_all(generators)

    # The desk itself.

    def _open(self) -> None:
        self.ledger = Ledger(ledger_config(self.plan))
        self.members = Members(self.ledger, run_id=self.plan.topology.run.name)
        self.pump = Pump(self.ledger)
        self.store = Store(self.run_dir, synchronous="off")
        self.source: WorkerRecord
        self.trainer: WorkerRecord
        self.reward: WorkerRecord
        self.batches: list[int] = []
        self.start: TrainerStart | None = None
        self.told: list[str] = []

    def crash(self) -> None:
        """Kill everything at once and start again from the tables."""
        generators = len(self.generators)
        self.store.close()
        self._open()
        restore(self.ledger, self.members, self.store)
        release_all(self.ledger, "the run was resumed", self.now)
        self.join_all(generators)

    def close(self) -> None:
        """Close the files."""
        self.store.close()

    def tick(self) -> float:
        """The next moment."""
        self.now = round(self.now + 0.01, 2)
        return self.now

    def join(self, name: str, role: str) -> WorkerRecord:
        """A new life of an actor says hello."""
        self.lives += 1
        incarnation = f"life{self.lives}"
        peer = f"{name}.{incarnation}".encode()
        hello = Hello(
            name=name, role=role, incarnation=incarnation, protocol=1, schema="", host="here", pid=self.lives
        )
        self.members.join(peer, hello, self.tick())
        return self.ledger.fleet.workers[peer]

    def join_all(self, generators: int) -> None:
        """Everybody says hello."""
        self.source = self.join("source", "source")
        self.reward = self.join("reward", "reward")
        self.ledger.fleet.want(self.reward, Want(kind=Kind.SCORE, samples=1000, num_bytes=1 << 30))
        self.ledger.fleet.want(self.reward, Want(kind=Kind.FILTER, samples=1000))
        self.join("evaluator", "evaluator")
        self.generators = {}
        for number in range(generators):
            self.add_generator(f"generator-{number}", chunk=3 + number)
        self.start_trainer()

    def add_generator(self, name: str, *, chunk: int = 4) -> None:
        """A generator joins; it asks for work once it has weights."""
        self.generators[name] = Generator(self.join(name, "generator"), chunk)

    def start_trainer(self) -> None:
        """A (new) life of the trainer begins; it publishes what it may once it knows where it stands."""
        self.batches = []
        self.trainer = self.join("trainer", "trainer")
        self.ledger.fleet.want(self.trainer, Want(kind=Kind.TRAIN, samples=2, num_bytes=1 << 30))

    def kill(self, name: str) -> None:
        """A generator dies and is started again by the supervisor."""
        worker = self.generators[name].worker
        self.members.lost(MemberLost(name=name, incarnation=worker.incarnation, reason="killed"), self.tick())
        self.add_generator(name, chunk=self.generators[name].chunk)

    def commit(self) -> bool:
        """Pump, write, then hand out the messages; whether there was anything."""
        self.pump.run(self.tick())
        transaction = self.ledger.book.take()
        if transaction.empty:
            return False
        self.store.write(transaction)
        self.batches += [batch for _, batch in transaction.deliver]
        for version, incarnation in transaction.evaluated:
            self.members.evaluation_seen(version, incarnation)
        for item in transaction.sends:
            self._deliver(item.peer, item.message)
        return True

    def _deliver(self, peer: bytes, message: Any) -> None:
        name = peer.decode().split(".")[0]
        match message:
            case Need():
                self._issue(message)
            case Welcome() if message.trainer is not None:
                self._begin(message.trainer)
            case NewVersion():
                self._load(name, message.manifest)
            case Welcome() if name in self.generators and message.announced is not None:
                self._load(name, message.announced)
            case Leases() if name in self.generators:
                for lease in message.leases:
                    self._take(self.generators[name], lease)
            case Leases():
                for lease in message.leases:
                    self._reward(lease)

    # The peers.

    def number(self, *key: Any) -> random.Random:
        """Random numbers that depend on the key alone."""
        return random.Random(f"{self.seed}:{key}")

    def _issue(self, need: Need) -> None:
        lane, dataset = need.lane, "held" if need.lane is Lane.EVAL else ""
        count = self.eval_prompts if need.lane is Lane.EVAL else need.groups
        first = self.ledger.book.next_group
        prompts = [self.number("prompt", first + i).choices(range(2, self.vocab), k=3) for i in range(count)]
        bodies = [
            frame(Prompt(tokens=pack_tokens(tokens), text=f"p{tokens}", dataset=dataset))
            for tokens in prompts
        ]
        samples = 1 if lane is Lane.EVAL else self.plan.topology.rollout.n_samples_per_prompt
        issue = Issue(
            lane=lane, first_group=first, prompts=[Issued(samples, 3, dataset) for _ in bodies],
            cursor=b"%d" % (first + count), ended=lane is Lane.EVAL, version=need.version,
        )  # fmt: skip
        self.ledger.issue(issue, bodies, self.tick())

    def _begin(self, start: TrainerStart) -> None:
        """The trainer has its answer: it publishes its weights unless a later version is out."""
        self.start = start
        step = max(self.members.checkpoints, default=0)
        self.told.append(f"life {start.incarnation} at {step}")
        if start.published is None or start.published.version <= step:
            self._publish(step, self._digest_at(step))

    def _digest_at(self, step: int) -> str:
        row = self.store.db.execute(
            "select digest from trained where batch = ? order by incarnation desc limit 1", (step - 1,)
        ).fetchone()
        return row[0] if row else "initial"

    def _publish(self, version: int, digest: str) -> None:
        assert self.start is not None
        manifest = Manifest(
            run_id="run", version=version, incarnation=self.start.incarnation, num_bytes=8, tensors=[],
            step=version * self.plan.num_steps_per_rollout, digest=digest,
        )  # fmt: skip
        old = self.start.published
        if old is not None and manifest.version < old.version:
            return
        if old is not None and (old.version, old.digest) == (version, digest):
            manifest = msgspec.structs.replace(manifest, incarnation=old.incarnation)
        self.members.published(self.trainer, Published(manifest=manifest), self.tick())

    def _load(self, name: str, manifest: Manifest) -> None:
        generator = self.generators.get(name)
        if generator is None:
            return
        first = generator.version[0] < 0
        generator.version = (manifest.version, manifest.incarnation)
        self.members.swapped(
            generator.worker,
            Swapped(version=manifest.version, incarnation=manifest.incarnation, pause_s=0.1, transfer_s=0.1,
                    aborted=0, recomputed_tokens=0),
            self.tick(),
        )  # fmt: skip
        self._credit(generator, 6 if first else 0, 1 << 30 if first else 0)

    def _credit(self, generator: Generator, samples: int, num_bytes: int) -> None:
        version, incarnation = generator.version
        want = Want(kind=Kind.GENERATE, samples=samples, num_bytes=num_bytes, version=version,
                    incarnation=incarnation, capacity=6)  # fmt: skip
        self.ledger.fleet.want(generator.worker, want)

    def _take(self, generator: Generator, lease: Lease) -> None:
        for index in lease.parts.indices:
            group = lease.parts.group_id
            offset = self.ledger.book.groups[group].samples[index].tokens
            length = self.number("length", group, index).randrange(2, 14)
            generator.jobs.append(Job(lease.fence, group, index, offset, max(length, offset + 1)))

    def turn(self, generator: Generator) -> None:
        """Every job of a generator gets one chunk longer; those that are done leave."""
        jobs, generator.jobs = generator.jobs, []
        for job in jobs:
            done = self._advance(generator, job)
            if done:
                self._credit(generator, 1, 0)
            else:
                generator.jobs.append(job)

    def _advance(self, generator: Generator, job: Job) -> bool:
        count = min(generator.chunk, job.length - job.offset)
        done = job.offset + count == job.length
        numbers = self.number("tokens", job.group_id, job.index, job.offset)
        spans = [Span(*generator.version, count)]
        segment = Segment(
            tokens=pack_tokens([numbers.randrange(self.vocab) for _ in range(count)]),
            logprobs=pack_logprobs([-4.2 + 0.1 * numbers.random() for _ in range(count)]),
            spans=spans, text="x" * count,
        )  # fmt: skip
        report = Report(
            fence=job.fence, group_id=job.group_id, index=job.index, offset=job.offset, num_tokens=count,
            spans=spans,
            status=Status.COMPLETED if done else Status.PENDING,
        )  # fmt: skip
        self.ledger.report(generator.worker, report, frame(segment), self.tick())
        job.offset += count
        return done

    def hand_back(self, name: str) -> None:
        """A generator aborts everything it holds."""
        generator = self.generators[name]
        for job in generator.jobs:
            report = Report(
                fence=job.fence,
                group_id=job.group_id,
                index=job.index,
                offset=job.offset,
                status=Status.ABORTED,
            )
            self.ledger.report(generator.worker, report, None, self.tick())
        self._credit(generator, len(generator.jobs), 0)
        generator.jobs = []

    def _reward(self, lease: Lease) -> None:
        group = lease.parts.group_id
        if lease.kind is Kind.FILTER:
            verdict = Verdict(fence=lease.fence, group_id=group, keep=self.keep(group), reason="not kept")
            self.ledger.verdict(self.reward, verdict, self.tick())
        else:
            for index in lease.parts.indices:
                reward = float(self.number("reward", group).randrange(2) ^ (index % 2))
                scored = Scored(fence=lease.fence, group_id=group, index=index, reward=reward)
                self.ledger.score(self.reward, scored, frame(Score(reward=reward)), self.tick())
        self.ledger.fleet.want(self.reward, Want(kind=lease.kind, samples=len(lease.parts.indices)))

    def train_one(self) -> bool:
        """The trainer trains, settles, publishes and saves one batch, if it has one."""
        if not self.batches or self.start is None:
            return False
        batch = self.batches.pop(0)
        parts = batch_parts(self.store.db, batch)
        groups = unpack(
            [p for p, _ in parts], self.store.read(body for _, bodies in parts for body in bodies)
        )
        started = self.tick()
        digest, step, tokens = self.train(batch, groups)
        trained = Trained(
            batch=batch, incarnation=self.start.incarnation, step=step, digest=digest, started=started,
            ended=self.tick(), tokens=tokens,
        )  # fmt: skip
        self.members.trained(self.trainer, trained, self.tick())
        self.ledger.fleet.want(self.trainer, Want(kind=Kind.TRAIN, samples=1))
        self._publish(batch + 1, digest)
        interval = self.plan.topology.trainer.save_interval
        if batch + 1 == self.plan.num_rollout or (interval and (batch + 1) % interval == 0):
            path = self.save(batch + 1)
            saved = Saved(
                rollout_step=batch + 1, incarnation=self.start.incarnation, path=str(path), step=step
            )
            self.members.saved(self.trainer, saved, self.tick())
        return True

    def round(self) -> None:
        """Everybody does one thing."""
        while self.commit():
            pass
        for generator in list(self.generators.values()):
            self.turn(generator)
        while self.commit():
            pass
        self.train_one()

    def play(self, *, rounds: int = 200) -> Desk:
        """To the end of the run, or so many rounds."""
        for _ in range(rounds):
            self.round()
            while self.commit():
                pass
            if self.ledger.finished:
                break
        return self


def fake_train(batch: int, groups: list[list[Sample]]) -> tuple[str, int, int]:
    """A digest that depends on the tokens, and one optimizer step a batch."""
    hasher = xxhash.xxh3_128(b"%d" % batch)
    for group in groups:
        for sample in group:
            hasher.update(sample.tokens)
    return hasher.hexdigest(), batch + 1, sum(sample.num_tokens for group in groups for sample in group)


def played(run_dir: Path, **options: Any) -> Path:
    """A run with lag, partials, a killed generator, a restarted trainer, refused groups, an evaluation."""
    names = ("num_rollout", "batch_size", "num_samples", "max_staleness", "rollout", "trainer", "model")
    plan_options = {name: options.pop(name) for name in names if name in options}
    plan_options.setdefault(
        "rollout", 'dynamic_sampling_filter_path = "plugins.filters:keep"\npartial_rollout = true'
    )
    plan = make_plan(evals=True, **plan_options)
    desk = Desk(run_dir, plan, keep=lambda group_id: group_id % 5 != 4, **options)
    desk.play(rounds=4)
    desk.kill("generator-0")
    desk.play(rounds=3)
    desk.hand_back("generator-1")
    desk.play(rounds=3)
    desk.start_trainer()
    desk.play()
    desk.close()
    return run_dir
