"""The ledger: events in, a transaction out. It owns the life of every group and sample.

It is a plain object: no await, no clock (time comes in with events), no file, and it never looks inside a
body. Each public method is one event; `pump` then gives out whatever work is possible, and `take` returns
what must be committed and what may leave after that commit.

    fresh -lease> generating -done> generated -lease> scoring -scored> scored -complete> [filtering] > ready
      ^               | abort, death: back with its tokens                               | refused      |
      +---------------+                                                                  +> filtered   batched
"""

from __future__ import annotations

from asyncrl.buffer.batches import Batches
from asyncrl.buffer.book import Book, Frame
from asyncrl.buffer.config import LedgerConfig
from asyncrl.buffer.fleet import Fleet
from asyncrl.buffer.lengths import Lengths
from asyncrl.buffer.queues import Queues
from asyncrl.buffer.states import (
    FRESH,
    GENERATED,
    GENERATING,
    READY,
    SCORED,
    SCORING,
    GroupRecord,
    LeaseRecord,
    SampleRecord,
    WorkerRecord,
)
from asyncrl.buffer.versions import Versions
from asyncrl.messages.control import Ack, Issue, Kind, Report, Scored, Verdict
from asyncrl.messages.sample import Lane, Settled, Status

TICK_S = 0.5
"""How often `tick` is called."""


