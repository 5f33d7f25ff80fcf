"""The promises, checked from outside the ledger: what it says, what it commits, and what reaches the actors.

Every event: tickets, the staleness rule over due dates, credit of the worker that spoke. Every message that
leaves: fences, one holder of each fence, versions never going back, tokens never shorter than acknowledged.
Every commit: each group settles once, is in one batch, each training follows the one before in its lineage.
Every trained batch: whole answers, each sample once, no token older than the bound, recomputed from the
bodies. Every `check_every` events: everything else (`full`). A check never changes what it looks at.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import xxhash

from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.states import FRESH, GENERATED, GENERATING, READY, SCORED, SCORING, Transaction
from asyncrl.messages import control
from asyncrl.messages.control import Kind
from asyncrl.messages.sample import Lane, Settled
from asyncrl.messages.version import Manifest
from asyncrl.sim.bodies import Answer, InvariantError
from asyncrl.sim.scenario import Scenario

REASON, BATCH, NUM_SAMPLES, VERSION, INCARNATION = 5, 9, 3, 6, 7
"""Columns of a group's row."""

REMEMBERED = 100_000
"""Newest leases of which the holder is remembered: one may be told again long after it was given."""


def require(holds: bool, invariant: str, detail: str) -> None:
    """Raise InvariantError unless it holds. Frequent checks build their text only when they fail."""
    if not holds:
        raise InvariantError(invariant, detail)


