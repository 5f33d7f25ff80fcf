"""What people want to know about a live run, as plain data.

`RunView` is fed small updates by whoever has them and answers questions: how far, how fast, how stale, who
waits for what, what is the bottleneck. Pure: no clock (time comes in with each update, in seconds of any one
monotonic clock), no terminal, no await. Counters of a member may go back (it was restarted): its rates begin
anew. Steps may go back (the trainer was restarted): the history after them is forgotten.
"""

from __future__ import annotations

import math
from collections import deque

import msgspec

from asyncrl.obs import diagnosis

WINDOW_S = 20.0
"""Rates and waits of members are taken over this much of the past."""
WINDOW_STEPS = 20
"""Step time and training rate are taken over this many rollout steps."""
HISTORY_STEPS = 2000
"""Rewards kept for the sparkline."""
GONE = ("left", "finished")
"""States of a member that is no longer part of the run."""


class PlanUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """What was known before the start."""

    run: str
    run_dir: str
    total_steps: int | None = None
    """Rollout steps the run will take; None when the data decides."""
    max_staleness: int | None = None
    """Rollout steps; None is unbounded."""


class PhaseUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="phase"):
    """The run as a whole entered another phase."""

    phase: str
    """"starting", "training", "evaluating", "draining", "finished", "failed"; any word is shown as it is."""


class StepUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """A rollout step was trained."""

    step: int
    """Rollout steps trained so far, this one included."""
    version: int
    """Version the step led to."""
    reward: float
    """Mean raw reward of its batch."""
    num_tokens: int
    """Tokens it trained on."""
    staleness_mean: float
    """Rollout steps."""
    staleness_max: float
    response_len: float | None = None
    """Mean, tokens."""
    truncated_ratio: float | None = None


class EvalUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="eval"):
    """An evaluation ended."""

    version: int
    values: dict[str, float]
    """Mean reward by evaluation set."""
    num_samples: int = 0
    examples: list[str] = []
    """A few answers with label and reward, one line each."""


class QueueUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="queue"):
    """Where the samples are."""

    counts: dict[str, int]
    """Samples by state, lane train."""
    tickets_used: int
    """Groups outstanding."""
    tickets_total: int
    evaluated: int = 0
    """Groups of the lane eval that were evaluated so far."""


class MemberUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="member"):
    """What one actor reports about itself. All counters run from its start."""

    name: str
    role: str
    """"source", "generator", "reward", "buffer", "trainer", "evaluator"."""
    state: str
    """"starting", "running", "loading", "draining", "dead", or one of GONE; any word is shown as it is."""
    version: int | None = None
    """Version its engine serves; None where there is no engine."""
    wall_s: float = 0.0
    busy_s: float = 0.0
    waits: dict[str, float] = {}
    """Seconds by named wait (`Waits.snapshot`)."""
    waits_for: str = ""
    """What its main loop waits for now; empty when busy."""
    waits_for_s: float = 0.0
    """For how long."""
    generated_tokens: int = 0
    push_pause_s: float | None = None
    """Its last pause of generation for new weights."""
    digest: str = ""
    """Digest of `version`, once it has checked the bytes it serves against it."""
    held: int = 0
    """Samples it has in work."""
    load_s: float | None = None
    """From the announcement of `version` to serving it."""
    loading_s: float = 0.0
    """Since a version was announced that it does not serve yet; 0 where there is none."""
    problem: str = ""
    """What keeps it from serving that version."""
    lag_s: float = 0.0
    """How long its event loop stood still at a time, at most, since its last report."""
    health: str = ""
    """How it stands by the supervisor's judgement, which adds it: `actor.health.State`."""

    @property
    def ready(self) -> bool:
        """Whether it has got ready for work since it was started."""
        return self.state != "starting"

    @property
    def word(self) -> str:
        """Its state in one word: what it says, unless the supervisor knows of trouble."""
        if self.state in GONE or self.health in {"", "healthy", "retired"}:
            return self.state
        # Whoever starts or drains says so itself.
        return self.state if self.health == "stale" and self.state != "running" else self.health


class NoteUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="note"):
    """Something a person should know happened: a restart, an attachment, a checkpoint."""

    text: str


Update = PlanUpdate | PhaseUpdate | StepUpdate | EvalUpdate | QueueUpdate | MemberUpdate | NoteUpdate


class Member:
    """One actor as the view knows it: its last report, and what changed over the last `WINDOW_S`."""

    def __init__(self, report: MemberUpdate, *, now: float) -> None:
        self.report = report
        self._past: deque[tuple[float, MemberUpdate]] = deque([(now, report)])

    def update(self, report: MemberUpdate, *, now: float) -> None:
        """Take its next report."""
        if report.wall_s < self.report.wall_s or report.generated_tokens < self.report.generated_tokens:
            self._past.clear()
        self.report = report
        self._past.append((now, report))
        while len(self._past) > 2 and now - self._past[1][0] >= WINDOW_S:
            self._past.popleft()

    @property
    def busy(self) -> float | None:
        """Share of recent wall time in which it waited for nothing; None before the second report."""
        return self._share(self._past[0][1].busy_s, self.report.busy_s)

    def waited(self, *names: str) -> float | None:
        """Share of recent wall time in these waits together; None before the second report."""
        before, after = self._past[0][1].waits, self.report.waits
        return self._share(sum(before.get(n, 0.0) for n in names), sum(after.get(n, 0.0) for n in names))

    @property
    def waits(self) -> dict[str, float]:
        """Share of recent wall time by named wait."""
        shares = ((name, self.waited(name)) for name in self.report.waits)
        return {name: share for name, share in shares if share is not None}

    @property
    def tokens_per_s(self) -> float:
        """Response tokens generated per second, recently; 0 when it does not run."""
        (first_at, first), (last_at, last) = self._past[0], self._past[-1]
        if last_at <= first_at or self.report.state in (*GONE, "dead"):
            return 0.0
        return (last.generated_tokens - first.generated_tokens) / (last_at - first_at)

    def _share(self, before: float, after: float) -> float | None:
        wall = self.report.wall_s - self._past[0][1].wall_s
        return min(max((after - before) / wall, 0.0), 1.0) if wall > 0 else None


