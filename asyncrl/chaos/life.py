"""One life of an actor under orders: counts the moments as they come, and carries out what is ordered.

Invariants: an order fires once per run, as a line of the journal says from before it is done; what it does to
the process is done inside the call that the moment is about.
"""

from __future__ import annotations

import fnmatch
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.chaos import process
from asyncrl.chaos.journal import Journal, read_journal
from asyncrl.chaos.orders import DETOURS, Moment, Order, check, errno_of, matches, moment_of
from asyncrl.errors import ConfigError, RunError
from asyncrl.topology.plan import Plan

ORDERS = "ASYNCRL_ORDERS"
"""Environment variable with the path of the file of orders; without it this package does nothing."""
_SHOWN = 300
"""Characters of a message in the journal."""


class _Standing:
    """An order that may still fire in this life."""

    def __init__(self, index: int, order: Order) -> None:
        self.index, self.order = index, order
        self.moment = moment_of(order.at)
        self.pattern = re.compile(fnmatch.translate(self.moment.glob))
        self._seen = 0
        """Matching moments so far."""
        self._fired = 0

    def comes(self, *, taken: bool = False) -> bool:
        """A matching moment has come; whether it is one to act on, unless it is taken already."""
        self._seen += 1
        due = not taken and self._seen >= self.order.nth and self._fired < self.order.count
        self._fired += due
        return due


class Life:
    """See the module's docstring. Files may be touched on any thread, messages on the event loop's alone."""

    def __init__(self, name: str, *, orders: Sequence[Order], run_dir: Path, incarnation: str) -> None:
        """Write the birth down and take the orders that are left; `orders` are all of the file."""
        past = read_journal(run_dir)
        done = {line["order"] for line in past if "order" in line}
        self.name, self.incarnation = name, incarnation
        self.number = 1 + sum(line.get("born") == name for line in past)
        self._journal = Journal(run_dir)
        self._journal.write({"born": name, "life": self.number, "incarnation": incarnation})
        self._lock = threading.Lock()
        self._standing: dict[tuple[str, str], list[_Standing]] = {}
        for index, order in enumerate(orders):
            if order.actor == name and index not in done and order.life in {0, self.number}:
                standing = _Standing(index, order)
                self._standing.setdefault(standing.moment[:2], []).append(standing)
        events = {what for kind, what in self._standing if kind == "file"}
        if events:
            process.watch_files(events, self._touched)
        for standing in self._standing.get(("start", ""), []):
            if standing.comes():
                self._carry_out(standing, "")

    def at(
        self, kind: str, message: Any, peer: bytes = b"", *, cut: Callable[[], None] | None = None
    ) -> Order | None:
        """A moment of a message has come. Returns the order to send it on a detour, if there is one.

        At most one order at a time reroutes a message; another one for the same takes the next. Anything
        else is done here, in the order of the file, with `cut` where the link has a connection to lose.
        May not return at all, or raise RunError, as ordered.
        """
        standing = self._standing.get((kind, type(message).__name__))
        if not standing:
            return None
        detour: Order | None = None
        name = _member(peer)
        for item in standing:
            reroutes = item.order.action in DETOURS
            if not matches(item.order, message, name) or not item.comes(
                taken=reroutes and detour is not None
            ):
                continue
            self._carry_out(item, f"{name} {message!r}"[:_SHOWN].strip())
            if item.order.action == "cut" and cut is not None:
                cut()
            detour = item.order if reroutes else detour
        return detour

    def _touched(self, event: str, path: str) -> None:
        with self._lock:
            due = [
                item for item in self._standing[("file", event)] if item.pattern.match(path) and item.comes()
            ]
        for item in due:
            self._carry_out(item, path)

    def _carry_out(self, standing: _Standing, about: str) -> None:
        order = standing.order
        self._journal.write(
            {
                "order": standing.index, "actor": self.name, "incarnation": self.incarnation,
                "life": self.number, "moment": order.at, "action": order.action, "message": about,
            }
        )  # fmt: skip
        number = errno_of(order.action)
        if number:
            raise OSError(number, os.strerror(number), about)
        self._act(order, standing.moment)

    def _act(self, order: Order, moment: Moment) -> None:
        """Do it to the process; what concerns a message is the link's to do."""
        if moment.kind == "sent" and order.action in {"kill", "stop"}:
            process.hold(process.FLUSH_S)
        match order.action:
            case "kill":
                process.end()
            case "stop":
                process.stop()
            case "freeze":
                process.hold(order.seconds)
            case "clock":
                process.move_clock(order.seconds)
            case "exit":
                raise RunError(f"{self.name}: ordered to fail at {order.at}")


def begin_life(
    name: str, *, plan: Plan, run_dir: Path, incarnation: str = "", in_process: bool = False
) -> Life | None:
    """The orders of one actor, from now on; None where the environment names none.

    Raises:
        ConfigError: the file cannot be read, or has an order that no run of this plan can carry out.
        RunError: an order says so ("exit" at "start").
    """
    source = os.environ.get(ORDERS, "")
    if not source:
        return None
    try:
        orders = msgspec.json.decode(Path(source).read_bytes(), type=list[Order])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{source}: no list of orders: {error}; write one (see asyncrl.chaos), or unset {ORDERS}"
        ) from error
    check(orders, plan, source=source, in_process=in_process)
    return Life(name, orders=orders, run_dir=run_dir, incarnation=incarnation)


def _member(peer: bytes) -> str:
    """The name in an identity: what is before the last dot."""
    text = peer.decode(errors="backslashreplace")
    return text.rpartition(".")[0] or text
