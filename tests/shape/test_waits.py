"""Every wait on another process has a name and a deadline, or a reason here why it needs one of them only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "asyncrl"
PACKAGES = ("actor", "roles", "buffer", "engines", "train", "weights", "rewards", "run")
WAITS = {"recv", "recv_multipart", "wait", "wait_for", "get", "put", "join", "acquire", "read", "readline"}
"""Methods, and functions of asyncio, that return when somebody else has done something."""
WRITES = {"send": {"_desk", "_control", "link"}, "drain": {"stdin"}}
"""And those that wait for a reader, by what they are called on (a server's send never waits)."""

NAMES = {"waits", "side_waits", "_waits", "_side_waits"}
"""Contexts that give what is inside a name..."""
DEADLINES = {"timeout", "timeout_at"}
"""...or a deadline..."""
BOTH = {"awaiting", "patience", "_patience", "idle"}
"""...or both. `idle` ends when the link's other end has been silent for too long (`actor.waiting.Peers`)."""

FOR_EVER = {
    # The reader loops. What comes is what `idle` waits for, and silence is noticed beside them: the actors'
    # by `Peers`, the supervisor's and the buffer's by counting heartbeats.
    "actor/base.py: _read_control: self._control.recv()",
    "actor/client.py: _read_desk: self._desk.recv()",
    "actor/supervisor.py: _read: self._link.recv()",
    "roles/buffer.py: _read: self.door.server.recv()",
    # Of receivers of weights, who owe their publisher nothing.
    "weights/carriers/stream.py: serve: self._link.recv()",
    # An actor, and a run, live until they are told to leave; `Peers` ends the one, the watchdog the other.
    "actor/base.py: run: self._done.wait()",
    "actor/supervisor.py: run: self._over.wait()",
    # A process lives as long as it lives; it is killed when it is silent, and reaped here.
    "actor/children.py: _reap: handle.wait()",
    "actor/forks.py: wait: self._ended.wait()",
    "actor/launchers.py: wait: self._process.wait()",
    "actor/launchers.py: wait: asyncio.wait([self._task])",
    # Loops that have nothing to do, but whose end would end their actor.
    "roles/reward.py: _ask: asyncio.Event().wait()",
    "weights/pushes.py: serve: asyncio.Event().wait()",
    # What a child writes, as long as it lives; `kill` waits for the rest for at most LAST_WORDS_S.
    "rewards/process.py: _keep_output: reader.read(READ_BYTES)",
    # An attached process works until its run ends; beside it `_watch` asks, with deadlines, whether it has.
    "run/remote.py: attach: asyncio.wait([living, watching], return_when=asyncio.FIRST_COMPLETED)",
}
"""Where waiting for ever is right: "file: function: what is awaited". Every entry has its reason above it."""

OF_OUR_OWN = {
    # Own samples end: each of them waits for an engine, or for an acknowledgement that has a deadline.
    "roles/generator.py: _count_idle: self.leased.idle.wait()",
    "roles/generator.py: _credit: self.leased.room.wait()",
    "actor/reports.py: write: self._changed.wait()",
    # Getting ready: loading, and a welcome that has a deadline.
    "actor/base.py: _started: asyncio.wait([starting, leaving], return_when=asyncio.FIRST_COMPLETED)",
    "actor/base.py: _drain: self._ready.wait()",
    # Own decoding: the engine's thread ends every request, also when it fails.
    "engines/embedded.py: generate: stream.get()",
    "engines/scripted.py: _swap: self._idle.wait()",
    # Own training, on the compute thread.
    "train/deliveries.py: fetch: self._prepared.put(Job(part.batch, part.recorded_digest, prepared))",
    "weights/pushes.py: write: self._jobs.get()",
    # Whoever has a child gives it back at its own deadline.
    "rewards/sandbox.py: _child: self._free.get()",
}
"""Not on another process: on a task or thread of the same one, which ends, or waits with a deadline."""

IN_WORDS = {
    # What the supervisor waits for is in the reason that it gives up with.
    (
        "actor/supervisor.py: _start_all: "
        "asyncio.wait(events, timeout=START_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)"
    ),
    # Who has not ended by then is killed; who has not answered is named mute in the report.
    "actor/children.py: wait_all: handle.wait()",
    "actor/children.py: _reap: asyncio.wait_for(self._said[member.name].wait(), LAST_WORDS_S)",
    "actor/examine.py: _ask: self._answered.wait()",
    # What a supervisor that stands still does not read is dropped; its silence has a name.
    "actor/base.py: _say: self._control.send(message)",
    # Commands: their error says who did not answer.
    "run/remote.py: ask: link.send(message)",
    "run/remote.py: ask: link.recv()",
    "run/remote.py: attach: asyncio.wait([living], timeout=LEAVE_S)",
}
"""Waits with a deadline outside of the loops whose time has names: what they waited for is told in words."""

BY_CALLER = {
    # The first message on a link, which has room for a thousand.
    "actor/base.py: _dial_control: self._control.send(self.hello())",
    # Within the deadline and the name of the one function that calls it: `begin`, `fetch` (in the
    # generator's "weights"), `Child._receive` (in "import" and "reward").
    "actor/client.py: _first_answer: asyncio.wait([receiving], timeout=every_s)",
    "engines/swap.py: _fetch: asyncio.wait((fetching, leaving), return_when=asyncio.FIRST_COMPLETED)",
    "engines/swap.py: _fetch: asyncio.wait([fetching])",
    "weights/carriers/stream.py: run: link.recv()",
    "weights/carriers/stream.py: _ask: link.send(request)",
    "rewards/process.py: _read: self._process.stdout.read(READ_BYTES)",
}
"""Waits that get both from around their function, or that cannot last."""

ALLOWED = FOR_EVER | OF_OUR_OWN | IN_WORDS | BY_CALLER


class Bounds(NamedTuple):
    """What the contexts around a wait give it."""

    name: bool = False
    deadline: bool = False


def name_of(node: ast.expr) -> str:
    """The last name of what is called: `recv` of `self._link.recv()`."""
    called = node.func if isinstance(node, ast.Call) else node
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def is_wait(call: ast.Call) -> bool:
    """Whether this returns only when somebody else has done something."""
    name = name_of(call)
    if name in WRITES:
        return isinstance(call.func, ast.Attribute) and name_of(call.func.value) in WRITES[name]
    return name in WAITS


def within(node: ast.AST, bounds: Bounds) -> Bounds:
    """The bounds inside a `with`, given those around it."""
    if not isinstance(node, ast.With | ast.AsyncWith):
        return bounds
    calls = (item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call))
    names = {name_of(call) for call in calls}
    return Bounds(
        name=bounds.name or bool(names & (NAMES | BOTH)),
        deadline=bounds.deadline or bool(names & (DEADLINES | BOTH)),
    )


