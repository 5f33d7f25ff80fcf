"""The systematic matrix, and random schedules by seed. The same seed gives the same cases, in the same order.

First what every role's death at every step and every other fault need once (`core`), then the rest of the
cross product, then random schedules of one to four orders; each part in an order that the seed draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec

from asyncrl.chaos import Order
from tools.chaos.moments import HELLOS, LEFT_OUT, LOADING, MESSAGES, MOMENTS, ONCE, Moment
from tools.chaos.spec import Case, Expected, Step

DETOURS = ("lose", "delay", "duplicate", "swap", "drop")
"""What may happen to a message; "lose" is what a lost connection does to it."""
SHORT_S, LONG_S = 0.8, 2.8
"""Of a stand-still: below and above run.dead_after_s (1.5 s)."""
HOUR_S = 3600.0
ACTORS = {"generator": "generator-0", "reward": "reward-0"}
"""Names of the roles that have several."""
ACTIONS = ("kill", "exit", "stop", "stop and continue", "stop, replaced", "slow", "slow, replaced")
NO_SPACE = "no space|disk|full"
RANDOM_ORDERS = 4
RANDOM_ACTIONS = ("kill", "kill", "kill", "exit", "stop", "stop and continue", "slow", "delay", "duplicate")


def matrix() -> list[Case]:
    """Every systematic case, in a fixed order."""
    return [*core(), *rest()]


def expand(seed: int, num_cases: int) -> list[Case]:
    """The first `num_cases` of a seed."""
    draw = random.Random(seed)
    cases = []
    for part in (core(), rest()):
        draw.shuffle(part)
        cases += part
    return [*cases, *schedules(seed, max(0, num_cases - len(cases)))][:num_cases]


def schedules(seed: int, num_cases: int) -> list[Case]:
    """The first random schedules of a seed."""
    return [_schedule(random.Random(f"{seed}:{number}"), number) for number in range(num_cases)]


def core() -> list[Case]:
    """A death at every step; every other way to fail once per role; faults of link and disk."""
    found = [case for role, moments in MOMENTS.items() for m in moments for case in _cases(role, m, "kill")]
    for number, (role, moments) in enumerate(MOMENTS.items()):
        for shift, action in enumerate(ACTIONS[1:]):
            # Another moment for each, not the first: there nothing is under way yet.
            moment = moments[1 + (number + 2 * shift) % (len(moments) - 1)]
            found += _cases(role, moment, action)
    return [
        *found,
        *_links(core=True),
        *_cuts(),
        *_clocks(),
        *_disks(),
        *_late_versions(),
        *_everything(),
        *_newcomers(),
    ]


def rest() -> list[Case]:
    """What is left of the cross product."""
    known = {case.name for case in core()}
    full = [
        case
        for role, moments in MOMENTS.items()
        for moment in moments
        for action in ACTIONS
        for case in _cases(role, moment, action)
    ]
    return [case for case in [*full, *_links(core=False)] if case.name not in known]


def _cases(role: str, moment: Moment, action: str) -> Iterator[Case]:
    """One case, or none where it makes no sense."""
    if moment.name in LOADING and action == "slow, replaced":
        return  # who is slow before it is ready loads, and is not replaced
    if role == "supervisor" and action in {"stop", "exit"}:
        return  # nobody is there to do anything about it
    yield Case(
        name=f"{role}: {action} {moment.name}",
        role=role,
        orders=[_order(role, moment, action)],
        steps=_steps(action, 0),
        options={"run.max_restarts": 5},
        state=moment.state,
    )


def _order(role: str, moment: Moment, action: str) -> Order:
    stops = action.startswith("stop")
    return Order(
        actor=ACTORS.get(role, role),
        at=moment.at,
        nth=moment.nth,
        where=dict(moment.where),
        action="stop" if stops else "freeze" if action.startswith("slow") else action,
        seconds={"slow": SHORT_S, "slow, replaced": LONG_S}.get(action, 0.0),
    )


def _steps(action: str, order: int) -> list[Step]:
    after_s = {"stop and continue": SHORT_S, "stop, replaced": LONG_S}.get(action)
    return [] if after_s is None else [Step(do="continue", order=order, after_s=after_s)]


def _links(*, core: bool) -> Iterator[Case]:
    """Messages lost with their connection, late, repeated, swapped; lost on a connection that lives."""
    for role, messages in MESSAGES.items():
        for number, at in enumerate(messages):
            for shift, action in enumerate(DETOURS):
                # Of each message the loss is in the core, and one more fault; the others follow.
                first = action == "lose" or shift == 1 + number % (len(DETOURS) - 1)
                if core == first:
                    yield from (_link(role, at, action, nth, name) for nth, name in _times(role, at))


def _times(role: str, at: str) -> list[tuple[int, str]]:
    """Which of a life's messages of this kind are hit, and what they are called."""
    if at in HELLOS:
        return [(number, f"{at} to {whom}") for number, whom in enumerate(HELLOS[at], start=1)]
    return [(1 if at in ONCE or role == "evaluator" else 2, at)]


