"""The sentence a report begins with: the most likely cause of a standstill. A pure function of a `Case`.

Rules are tried in order, the surest first: what the kernel says, then what a process says of itself, then who
waits for whom. The first that has something to say wins; each is a function that can be read alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from asyncrl.obs.stacks import Frame, Stack
from asyncrl.obs.text import duration, size
from asyncrl.obs.vitals import Case, Desk, Facts, Member, Process, Wait, blocking, place

SILENT_S = 3.0
"""A worker of which the buffer hears nothing for so long is worth a word; heartbeats come every second."""
LAG_S = 1.0
"""An event loop that stands still for so long keeps others waiting."""
USER_CODE_S = 2.0
"""A reward that runs for so long is worth a word while the trainer waits for it."""
NO_TOKENS_S = 8.0
"""A generator that holds work and hands nothing in for so long is worth a word."""
PUSH_S = 5.0
"""A version that was announced so long ago should be served by somebody."""
WAIT_S = 3.0
"""A wait of this length may be the standstill itself."""
MANY_RESTARTS = 2
WORKING = ("user", "ours")
"""A thread with nothing but library code on its stack waits for work."""

WAITS = {
    "batch": "a batch",
    "lease": "work",
    "need": "the buffer to want prompts",
    "welcome": "the buffer's welcome",
    "checkpoint": "the buffer to commit a checkpoint",
    "push": "the version before to be written",
    "finish": "the buffer to end the run",
    "disk": "the disk",
    "event": "anything to do",
    "evaluation": "an evaluation",
}
"""Named waits in words."""

Rule = Callable[[Case], str | None]


def cause(case: Case) -> str:
    """The sentence. It names the process, and file and line where there are some."""
    if not case.live:
        return _ended(case)
    return next(found for rule in RULES if (found := rule(case)))


def _ended(case: Case) -> str:
    if case.phase in {"finished", "drained"}:
        return f"the run has {case.phase}: nothing is wrong with it"
    if case.phase == "failed":
        return f"the run has failed: {case.detail or 'nobody said why; the last events may'}"
    last = f"; the last event: {case.events[-1]}" if case.events else ""
    return (
        f'the supervisor ended without a word while the run was "{case.phase}" (killed, or its machine was), '
        f"and every process with it{last}; `asyncrl launch --resume {case.run}` goes on"
    )


# What is certain.


def _known(case: Case) -> str | None:
    desk = _desk(case)
    return desk.failure if desk is not None and desk.failure else None


def _stopped(case: Case) -> str | None:
    for member, process in _processes(case):
        if process.state in {"T", "t"}:
            how = "a debugger" if process.state == "t" else "a signal (SIGSTOP)"
            free = f"; `kill -CONT {process.pid}` lets it go on" if process.state == "T" else ""
            return f"{_who(member, process)} is stopped by {how}{_silence(member)}{free}"
    return None


def _dead(case: Case) -> str | None:
    for member in _members(case):
        process = member.process
        gone = process is not None and process.state in {"gone", "Z", "X"}
        if gone or member.state == "restarting":
            words = f"; its last words: {member.last_words}" if member.last_words else ""
            again = ", and is being started again" if member.state == "restarting" else ""
            return f"{member.name} (pid {member.pid}) is dead{again}{_silence(member)}{words}"
    return None


def _blocked(case: Case) -> str | None:
    """It was asked, lives, and did not answer: its loop does not turn."""
    for member in _members(case):
        process = member.process
        if member.facts is not None or process is None or not member.asked:
            continue
        for_s = f" for {duration(member.heard_s)}" if member.heard_s is not None else ""
        if process.state == "D":
            return f"{_who(member, process)} hangs in the kernel{for_s} (state D): a disk or a device"
        main = next((s for s in process.stacks if s.kind == "thread"), None)
        where = blocking(main) if main is not None else None
        if where is not None:
            return f"the event loop of {_who(member, process)} is blocked{for_s} in {where.where}"
    return None


def _disk(case: Case) -> str | None:
    desk = _desk(case)
    if desk is not None and desk.low_on_disk:
        return (
            f"the disk of the run is full: {size(desk.free_bytes)} are free and buffer.min_free_bytes wants "
            f"{size(desk.min_free_bytes)}, so the buffer gives out no work to generate"
        )
    for member, wait in _waiting(case, "disk"):
        where = place(_stacks(member, "thread"), kinds=WORKING)
        waited = f"{member.name} has waited {duration(wait.seconds)} for it"
        return f"the disk does not finish a commit: {waited}{_in(where)}"
    return None


def _again_and_again(case: Case) -> str | None:
    for member in _members(case):
        if member.restarts >= MANY_RESTARTS and (member.facts is None or member.facts.uptime_s < WAIT_S):
            words = member.last_words or "it said nothing; see its log"
            return (
                f"{member.name} dies again and again, {member.restarts} times so far; its last words: {words}"
            )
    return None


# What is likely.


def _refused(case: Case) -> str | None:
    desk = _desk(case)
    if desk is None or desk.refused < 2 * desk.batch_size or not _trainer_waits(case):
        return None
    return (
        f"{desk.refused} groups in a row were refused by the filters or failed, and no batch of "
        f"{desk.batch_size} was cut: the prompts may be too easy or too hard, the filter too strict, or the "
        "reward broken"
    )


def _reward(case: Case) -> str | None:
    if not _trainer_waits(case):
        return None
    for member in _by_role(case, "reward"):
        facts = member.facts
        if facts is None or not facts.held or facts.oldest_held_s < USER_CODE_S:
            continue
        busy = next((p for p in member.children if not _idle(p)), None)
        where = place(busy.stacks) if busy is not None else None
        if busy is None or where is None:
            continue
        limit = f"; reward.timeout_s = {case.reward_timeout_s:g} ends it" if case.reward_timeout_s else ""
        return (
            f"the reward hangs in user code: {member.name} has been in {where.where} (pid {busy.pid}) for "
            f"{duration(facts.oldest_held_s)}{limit}"
        )
    return None


def _push(case: Case) -> str | None:
    generators = [(m, m.facts) for m in _by_role(case, "generator") if m.facts is not None]
    late = [(m, f) for m, f in generators if f.announced is not None and f.announced_s >= PUSH_S]
    if not late or len(late) < len(generators):
        return None
    member, facts = max(late, key=lambda pair: pair[1].announced_s)
    where = place(_stacks(member, "task"), containing="_swap")
    doing = f"is in {where.where}" if where is not None else "loads it"
    return (
        f"no generator can load version {facts.announced}, announced {duration(facts.announced_s)} ago: "
        f"{member.name} {doing}"
    )


def _silent(case: Case) -> str | None:
    desk = _desk(case)
    if desk is None:
        return None
    quiet = [w for w in desk.workers if w.silent_s >= SILENT_S and w.leases]
    if not quiet:
        return None
    worst = max(quiet, key=lambda worker: worker.silent_s)
    others = [w for w in desk.workers if w.role == worst.role and w is not worst]
    room = sum(sum(w.credit.values()) for w in others)
    rest = (
        f"the other {len(others)} of its role have room for {room} samples"
        if others
        else f"it is the only {worst.role}"
    )
    return (
        f"{worst.name} is silent: the buffer has heard nothing of it for {duration(worst.silent_s)} and it "
        f"holds {worst.leases} leases, the oldest for {duration(worst.oldest_lease_s)}; {rest}"
    )


def _generator(case: Case) -> str | None:
    for member in _by_role(case, "generator"):
        facts = member.facts
        if facts is None or not facts.held:
            continue
        for_s = _since(facts, "said", "Reports", fallback="Leases")
        if for_s is None or for_s < NO_TOKENS_S:
            continue
        where = place(_stacks(member, "thread"), kinds=WORKING) or place(
            _stacks(member, "task"), containing="_run"
        )
        return (
            f"{member.name} hangs: it holds {facts.held} samples and has handed in no token for "
            f"{duration(for_s)}{_in(where)}"
        )
    return None


def _lagging(case: Case) -> str | None:
    for member in _members(case):
        if member.facts is not None and member.facts.loop_lag_s >= LAG_S:
            lag = duration(member.facts.loop_lag_s)
            return f"the event loop of {member.name} stood still for {lag} a moment ago: something blocks it"
    return None


def _ended_data(case: Case) -> str | None:
    desk = _desk(case)
    if desk is None or not desk.source_ended or not _trainer_waits(case) or desk.counts.get("fresh"):
        return None
    if desk.outstanding >= desk.batch_size:
        return None
    left = f"{desk.outstanding} groups are left, fewer than a batch of {desk.batch_size}"
    goal = f" of {desk.target}" if desk.target is not None else ""
    return f"there is nothing to do: the data have ended after {desk.num_trained}{goal} rollout steps; {left}"


def _each_other(case: Case) -> str | None:
    """The trainer wants a batch, generators want work, and nobody moves."""
    trainers = [(m, w) for m, w in _waiting(case, "batch") if m.role == "trainer"]
    generators = [m for m in _by_role(case, "generator") if m.facts is not None]
    idle = [(m, w) for m, w in _waiting(case, "lease") if m.role == "generator"]
    if not trainers or not idle or len(idle) < len(generators):
        return None
    trainer, wait = trainers[0]
    other, since = max(idle, key=lambda pair: pair[1].seconds)
    desk = _desk(case)
    why = ""
    if desk is not None:
        states = ", ".join(f"{count} {state}" for state, count in sorted(desk.counts.items()) if count)
        why = f" ({desk.tickets_used} of {desk.tickets_total} tickets are used; samples: {states or 'none'})"
    return (
        f"{trainer.name} and {other.name} wait for each other: {trainer.name} {duration(wait.seconds)} for a "
        f"batch, {other.name} {duration(since.seconds)} for work{why}"
    )


def _starting(case: Case) -> str | None:
    """It loads something before it takes part."""
    for member in _members(case):
        starts = member.facts is not None and member.facts.state == "starting"
        mute = member.facts is None and member.process is not None and member.asked
        if starts or (mute and member.heard_s is None) or (mute and case.phase == "starting"):
            return f"{member.name} is not ready yet{_working(member)}"
    return None


def _unanswered(case: Case) -> str | None:
    for member in _members(case):
        if member.facts is None and member.asked:
            host = f" on {member.host}" if member.host and not member.local else ""
            return f"{member.name}{host} does not answer{_silence(member)}{_working(member)}"
    return None


def _busy_trainer(case: Case) -> str | None:
    if case.since_step_s is None or case.since_step_s < NO_TOKENS_S:
        return None
    for member in _by_role(case, "trainer"):
        if member.facts is not None and not member.facts.waits:
            where = place(_stacks(member, "thread"), kinds=WORKING)
            return f"{member.name} computes{since_step(case)}{_in(where)}"
    return None


def _longest_wait(case: Case) -> str | None:
    found = [(m, w) for m, w in _waiting(case) if w.name not in {"need", "evaluation", "event"}]
    stalled = case.since_step_s is not None and case.stall_s and case.since_step_s >= case.stall_s
    if not found or not (stalled or case.since_step_s is None or case.since_step_s >= NO_TOKENS_S):
        return None
    member, wait = max(found, key=lambda pair: pair[1].seconds)
    what = WAITS.get(wait.name, wait.name)
    return f"{member.name} has waited {duration(wait.seconds)} for {what}, longer than anybody for anything"


def _healthy(case: Case) -> str | None:
    return f"nothing is wrong: everybody answers, {case.step} rollout steps are trained{since_step(case)}"


RULES: tuple[Rule, ...] = (
    _known, _stopped, _again_and_again, _dead, _blocked, _starting, _disk, _refused, _push, _reward, _silent,
    _generator, _ended_data, _each_other, _unanswered, _lagging, _busy_trainer, _longest_wait, _healthy,
)  # fmt: skip
"""In the order of trust."""


def since_step(case: Case) -> str:
    """How long nothing was trained, as the end of a sentence; empty when nobody knows."""
    if case.since_step_s is None:
        return ""
    ago = f"{duration(case.since_step_s)} ago"
    return f", the last step {ago}" if case.step else f", no step since the start {ago}"


# Looking things up.


def _members(case: Case) -> list[Member]:
    return [*([case.supervisor] if case.supervisor is not None else []), *case.members]


def _processes(case: Case) -> Iterator[tuple[Member, Process]]:
    for member in _members(case):
        for process in (*([member.process] if member.process is not None else []), *member.children):
            yield member, process


def _by_role(case: Case, role: str) -> list[Member]:
    return [member for member in case.members if member.role == role]


def _desk(case: Case) -> Desk | None:
    return next(
        (m.facts.desk for m in case.members if m.facts is not None and m.facts.desk is not None), None
    )


def _waiting(case: Case, name: str = "") -> list[tuple[Member, Wait]]:
    """Who has waited for it for long; for anything when no name is given."""
    return [
        (member, wait)
        for member in case.members
        if member.facts is not None
        for wait in member.facts.waits
        if wait.seconds >= WAIT_S and name in {"", wait.name}
    ]


def _trainer_waits(case: Case) -> bool:
    """Whether the trainer has nothing to train on, or cannot be asked."""
    trainers = _by_role(case, "trainer")
    return not any(
        member.facts is not None and not any(wait.name == "batch" for wait in member.facts.waits)
        for member in trainers
    )


def _since(facts: Facts, way: str, kind: str, *, fallback: str) -> float | None:
    """Seconds since a kind of message went; where none ever did, since the newest `fallback` came."""
    ages = {(row.way, row.kind): row.age_s for row in facts.spoken}
    return ages.get((way, kind), ages.get(("heard", fallback)))


def _stacks(member: Member, kind: str) -> list[Stack]:
    return [stack for stack in member.facts.stacks if stack.kind == kind] if member.facts is not None else []


def _working(member: Member) -> str:
    """Where it is: a thread that works, else the innermost of what its tasks await."""
    stacks = member.facts.stacks if member.facts is not None else []
    if member.process is not None and not stacks:
        stacks = member.process.stacks
    threads = [s for s in stacks if s.kind == "thread" and s.name != "main"]
    return _in(place(threads, kinds=WORKING) or place([s for s in stacks if s.name == member.name]))


def _idle(process: Process) -> bool:
    """Whether a reward's child waits for its next message."""
    ours = [f for s in process.stacks[:1] for f in s.frames if f.kind == "ours"]
    return not process.stacks or (bool(ours) and ours[-1].function.rpartition(".")[2] == "receive")


def _who(member: Member, process: Process) -> str:
    inside = member.process is not None and process.pid == member.process.pid
    return f"{member.name} (pid {process.pid})" if inside else f"a child of {member.name} (pid {process.pid})"


def _silence(member: Member) -> str:
    return f", silent for {duration(member.heard_s)}" if member.heard_s is not None else ""


def _in(where: Frame | None) -> str:
    return f", in {where.where}" if where is not None else ""