def has_deadline(call: ast.Call) -> bool:
    """Whether the call itself ends in time: asyncio.wait(..., timeout=)."""
    return any(word.arg in {"timeout", "deadline_s"} for word in call.keywords)


def unbounded(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """(line, entry as in ALLOWED) of every wait in a file that lacks a name or a deadline."""
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(package).as_posix()

    def visit(node: ast.AST, function: str, bounds: Bounds) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
            function, bounds = node.name, Bounds()  # it runs when it is called, not where it is written
        elif isinstance(node, ast.Await) and isinstance(node.value, ast.Call) and is_wait(node.value):
            call = node.value
            if not (bounds.name and (bounds.deadline or has_deadline(call))):
                yield node.lineno, f"{where}: {function}: {ast.unparse(call)}"
        bounds = within(node, bounds)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, bounds)

    yield from visit(ast.parse(text, filename=str(path)), "", Bounds())


def test_every_wait_has_a_name_and_a_deadline_or_a_reason() -> None:
    found = [
        (f"{path.relative_to(ROOT)}:{line}", entry)
        for package in PACKAGES
        for path in sorted((PACKAGE / package).rglob("*.py"))
        for line, entry in unbounded(path)
    ]
    assert [(place, entry) for place, entry in found if entry not in ALLOWED] == []
    assert ALLOWED - {entry for _, entry in found} == set(), "these are not there any more"


def test_a_wait_that_lacks_one_is_found(tmp_path: Path) -> None:
    """The check itself: it sees through neither a nested function nor an unrelated `with`."""
    code = """
async def good(self):
    with self.waits("x"):
        async with asyncio.timeout(3):
            await self.queue.get()
        await asyncio.wait([task], timeout=3)
    async with awaiting(self.waits, "x", deadline_s=3):
        await self._desk.send(message)
    with self.idle("x"):
        await self.event.wait()
    await self._server.send(peer, message)

async def bad(self):
    await self.event.wait()
    with self.lock:
        await link.recv()
    with self.waits("x"):
        await self.event.wait()
        async def later():
            await self.queue.put(1)
    async with asyncio.timeout(3):
        await self._desk.send(message)
    await asyncio.wait([task], timeout=3)
"""
    module = tmp_path / "nothing.py"
    module.write_text(code, encoding="utf-8")
    assert [entry for _, entry in unbounded(module, tmp_path)] == [
        "nothing.py: bad: self.event.wait()",
        "nothing.py: bad: link.recv()",
        "nothing.py: bad: self.event.wait()",
        "nothing.py: later: self.queue.put(1)",
        "nothing.py: bad: self._desk.send(message)",
        "nothing.py: bad: asyncio.wait([task], timeout=3)",
    ]