def _link(role: str, at: str, action: str, nth: int, name: str) -> Case:
    orders = [
        Order(
            actor=ACTORS.get(role, role),
            at=at,
            action=what,
            nth=nth,
            seconds=0.7 if what == "delay" else 0.0,
        )
        for what in (("drop", "cut") if action == "lose" else (action,))
    ]
    # No transport loses a message on a connection that lives on: nobody can notice that one, but the stall
    # that follows has a name, and the resumed run finishes.
    expect: Expected = "finish or stall" if action == "drop" else "finish"
    return Case(name=f"{role}: {action} {name}", role=role, orders=orders, expect=expect)


def _cuts() -> Iterator[Case]:
    """The connection is lost, and with it what was on its way."""
    for role, at in (
        ("generator", "sent:Reports"), ("generator", "receive:Leases"), ("generator", "receive:Acks"),
        ("reward", "sent:Scores"), ("reward", "receive:Leases"), ("trainer", "receive:BatchPart"),
        ("trainer", "sent:Trained"), ("trainer", "sent:Published"), ("trainer", "sent:Saved"),
        ("source", "sent:Issue"), ("evaluator", "receive:Evaluated"), ("generator", "sent:Telemetry"),
    ):  # fmt: skip
        nth = 1 if role == "evaluator" or at == "sent:Saved" else 2
        order = Order(actor=ACTORS.get(role, role), at=at, nth=nth, action="cut")
        yield Case(name=f"{role}: connection cut {at}", role=role, orders=[order])


def _clocks() -> Iterator[Case]:
    for role, at in (
        ("buffer", "received:Reports"), ("generator", "received:Leases"), ("trainer", "received:BatchPart"),
        ("reward", "received:Leases"), ("source", "received:Need"), ("supervisor", "received:Telemetry"),
    ):  # fmt: skip
        for seconds in (HOUR_S, -HOUR_S):
            order = Order(actor=ACTORS.get(role, role), at=at, nth=3, action="clock", seconds=seconds)
            yield Case(name=f"{role}: clock {seconds:+.0f} s", role=role, orders=[order])


def _disks() -> Iterator[Case]:
    """Full, read-only, damaged; and single calls that fail."""
    for at in ("sent:Leases", "receive:Trained", "send:BatchPart"):
        mark = Order(actor="buffer", at=at, nth=2, action="freeze", seconds=0.3)
        yield Case(
            name=f"buffer: disk full at {at}", role="buffer", orders=[mark], steps=[Step(do="fill")],
            disk=True, expect="fail", says=NO_SPACE, options={"run.max_restarts": 1},
        )  # fmt: skip
    for name, actor, at, code in (
        ("checkpoint", "trainer", "file:open:*/.step-000002.tmp/*", "ENOSPC"),
        ("checkpoint", "trainer", "file:os.rename:*/.step-000002.tmp", "EROFS"),
        ("version", "trainer", "file:open:/dev/shm/asyncrl-*.tmp", "ENOSPC"),
        ("segment", "buffer", "file:open:*/bodies/*.bin", "ENOSPC"),
        ("segment", "buffer", "file:open:*/bodies/*.bin", "EROFS"),
        ("version", "generator", "file:open:/dev/shm/*.weights*", "EIO"),
    ):
        order = Order(actor=ACTORS.get(actor, actor), at=at, action=f"errno:{code}")
        yield Case(name=f"{actor}: {code} at a {name}", role=actor, orders=[order])
    yield from _damages()


def _damages() -> Iterator[Case]:
    """What is found when everything was lost and the run is resumed."""
    mark = Order(actor="trainer", at="sent:Trained", nth=3, action="freeze", seconds=0.4)
    lost = Case(name="", role="all", orders=[mark], steps=[Step(do="lose")])
    change = msgspec.structs.replace
    yield change(
        lost, name="all: read-only disk at the resumption", damage="read-only", disk=True, expect="fail",
        says="read-only|readonly",
    )  # fmt: skip
    yield change(
        lost, name="all: corrupted page", damage="corrupt page", lasting=True, expect="fail",
        says="malformed|corrupt|not a database",
    )  # fmt: skip
    yield change(
        lost, name="all: segment cut short", damage="cut segment", lasting=True, expect="fail",
        says="cut short",
    )  # fmt: skip
    yield change(lost, name="all: torn segment", damage="torn segment")
    yield change(lost, name="all: torn log", damage="torn log")


