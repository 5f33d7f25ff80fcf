"""The buffer: the one desk where every sample rests. A thin edge around the ledger and the store.

Events go into the ledger as they arrive; the commit loop pumps it, has the store write the transaction on a
thread, and only then sends what the transaction allows. While one transaction is being written, the events
of the next gather.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import shutil
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from asyncrl.actor.base import SCHEMA, Actor, Context
from asyncrl.buffer.config import ledger_config
from asyncrl.buffer.delivery import Courier
from asyncrl.buffer.desk import Desk
from asyncrl.buffer.ledger import TICK_S, Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.pump import Pump
from asyncrl.buffer.restore import release_all, restore
from asyncrl.buffer.settled import settled
from asyncrl.buffer.states import Outgoing, Transaction
from asyncrl.buffer.store import Store
from asyncrl.buffer.vitals import desk_facts
from asyncrl.errors import ExitCode, RunError
from asyncrl.link import ClientLink, Delivery, PeerGone, ServerLink, bind
from asyncrl.messages import control
from asyncrl.messages.control import PROTOCOL, Kind, MemberLost, Refused, ToBuffer
from asyncrl.messages.sample import Settled
from asyncrl.messages.supervision import Alarm
from asyncrl.obs.log import group_line
from asyncrl.obs.view import PhaseUpdate, QueueUpdate
from asyncrl.obs.vitals import Facts

SWITCH_S = 0.0005
"""Longest wait of one of the buffer's two threads for the other, in its own process."""
ALARM_S = 10.0
"""How long the buffer stays when the run cannot go on, so that the supervisor can examine everybody."""
GC_THRESHOLD = (50_000, 20, 50)
"""When the cycle collector runs there; Python's own default is (700, 10, 10)."""


