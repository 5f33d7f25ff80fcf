"""The desk's door: its link, who may come in, and who is turned away and told why.

Whoever is in talks to the desk, and what it is sent after a commit leaves by `post`. A warning about a peer
is written only while there is room for one (`link.Complaints`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection

from asyncrl.actor.base import SCHEMA, Actor
from asyncrl.buffer.gate import check_hello
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.states import Outgoing, WorkerRecord
from asyncrl.link import Complaints, PeerGone, ServerLink, complain, shown
from asyncrl.messages.control import PROTOCOL, Hello, HelloAgain, Message, Refused, ToBuffer
from asyncrl.topology.plan import Plan

MAX_WORKERS = 4096
"""Workers at the desk at once."""
ONLY_ONE = ("source", "trainer", "evaluator")
"""Roles that a run has at most one actor of."""


class Door:
    """See the module's docstring."""

    def __init__(self, actor: Actor, *, ledger: Ledger, members: Members) -> None:
        self._actor = actor
        self._ledger = ledger
        self._members = members
        self._complain = functools.partial(complain, Complaints(), actor.log)
        self._link: ServerLink | None = None

    @property
    def server(self) -> ServerLink:
        """Where the peers dial, once it is open."""
        assert self._link is not None
        return self._link

    @property
    def is_open(self) -> bool:
        """Whether peers can dial."""
        return self._link is not None

    def open(self) -> None:
        """Listen. Raises as `asyncrl.link.bind` does."""
        self._link = self._actor.context.bind(
            self._actor.context.desk_address,
            receives=ToBuffer,
            on_malformed=functools.partial(self._complain, "malformed"),
        )

    async def welcome(self, peer: bytes, hello: Hello, now: float) -> bool:
        """Let somebody in, or tell it why not; whether it is in."""
        if reason := other_code(hello):
            await self._refuse(peer, reason)
            return False
        if problem := check_hello(hello) or stranger(
            peer, hello, plan=self._actor.plan, workers=self._ledger.fleet.workers
        ):
            self._complain("unwelcome", peer, problem)
            await self._refuse(peer, f"hello refused: {problem}")
            return False
        self._members.join(peer, hello, now)
        return True

    async def ask_who(self, peer: bytes, message: Message) -> None:
        """Somebody talks who is not in: it has to say hello first (or again, to a desk that came back)."""
        self._complain("unknown", peer, f"{type(message).__name__} without a hello")
        await self.answer(peer, HelloAgain(desk=self._actor.context.incarnation))

    async def expel(self, worker: WorkerRecord, reason: str, now: float) -> None:
        """It does not speak our language: what it holds goes to others, and it is told why."""
        self._complain("expelled", worker.peer, f"{worker.name}: {reason}")
        self._members.expel(worker, reason, now)
        await self._refuse(worker.peer, f"{worker.name} broke the protocol: {reason}")

    async def _refuse(self, peer: bytes, reason: str) -> None:
        await self.answer(peer, Refused(reason=reason))

    async def answer(self, peer: bytes, message: Message) -> None:
        """Say something that rests on no commit."""
        with contextlib.suppress(PeerGone):
            await self.server.send(peer, message)

    async def post(self, item: Outgoing, frames: list[bytes]) -> None:
        """Send what rests on a commit, once that is done."""
        try:
            await self.server.send(item.peer, item.message, frames)
            self._actor.traffic.said(item.message)
        except PeerGone:
            worker = self._ledger.fleet.workers.get(item.peer)
            self._actor.log.info(
                "unreachable", member=worker.name if worker else "?", message=type(item.message).__name__
            )

    async def close(self) -> None:
        """Close the link, once what was sent has left."""
        if self._link is not None:
            await self._link.close(linger_s=1.0)


def other_code(hello: Hello) -> str:
    """Why we would not understand each other, for its operator; empty when we do."""
    if hello.protocol == PROTOCOL and hello.schema == SCHEMA:
        return ""
    text = f"protocol {hello.protocol} schema {hello.schema}, here {PROTOCOL} and {SCHEMA}"
    return f"{hello.name} runs other code than this run ({text}); install the same version"


def stranger(peer: bytes, hello: Hello, *, plan: Plan, workers: Collection[bytes]) -> str:
    """Why a peer cannot be who it says it is, given who is here already; empty when it can."""
    if peer != f"{hello.name}.{hello.incarnation}".encode():
        return f"its connection has the identity {shown(peer)}, not its name and incarnation"
    planned = [
        process.name if number == 0 else role
        for process in plan.processes
        for number, role in enumerate(process.roles)
        if role == hello.role
    ]
    if hello.role in ONLY_ONE and hello.name not in planned:
        return f"the {hello.role} of this run is called {', '.join(planned) or 'nothing: there is none'}"
    if len(workers) >= MAX_WORKERS and peer not in workers:
        return f"{MAX_WORKERS} workers are here already"
    return ""
