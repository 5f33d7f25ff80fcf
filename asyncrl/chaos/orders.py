"""What an order is, which orders there can be, and which message one is about.

Owns the grammar of moments and the check of a whole file against a plan. Does nothing by itself.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import msgspec
from msgspec import inspect

from asyncrl.errors import ConfigError
from asyncrl.messages.control import FromBuffer, ToBuffer
from asyncrl.messages.supervision import (
    AttachRequest,
    DetachRequest,
    FromSupervisor,
    StatusRequest,
    ToSupervisor,
)
from asyncrl.topology.plan import Plan

SUPERVISOR = "supervisor"
ATTACHED = "attached-"
"""Prefix of the names of members that came later; they are not in the plan."""
ON_MESSAGES = ("send", "sent", "receive", "received")
DETOURS = ("drop", "duplicate", "delay", "swap")
"""What may be done to a message, before it goes out or before the actor gets it."""
OF_PROCESSES = ("kill", "stop", "freeze", "clock")
ANYWHERE = (*OF_PROCESSES, "exit")
ERRNO = "errno:"
WITH_SECONDS = ("freeze", "delay", "clock")
FILE_EVENTS = (
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.listdir", "os.scandir", "shutil.rmtree", "shutil.copyfile", "shutil.copytree",
    "shutil.move", "sqlite3.connect",
)  # fmt: skip
"""Python's audit events whose first argument is a path; `os.replace` is os.rename, `os.unlink` os.remove."""


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fault: who, when, what."""

    actor: str
    """Its name: "generator-0", "buffer", "trainer", "evaluator", "supervisor", "attached-reward-0"."""
    at: str
    """The moment.

    "start": as soon as the process has read its orders; nobody is dialled yet.
    "send:Type": before a message of that type goes out.
    "sent:Type": when the transport has it; not for messages that go out late.
    "receive:Type": before the actor gets it.
    "received:Type": when the actor asks for the next message of that link after it, so it was handled.
    "file:EVENT:GLOB": before what Python's audit event EVENT (`FILE_EVENTS`) announces is done, on whatever
    thread, if its first argument matches GLOB (`fnmatch`: * also matches slashes).
    A Hello goes to the supervisor first, and then to the buffer.
    """
    action: str
    """What is done.

    "kill": SIGKILL. "stop": SIGSTOP; whoever drives the run continues the process or not.
    "exit": a RunError out of the call, with which the actor ends.
    "freeze": the thread of the moment, for messages the event loop's, stands still for `seconds`.
    "clock": `time.time()` of this process jumps by `seconds`.
    At send and receive: "drop"; "duplicate"; "delay" by `seconds`, others overtake it; "swap" with the next
    message to or from that peer, if one comes within `seconds` (0: 1 s).
    At messages of a client: "cut", the connection is lost with what is in it, and dialled again (send: before
    the message goes out; receive: the message has arrived). With a "drop" of the same message it is lost the
    way messages get lost; a "drop" alone is a fault that no transport here has.
    At files: "errno:ENOSPC" and the like, an OSError out of the call.
    """
    nth: int = 1
    """The nth time in one life of the actor that the moment comes; only matching ones count."""
    life: int = 0
    """Only in the nth life of this name in the run; 0: in any."""
    where: dict[str, Any] = {}
    """Fields of the message that have to be equal, {"kind": "generate"}; a dot goes one struct deeper. Where
    they are not the message's own, one element of one of its lists has to have them all.
    """
    peer: str = ""
    """At a server (buffer, supervisor): only messages to or from the member of this name."""
    seconds: float = 0.0
    """Of freeze, delay and swap, which take none that is negative, and of clock."""
    count: int = 1
    """How many matching messages in a row are dropped, duplicated or delayed, or file events fail."""


class Moment(NamedTuple):
    """The parts of `Order.at`."""

    kind: str
    what: str = ""
    """Type of the message, or audit event."""
    glob: str = ""


def moment_of(at: str) -> Moment:
    """Take `Order.at` apart."""
    kind, _, rest = at.partition(":")
    what, _, glob = rest.partition(":")
    return Moment(kind, what, glob) if kind == "file" else Moment(kind, rest)


def errno_of(action: str) -> int:
    """The number in "errno:NAME"; 0 where there is no such name."""
    return int(getattr(errno, action.removeprefix(ERRNO), 0)) if action.startswith(f"{ERRNO}E") else 0


def matches(order: Order, message: Any, peer: str) -> bool:
    """Whether an order is about this message, to or from that member (empty at a client)."""
    if order.peer and order.peer != peer:
        return False
    if not order.where or _has_all(message, order.where):
        return True
    lists = (value for value in _values(message) if isinstance(value, list))
    return any(_has_all(item, order.where) for values in lists for item in values)


def _values(message: Any) -> Iterator[Any]:
    return (getattr(message, name) for name in getattr(message, "__struct_fields__", ()))


def _has_all(item: Any, wanted: dict[str, Any]) -> bool:
    return all(_value(item, path) == value for path, value in wanted.items())


def _value(item: Any, path: str) -> Any:
    for name in path.split("."):
        item = getattr(item, name, None)
    return msgspec.to_builtins(item)


def check(orders: Sequence[Order], plan: Plan, *, source: str, in_process: bool) -> None:
    """Raises ConfigError with a line for everything that cannot happen in a run of this plan.

    Args:
        orders: all of a file.
        plan: whose actors they are for.
        source: the file, for the message.
        in_process: all actors share this process, so nothing may be done to it.
    """
    roles = {name: role for process in plan.processes for name, role in _actors(process.name, process.roles)}
    roles[SUPERVISOR] = SUPERVISOR
    problems = [
        f'{source}: order {index} ("{order.actor}" at "{order.at}"): {problem}'
        for index, order in enumerate(orders)
        for problem in _problems(order, roles, in_process=in_process)
    ]
    if problems:
        raise ConfigError(*problems)


def _actors(process: str, roles: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, role) of the actors of one process, named as `actor.host` does."""
    return ((process if number == 0 else role, role) for number, role in enumerate(roles))