class RunView:
    """The run as of the last update; see the module's docstring."""

    def __init__(self, *, now: float) -> None:
        self.began = now
        self.plan = PlanUpdate(run="", run_dir="")
        self.phase = "starting"
        self.last: StepUpdate | None = None
        self.queue = QueueUpdate(counts={}, tickets_used=0, tickets_total=0)
        self.members: dict[str, Member] = {}
        self.evaluations: dict[int, dict[str, float]] = {}
        self.note = ""
        self.examples: list[str] = []
        """Of the newest evaluation."""
        self._steps: deque[tuple[float, StepUpdate]] = deque(maxlen=HISTORY_STEPS)

    def apply(self, update: Update, *, now: float) -> None:
        """Take one update that arrived at `now`."""
        match update:
            case PlanUpdate():
                self.plan = update
            case PhaseUpdate():
                self.phase = update.phase
            case StepUpdate():
                self._step(update, now)
            case EvalUpdate():
                self.examples = update.examples or self.examples
                self.evaluations[update.version] = self.evaluations.get(update.version, {}) | update.values
            case QueueUpdate():
                self.queue = update
            case MemberUpdate():
                self._member(update, now)
            case NoteUpdate():
                self.note = update.text

    @property
    def step(self) -> int:
        """Rollout steps trained."""
        return self.last.step if self.last is not None else 0

    @property
    def rewards(self) -> list[float]:
        """Mean reward of each step, oldest first; at most HISTORY_STEPS."""
        return [update.reward for _, update in self._steps]

    @property
    def present(self) -> list[Member]:
        """Members that are part of the run, by role and name."""
        order = ("trainer", "generator", "reward", "buffer", "source", "evaluator")
        rank = {role: i for i, role in enumerate(order)}
        here = [member for member in self.members.values() if member.report.state not in GONE]
        return sorted(here, key=lambda m: (rank.get(m.report.role, len(rank)), _natural(m.report.name)))

    @property
    def step_s(self) -> float | None:
        """Mean seconds of a recent rollout step; None before the second."""
        recent = list(self._steps)[-WINDOW_STEPS - 1 :]
        if len(recent) < 2 or recent[-1][1].step == recent[0][1].step:
            return None
        return (recent[-1][0] - recent[0][0]) / (recent[-1][1].step - recent[0][1].step)

    def eta_s(self, *, now: float) -> float | None:
        """Seconds until the last step at the recent pace; None while the pace or the end is unknown."""
        if self.plan.total_steps is not None and self.step >= self.plan.total_steps:
            return 0.0
        step_s = self.step_s
        if step_s is None or self.plan.total_steps is None:
            return None
        # The step under way has used up some of its time, at most all of it.
        used = min(now - self._steps[-1][0], step_s)
        return (self.plan.total_steps - self.step) * step_s - used

    @property
    def generated_per_s(self) -> float | None:
        """Response tokens all generators sample per second; None before one reported."""
        rates = [m.tokens_per_s for m in self.members.values() if m.report.role == "generator"]
        return math.fsum(rates) if rates else None

    @property
    def trained_per_s(self) -> float | None:
        """Tokens trained per second over the recent steps; None before the second step."""
        recent = list(self._steps)[-WINDOW_STEPS - 1 :]
        if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            return None
        return sum(update.num_tokens for _, update in recent[1:]) / (recent[-1][0] - recent[0][0])

    @property
    def accuracy(self) -> tuple[int, float] | None:
        """(version, mean over the evaluation sets) of the newest evaluation."""
        return self._accuracy(max(self.evaluations, default=None))

    @property
    def first_accuracy(self) -> tuple[int, float] | None:
        """(version, mean over the evaluation sets) of the oldest evaluation."""
        return self._accuracy(min(self.evaluations, default=None))

    @property
    def bottleneck(self) -> str:
        """Who holds the run up, in one sentence."""
        shares = diagnosis.Shares(
            trainer_wait=_mean([m.waited(*diagnosis.BATCH_WAITS) for m in self._of("trainer")]),
            trainer_other=_largest(self._of("trainer"), besides=diagnosis.BATCH_WAITS),
            generator_wait=_mean([m.waited(*diagnosis.WORK_WAITS) for m in self._of("generator")]),
            reward_busy=_mean([m.busy for m in self._of("reward")]),
            tickets_free=self.queue.tickets_total - self.queue.tickets_used,
            waiting_for_score=self.queue.counts.get("generated", 0),
            max_staleness=self.plan.max_staleness,
        )
        return diagnosis.bottleneck(shares)

    def _accuracy(self, version: int | None) -> tuple[int, float] | None:
        if version is None or not self.evaluations[version]:
            return None
        values = self.evaluations[version].values()
        return version, math.fsum(values) / len(values)

    def _of(self, role: str) -> list[Member]:
        return [m for m in self.members.values() if m.report.role == role and m.report.state == "running"]

    def _step(self, update: StepUpdate, now: float) -> None:
        while self._steps and self._steps[-1][1].step >= update.step:
            self._steps.pop()
        self._steps.append((now, update))
        self.last = update
        if self.phase == "starting":
            self.phase = "training"

    def _member(self, update: MemberUpdate, now: float) -> None:
        known = self.members.get(update.name)
        if known is None:
            self.members[update.name] = Member(update, now=now)
        else:
            known.update(update, now=now)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _largest(members: list[Member], *, besides: tuple[str, ...]) -> tuple[str, float] | None:
    shares = [(n, share) for m in members for n, share in m.waits.items() if n not in besides]
    return max(shares, key=lambda pair: pair[1], default=None)


def _natural(name: str) -> tuple[str, int, str]:
    head, _, tail = name.rpartition("-")
    return (head, int(tail), "") if tail.isdigit() and tail.isascii() else (name, -1, tail)
