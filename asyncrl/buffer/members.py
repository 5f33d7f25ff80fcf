"""Events about actors: they join, leave, fall silent; the trainer trains, publishes, saves."""

from __future__ import annotations

import msgspec

from asyncrl.buffer import deaths
from asyncrl.buffer.blame import Blame
from asyncrl.buffer.ledger import TICK_S, Ledger
from asyncrl.buffer.states import WorkerRecord, parts_of, size_of
from asyncrl.errors import ProtocolError
from asyncrl.messages.control import (
    Committed,
    Finish,
    Hello,
    HelloAgain,
    Kind,
    Lease,
    Leases,
    MemberLost,
    Published,
    Refused,
    Saved,
    Swapped,
    Trained,
    TrainerStart,
    Welcome,
)
from asyncrl.messages.sample import Lane, Settled

HELLOS_IN_VAIN = 16
"""How often an actor may state all it has to tell without telling what is missed."""


class Members:
    """See the module's docstring."""

    def __init__(self, ledger: Ledger, *, run_id: str, life: str = "") -> None:
        """`life` is the incarnation of the buffer's process."""
        self.ledger = ledger
        self.blame = Blame(ledger)
        self.run_id = run_id
        self.life = life
        self.incarnation = 0
        """Number of the trainer's present life."""
        self.trainer_life = ""
        """Its process's own incarnation."""
        self.trainer_start = 0
        """Rollout steps in the weights that it started with: the first version it may publish."""
        self.checkpoints: dict[int, str] = {}
        """Rollout step -> directory of the newest committed checkpoint there."""
        self.newest: dict[str, str] = {}
        """Name -> incarnation of its newest life."""
        self.past: set[tuple[str, str]] = set()
        """(name, incarnation) of lives that a newer one has replaced: whatever they say changes nothing."""
        self._missed: dict[str, tuple[tuple[str, int, int, int], int]] = {}
        """By name: where the run stood when words were missed first, and hellos said by then."""

    def live(self, name: str, incarnation: str) -> None:
        """A life begins; the one before it, if it was another, is past."""
        before = self.newest.get(name, incarnation)
        if before != incarnation:
            self.past.add((name, before))
        self.newest[name] = incarnation

    def join(self, peer: bytes, hello: Hello, now: float) -> None:
        """An actor said hello (again). One that was stopped, replaced and continued is turned away."""
        ledger = self.ledger
        if (hello.name, hello.incarnation) in self.past:
            ledger.book.send(peer, Refused(reason=f"a newer life of {hello.name} has taken its place"))
            return
        known = ledger.fleet.find(hello.name, hello.incarnation)
        if known is not None and hello.number < known.hellos:
            # A later one has overtaken it and been answered: what that conversation gave still stands.
            return
        self.live(hello.name, hello.incarnation)
        before = ledger.fleet.workers.get(peer)
        if before is not None and (before.name, before.incarnation) != (hello.name, hello.incarnation):
            self._remove(before, "its connection is somebody else's now", now, ours=True)
        for other in ledger.fleet.with_role(hello.role):
            if other.name == hello.name and other.incarnation != hello.incarnation:
                self._remove(other, "replaced", now, ours=True)
        for name, incarnation in ledger.fleet.absent(hello.name):
            if incarnation != hello.incarnation:
                self._forget((name, incarnation), "replaced", now)
        worker = ledger.fleet.join(peer, hello)
        ledger.book.row("member", hello.name, hello.incarnation, hello.role, hello.host, hello.pid, now)
        start = self._start_trainer(worker, hello, now) if hello.role == "trainer" else None
        welcome = Welcome(
            run_id=self.run_id,
            desk=self.life,
            number=hello.number,
            held=sorted(worker.leases),
            announced=ledger.versions.announced if ledger.versions.held else None,
            trainer=start,
            cursor=ledger.cursor if hello.role == "source" else b"",
            next_group=ledger.book.next_group,
        )
        ledger.book.send(peer, welcome)
        self._lease_again(worker, known=set(hello.leases))
        if ledger.finished:
            ledger.book.send(peer, Finish(reason="the run has finished"))
        for evaluation in (ledger.versions.previous, ledger.versions.evaluation):
            if (
                hello.role == "evaluator"
                and evaluation is not None
                and evaluation.done
                and not evaluation.seen
            ):
                ledger.book.deliver_evaluation(*evaluation.key)

    def _lease_again(self, worker: WorkerRecord, *, known: set[int]) -> None:
        """What it holds already and does not know of, once more, for the message was lost.

        Its new credit is all the room it has beside the leases it knows; the others are charged to it. Work
        under a fence that `Welcome.held` does not name is not its own any more.
        """
        ledger = self.ledger
        leases: list[Lease] = []
        bodies: list[int] = []
        for fence in sorted(worker.leases):
            lease = ledger.fleet.leases[fence]
            group = ledger.book.groups[lease.group_id]
            if group.lane is Lane.EVAL and lease.kind is Kind.GENERATE:
                worker.eval_held += len(lease.indices)
            if fence in known:
                continue
            indices = sorted(lease.remaining) if lease.kind is Kind.GENERATE else lease.indices
            parts, ids = parts_of(group, indices, scored=lease.kind is Kind.FILTER)
            leases.append(Lease(fence=fence, kind=lease.kind, parts=parts, version=group.version))
            bodies += ids
            worker.credit[lease.kind] = worker.credit.get(lease.kind, 0) - len(indices)
            worker.credit_bytes -= size_of(group, indices, scored=parts.scored)
        if leases:
            ledger.book.send(worker.peer, Leases(leases=leases), bodies)

    def _start_trainer(self, worker: WorkerRecord, hello: Hello, now: float) -> TrainerStart:
        ledger = self.ledger
        step = max(self.checkpoints, default=0)
        if worker.incarnation != self.trainer_life:
            self.incarnation += 1
            self.trainer_life, self.trainer_start = worker.incarnation, step
            self._rewind(step)
            row = (self.incarnation, worker.incarnation, self.checkpoints.get(step, ""), step, now)
            ledger.book.row("incarnation", *row)
            ledger.versions.trainer_left()
        else:
            ledger.versions.trainer_back(incarnation=self.incarnation, num_trained=ledger.batches.num_trained)
            step = max(step, hello.batches)
        ledger.batches.on_delivery = step
        return TrainerStart(
            incarnation=self.incarnation,
            checkpoint=self.checkpoints.get(max(self.checkpoints, default=0), ""),
            published=ledger.versions.published,
        )

    def _rewind(self, step: int) -> None:
        """Batches trained after the checkpoint are back to `batched`: their training is lost."""
        undone = self.ledger.batches.rewind(step)
        for record in undone:
            self.ledger.book.count_settled(
                Settled.TRAINED, groups=-record.groups, samples=-record.samples, tokens=-record.tokens
            )
        if undone:
            self.ledger.book.row("untrain_groups", step)
            self.ledger.book.row("untrain_samples", step)

    def leave(self, worker: WorkerRecord, reason: str, now: float) -> None:
        """It said goodbye. One that says so while it runs and holds work has not handed it back."""
        early = reason == "running" and bool(worker.leases)
        self._remove(worker, "left while it ran" if early else reason, now, ours=True, died=early)

    def expel(self, worker: WorkerRecord, reason: str, now: float) -> None:
        """It broke the protocol: nothing it holds is its own any more. No sample is to blame for that."""
        self._remove(worker, f"broke the protocol: {reason}", now, ours=True)

    def lost(self, message: MemberLost, now: float) -> None:
        """The supervisor saw it die."""
        worker = self.ledger.fleet.find(message.name, message.incarnation)
        if worker is not None:
            self._remove(worker, message.reason, now, ours=message.ours)
        elif self.ledger.fleet.absent(message.name):
            self._forget((message.name, message.incarnation), message.reason, now)

    def _forget(self, identity: tuple[str, str], reason: str, now: float) -> None:
        """Somebody from before the buffer's restart will not come back. Whose fault that is, nobody knows."""
        self.ledger.book.seq += 1
        leases = self.ledger.fleet.take_leases(identity)
        deaths.record(self.ledger, identity, leases, reason, now)
        self.ledger.release(leases, reason, now, ours=True)
        self.ledger.book.row("member_left", now, reason, *identity)

    def _remove(
        self, worker: WorkerRecord, reason: str, now: float, *, ours: bool, died: bool = True
    ) -> None:
        self.ledger.book.seq += 1
        leases = self.ledger.fleet.leave(worker)
        if died:
            identity = (worker.name, worker.incarnation)
            deaths.record(self.ledger, identity, leases, reason, now)
        self.blame.release(leases, reason, now, ours=ours)
        self.ledger.book.row("member_left", now, reason, worker.name, worker.incarnation)
        if worker.role == "trainer" and self.ledger.fleet.only("trainer") is None:
            self.ledger.versions.trainer_left()

    def tick(self, now: float) -> list[str]:
        """Remove workers that fell silent, on the clock of `Fleet.steady`; returns their names."""
        fleet = self.ledger.fleet
        silent = fleet.silent(every_s=TICK_S)
        for worker in silent:
            self._remove(worker, f"silent for {fleet.steady - worker.last_seen:.1f} s", now, ours=False)
        absent = fleet.orphaned()
        for identity in absent:
            self._forget(identity, "did not come back after the buffer's restart", now)
        return [worker.name for worker in silent] + [name for name, _ in absent]

    def ask_again(self, worker: WorkerRecord) -> None:
        """Words of its own were lost: it says hello, and then states everything anew.

        Raises ProtocolError where that has changed nothing again and again: it has not got what is missed.
        """
        published = self.ledger.versions.published
        point = (
            worker.incarnation, self.ledger.book.next_group, self.ledger.batches.num_trained,
            published.version if published else -1,
        )  # fmt: skip
        stood, hellos = self._missed.get(worker.name, (None, 0))
        if stood != point:
            self._missed[worker.name] = (point, worker.hellos)
        elif worker.hellos - hellos > HELLOS_IN_VAIN:
            raise ProtocolError(
                f"after {HELLOS_IN_VAIN} hellos it still leaves out what follows the newest here: "
                f"{point[1]} groups, {point[2]} batches trained, version {point[3]}"
            )
        self.ledger.book.send(worker.peer, HelloAgain(desk=self.life))

    # The trainer.

    def _lost_some(self, worker: WorkerRecord, steps: int, *, version: bool = False) -> bool:
        """Whether the trainer speaks of more than it has told of, so that words of its own were lost.

        It is asked for all of them again, in order, which it says after a hello.

        Args:
            worker: the trainer's present life.
            steps: batches that have to be trained before this can be true.
            version: it tells of a version, and none may be left out, except what the life before it had not
                published yet when it died: this one begins with its checkpoint.
        """
        ledger = self.ledger
        lost = steps > ledger.batches.num_trained
        if version:
            old = ledger.versions.published
            latest = 0 if old is None else old.version + ledger.config.update_weights_interval
            lost = lost or steps > max(latest, self.trainer_start)
        if lost:
            self.ask_again(worker)
        return lost

    def trained(self, worker: WorkerRecord, message: Trained, now: float) -> None:
        """A batch is trained; a repeat, or the word of a replaced trainer, changes nothing."""
        ledger = self.ledger
        if message.incarnation == self.incarnation and self._lost_some(worker, message.batch):
            return
        known = message.batch in ledger.batches.records and message.batch <= ledger.batches.num_trained
        if message.incarnation != self.incarnation or not known:
            ledger.book.totals["refused.results"] += 1
            return
        record = ledger.batches.mark_trained(message.batch)
        if record is not None:
            ledger.book.seq += 1
            ledger.book.count_settled(
                Settled.TRAINED, groups=record.groups, samples=record.samples, tokens=record.tokens
            )
            ledger.book.row("trained_groups", now, ledger.book.seq, message.batch)
            ledger.book.row("trained_samples", message.batch)
            ledger.book.row(
                "trained", message.batch, message.incarnation, message.step, message.digest, message.started,
                message.ended, message.tokens,
            )  # fmt: skip
        ledger.book.send(worker.peer, Committed(what="trained", number=message.batch))

    def published(self, worker: WorkerRecord, message: Published, now: float) -> None:
        """A version's bytes are complete; from this commit on it exists."""
        ledger, manifest = self.ledger, message.manifest
        old = ledger.versions.published
        behind = old is not None and manifest.version < old.version
        mine = worker.incarnation == self.trainer_life
        if mine and self._lost_some(worker, manifest.version, version=True):
            return
        if worker.incarnation != self.trainer_life or behind:
            ledger.book.totals["refused.results"] += 1
            return
        ledger.book.seq += 1
        ledger.versions.publish(manifest)
        ledger.batches.published = max(ledger.batches.published, manifest.version)
        ledger.book.row(
            "version", manifest.version, manifest.incarnation, manifest.step, manifest.digest,
            manifest.num_bytes, msgspec.json.encode(manifest), now,
        )  # fmt: skip
        ledger.book.send(worker.peer, Committed(what="version", number=manifest.version))

    def saved(self, worker: WorkerRecord, message: Saved, now: float) -> None:
        """A checkpoint directory is complete."""
        ledger = self.ledger
        if message.incarnation != self.incarnation:
            ledger.book.totals["refused.results"] += 1
            return
        if self._lost_some(worker, message.rollout_step):
            return
        self.checkpoints[message.rollout_step] = message.path
        ledger.saved = max(ledger.saved, message.rollout_step)
        ledger.book.row(
            "checkpoint", message.rollout_step, message.incarnation, message.step, message.path, now
        )
        ledger.book.send(worker.peer, Committed(what="checkpoint", number=message.rollout_step))

    # Generators.

    def swapped(self, worker: WorkerRecord, message: Swapped, now: float) -> None:
        """How a push went at a generator."""
        self.ledger.book.row(
            "swap", worker.name, message.version, message.incarnation, message.pause_s, message.transfer_s,
            message.aborted, message.recomputed_tokens, now,
        )  # fmt: skip

    def evaluation_seen(self, version: int, incarnation: int) -> None:
        """The evaluator has logged an evaluation."""
        for evaluation in (self.ledger.versions.previous, self.ledger.versions.evaluation):
            if evaluation is not None and evaluation.done and evaluation.key == (version, incarnation):
                evaluation.seen = True
                self.ledger.book.row("evaluation_seen", version, incarnation)
