"""The buffer: the one desk where every sample rests. A thin edge around the ledger and the store.

Events go into the ledger as they arrive; the commit loop pumps it, has the store write the transaction on a
thread, and only then sends what the transaction allows. While one transaction is being written, the events
of the next gather.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from asyncrl.actor.base import Actor, Context
from asyncrl.buffer.config import ledger_config
from asyncrl.buffer.desk import Desk
from asyncrl.buffer.door import Door
from asyncrl.buffer.executor import Executor
from asyncrl.buffer.ledger import TICK_S, Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.pump import Pump
from asyncrl.buffer.restore import release_all
from asyncrl.buffer.showing import Showing
from asyncrl.buffer.tuning import tune_interpreter
from asyncrl.buffer.vitals import desk_facts
from asyncrl.errors import ExitCode, NothingToTrainError, ProtocolError
from asyncrl.link import ClientLink, Delivery, ServerLink
from asyncrl.messages import control
from asyncrl.messages.control import MemberLost
from asyncrl.messages.supervision import Alarm
from asyncrl.obs.view import PhaseUpdate
from asyncrl.obs.vitals import Facts

DELIVERED_TO = ("trainer", "evaluator")
"""Roles that batches or evaluations are delivered to."""
ALARM_S = 10.0
"""How long the buffer stays when the run cannot go on, so that the supervisor can examine everybody."""


class BufferRole(Actor):
    """See the module's docstring.

    consumes: everything its peers say    waits for: peers    unblocked by: every role
    produces: acknowledgements, leases, batches, versions, after the commit they rest on
    """

    role = "buffer"
    drains_while_starting = False
    """What the others hand back while they drain has to be committed."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.ledger = Ledger(ledger_config(self.plan))
        self.members = Members(self.ledger, run_id=self.plan.topology.run.name, life=context.incarnation)
        self.pump = Pump(self.ledger)
        self.desk = Desk(self.ledger, self.members)
        self.showing = Showing(self, self.ledger)
        self.door = Door(self, ledger=self.ledger, members=self.members)
        self.executor = Executor(self, ledger=self.ledger, members=self.members)
        self._changed = asyncio.Event()
        self._told_end = False
        self._free_bytes = 0

    async def open(self) -> None:
        if self.context.hub is None:
            tune_interpreter()
        await self.compute(self.executor.open)
        if self.context.resumed:
            release_all(self.ledger, "the run was resumed", time.time())
        self.door.open()

    async def begin(self) -> None:
        await self._say(self.hello(address=self.door.server.address))

    def loops(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._read(), self._commit(), self._tick()]

    async def _read(self) -> None:
        """consumes: messages of peers    waits for: peers    produces: ledger events"""
        while True:
            delivery = await self.door.server.recv()
            await self._take(delivery)
            self._changed.set()

    def _now(self) -> float:
        """The time of an event for the records; silence is counted on a clock that nobody sets."""
        self.ledger.fleet.steady = time.monotonic()
        return time.time()

    async def _take(self, delivery: Delivery) -> None:
        now = self._now()
        message, peer = delivery.message, delivery.peer
        self.traffic.heard(message)
        if isinstance(message, control.Hello):
            if await self.door.welcome(peer, message, now) and message.role in DELIVERED_TO:
                self.executor.came(peer)
            return
        worker = self.ledger.fleet.workers.get(peer)
        if worker is None:
            await self.door.ask_who(peer, message)
            return
        self.ledger.fleet.heard_of(worker)
        try:
            self.desk.take(worker, message, delivery.frames, now)
        except ProtocolError as error:
            await self.door.expel(worker, str(error), now)
            return
        if isinstance(message, control.Heartbeat) and message.asks:
            # Whoever has missed the end hears it with its next heartbeat; it is told once it is committed.
            end = control.Finish(reason="the run has finished")
            await self.door.answer(peer, end if self._told_end else control.Alive())
        if isinstance(message, control.Want):
            self.executor.credit(message, peer=peer)

    async def on_control(self, message: Any) -> None:
        if isinstance(message, MemberLost):
            self.members.lost(message, time.time())
            self._changed.set()

    async def drain(self) -> None:
        """No new leases and batches; the supervisor stops us when the others have left."""
        self.ledger.draining = True
        self._changed.set()

    async def _tick(self) -> None:
        """produces: silences noticed, disk space watched, gauges    waits for: the clock"""
        while True:
            await asyncio.sleep(TICK_S)
            for name in self.members.tick(self._now()):
                self.log.warning("silent", member=name)
            self._free_bytes = shutil.disk_usage(self.context.run_dir).free
            self.ledger.low_on_disk = self._free_bytes < self.plan.topology.buffer.min_free_bytes
            self._changed.set()
            await self.showing.show()

    async def _commit(self) -> None:
        """consumes: the ledger's transactions    waits for: events, the disk    produces: every message"""
        while True:
            with self.idle("event"):
                await self._changed.wait()
            self._changed.clear()
            self.pump.run(time.time())
            if self.ledger.failure:
                await self._alarm(self.ledger.failure)
            transaction = self.ledger.book.take()
            if transaction.empty and not self.executor.has_work:
                continue
            began = time.monotonic()
            with self.waits("disk"):
                # Looked up here: the thread may not read what the event loop changes meanwhile.
                evaluator = self.ledger.fleet.only("evaluator")
                outgoing = await self.compute(
                    functools.partial(self.executor.execute, transaction, evaluator)
                )
            self.gauges["buffer/commit_s"] = time.monotonic() - began
            for item, frames in outgoing:
                await self.door.post(item, frames)
            for proven in self.members.blame.take():
                await self._say(proven)
            await self._maybe_end()

    async def _alarm(self, reason: str) -> None:
        """The run cannot go on: the supervisor ends it once it has seen why, else we do."""
        await self._say(Alarm(name=self.name, reason=reason))
        with self.waits("supervisor"):
            await asyncio.sleep(ALARM_S)
        raise NothingToTrainError(reason)

    def vitals(self) -> Facts:
        if not self.is_ready:
            return super().vitals()  # the ledger is being restored, on another thread
        wanted = self.plan.topology.buffer.min_free_bytes
        free = self._free_bytes
        desk = desk_facts(self.ledger, now=self._now(), free_bytes=free, min_free_bytes=wanted)
        return msgspec.structs.replace(super().vitals(), desk=desk)

    def links(self) -> dict[str, ClientLink | ServerLink]:
        return super().links() | ({"desk": self.door.server} if self.door.is_open else {})

    async def _maybe_end(self) -> None:
        if self.ledger.finished and not self._told_end:
            self._told_end = True
            self.state = "finished"
            await self.showing.show()  # how it ended; a short run may have no tick at all
            await self.tell(PhaseUpdate(phase="finished"))

    async def close(self) -> None:
        await self.door.close()
        with contextlib.suppress(RuntimeError):
            await self.compute(self.executor.close)

    def leave(self, code: ExitCode = ExitCode.FINISHED) -> None:
        super().leave(ExitCode.FINISHED if self.ledger.finished else code)
