"""No wait on another process is unbounded and nameless: it has a name, or a deadline, or a reason here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "asyncrl"
PACKAGES = ("actor", "roles", "weights", "rewards", "run")
WAITS = {"recv", "recv_multipart", "wait", "get", "put", "join", "acquire", "read", "readline", "drain"}
"""Methods, and functions of asyncio, that return when somebody else has done something."""
BOUNDED = {"waits", "side_waits", "_waits", "_side_waits", "timeout", "timeout_at", "awaiting", "_patience"}
"""Contexts that give what is inside a name or a deadline."""

ALLOWED = {
    # The reader loops: messages come when they come, and whether their sender lives is told by heartbeats.
    "actor/base.py: _read_control: self._control.recv()",
    "actor/client.py: _read_desk: self._desk.recv()",
    "actor/supervisor.py: _read: self._link.recv()",
    "roles/buffer.py: _read: self._link.recv()",
    "weights/carriers/stream.py: serve: self._link.recv()",
    # An actor, and a run, live until they are told to leave; the supervisor's watchdog bounds the run.
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
    # Own samples end: each of them waits for an engine, or for an acknowledgement that has a deadline.
    "roles/generator.py: _count_idle: self._idle.wait()",
    # Timed by the one function that calls it: `fetch`, and `Child._receive`.
    "weights/carriers/stream.py: run: link.recv()",
    "rewards/process.py: _read: self._process.stdout.read(READ_BYTES)",
    # What a child writes, as long as it lives; `kill` waits for the rest for at most LAST_WORDS_S.
    "rewards/process.py: _keep_output: reader.read(READ_BYTES)",
    # An attached process works until its run ends; beside it `_watch` asks, with deadlines, whether it has.
    "run/remote.py: attach: asyncio.wait([living, watching], return_when=asyncio.FIRST_COMPLETED)",
}
"""Where waiting for ever is right: "file: function: what is awaited". Every entry has its reason above it."""


def name_of(node: ast.expr) -> str:
    """The last name of what is called: `recv` of `self._link.recv()`."""
    called = node.func if isinstance(node, ast.Call) else node
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def is_bounded(node: ast.AST) -> bool:
    """Whether a `with` gives its block a name or a deadline."""
    return isinstance(node, ast.With | ast.AsyncWith) and any(
        isinstance(item.context_expr, ast.Call) and name_of(item.context_expr) in BOUNDED
        for item in node.items
    )


def has_deadline(call: ast.Call) -> bool:
    """Whether the call itself ends in time: asyncio.wait(..., timeout=)."""
    return any(word.arg in {"timeout", "deadline_s"} for word in call.keywords)


def nameless(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """(line, entry as in ALLOWED) of every wait in a file that has neither a name nor a deadline."""
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(package).as_posix()

    def visit(node: ast.AST, function: str, *, bounded: bool) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
            function, bounded = node.name, False  # a function runs when it is called, not where it is written
        elif is_bounded(node):
            bounded = True
        elif isinstance(node, ast.Await) and isinstance(node.value, ast.Call) and not bounded:
            call = node.value
            if name_of(call) in WAITS and not has_deadline(call):
                yield node.lineno, f"{where}: {function}: {ast.unparse(call)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, bounded=bounded)

    yield from visit(ast.parse(text, filename=str(path)), "", bounded=False)


def test_every_wait_has_a_name_a_deadline_or_a_reason() -> None:
    found = [
        (f"{path.relative_to(ROOT)}:{line}", entry)
        for package in PACKAGES
        for path in sorted((PACKAGE / package).rglob("*.py"))
        for line, entry in nameless(path)
    ]
    assert [(place, entry) for place, entry in found if entry not in ALLOWED] == []
    assert ALLOWED - {entry for _, entry in found} == set(), "these are not there any more"


def test_a_nameless_wait_is_found(tmp_path: Path) -> None:
    """The check itself: it sees through neither a nested function nor an unrelated `with`."""
    code = """
async def good(self):
    with self.waits("x"):
        await self.queue.get()
    async with asyncio.timeout(3):
        await self.event.wait()
    await asyncio.wait([task], timeout=3)
    async with awaiting(self.waits, "x", deadline_s=3):
        await self.event.wait()

async def bad(self):
    await self.event.wait()
    with self.lock:
        await link.recv()
    with self.waits("x"):
        async def later():
            await self.queue.put(1)
"""
    module = tmp_path / "nothing.py"
    module.write_text(code, encoding="utf-8")
    assert [entry for _, entry in nameless(module, tmp_path)] == [
        "nothing.py: bad: self.event.wait()",
        "nothing.py: bad: link.recv()",
        "nothing.py: later: self.queue.put(1)",
    ]