class Checks:
    """See the module's docstring."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.bounded = scenario.on_straggler != "train"
        self._newest: dict[tuple[Kind, int, int], int] = {}
        """Newest fence of each live sample by kind of work."""
        self._holder: dict[int, bytes] = {}
        self._acked: dict[tuple[int, int], int] = {}
        """Tokens acknowledged of each live sample."""
        self._settled: dict[int, str] = {}
        self._batch_of: dict[int, int] = {}
        self._pieces: dict[tuple[int, int], bytes] = {}
        """Digest of every piece of a batch as first delivered."""
        self._next_train = 0
        self._saved = 0
        self._incarnation = 0
        self._trainer_life = 0
        self._published = -1
        self._trained_by: dict[int, int] = {}
        self.trained_samples = 0
        """In the surviving lineage."""
        self._samples_in: Counter[int] = Counter()
        self._groups_in: Counter[int] = Counter()
        self.evaluated_samples = 0
        self._evaluations: Counter[tuple[int, int]] = Counter()
        """(version, incarnation) -> groups that were evaluated."""
        self.retrained = 0
        """Trainings that a restart of the trainer undid."""
        self.max_staleness = 0
        self.staleness: Counter[int] = Counter()
        """Samples trained by the age of their oldest token."""

    # The ledger's counts.

    def event(self, ledger: Ledger) -> None:
        """After every event at the desk."""
        batches = ledger.batches
        if batches.outstanding > batches.tickets:
            detail = f"{batches.outstanding} groups are outstanding with {batches.tickets} tickets"
            raise InvariantError("tickets bound what is outstanding", detail)
        if self.scenario.on_straggler == "wait":
            due_so_far = 0
            for due in sorted(batches.dues):
                due_so_far += batches.dues[due]
                if due_so_far > max(0, due + 1 - batches.next_batch) * batches.batch_size:
                    raise InvariantError(
                        "every outstanding group can still be trained in time",
                        f"{due_so_far} groups are due by batch {due}, next is {batches.next_batch}",
                    )

    def leases(self, ledger: Ledger, transaction: Transaction) -> None:
        """Work is given out: nothing that was not asked for."""
        if self.scenario.group_rm:
            return  # a whole group may overdraw a worker's credit, by design
        whole = self.scenario.group_size > self.scenario.reward_batch  # such a group may overdraw, by design
        granted = {values[1:4] for name, values in transaction.rows if name == "lease"}
        for kind, name, incarnation in granted:
            worker = ledger.fleet.find(name, incarnation)
            credit = 0 if worker is None else worker.credit.get(Kind(kind), 0)
            if credit < 0 and not (whole and kind == Kind.FILTER):
                raise InvariantError("credits are never exceeded", f"{name} has {credit} of {kind}")

    def holds(self, name: str, held: int, capacity: int) -> None:
        """A generator took leases in."""
        if held > capacity:
            raise InvariantError("credits are never exceeded", f"{name} holds {held}, it has {capacity}")

    # What leaves the desk.

    def sends(self, peer: bytes, message: Any) -> None:
        """A message leaves."""
        match message:
            case control.Leases():
                for lease in message.leases:
                    self._lease(peer, lease)
            case control.Acks():
                for ack in message.acks:
                    self._ack(ack)

    def _lease(self, peer: bytes, lease: control.Lease) -> None:
        holder = self._holder.get(lease.fence)
        if holder is not None:
            if holder != peer:
                raise InvariantError(
                    "a fence has one holder", f"{lease.fence} of {holder!r} goes to {peer!r}"
                )
            return
        self._holder[lease.fence] = peer
        if len(self._holder) > REMEMBERED:
            del self._holder[next(iter(self._holder))]
        for index in lease.parts.indices:
            sample = (lease.kind, lease.parts.group_id, index)
            if lease.fence <= self._newest.get(sample, 0):
                raise InvariantError("fences increase", f"{sample} is leased under {lease.fence}")
            self._newest[sample] = lease.fence

    def _ack(self, ack: control.Ack) -> None:
        if not ack.accepted or ack.index < 0:
            return
        newest = self._newest.get((Kind.GENERATE, ack.group_id, ack.index), 0)
        if not self.scenario.group_rm:  # there a scored sample is told once more with the rest of its group
            newest = max(newest, self._newest.get((Kind.SCORE, ack.group_id, ack.index), 0))
        if ack.fence < newest:
            detail = f"group {ack.group_id} sample {ack.index}: {ack.fence} was accepted after {newest}"
            raise InvariantError("a result under an old fence is refused", detail)

    # What reaches the actors.

    def leased(self, lease: control.Lease, answer: Answer, name: str) -> None:
        """A generator gets a sample: with all tokens that anybody was told are safe."""
        if self._newest.get((Kind.GENERATE, lease.parts.group_id, answer.index)) != lease.fence:
            return  # withdrawn long ago, and read only now by a worker that stood still
        acked = self._acked.get((lease.parts.group_id, answer.index), 0)
        if self.scenario.partial_rollout and answer.num_tokens < acked:
            raise InvariantError(
                "acknowledged tokens are never lost",
                f"group {lease.parts.group_id} sample {answer.index} comes to {name} with "
                f"{answer.num_tokens} of {acked} tokens",
            )

    def acknowledged(self, group_id: int, index: int, tokens: int) -> None:
        """A generator was told that so many tokens are safe."""
        if group_id not in self._settled and group_id not in self._batch_of:
            self._acked[(group_id, index)] = tokens

    def announced(self, name: str, serves: tuple[int, int], manifest: Manifest) -> None:
        """A generator is told to serve a version."""
        if manifest.version < serves[0]:
            detail = f"{name} serves v{serves[0]}.{serves[1]} and is told {manifest.name}"
            raise InvariantError("the published step never goes back", detail)

    def delivered(self, part: control.BatchPart, frames: list[bytes]) -> None:
        """A piece of a batch reaches the trainer: the first time or once more, it is the same."""
        hasher = xxhash.xxh3_128(repr(part.groups).encode())
        for frame in frames:
            hasher.update(frame)
        digest = hasher.digest()
        key = (part.batch, part.part)
        if self._pieces.setdefault(key, digest) != digest:
            raise InvariantError("batches are never formed differently", f"piece {key} has changed")

    def trains(self, incarnation: int, batch: int, groups: list[tuple[int, list[Answer]]]) -> None:
        """A life of the trainer has trained a batch."""
        if len(groups) != self._groups_in[batch]:
            detail = f"batch {batch} was recorded with {self._groups_in[batch]} groups, {len(groups)} came"
            raise InvariantError("batches are trained whole", detail)
        seen: set[int] = set()
        for group_id, answers in groups:
            if group_id in seen or self._batch_of.get(group_id) != batch:
                detail = f"group {group_id} in batch {batch}, recorded in {self._batch_of.get(group_id)}"
                raise InvariantError("no sample is trained twice", detail)
            seen.add(group_id)
            if [answer.index for answer in answers] != list(range(self.scenario.group_size)):
                raise InvariantError("groups are trained whole", f"group {group_id}: {answers}")
            for answer in answers:
                age = batch - answer.oldest
                if answer.num_tokens <= 0 or (self.bounded and age > self.scenario.max_staleness):
                    raise InvariantError(
                        "no token is older than the bound",
                        f"group {group_id} sample {answer.index} in batch {batch}: {answer}, incarnation "
                        f"{incarnation}",
                    )
                self.staleness[age] += 1

    def evaluated(self, groups: list[tuple[int, list[Answer]]], key: tuple[int, int]) -> None:
        """A finished evaluation, or one that was seen before."""
        whole = self._evaluations[key]
        if len(groups) != whole:
            raise InvariantError("evaluations are whole", f"{len(groups)} of {whole} groups of {key}")
        for group_id, answers in groups:
            for answer in answers:
                if answer.versions != {key}:
                    detail = f"{group_id}: {answer}, not {key}"
                    raise InvariantError("an evaluation never mixes versions", detail)
                self.evaluated_samples += 1

    # What is committed.

    def committed(self, transaction: Transaction) -> None:
        """A transaction is on disk."""
        for body in transaction.bodies:
            holder = self._holder.get(body.fence)
            if holder is not None and holder.partition(b".")[0] != body.worker.encode():
                detail = f"group {body.group_id} sample {body.index}: {body.worker}, under {holder!r}'s fence"
                raise InvariantError("a result under an old fence is refused", detail)
        for row in transaction.groups:
            if row[REASON] is not None:
                self._settle(row[0], row[REASON])
                if row[REASON] == Settled.EVALUATED:
                    self._evaluations[(row[VERSION], row[INCARNATION])] += 1
            elif row[BATCH] >= 0:
                before = self._batch_of.setdefault(row[0], row[BATCH])
                if before != row[BATCH]:
                    raise InvariantError("a group is in one batch", f"{row[0]} in {before} and {row[BATCH]}")
                self._samples_in[row[BATCH]] += row[NUM_SAMPLES]
                self._groups_in[row[BATCH]] += 1
                self._forget(row[0], row[NUM_SAMPLES])
        for name, values in transaction.rows:
            if name == "trained":
                self._trained(values[0], values[1])
            elif name == "incarnation":
                self._trainer_starts(values[0], values[1], values[3])
            elif name == "checkpoint":
                self._saved = max(self._saved, values[0])
                require(values[0] <= self._next_train, "a checkpoint is trained", f"{values}")
            elif name == "version":
                self._version(values[0], values[1])

    def _settle(self, group_id: int, reason: str) -> None:
        if group_id in self._settled or group_id in self._batch_of:
            before = self._settled.get(group_id, "batched")
            raise InvariantError("each group settles exactly once", f"{group_id}: {before}, then {reason}")
        self._settled[group_id] = reason
        self._forget(group_id, self.scenario.group_size)

    def _forget(self, group_id: int, samples: int) -> None:
        for index in range(samples):
            self._acked.pop((group_id, index), None)
            for kind in (Kind.GENERATE, Kind.SCORE, Kind.FILTER):
                self._newest.pop((kind, group_id, index), None)

    def _trained(self, batch: int, incarnation: int) -> None:
        if batch != self._next_train or incarnation != self._incarnation:
            detail = f"batch {batch} by {incarnation}, due {self._next_train} by {self._incarnation}"
            raise InvariantError("each batch is trained once in a lineage", detail)
        self._next_train += 1
        self.trained_samples += self._samples_in[batch]

    def _trainer_starts(self, incarnation: int, process: str, step: int) -> None:
        life = int(process.removeprefix("life"))
        require(life > self._trainer_life, "a replaced life stays out", f"trainer {process}")
        self._trainer_life = life
        require(step == self._saved, "a trainer starts at its newest checkpoint", f"{step}, {self._saved}")
        require(incarnation > self._incarnation, "lives of the trainer are counted", f"{incarnation}")
        self._incarnation = incarnation
        self.retrained += self._next_train - step
        self.trained_samples -= sum(self._samples_in[b] for b in range(step, self._next_train))
        self._next_train = step

    def _version(self, version: int, incarnation: int) -> None:
        if version < self._published:
            detail = f"v{version}.{incarnation} after v{self._published}"
            raise InvariantError("the published step never goes back", detail)
        require(
            version <= self._next_train, "a version is trained", f"v{version} of {self._next_train} batches"
        )
        self._published = version

    # Everything.

    def full(self, ledger: Ledger) -> None:
        """Every `check_every` events: sums, places and due dates, recounted from the live groups."""
        book, batches = ledger.book, ledger.batches
        live = sum(group.tokens for group in book.groups.values())
        batched = sum(record.tokens for record in batches.records.values() if not record.trained)
        settled = sum(
            n for name, n in book.totals.items() if name.startswith("settled.") and "tokens" in name
        )
        received, again = book.totals["received.tokens"], book.totals["regenerated.tokens"]
        if received != live + batched + settled + again:
            detail = f"{received} received, {live} live, {batched} batched, {settled} settled, {again} again"
            raise InvariantError("the tokens equation", detail)
        dues = Counter(group.due for group in book.groups.values() if group.due >= 0)
        require(dues == +batches.dues, "due dates are counted", f"{dues} in groups, {batches.dues} counted")
        for group_id in book.groups:
            require(
                group_id not in self._settled and group_id not in self._batch_of,
                "each group settles exactly once",
                f"{group_id} is live again after it was {self._settled.get(group_id, 'batched')}",
            )
        self._leases(ledger)
        self._places(ledger)

    def _leases(self, ledger: Ledger) -> None:
        for fence, lease in ledger.fleet.leases.items():
            worker = ledger.fleet.find(lease.worker, lease.incarnation)
            require(
                worker is None or fence in worker.leases,
                "a lease is its worker's",
                f"{fence} of {lease.worker}",
            )
        for worker in ledger.fleet.workers.values():
            gone = worker.leases - ledger.fleet.leases.keys()
            require(not gone, "a worker's leases are leases", f"{worker.name} holds {gone}")

    def _places(self, ledger: Ledger) -> None:
        """Every sample of a live group waits in one queue or is in one live lease."""
        queues, leases = ledger.queues, ledger.fleet.leases
        leased: Counter[tuple[Kind, int, int]] = Counter()
        for lease in leases.values():
            leased.update((lease.kind, lease.group_id, index) for index in lease.remaining)
        fresh, partial, evaluation = set(queues.fresh), set(queues.partial), set(queues.evaluation)
        to_score, to_filter = set(queues.to_score), set(queues.to_filter)
        score_groups = set(queues.to_score_groups)
        for number, group in ledger.book.groups.items():
            waits = partial if group.lane is Lane.TRAIN else evaluation
            unfinished = any(s.state in {FRESH, GENERATING, SCORING} for s in group.samples)
            grouped = queues.scores_groups and (unfinished or number in score_groups)
            for sample in group.samples:
                here = (number, sample.index)
                state = sample.state
                somewhere = (
                    (state == FRESH and (here in waits or (number in fresh and group.issued_seq < 0)))
                    or (state == GENERATING and leased[(Kind.GENERATE, *here)] == 1)
                    or (state == GENERATED and (here in to_score or grouped))
                    or (state == SCORING and leased[(Kind.SCORE, *here)] == 1)
                    or state == SCORED
                )
                if not somewhere:
                    raise InvariantError("every sample is in one place", f"{here} is {state} and nowhere")
            if all(sample.state == SCORED for sample in group.samples):
                ready = group.state == READY and number in ledger.batches.ready
                judged = number in to_filter or group.fence in leases
                if ready == judged and (not ready or group.fence in leases):
                    raise InvariantError("every group is in one place", f"{number}: ready {ready}")

    def end(self, ledger: Ledger, batches: int) -> None:
        """The run has finished."""
        require(self._next_train == batches, "every batch is trained", f"{self._next_train} of {batches}")
        require(not ledger.book.groups, "every group settles", f"{sorted(ledger.book.groups)[:5]} are live")
        require(not ledger.fleet.leases, "every lease ends", f"{sorted(ledger.fleet.leases)[:5]} are open")
        unsettled = set(range(ledger.book.next_group)) - self._settled.keys() - self._batch_of.keys()
        require(not unsettled, "every group settles", f"{sorted(unsettled)[:5]} never did")