def _problems(order: Order, roles: dict[str, str], *, in_process: bool) -> Iterator[str]:
    role = roles.get(order.actor, "")
    if order.actor.startswith(ATTACHED):
        role = order.actor.removeprefix(ATTACHED).rpartition("-")[0]
    if not role:
        allowed = ", ".join(sorted(roles))
        yield f"actor: nobody of this run is called that; allowed: {allowed}, {ATTACHED}ROLE-NUMBER"
        return
    moment = moment_of(order.at)
    problem = _of_moment(moment, role) or _of_action(order, moment, role)
    if problem:
        yield problem
        return
    if in_process and (order.action in OF_PROCESSES or moment.kind == "file"):
        yield (
            f'action "{order.action}" at "{moment.kind}" is for processes of their own, and here all actors '
            "share one; launch without --in-process, or use exit or an order about a message"
        )
    yield from _of_options(order, moment, role)


def _of_moment(moment: Moment, role: str) -> str:
    if moment.kind == "start" and not moment.what:
        return ""
    if moment.kind == "file":
        if moment.what not in FILE_EVENTS:
            return f'at: "{moment.what}" is no audit event about a file; allowed: {", ".join(FILE_EVENTS)}'
        return "" if moment.glob else "at: a pattern is missing; write file:EVENT:GLOB"
    if moment.kind not in ON_MESSAGES:
        return "at: no such moment; allowed: start, send:, sent:, receive:, received: TYPE, file:EVENT:GLOB"
    types = _types(moment, role)
    if moment.what not in types:
        verb = "sends" if moment.kind in {"send", "sent"} else "receives"
        return f'at: {role} never {verb} "{moment.what}"; it {verb} {", ".join(sorted(types))}'
    return ""


def _types(moment: Moment, role: str) -> dict[str, type]:
    """The messages that an actor of this role may send or receive, on both its links."""
    outward = moment.kind in {"send", "sent"}
    if role == SUPERVISOR:
        unions = [FromSupervisor if outward else ToSupervisor]
    elif role == "buffer":
        unions = [FromBuffer, ToSupervisor] if outward else [ToBuffer, FromSupervisor]
    else:
        unions = [ToBuffer, ToSupervisor] if outward else [FromBuffer, FromSupervisor]
    commands = set() if role == SUPERVISOR else {AttachRequest, DetachRequest, StatusRequest}
    return {kind.__name__: kind for union in unions for kind in get_args(union) if kind not in commands}


def _of_action(order: Order, moment: Moment, role: str) -> str:
    action = order.action
    allowed = [*ANYWHERE]
    if moment.kind in {"send", "receive"}:
        allowed += DETOURS
    if moment.kind in ON_MESSAGES and not _of_a_server(moment, role):
        allowed.append("cut")
    if moment.kind == "file":
        allowed.append(f"{ERRNO}NAME")
    if action in allowed or (moment.kind == "file" and errno_of(action)):
        return ""
    return f'action: "{action}" cannot be done there; allowed: {", ".join(allowed)}'


def _of_a_server(moment: Moment, role: str) -> bool:
    """Whether a message of this type may be one of a link on which this role is dialled."""
    desk = {kind.__name__ for union in (ToBuffer, FromBuffer) for kind in get_args(union)}
    return role == SUPERVISOR or (role == "buffer" and moment.what in desk)


def _of_options(order: Order, moment: Moment, role: str) -> Iterator[str]:
    if order.nth < 1 or order.count < 1 or order.life < 0:
        yield f"nth {order.nth}, count {order.count}, life {order.life}: allowed are 1, 1, 0 and above"
    if order.count > 1 and order.action not in {"drop", "duplicate", "delay"} and not errno_of(order.action):
        yield f'count: "{order.action}" happens once; write several orders'
    if (order.action in WITH_SECONDS) != bool(order.seconds) and order.action != "swap":
        yield f"seconds {order.seconds:g}: {', '.join(WITH_SECONDS)} need them, swap may have them"
    if order.seconds < 0 and order.action != "clock":
        yield f"seconds {order.seconds:g}: only a clock goes back"
    if order.peer and not (moment.kind in ON_MESSAGES and role in {SUPERVISOR, "buffer"}):
        yield "peer: only messages of the buffer and the supervisor have several; leave it out"
    if order.where and moment.kind not in ON_MESSAGES:
        yield "where: only messages have fields; leave it out"
    elif order.where:
        known = set(_fields(_types(moment, role)[moment.what]))
        unknown = [name for name in order.where if name.partition(".")[0] not in known]
        if unknown:
            yield f"where: {moment.what} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}"


def _fields(kind: type) -> Iterator[str]:
    """Names of a message's fields, and of those of the structs in its lists."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    for field in described.fields:
        yield field.name
        if isinstance(field.type, inspect.ListType) and isinstance(field.type.item_type, inspect.StructType):
            yield from (inner.name for inner in field.type.item_type.fields)
