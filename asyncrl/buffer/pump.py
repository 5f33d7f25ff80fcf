"""Gives out whatever work is possible now: prompts wanted, leases, batches, versions, the end.

Runs after every bundle of events. It reads and moves the ledger's state and never waits.
"""

from __future__ import annotations

import heapq

from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.queues import waits_for_group_score
from asyncrl.buffer.states import READY, SCORED, GroupRecord, SampleRecord, WorkerRecord, parts_of, size_of
from asyncrl.messages.control import Finish, Kind, Lease, Leases, Need, NewVersion, Retire
from asyncrl.messages.sample import Lane, Settled


class Pump:
    """See the module's docstring."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._source: WorkerRecord | None = None
        """Whom the needs below were told; another hello, and they have to be told again."""
        self._asked_for = 0
        """Groups of the lane train asked for, counted like `Ledger.num_prompts`."""
        self._asked_evaluation = (-1, -1)
        self._told_end: WorkerRecord | None = None
        """The trainer that knows that the data have ended."""
        self._closed: set[int] = set()
        """Versions under which no fresh group may be issued any more in this round."""
        self._find = {
            Kind.GENERATE: self._generate, Kind.SCORE: self._score, Kind.FILTER: self._filter,
        }  # fmt: skip

    def run(self, now: float) -> None:
        """One round; see the module's docstring."""
        ledger = self.ledger
        if ledger.finished or ledger.failure:
            return
        self._announce(now)
        self._cut(now)
        self._ask_for_prompts()
        if not ledger.draining:
            self._lease(now)
        self._end(now)

    # Prompts.

    def _ask_for_prompts(self) -> None:
        ledger = self.ledger
        source = ledger.fleet.only("source")
        if source is None or ledger.draining:
            return
        if source is not self._source:
            self._source, self._asked_for, self._asked_evaluation = source, ledger.num_prompts, (-1, -1)
        evaluation = ledger.versions.evaluation
        if evaluation is not None and not evaluation.issued and self._asked_evaluation != evaluation.key:
            self._asked_evaluation = evaluation.key
            ledger.book.send(source.peer, Need(lane=Lane.EVAL, version=evaluation.version))
        missing = self._missing_prompts()
        if missing > 0:
            self._asked_for = max(self._asked_for, ledger.num_prompts) + missing
            ledger.book.send(source.peer, Need(lane=Lane.TRAIN, groups=missing))

    def _missing_prompts(self) -> int:
        ledger, batches = self.ledger, self.ledger.batches
        if ledger.source_ended:
            return 0
        on_the_way = max(0, self._asked_for - ledger.num_prompts)
        at_hand = len(ledger.queues.fresh) + on_the_way
        lead = ledger.config.prompt_lead or batches.batch_size
        wanted = max(0, batches.tickets - batches.outstanding) + lead
        if batches.target is not None:
            left = (batches.target - batches.next_batch) * batches.batch_size - batches.dues.total()
            wanted = min(wanted, left + batches.surplus)
        shortage = wanted - at_hand
        # Asked for in handfuls: a message for every settled group would be a message for every few samples.
        return shortage if shortage >= max(1, min(lead // 4, wanted)) else 0

    # Leases.

    def _lease(self, now: float) -> None:
        self._closed.clear()
        waiting = self._waiting_kinds()
        able = [worker for worker in self.ledger.fleet.workers.values() if _has_room(worker, waiting)]
        # Whoever holds least is served first, so that two workers with room for all share the work.
        for worker in sorted(able, key=lambda w: len(w.leases)):
            leases: list[Lease] = []
            bodies: list[int] = []
            for kind in waiting:
                self._lease_kind(worker, kind, leases, bodies, now)
            if leases:
                self.ledger.book.send(worker.peer, Leases(leases=leases), bodies)

    def _waiting_kinds(self) -> list[Kind]:
        """Kinds of work of which there may be some to give out."""
        queues = self.ledger.queues
        generate = queues.partial or queues.evaluation or (queues.fresh and self.ledger.batches.has_ticket)
        score = queues.to_score or queues.to_score_groups
        found = ((Kind.GENERATE, generate), (Kind.SCORE, score), (Kind.FILTER, queues.to_filter))
        return [kind for kind, there_is in found if there_is]

    def _lease_kind(
        self, worker: WorkerRecord, kind: Kind, leases: list[Lease], bodies: list[int], now: float
    ) -> None:
        """Add what there is of one kind of work, as far as the worker's credit goes."""
        find = self._find[kind]
        while worker.credit.get(kind, 0) > 0 and not worker.alone:
            found = find(worker, now)
            if found is None:
                return
            leases.append(found[0])
            bodies += found[1]

    def _generate(self, worker: WorkerRecord, now: float) -> tuple[Lease, list[int]] | None:
        if self.ledger.low_on_disk or worker.version < 0:
            return None
        return self._evaluation(worker, now) or self._partial(worker, now) or self._fresh(worker, now)

    def _evaluation(self, worker: WorkerRecord, now: float) -> tuple[Lease, list[int]] | None:
        ledger = self.ledger
        evaluation = ledger.versions.evaluation
        served = (worker.version, worker.version_incarnation)
        if evaluation is None or evaluation.key != served:
            return None
        share = max(1, int(worker.capacity * ledger.config.eval_share))
        if worker.eval_held >= share and (ledger.queues.fresh or ledger.queues.partial):
            return None
        return self._waiting(worker, ledger.queues.evaluation, now)

    def _partial(self, worker: WorkerRecord, now: float) -> tuple[Lease, list[int]] | None:
        return self._waiting(worker, self.ledger.queues.partial, now)

    def _waiting(
        self, worker: WorkerRecord, heap: list[tuple[int, int]], now: float
    ) -> tuple[Lease, list[int]] | None:
        """The first sample of a heap that this worker may take."""
        if not heap:
            return None
        ledger = self.ledger
        skipped = []
        granted = None
        while granted is None:
            found = ledger.queues.peek(heap, ledger.book.groups)
            if found is None:
                break
            group, sample = found
            if worker.version >= group.version and self._may_take(worker, sample):
                granted = self._grant(worker, Kind.GENERATE, group, [sample.index], now)
                if granted is None:
                    break
            else:
                skipped.append(heapq.heappop(heap))
        for entry in skipped:
            heapq.heappush(heap, entry)
        return granted

    def _may_take(self, worker: WorkerRecord, sample: SampleRecord) -> bool:
        """A suspect (its next failure fails the group) is leased alone, to a worker that holds nothing."""
        return not self._is_suspect(sample) or not worker.leases

    def _is_suspect(self, sample: SampleRecord) -> bool:
        return 0 < self.ledger.config.max_attempts - 1 <= sample.attempts

    def _fresh(self, worker: WorkerRecord, now: float) -> tuple[Lease, list[int]] | None:
        ledger = self.ledger
        while ledger.queues.fresh and ledger.queues.fresh[0] not in ledger.book.groups:
            ledger.queues.fresh.popleft()
        if not ledger.queues.fresh or worker.version in self._closed:
            return None
        group = ledger.book.groups[ledger.queues.fresh[0]]
        published = ledger.versions.published
        newest = published is not None and worker.version >= published.version
        if not ledger.batches.may_issue(worker.version, newest=newest):
            # Leases only use tickets up: whoever else serves it need not ask again before the next round.
            self._closed.add(worker.version)
            return None
        count = len(group.samples)
        room = worker.credit[Kind.GENERATE]
        if room < count and worker.capacity >= count:
            return None  # the whole group goes to one worker, which will have room for it
        if not ledger.fleet.fits(worker, group.prompt_bytes):
            return None
        ledger.queues.fresh.popleft()
        ledger.book.seq += 1
        ledger.batches.issue(group, worker.version, ledger.book.seq)
        group.incarnation = worker.version_incarnation
        group.state = "open"
        for sample in group.samples[room:]:
            ledger.queues.return_sample(group, sample)
        return self._grant(worker, Kind.GENERATE, group, list(range(min(room, count))), now)

    def _score(self, worker: WorkerRecord, now: float) -> tuple[Lease, list[int]] | None:
        ledger = self.ledger
        group = ledger.queues.first_group(
            ledger.queues.to_score_groups, ledger.book.groups, waits_for_group_score
        )
        if group is not None:
            return self._whole_group(worker, Kind.SCORE, group, now)
        taken = ledger.queues.take_to_score(ledger.book.groups, worker.credit[Kind.SCORE])
        if taken is None:
            return None
        granted = self._grant(worker, Kind.SCORE, taken[0], taken[1], now)
        if granted is None:
            ledger.queues.to_score.extendleft((taken[0].group_id, index) for index in reversed(taken[1]))
        return granted

    def _filter(self, worker: WorkerRecord, now: float) -> tuple[Lease, list[int]] | None:
        ledger = self.ledger
        group = ledger.queues.first_group(
            ledger.queues.to_filter, ledger.book.groups, lambda g: waits_for_filter(g, ledger)
        )
        return None if group is None else self._whole_group(worker, Kind.FILTER, group, now)

    def _whole_group(
        self, worker: WorkerRecord, kind: Kind, group: GroupRecord, now: float
    ) -> tuple[Lease, list[int]] | None:
        """A job that cannot be split: it waits for room, and one larger than the worker takes all of it.

        In that case alone the credit is below zero until the worker hands the group in.
        """
        count = len(group.samples)
        if worker.credit[kind] < min(count, worker.capacity):
            return None
        return self._grant(worker, kind, group, list(range(count)), now)

    def _grant(
        self, worker: WorkerRecord, kind: Kind, group: GroupRecord, indices: list[int], now: float
    ) -> tuple[Lease, list[int]] | None:
        """Lease these samples if the worker's byte window takes them."""
        ledger = self.ledger
        num_bytes = size_of(group, indices, scored=kind is Kind.FILTER)
        if not ledger.fleet.fits(worker, num_bytes):
            return None
        parts, bodies = parts_of(group, indices, scored=kind is Kind.FILTER)
        suspect = kind is Kind.GENERATE and any(self._is_suspect(group.samples[i]) for i in indices)
        record = ledger.grant(worker, kind, group, indices, num_bytes, now)
        if suspect:
            worker.alone = record.fence
        if group.lane is Lane.EVAL and kind is Kind.GENERATE:
            worker.eval_held += len(indices)
        return Lease(fence=record.fence, kind=kind, parts=parts, version=group.version), bodies

    # Batches.

    def _cut(self, now: float) -> None:
        ledger = self.ledger
        trainer = ledger.fleet.only("trainer")
        if trainer is None or ledger.draining:
            return
        while trainer.credit.get(Kind.TRAIN, 0) > 0:
            if ledger.batches.on_delivery < ledger.batches.next_batch:
                batch: int | None = ledger.batches.on_delivery
            else:
                batch = self._next_batch(now)
            if batch is None:
                return
            trainer.credit[Kind.TRAIN] -= 1
            ledger.batches.on_delivery = batch + 1
            ledger.book.deliver(trainer.peer, batch)

    def _next_batch(self, now: float) -> int | None:
        ledger, batches = self.ledger, self.ledger.batches
        size = self._batch_size()
        chosen = batches.choose(size)
        if chosen is None and batches.on_straggler == "drop":
            self._drop_overdue(now)
            chosen = batches.choose(size)
        if not chosen:
            return None
        ledger.book.seq += 1
        groups = [ledger.book.groups[group_id] for group_id in chosen]
        batch = batches.record(groups)
        record = batches.records[batch]
        for position, group in enumerate(groups):
            ledger.book.batch(group, batch)
            ledger.lengths.batched([sample.tokens for sample in group.samples])
            ledger.book.row("batch_group", batch, position, group.group_id)
        ledger.lengths.cut()
        ledger.book.row("batch", batch, record.groups, record.samples, record.tokens, ledger.book.seq, now)
        return batch

    def _batch_size(self) -> int:
        """B, or what is left when the data have ended and a smaller last batch is wanted."""
        ledger, batches = self.ledger, self.ledger.batches
        left = batches.dues.total()
        if not (ledger.source_ended and not ledger.queues.fresh and left < batches.batch_size):
            return batches.batch_size
        if ledger.config.allow_partial_train_step and left == len(batches.ready):
            return left
        return batches.batch_size

    def _drop_overdue(self, now: float) -> None:
        ledger, batches = self.ledger, self.ledger.batches
        while (due := batches.overdue()) is not None:
            late = [g for g in ledger.book.groups.values() if 0 <= g.due <= due]
            late.sort(key=lambda g: (g.group_id in batches.ready, g.due, g.group_id))
            ledger.settle_stale(late[0], now)

    # Versions and the end.

    def _announce(self, now: float) -> None:
        ledger, versions = self.ledger, self.ledger.versions
        generators = ledger.fleet.with_role("generator")
        if versions.evaluation_is_lost({(w.version, w.version_incarnation) for w in generators}):
            ledger.abandon_evaluation(now)
        manifest = versions.announce()
        if manifest is not None:
            for worker in generators:
                ledger.book.send(worker.peer, NewVersion(manifest=manifest))
            trainer = ledger.fleet.only("trainer")
            if trainer is not None:
                ledger.book.send(trainer.peer, Retire(below=manifest.version))
        if ledger.draining:
            return
        evaluation = versions.start_evaluation(ledger.batches.target)
        if evaluation is not None:
            ledger.book.row("evaluation", evaluation.version, evaluation.incarnation, now)

    def _end(self, now: float) -> None:
        ledger, batches = self.ledger, self.ledger.batches
        if batches.target is None or batches.next_batch < batches.target:
            self._notice_exhaustion()
        if batches.target is None or batches.num_trained < batches.target:
            return
        self._tell_trainer_the_end()
        if ledger.saved < batches.target or not ledger.versions.finished(batches.target):
            return
        ledger.settle_all(Settled.UNNEEDED, now, "left over when the run ended")
        ledger.finished = True
        self._tell_everyone(Finish(reason=f"all {batches.target} rollout steps are trained"))

    def _notice_exhaustion(self) -> None:
        """The data have ended and what is left cannot fill a batch: the run ends earlier than planned."""
        ledger, batches = self.ledger, self.ledger.batches
        if not ledger.source_ended or ledger.queues.fresh or batches.dues.total() >= batches.batch_size:
            return
        if ledger.config.allow_partial_train_step and batches.dues.total():
            return
        batches.target = batches.next_batch
        ledger.book.row("meta", "target", batches.target)

    def _tell_trainer_the_end(self) -> None:
        """To a trainer that expects more steps than the data allow; after the last one, lest it skip some."""
        ledger = self.ledger
        trainer = ledger.fleet.only("trainer")
        if ledger.batches.target == ledger.config.num_rollout or ledger.draining:
            return
        if trainer is not None and trainer is not self._told_end:
            self._told_end = trainer
            ledger.book.send(trainer.peer, Finish(reason="the data have ended", done=False))

    def _tell_everyone(self, message: Finish) -> None:
        for worker in self.ledger.fleet.workers.values():
            self.ledger.book.send(worker.peer, message)


def _has_room(worker: WorkerRecord, kinds: list[Kind]) -> bool:
    """Whether it may be given work of one of these kinds."""
    return not worker.alone and any(worker.credit.get(kind, 0) > 0 for kind in kinds)


def waits_for_filter(group: GroupRecord, ledger: Ledger) -> bool:
    """Every sample is scored, and neither has a filter said yes nor is one at work."""
    at_work = group.fence in ledger.fleet.leases
    return group.state != READY and not at_work and all(s.state == SCORED for s in group.samples)