def _late_versions() -> Iterator[Case]:
    """A slow disk for versions: training waits for it, and a checkpoint may be newer than any version."""
    late = Order(
        actor="trainer", at="file:open:/dev/shm/asyncrl-*.tmp", action="freeze", nth=2, seconds=LONG_S
    )  # fmt: skip
    yield Case(name="trainer: slow disk for versions", role="trainer", orders=[late])
    for role, action, steps in (("trainer", "kill", []), ("all", "stop", [Step(do="lose")])):
        die = Order(actor="trainer", at="received:Committed", where={"what": "checkpoint"}, action=action)
        yield Case(
            name=f"{role}: {'lost' if steps else action}, checkpoint newer than versions", role=role,
            orders=[die, late], steps=steps, state=LEFT_OUT,
        )  # fmt: skip


def _everything() -> Iterator[Case]:
    """All processes at once, at moments of several roles."""
    for role, name in (
        ("trainer", "batch delivered, not trained"), ("trainer", "trained, not told"),
        ("trainer", "mid-checkpoint, torn"), ("trainer", "mid-publish, not told"), ("trainer", "saved told"),
        ("buffer", "before acknowledgement"), ("buffer", "batch recorded, not delivered"),
        ("generator", "mid-generation"), ("reward", "mid-scoring"), ("source", "prompts sent"),
    ):  # fmt: skip
        moment = next(m for m in MOMENTS[role] if m.name == name)
        yield Case(
            name=f"all: lost, {role} {name}", role="all", orders=[_order(role, moment, "stop")],
            steps=[Step(do="lose")], state=moment.state,
        )  # fmt: skip


def _newcomers() -> Iterator[Case]:
    """A generator attached to the live run, and hit on its way in."""
    mark = Order(actor="buffer", at="sent:Leases", nth=3, action="freeze", seconds=0.05)
    yield Case(name="generator: attached", role="generator", orders=[mark], steps=[Step(do="attach")])
    for at in ("sent:Hello", "receive:Welcome", "received:Welcome", "sent:Want"):
        order = Order(actor="attached-generator-0", at=at, nth=2 if at == "sent:Hello" else 1, action="kill")
        yield Case(
            name=f"generator: attached, kill {at}", role="generator", orders=[mark, order],
            steps=[Step(do="attach")], options={"run.num_rollout": 8},
        )  # fmt: skip
    for at in ("receive:Welcome", "received:Leases"):
        order = Order(actor="attached-generator-0", at=at, action="stop")
        yield Case(
            name=f"generator: attached, stop and continue {at}", role="generator", orders=[mark, order],
            steps=[Step(do="attach"), Step(do="continue", order=1, after_s=LONG_S)],
            options={"run.num_rollout": 12},
        )  # fmt: skip


def _schedule(draw: random.Random, number: int) -> Case:
    """A random schedule: several faults, each in any role at any step."""
    orders: list[Order] = []
    steps: list[Step] = []
    for _ in range(draw.randint(1, RANDOM_ORDERS)):
        order, more = _drawn(draw, len(orders))
        orders.append(order)
        steps += more
    return Case(
        name=f"random {number}: {'; '.join(f'{o.actor} {o.action} {o.at}' for o in orders)}",
        role="random", orders=orders, steps=steps, options={"run.max_restarts": 8}, may_miss=True,
    )  # fmt: skip


def _drawn(draw: random.Random, index: int) -> tuple[Order, Sequence[Step]]:
    role = draw.choice(list(MOMENTS))
    action = draw.choice(RANDOM_ACTIONS)
    if action in {"delay", "duplicate"} and role in MESSAGES:
        at = draw.choice(MESSAGES[role])
        seconds = draw.choice([0.3, 0.7, 1.2]) if action == "delay" else 0.0
        actor = _one_of(draw, role)
        return Order(actor=actor, at=at, action=action, nth=draw.randint(1, 6), seconds=seconds), []
    if role == "supervisor":
        action = draw.choice(["kill", "stop and continue", "stop, replaced", "slow"])
    elif action in {"delay", "duplicate"}:
        action = "kill"
    moment = draw.choice(MOMENTS[role])
    order = _order(role, moment, action)
    return (
        Order(
            actor=_one_of(draw, role), at=order.at, action=order.action, where=order.where,
            seconds=order.seconds, nth=1 if moment.at == "start" else draw.randint(1, moment.nth + 3),
        ),
        _steps(action, index),
    )  # fmt: skip


def _one_of(draw: random.Random, role: str) -> str:
    return f"{role}-{draw.randrange(2)}" if role in ACTORS else role
