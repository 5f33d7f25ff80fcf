"""A whole run around a `Desk`: who is here, what was promised, and what must always hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from ledger_cast import (
    GROUP_SIZE,
    Desk,
    Evaluator,
    Generator,
    Peer,
    Reward,
    Source,
    Trainer,
    check_tokens,
)

from asyncrl.buffer.config import LedgerConfig
from asyncrl.buffer.select import feasible
from asyncrl.buffer.states import FRESH, GENERATED, GENERATING, READY, SCORED, SCORING, GroupRecord
from asyncrl.messages import control
from asyncrl.messages.control import Kind
from asyncrl.messages.sample import Lane, Status, tokens_of

GENERATORS = ("gen-0", "gen-1")
REWARDS = ("reward-0",)
ROUNDS = 400
"""Rounds in which a run with willing peers has to end."""


def at_rest(group: GroupRecord) -> bool:
    """Nobody works on the group, and no sample of it waits for a generator."""
    return all(sample.state in {GENERATED, SCORED} for sample in group.samples)


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is like."""

    ledger: LedgerConfig
    prompts: int = 1000
    save_interval: int = 2
    prefetch: int = 1
    exact: bool = True
    """Whether retraining gives the same weights to the bit."""
    capacity: int = 4
    """Samples a worker holds at most."""
    window: int = 1200
    """Bytes a worker holds at most."""