class BufferRole(Actor):
    """See the module's docstring.

    consumes: everything its peers say    waits for: peers    unblocked by: every role
    produces: acknowledgements, leases, batches, versions, after the commit they rest on
    """

    role = "buffer"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.ledger = Ledger(ledger_config(self.plan))
        self.members = Members(self.ledger, run_id=self.plan.topology.run.name)
        self.pump = Pump(self.ledger)
        self.desk = Desk(self.ledger, self.members)
        self._changed = asyncio.Event()
        self._link: ServerLink | None = None
        self._store: Store | None = None
        self._courier: Courier | None = None
        self._told_end = False
        self._free_bytes = 0

    @property
    def store(self) -> Store:
        """The open store."""
        assert self._store is not None
        return self._store

    async def open(self) -> None:
        options = self.plan.topology.buffer
        if self.context.hub is None:
            # The store's thread gives the interpreter's lock up for every call into SQLite, and a busy loop
            # hands it back only after this long (5 ms by default): commits would crawl under load.
            sys.setswitchinterval(SWITCH_S)
            # None of the many small records is part of a cycle: looking for one again and again is lost time.
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLD)
        self._store = await self.compute(
            lambda: Store(self.context.run_dir, segment_bytes=options.segment_bytes)
        )
        await self.compute(lambda: restore(self.ledger, self.members, self.store))
        if self.context.resumed:
            release_all(self.ledger, "the run was resumed", time.time())
        self._courier = Courier(self.store, window_bytes=options.window_bytes)
        self._link = bind(
            self.context.desk_address,
            receives=ToBuffer,
            security=self.context.key,
            hub=self.context.hub,
            on_malformed=lambda peer, why: self.log.warning(
                "malformed", peer=peer.decode(errors="replace"), why=why
            ),
        )

    async def begin(self) -> None:
        assert self._link is not None
        await self._say(self.hello(address=self._link.address))

    def loops(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._read(), self._commit(), self._tick()]

    async def _read(self) -> None:
        """consumes: messages of peers    waits for: peers    produces: ledger events"""
        assert self._link is not None
        while True:
            delivery = await self._link.recv()
            await self._take(delivery)
            self._changed.set()

    async def _take(self, delivery: Delivery) -> None:
        now = time.time()
        message, peer = delivery.message, delivery.peer
        self.traffic.heard(message)
        if isinstance(message, control.Hello):
            await self._hello(peer, message, now)
            return
        worker = self.ledger.fleet.workers.get(peer)
        if worker is None:
            await self._refuse(
                peer, "say hello first: this desk does not know you (it may have been restarted)"
            )
            return
        worker.last_seen = now
        if isinstance(message, control.Want) and message.kind is Kind.TRAIN and self._courier is not None:
            self._courier.credit(message.num_bytes)
        self.desk.take(worker, message, delivery.frames, now)

    async def _hello(self, peer: bytes, hello: control.Hello, now: float) -> None:
        if hello.protocol != PROTOCOL or hello.schema != SCHEMA:
            text = f"protocol {hello.protocol} schema {hello.schema}, here {PROTOCOL} and {SCHEMA}"
            await self._refuse(
                peer, f"{hello.name} runs other code than this run ({text}); install the same version"
            )
            return
        self.members.join(peer, hello, now)

    async def _refuse(self, peer: bytes, reason: str) -> None:
        assert self._link is not None
        with contextlib.suppress(PeerGone):
            await self._link.send(peer, Refused(reason=reason))

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
            for name in self.members.tick(time.time()):
                self.log.warning("silent", member=name)
            self._free_bytes = shutil.disk_usage(self.context.run_dir).free
            self.ledger.low_on_disk = self._free_bytes < self.plan.topology.buffer.min_free_bytes
            self._changed.set()
            await self._show()

    async def _show(self) -> None:
        counts = self.ledger.counts()
        used = counts.pop("tickets_used")
        free = counts.pop("tickets_free")
        self.gauges |= {f"queue/{state}": float(n) for state, n in counts.items()}
        self.gauges |= {"queue/tickets_used": used, "queue/tickets_free": free}
        for reason in Settled:
            self.gauges[f"ledger/settled/{reason}"] = self.ledger.book.totals[f"settled.{reason}.groups"]
        self.metrics.write(self.gauges, step=self.ledger.batches.num_trained)
        await self.tell(
            QueueUpdate(counts=counts, tickets_used=used, tickets_total=self.ledger.batches.tickets)
        )

    async def _commit(self) -> None:
        """consumes: the ledger's transactions    waits for: events, the disk    produces: every message"""
        while True:
            with self.waits("event"):
                await self._changed.wait()
            self._changed.clear()
            self.pump.run(time.time())
            if self.ledger.failure:
                await self._alarm(self.ledger.failure)
            transaction = self.ledger.book.take()
            if transaction.empty and not self._courier_has_work():
                continue
            began = time.monotonic()
            with self.waits("disk"):
                outgoing = await self.compute(functools.partial(self._execute, transaction))
            self.gauges["buffer/commit_s"] = time.monotonic() - began
            for item, frames in outgoing:
                await self._post(item, frames)
            await self._maybe_end()

    async def _alarm(self, reason: str) -> None:
        """The run cannot go on: the supervisor ends it once it has seen why, else we do."""
        await self._say(Alarm(name=self.name, reason=reason))
        with self.waits("supervisor"):
            await asyncio.sleep(ALARM_S)
        raise RunError(reason)

    def vitals(self) -> Facts:
        wanted = self.plan.topology.buffer.min_free_bytes
        free = self._free_bytes
        desk = desk_facts(self.ledger, now=time.time(), free_bytes=free, min_free_bytes=wanted)
        return msgspec.structs.replace(super().vitals(), desk=desk)

    def links(self) -> dict[str, ClientLink | ServerLink]:
        return super().links() | ({} if self._link is None else {"desk": self._link})

    def _courier_has_work(self) -> bool:
        return self._courier is not None and self._courier.has_work

    def _execute(self, transaction: Transaction) -> list[tuple[Outgoing, list[bytes]]]:
        """On the compute thread: write, then read what the messages carry."""
        assert self._courier is not None
        self.store.write(transaction)
        for group in settled(self.store.db, transaction):
            group_line(
                self.log,
                group_id=group.group_id,
                settled=group.reason,
                lane=group.lane,
                issue_version=group.version if group.version >= 0 else None,
                num_samples=group.num_samples,
                num_tokens=group.num_tokens,
                step=group.batch + 1 if group.batch >= 0 else None,
                detail=group.note,
            )
        if any(name == "checkpoint" for name, _ in transaction.rows):
            self._prune()
        outgoing = [(item, self.store.read(item.bodies)) for item in transaction.sends]
        for peer, batch in transaction.deliver:
            self._courier.queue_batch(peer, batch)
        evaluator = self.ledger.fleet.only("evaluator")
        if evaluator is not None:
            for version, incarnation in transaction.evaluated:
                self._courier.queue_evaluation(evaluator.peer, version, incarnation)
        return outgoing + self._courier.take()

    def _prune(self) -> None:
        """A checkpoint was committed: bodies that no kept checkpoint needs may go."""
        keep = self.plan.topology.trainer.keep_checkpoints
        steps = sorted(self.members.checkpoints)[-keep:]
        if self.plan.topology.buffer.keep == "checkpoint" and len(steps) == keep:
            self.store.prune(steps[0])

    async def _post(self, item: Outgoing, frames: list[bytes]) -> None:
        assert self._link is not None
        try:
            await self._link.send(item.peer, item.message, frames)
            self.traffic.said(item.message)
        except PeerGone:
            worker = self.ledger.fleet.workers.get(item.peer)
            self.log.info(
                "unreachable", member=worker.name if worker else "?", message=type(item.message).__name__
            )

    async def _maybe_end(self) -> None:
        if self.ledger.finished and not self._told_end:
            self._told_end = True
            self.state = "finished"
            await self.tell(PhaseUpdate(phase="finished"))

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close(linger_s=1.0)
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                await self.compute(self._store.close)

    def leave(self, code: ExitCode = ExitCode.FINISHED) -> None:
        super().leave(ExitCode.FINISHED if self.ledger.finished else code)