class Ledger:
    """See the module's docstring."""

    def __init__(self, config: LedgerConfig) -> None:
        self.config = config
        self.book = Book()
        self.fleet = Fleet(dead_after_s=config.dead_after_s)
        self.lengths = Lengths()
        self.queues = Queues(scores_groups=config.group_rm)
        self.versions = Versions(
            evaluates=config.evaluates,
            eval_interval=config.eval_interval,
            skip_before_train=config.skip_eval_before_train,
        )
        self.batches = Batches(
            batch_size=config.batch_size,
            max_staleness=config.max_staleness,
            tickets=config.tickets,
            target=config.num_rollout,
            on_straggler=config.on_straggler,
        )
        self.saved = 0
        """Rollout step of the newest committed checkpoint."""
        self.cursor = b""
        self.source_ended = False
        self.num_prompts = 0
        """Groups of the lane train handed in since this ledger was made."""
        self.draining = False
        self.low_on_disk = False
        self.failure = ""
        """Not empty: the run cannot go on, and why."""
        self.finished = False

    # Prompts.

    def issue(self, message: Issue, frames: list[Frame], now: float) -> None:
        """The source handed in prompts; a repeat (its first ordinal is not the next free one) is ignored."""
        if message.first_group != self.book.next_group or self.finished:
            return
        self.book.seq += 1
        for issued, frame in zip(message.prompts, frames, strict=True):
            group = self.book.add_group(message.lane, issued, frame, now)
            if message.lane is Lane.TRAIN:
                self.queues.fresh.append(group.group_id)
            else:
                self._add_to_evaluation(group, message.version, now)
        if message.lane is Lane.TRAIN:
            self.num_prompts += len(message.prompts)
            self.cursor = message.cursor
            self.source_ended = message.ended
            self.book.row("meta", "cursor", message.cursor)
            self.book.row("meta", "source_ended", int(message.ended))
        elif message.ended:
            self._evaluation_issued(message.version, now)

    def _add_to_evaluation(self, group: GroupRecord, version: int, now: float) -> None:
        evaluation = self.versions.evaluation
        group.issued_seq = self.book.seq
        if evaluation is None or evaluation.issued or evaluation.version != version:
            # Asked for twice, or for an evaluation that was given up: the ordinals are used all the same.
            self.book.settle(group, Settled.UNNEEDED, now, f"no evaluation of version {version} waits for it")
            return
        group.version, group.incarnation = version, evaluation.incarnation
        evaluation.open_groups += 1
        self.queues.return_group(group)

    def _evaluation_issued(self, version: int, now: float) -> None:
        evaluation = self.versions.evaluation
        if evaluation is not None and evaluation.version == version and not evaluation.done:
            evaluation.issued = True
            self._maybe_end_evaluation(now)

    # Results of generators.

    def report(self, worker: WorkerRecord, report: Report, frame: Frame | None, now: float) -> None:
        """Tokens of one sample and how it stands; see `Report`."""
        group, sample = self._find(report.group_id, report.index)
        if group is None or sample is None or sample.fence != report.fence:
            self._refuse(worker, report, 0, "the lease is not valid any more")
            return
        committed = report.offset + report.num_tokens <= sample.tokens
        if committed and (sample.state != GENERATING or report.num_tokens):
            self._accept(worker, report, sample)
            return
        if sample.state != GENERATING or report.offset != sample.tokens:
            reason = f"offset {report.offset} is not the committed length {sample.tokens}"
            self._refuse(worker, report, sample.tokens, reason)
            return
        self.book.seq += 1
        lease = self.fleet.leases[report.fence]
        if report.num_tokens and frame is not None:
            self.book.add_tokens(group, sample, report, worker.name, frame)
            lease.progressed = True
        self._advance(group, sample, lease, report, now)
        self._accept(worker, report, sample)

    def _advance(
        self, group: GroupRecord, sample: SampleRecord, lease: LeaseRecord, report: Report, now: float
    ) -> None:
        if report.status is Status.PENDING:
            return
        self.book.touch(group, sample)
        self._end_part(lease, sample.index, str(report.status), now)
        if report.status in {Status.COMPLETED, Status.TRUNCATED}:
            sample.state, sample.status, sample.attempts = GENERATED, report.status, 0
            self.queues.generated(group, sample)
        elif report.status is Status.ABORTED:
            self._give_back(group, sample)
        else:
            self._failed_attempt(group, sample, lease, report.reason or "generation failed", now)

    def _give_back(self, group: GroupRecord, sample: SampleRecord) -> None:
        sample.state = FRESH
        if not self._keeps_tokens(group):
            self.book.discard_tokens(group, sample)
        self.queues.return_sample(group, sample)
        self.book.touch(group, sample)

    def _keeps_tokens(self, group: GroupRecord) -> bool:
        return self.config.partial_rollout and group.lane is Lane.TRAIN

    def _failed_attempt(
        self, group: GroupRecord, sample: SampleRecord, lease: LeaseRecord, reason: str, now: float
    ) -> None:
        """An attempt ended without a result: the sample goes back, or its group fails."""
        progressed = lease.progressed and self._keeps_tokens(group)
        sample.attempts += not (progressed or lease.excused)
        if sample.attempts >= self.config.max_attempts:
            tried = f"{sample.attempts} attempts at {lease.kind} failed"
            self._fail(group, now, f"sample {sample.index}: {tried}; the last: {reason}")
        elif lease.kind is Kind.GENERATE:
            self._give_back(group, sample)
        else:
            sample.state = GENERATED
            self.queues.generated(group, sample)
            self.book.touch(group, sample)

    def _accept(self, worker: WorkerRecord, report: Report, sample: SampleRecord) -> None:
        last = sample.state != GENERATING
        # An answer that is handed back and not kept has no tokens any more.
        offset = report.offset + report.num_tokens if last else sample.tokens
        ack = Ack(report.fence, report.group_id, report.index, offset, accepted=True, last=last)
        self.book.acknowledge(worker.peer, ack)

    def _refuse(self, worker: WorkerRecord, report: Report, offset: int, reason: str) -> None:
        self.book.totals["refused.results"] += 1
        ack = Ack(report.fence, report.group_id, report.index, offset, accepted=False, reason=reason)
        self.book.acknowledge(worker.peer, ack)

    # Results of reward workers.

    def score(self, worker: WorkerRecord, scored: Scored, frame: Frame | None, now: float) -> None:
        """A score, or the named failure of one."""
        group, sample = self._find(scored.group_id, scored.index)
        valid = group is not None and sample is not None and sample.fence == scored.fence
        if group is None or sample is None or not valid:
            self.book.totals["refused.results"] += 1
        elif sample.state == SCORING:
            self.book.seq += 1
            lease = self.fleet.leases[scored.fence]
            self._end_part(lease, sample.index, "failed" if scored.error else "scored", now)
            if scored.error or frame is None:
                self._failed_attempt(group, sample, lease, scored.error or "no score came", now)
            else:
                sample.state, sample.reward, sample.attempts = SCORED, scored.reward, 0
                sample.removed = scored.remove_sample
                self.book.add_score(group, sample, scored.fence, worker.name, frame)
                self._maybe_complete(group, now)
        ack = Ack(scored.fence, scored.group_id, scored.index, 0, valid, "" if valid else "the lease ended")
        self.book.acknowledge(worker.peer, ack)

    def _maybe_complete(self, group: GroupRecord, now: float) -> None:
        if any(sample.state != SCORED for sample in group.samples):
            self.queues.maybe_score_group(group)
            return
        if group.lane is Lane.EVAL:
            self._settle(group, Settled.EVALUATED, now)
        elif self.config.filters:
            self.queues.to_filter.append(group.group_id)
        else:
            self._ready(group)

    def _ready(self, group: GroupRecord) -> None:
        group.state = READY
        self.batches.complete(group)
        self.book.touch(group)

    def verdict(self, worker: WorkerRecord, verdict: Verdict, now: float) -> None:
        """What the filters say of a complete group."""
        group = self.book.groups.get(verdict.group_id)
        valid = group is not None and group.fence == verdict.fence and verdict.fence in self.fleet.leases
        if group is None or not valid:
            self.book.totals["refused.results"] += 1
        else:
            self.book.seq += 1
            lease = self.fleet.leases[verdict.fence]
            self.end_lease(lease, "failed" if verdict.error else "judged", now)
            self._judge(group, verdict, now)
        ack = Ack(verdict.fence, verdict.group_id, -1, 0, valid, "" if valid else "the lease ended")
        self.book.acknowledge(worker.peer, ack)

    def _judge(self, group: GroupRecord, verdict: Verdict, now: float) -> None:
        group.fence = 0
        if verdict.error:
            self._fail(group, now, f"filter: {verdict.error}")
        elif verdict.keep:
            for index in verdict.removed:
                group.samples[index].removed = True
            self.book.touch(group, *group.samples)
            self._ready(group)
        else:
            self._settle(group, Settled.FILTERED, now, verdict.reason)
            self._count_refusal(verdict.reason)

    def _fail(self, group: GroupRecord, now: float, note: str) -> None:
        self._settle(group, Settled.FAILED, now, note)
        if group.lane is Lane.TRAIN:
            self._count_refusal(note)

    def _count_refusal(self, reason: str) -> None:
        """Groups that no batch will ever have: too many in a row, and the run would go round for ever."""
        self.batches.refused += 1
        # Verdicts may still arrive before the run ends: the first one over the limit is the one to report.
        if self.batches.refused > self.config.max_refused_per_step and not self.failure:
            self.failure = (
                f"{self.batches.refused} groups in a row were refused by the filters or failed without a "
                f"batch being cut (rollout.max_refused_per_step = {self.config.max_refused_per_step}); the "
                f"last reason: {reason or 'none given'}. The prompts may all be too easy or too hard for "
                "this model, the filter too strict, or the reward broken."
            )

    # Leases.

    def grant(
        self,
        worker: WorkerRecord,
        kind: Kind,
        group: GroupRecord,
        indices: list[int],
        num_bytes: int,
        now: float,
    ) -> LeaseRecord:
        """Give samples to a worker; a whole-group lease for FILTER leaves their states alone."""
        fence = self.book.fence()
        lease = LeaseRecord(
            fence, kind, worker.name, worker.incarnation, group.group_id, indices, set(indices),
            group.version, now, num_bytes,
        )  # fmt: skip
        self.fleet.grant(worker, lease)
        if kind is Kind.FILTER:
            group.fence = fence
        else:
            for index in indices:
                sample = group.samples[index]
                if sample.state == SCORED:
                    lease.remaining.discard(index)  # a group is scored again for its other samples
                    continue
                sample.fence = fence
                sample.state = GENERATING if kind is Kind.GENERATE else SCORING
        self.book.touch(group, *(group.samples[i] for i in indices))
        self.book.row(
            "lease", fence, str(kind), worker.name, worker.incarnation, group.group_id,
            ",".join(map(str, indices)), group.version, now,
        )  # fmt: skip
        return lease

    def _end_part(self, lease: LeaseRecord, index: int, outcome: str, now: float) -> None:
        lease.remaining.discard(index)
        if not lease.remaining:
            self.end_lease(lease, outcome, now)

    def end_lease(self, lease: LeaseRecord, outcome: str, now: float) -> None:
        """Nothing of the lease is left to do."""
        worker = self.fleet.find(lease.worker, lease.incarnation)
        group = self.book.groups.get(lease.group_id)
        if worker is not None and group is not None and group.lane is Lane.EVAL:
            worker.eval_held = max(0, worker.eval_held - len(lease.indices))
        self.fleet.end(lease)
        self.book.row("lease_end", now, outcome, lease.fence)

    def release(self, leases: list[LeaseRecord], reason: str, now: float, *, ours: bool) -> None:
        """Leases of a worker that is gone: its samples go back, with what they have."""
        for lease in leases:
            self.fleet.leases.pop(lease.fence, None)
            self.book.row("lease_end", now, reason, lease.fence)
            lease.excused = ours
            if lease.kind is Kind.FILTER:
                self._release_filter(lease)
                continue
            for index in sorted(lease.remaining):
                group, sample = self._find(lease.group_id, index)
                if group is not None and sample is not None and sample.fence == lease.fence:
                    sample.fence = 0  # a late result of this lease is refused, not taken for a repeat
                    self._failed_attempt(group, sample, lease, reason, now)

    def _release_filter(self, lease: LeaseRecord) -> None:
        group = self.book.groups.get(lease.group_id)
        if group is not None and group.fence == lease.fence:
            group.fence = 0
            self.queues.to_filter.append(group.group_id)

    # Settling.

    def settle_all(self, reason: Settled, now: float, note: str) -> None:
        """Everything that is left, at the end of the run."""
        for group in list(self.book.groups.values()):
            self._settle(group, reason, now, note)

    def settle_stale(self, group: GroupRecord, now: float) -> None:
        """A group that would be trained too late, under on_straggler = "drop"."""
        complete = group.group_id in self.batches.ready
        surplus = complete or self.batches.surplus > 0
        self._settle(group, Settled.SURPLUS if surplus else Settled.STALE, now, f"due in batch {group.due}")

    def _settle(self, group: GroupRecord, reason: Settled, now: float, note: str = "") -> None:
        for lease in self.fleet.leases_on(group):
            self.end_lease(lease, f"group {reason}", now)
        self.batches.drop(group)
        self.book.settle(group, reason, now, note)
        if group.lane is Lane.TRAIN and group.version >= 0 and reason is not Settled.UNNEEDED:
            self.lengths.dropped([sample.tokens for sample in group.samples], reason)
        evaluation = self.versions.evaluation
        if evaluation is not None and group.lane is Lane.EVAL:
            evaluation.open_groups -= evaluation.key == (group.version, group.incarnation)
            self._maybe_end_evaluation(now)

    def abandon_evaluation(self, now: float) -> None:
        """Nobody can serve the evaluated version any more: another one will be evaluated in its stead."""
        gone = self.versions.abandon_evaluation()
        self.book.row("evaluation_gone", *gone.key)
        for group in [g for g in self.book.groups.values() if g.lane is Lane.EVAL]:
            self._settle(group, Settled.UNNEEDED, now, "the evaluated version was lost with the trainer")

    def _maybe_end_evaluation(self, now: float) -> None:
        evaluation = self.versions.evaluation
        if evaluation is None or evaluation.done or not evaluation.issued or evaluation.open_groups:
            return
        evaluation.done = True
        self.book.row("evaluation_done", now, evaluation.version, evaluation.incarnation)
        self.book.deliver_evaluation(evaluation.version, evaluation.incarnation)

    def _find(self, group_id: int, index: int) -> tuple[GroupRecord | None, SampleRecord | None]:
        group = self.book.groups.get(group_id)
        if group is None or not 0 <= index < len(group.samples):
            return None, None
        return group, group.samples[index]

    # What the desk looks like.

    def counts(self) -> dict[str, int]:
        """Live samples by state, and tickets; the gauges behind queue/*."""
        states = dict.fromkeys(("fresh", "generating", "generated", "scoring", "scored"), 0)
        for group in self.book.groups.values():
            for sample in group.samples:
                states[sample.state] += 1
        states["ready"] = len(self.batches.ready)
        states["tickets_used"] = self.batches.outstanding
        states["tickets_free"] = self.batches.tickets - states["tickets_used"]
        return states