class World:
    """See the module's docstring. Every method is one event; `check` holds after each of them."""

    def __init__(self, run_dir: Path, setup: Setup) -> None:
        self.setup = setup
        self.desk = Desk(run_dir, setup.ledger)
        self.peers: dict[str, Peer] = {}
        self.lives: Counter[str] = Counter()
        self.mail: list[tuple[bytes, Any, list[bytes]]] = []
        self.silent: set[str] = set()
        self.newest: dict[tuple[Kind, int, int], int] = {}
        """Newest fence of each sample, by kind of work."""
        self.fences: dict[int, str] = {}
        """Lease -> the life that it was given to."""
        self.recorded: dict[int, list[Any]] = {}
        self.old_reports: list[tuple[Any, bytes]] = []
        self.settled: dict[int, str] = {}

    # Peers.

    def join(self, name: str) -> None:
        """A (new) life of an actor says hello."""
        self.lives[name] += 1
        life, send, role = self.lives[name], self.receive, name.partition("-")[0]
        peer: Peer
        if role == "source":
            peer = Source(name, life, send, prompts=self.setup.prompts)
        elif role == "gen":
            peer = Generator(name, life, send, capacity=self.setup.capacity, window=self.setup.window)
        elif role == "reward":
            peer = Reward(name, life, send, capacity=self.setup.capacity, window=self.setup.window)
        elif role == "evaluator":
            peer = Evaluator(name, life, send)
        else:
            peer = Trainer(
                name, life, send, num_rollout=self.setup.ledger.num_rollout,
                interval=self.setup.ledger.update_weights_interval,
                save_interval=self.setup.save_interval, prefetch=self.setup.prefetch, exact=self.setup.exact,
            )  # fmt: skip
        self.peers[name] = peer
        peer.hello()

    def join_all(self) -> None:
        names = ["source", "trainer", *GENERATORS, *REWARDS]
        for name in names + ["evaluator"] * self.setup.ledger.evaluates:
            if name not in self.peers:
                self.join(name)

    def receive(self, peer: bytes, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, control.Reports):
            self.old_reports = [*self.old_reports[-20:], (message, frames[0])]
        self.desk.take(peer, message, frames)

    def die(self, name: str, *, seen: bool, ours: bool = False) -> None:
        """A process is gone; the supervisor says so, or its silence does."""
        peer = self.peers.pop(name, None)
        if peer is None:
            return
        lost = control.MemberLost(name=name, incarnation=peer.incarnation, reason="killed", ours=ours)
        if seen:
            self.desk.members.lost(lost, self.desk.now)
        else:
            self.tick(self.setup.ledger.dead_after_s + 1)

    def partition(self, name: str) -> None:
        """A peer is cut off until the desk gives it up, and then comes back in the same life."""
        peer = self.peers.get(name)
        if peer is None:
            return
        self.silent.add(name)
        self.tick(self.setup.ledger.dead_after_s + 1)
        self.silent.discard(name)
        peer.reconnect()

    def tick(self, seconds: float) -> None:
        """Time passes; whoever is not silent is heard of every half second."""
        for _ in range(int(seconds * 2) + 1):
            self.desk.now += 0.5
            self.desk.ledger.fleet.steady += 0.5
            for name, peer in self.peers.items():
                if name not in self.silent:
                    self.desk.take(peer.peer, control.Heartbeat(), [])
            self.desk.members.tick(self.desk.now)

    # The desk.

    def commit(self) -> None:
        """The desk writes and says what it may."""
        for peer, message, frames in self.desk.commit():
            self.inspect(peer, message)
            for actor in self.peers.values():
                if actor.peer == peer:
                    actor.inbox.append((message, frames))

    def crash(self, *, committed: bool, survivors: bool) -> None:
        """The desk dies, before its commit or between the commit and the messages that rest on it."""
        if committed:
            self.desk.commit()
        self.desk.restart(resumed=not survivors)
        if not survivors:
            self.peers.clear()
        for peer in list(self.peers.values()):
            peer.reconnect()

    def inspect(self, peer: bytes, message: Any) -> None:
        """What the desk says, as it leaves."""
        match message:
            case control.Leases():
                for lease in message.leases:
                    self.inspect_lease(peer, lease)
            case control.BatchPart():
                parts = self.recorded.setdefault(message.batch, [])
                told = msgspec.structs.replace(message, recorded_digest="")
                assert message.part <= len(parts), "parts come in order"
                if message.part < len(parts):
                    assert parts[message.part] == told, "a batch is delivered again exactly as before"
                else:
                    parts.append(told)

    def inspect_lease(self, peer: bytes, lease: control.Lease) -> None:
        who = peer.decode()
        if lease.fence in self.fences:
            assert self.fences[lease.fence] == who, "a fence is never given to another life"
            return
        for index in lease.parts.indices:
            sample = (lease.kind, lease.parts.group_id, index)
            assert lease.fence > self.newest.get(sample, 0), "fences increase"
            self.newest[sample] = lease.fence
        self.fences[lease.fence] = who
        worker = self.desk.ledger.fleet.workers.get(peer)
        if lease.kind is Kind.GENERATE and worker is not None:
            served = (worker.version, worker.version_incarnation)
            if lease.parts.lane is Lane.EVAL:
                assert served[0] == lease.version, "an evaluation is leased under its own version only"
            else:
                assert served[0] >= lease.version, "a partial goes to its issue version or a newer one"

    # Liveness.

    def finish(self) -> None:
        """With peers that do their work, the run ends."""
        if self.desk.ledger.draining:
            self.commit()
            self.peers.clear()
            self.desk.restart(resumed=True)
        self.desk.ledger.low_on_disk = False
        for _ in range(ROUNDS):
            self.join_all()
            self.commit()
            for peer in list(self.peers.values()):
                peer.read()
                peer.work()
            self.tick(0)
            if self.desk.ledger.finished:
                break
        assert self.desk.ledger.finished, self.story()
        self.commit()
        self.check()
        self.check_end()

    def check_end(self) -> None:
        """Everything settled once, and the surviving lineage trained every batch, each sample once."""
        db = self.desk.store.db
        assert db.execute("select count(*) from groups where reason is null").fetchone() == (0,)
        assert db.execute("select count(*) from leases where ended_at is null").fetchone() == (0,)
        target = self.desk.ledger.batches.target
        trained = db.execute(
            "select b.batch, count(*) from batches b join batch_groups using (batch) join groups g"
            " using (group_id) where g.reason = 'trained' group by 1 order by 1"
        ).fetchall()
        assert [batch for batch, _ in trained] == list(range(target or 0))
        groups = [row[0] for row in db.execute("select group_id from batch_groups")]
        assert len(groups) == len(set(groups)), "no group is in two batches"

    def story(self) -> str:
        """Where a run that does not end stands."""
        ledger = self.desk.ledger
        workers = [
            (w.name, dict(w.credit), w.credit_bytes, w.version, sorted(w.leases), w.alone)
            for w in ledger.fleet.workers.values()
        ]
        batches, versions = ledger.batches, ledger.versions
        return (
            f"not finished: {ledger.counts()}, next batch {batches.next_batch} of {batches.target}, trained "
            f"{batches.num_trained}, saved {ledger.saved}, published {versions.published}, announced "
            f"{versions.announced}, held {versions.held}, available {versions.available}, evaluation "
            f"{versions.evaluation}, failure {ledger.failure!r}, workers {workers}, dues {batches.dues}, "
            f"fresh {len(ledger.queues.fresh)}, ended {ledger.source_ended}"
        )

    # Invariants.

    def check(self) -> None:
        """What holds after every event, before and after commits."""
        ledger = self.desk.ledger
        assert ledger.batches.outstanding <= ledger.batches.tickets, "tickets bound what is outstanding"
        if ledger.config.on_straggler == "wait":
            batches = ledger.batches
            assert feasible(batches.dues, batches.next_batch, batches.batch_size), "each can be in time"
        for worker in ledger.fleet.workers.values():
            assert all(credit >= 0 for credit in worker.credit.values()), (worker.name, worker.credit)
            held = {f for f, x in ledger.fleet.leases.items() if x.worker == worker.name}
            assert worker.leases <= held
        self.check_places()
        self.check_tokens_kept()
        totals = ledger.book.totals
        live = sum(group.tokens for group in ledger.book.groups.values())
        batched = sum(r.tokens for r in ledger.batches.records.values() if not r.trained)
        settled = sum(n for name, n in totals.items() if name.startswith("settled.") and "tokens" in name)
        assert totals["received.tokens"] == live + batched + settled + totals["regenerated.tokens"]

    def check_places(self) -> None:
        """Every sample waits in one queue, or is in one live lease; every group is in one place."""
        ledger = self.desk.ledger
        queues = ledger.queues
        leased: Counter[tuple[Kind, int, int]] = Counter()
        for lease in ledger.fleet.leases.values():
            leased.update((lease.kind, lease.group_id, index) for index in lease.remaining)
        assert all(count == 1 for count in leased.values()), "no sample in two live leases"
        for group in ledger.book.groups.values():
            number = group.group_id
            for sample in group.samples:
                here = (number, sample.index)
                heap = queues.partial if group.lane is Lane.TRAIN else queues.evaluation
                waits = {
                    FRESH: here in heap or (number in queues.fresh and group.issued_seq < 0),
                    GENERATING: leased[(Kind.GENERATE, *here)] == 1,
                    GENERATED: here in queues.to_score
                    or number in queues.to_score_groups
                    or (queues.scores_groups and not at_rest(group)),
                    SCORING: leased[(Kind.SCORE, *here)] == 1,
                    SCORED: True,
                }  # fmt: skip
                assert waits[sample.state], (
                    f"group {number} sample {sample.index} is {sample.state} and nowhere"
                )
            if all(sample.state == SCORED for sample in group.samples):
                ready = group.state == READY and number in ledger.batches.ready
                at_filter = number in queues.to_filter or group.fence in ledger.fleet.leases
                assert ready or at_filter, f"group {number} is complete and nowhere"
                assert not (ready and group.fence in ledger.fleet.leases), f"group {number} is in two places"

    def check_tokens_kept(self) -> None:
        """No acknowledged token is lost (where partials are kept)."""
        groups = self.desk.ledger.book.groups
        if not self.setup.ledger.partial_rollout:
            return
        for peer in self.peers.values():
            if isinstance(peer, Generator):
                for (group_id, index), length in peer.acknowledged.items():
                    if group_id in groups:
                        assert groups[group_id].samples[index].tokens >= length

    def check_stored(self) -> None:
        """After a commit, the tables say what the ledger says; a group settles once and stays settled."""
        ledger, db = self.desk.ledger, self.desk.store.db
        rows = db.execute("select group_id, state, reason, batch from groups order by group_id").fetchall()
        assert [row[0] for row in rows] == list(range(ledger.book.next_group))
        for group_id, state, reason, batch in rows:
            live = group_id in ledger.book.groups
            assert live == (reason is None and batch < 0), (group_id, state, reason, batch)
            if reason is not None and reason != "trained":
                assert self.settled.setdefault(group_id, reason) == reason
            assert group_id not in self.settled or self.settled[group_id] == reason
        for trainer in self.peers.values():
            if isinstance(trainer, Trainer):
                self.check_trained(trainer)

    def check_trained(self, trainer: Trainer) -> None:
        """In one lineage each sample is trained once, and no token is older than the bound."""
        seen: set[tuple[int, int]] = set()
        for batch, groups in trainer.trained:
            for sample in (sample for group in groups for sample in group):
                check_tokens(sample)
                assert len(tokens_of(sample.tokens)) > 0
                assert (sample.group_id, sample.index) not in seen, "trained twice"
                seen.add((sample.group_id, sample.index))
                oldest = sample.oldest_version
                if self.setup.ledger.on_straggler == "wait":
                    assert oldest is not None
                    assert batch - oldest <= self.setup.ledger.max_staleness, "a token is too old"
            assert all(len(group) == GROUP_SIZE for group in groups)

    # Events of the state machine, chosen by small numbers.

    def generator(self, pick: int) -> Generator | None:
        found = [peer for peer in self.peers.values() if isinstance(peer, Generator)]
        return found[pick % len(found)] if found else None

    def generate(self, pick: int, action: int) -> None:
        """A generator does something with one of its samples."""
        peer = self.generator(pick)
        if peer is None:
            return
        peer.read()
        jobs = peer.free()
        if not jobs:
            peer.swap()
            return
        job = jobs[(pick // 2) % len(jobs)]
        if not peer.may_start(job):
            return
        left = job.length - job.done
        match action % 6:
            case 0:
                peer.report(job, Status.PENDING, new=min(1, left))
            case 1:
                peer.report(job, Status.COMPLETED, new=left)
            case 2:
                peer.report(job, Status.TRUNCATED, new=left)
            case 3:
                peer.report(job, Status.ABORTED, new=min(2, left))
            case 4:
                peer.report(job, Status.FAILED, new=0)
            case 5:
                peer.report(job, Status.PENDING, new=min(2, left))
                peer.repeat(job)

    def late(self, pick: int) -> None:
        """An old report comes once more, from whoever is here now."""
        peer = self.generator(pick)
        if peer is not None and self.old_reports:
            report, body = self.old_reports[pick % len(self.old_reports)]
            self.desk.take(peer.peer, report, [body])

    def judge(self, pick: int, *, good: bool) -> None:
        """The reward worker scores or judges one lease."""
        for peer in self.peers.values():
            if isinstance(peer, Reward):
                peer.read()
                if peer.jobs:
                    peer.do(sorted(peer.jobs)[pick % len(peer.jobs)], good=good)

    def act(self, name: str) -> None:
        """An actor reads what came; the trainer trains one batch."""
        peer = self.peers.get(name)
        if peer is None:
            return
        peer.read()
        if isinstance(peer, Trainer):
            peer.train()
        elif isinstance(peer, Source | Evaluator):
            peer.work()
