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
from asyncrl.buffer import deaths
from asyncrl.buffer.config import ledger_config
from asyncrl.buffer.delivery import Courier, in_pieces
from asyncrl.buffer.desk import Desk
from asyncrl.buffer.gate import check_hello
from asyncrl.buffer.ledger import TICK_S, Ledger
from asyncrl.buffer.lengths import tokens_dropped
from asyncrl.buffer.members import Members
from asyncrl.buffer.pump import Pump
from asyncrl.buffer.restore import release_all, restore
from asyncrl.buffer.settled import settled
from asyncrl.buffer.states import Outgoing, Transaction, WorkerRecord
from asyncrl.buffer.store import Store
from asyncrl.buffer.vitals import desk_facts
from asyncrl.errors import ExitCode, NothingToTrainError, ProtocolError
from asyncrl.link import (
    ClientLink,
    Complaints,
    Delivery,
    PeerGone,
    ServerLink,
    complain,
    shown,
)
from asyncrl.messages import control
from asyncrl.messages.control import PROTOCOL, Kind, MemberLost, Refused, ToBuffer
from asyncrl.messages.sample import Settled
from asyncrl.messages.supervision import Alarm
from asyncrl.obs.log import group_line
from asyncrl.obs.view import NoteUpdate, PhaseUpdate, QueueUpdate
from asyncrl.obs.vitals import Facts

SWITCH_S = 0.0005
"""Longest wait of one of the buffer's two threads for the other, in its own process."""
MAX_WORKERS = 4096
"""Workers at the desk at once."""
DELIVERED = (Kind.TRAIN, Kind.EVALUATE)
"""Wants that give back bytes of what the courier delivers."""
ONLY_ONE = ("source", "trainer", "evaluator")
"""Roles that a run has at most one actor of."""
OLD = 2
"""A group is old that is unfinished after so many times max_staleness + 1 batches."""
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
    drains_while_starting = False
    """What the others hand back while they drain has to be committed."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.ledger = Ledger(ledger_config(self.plan))
        self.members = Members(self.ledger, run_id=self.plan.topology.run.name, life=context.incarnation)
        self.pump = Pump(self.ledger)
        self.desk = Desk(self.ledger, self.members)
        self._complain = functools.partial(complain, Complaints(), self.log)
        self._changed = asyncio.Event()
        self._link: ServerLink | None = None
        self._store: Store | None = None
        self._courier: Courier | None = None
        self._told_end = False
        self._starving = ""
        self._came: list[bytes] = []
        """Who came since the last commit and is delivered to: what was on its way to them is not for now."""
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
        self._link = self.context.bind(
            self.context.desk_address,
            receives=ToBuffer,
            on_malformed=functools.partial(self._complain, "malformed"),
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

    def _now(self) -> float:
        """The time of an event for the records; silence is counted on a clock that nobody sets."""
        self.ledger.fleet.steady = time.monotonic()
        return time.time()

    async def _take(self, delivery: Delivery) -> None:
        now = self._now()
        message, peer = delivery.message, delivery.peer
        self.traffic.heard(message)
        if isinstance(message, control.Hello):
            await self._hello(peer, message, now)
            return
        worker = self.ledger.fleet.workers.get(peer)
        if worker is None:
            self._complain("unknown", peer, f"{type(message).__name__} without a hello")
            await self._answer(peer, control.HelloAgain(desk=self.context.incarnation))
            return
        self.ledger.fleet.heard_of(worker)
        try:
            self.desk.take(worker, message, delivery.frames, now)
        except ProtocolError as error:
            await self._expel(worker, str(error), now)
            return
        if isinstance(message, control.Heartbeat) and message.asks:
            await self._answer(peer, control.Alive())
        if isinstance(message, control.Want) and message.kind in DELIVERED and self._courier is not None:
            self._courier.credit(message.num_bytes, peer=peer)

    async def _expel(self, worker: WorkerRecord, reason: str, now: float) -> None:
        """It does not speak our language: what it holds goes to others, and it is told why."""
        self._complain("expelled", worker.peer, f"{worker.name}: {reason}")
        self.members.expel(worker, reason, now)
        await self._refuse(worker.peer, f"{worker.name} broke the protocol: {reason}")

    async def _hello(self, peer: bytes, hello: control.Hello, now: float) -> None:
        if hello.protocol != PROTOCOL or hello.schema != SCHEMA:
            text = f"protocol {hello.protocol} schema {hello.schema}, here {PROTOCOL} and {SCHEMA}"
            reason = f"{hello.name} runs other code than this run ({text}); install the same version"
            await self._answer(peer, Refused(reason=reason))
            return
        problem = check_hello(hello) or self._stranger(peer, hello)
        if problem:
            self._complain("unwelcome", peer, problem)
            await self._refuse(peer, f"hello refused: {problem}")
            return
        self.members.join(peer, hello, now)
        if hello.role in {"trainer", "evaluator"}:
            self._came.append(peer)

    def _stranger(self, peer: bytes, hello: control.Hello) -> str:
        """Why this peer cannot be who it says it is; empty when it can."""
        if peer != f"{hello.name}.{hello.incarnation}".encode():
            return f"its connection has the identity {shown(peer)}, not its name and incarnation"
        planned = [
            process.name if number == 0 else role
            for process in self.plan.processes
            for number, role in enumerate(process.roles)
            if role == hello.role
        ]
        if hello.role in ONLY_ONE and hello.name not in planned:
            return f"the {hello.role} of this run is called {', '.join(planned) or 'nothing: there is none'}"
        if len(self.ledger.fleet.workers) >= MAX_WORKERS and peer not in self.ledger.fleet.workers:
            return f"{MAX_WORKERS} workers are here already"
        return ""

    async def _refuse(self, peer: bytes, reason: str) -> None:
        await self._answer(peer, Refused(reason=reason))

    async def _answer(self, peer: bytes, message: control.Message) -> None:
        """Say something that rests on no commit."""
        assert self._link is not None
        with contextlib.suppress(PeerGone):
            await self._link.send(peer, message)

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
            await self._show()

    async def _show(self) -> None:
        counts = self.ledger.counts()
        used = counts.pop("tickets_used")
        free = counts.pop("tickets_free")
        self.gauges |= {f"queue/{state}": float(n) for state, n in counts.items()}
        self.gauges |= {"queue/tickets_used": used, "queue/tickets_free": free}
        for reason in Settled:
            self.gauges[f"ledger/settled/{reason}"] = self.ledger.book.totals[f"settled.{reason}.groups"]
        self.gauges |= deaths.metrics(self.ledger.book.totals)
        await self._show_lengths()
        self.metrics.write(self.gauges, step=self.ledger.batches.num_trained)
        await self.tell(
            QueueUpdate(
                counts=counts,
                tickets_used=used,
                tickets_total=self.ledger.batches.tickets,
                evaluated=self.ledger.book.totals[f"settled.{Settled.EVALUATED}.groups"],
            )
        )

    async def _show_lengths(self) -> None:
        """Gauges of lengths and of tokens thrown away; a warning when long answers begin to starve."""
        ledger = self.ledger
        oldest = ledger.book.oldest_unfinished()
        age = 0 if oldest is None else max(0, ledger.batches.next_batch - oldest.version)
        self.gauges |= ledger.lengths.metrics()
        self.gauges["lengths/oldest_group_batches"] = age
        self.gauges["lengths/oldest_group_s"] = 0.0 if oldest is None else time.time() - oldest.created_at
        dropped = tokens_dropped(ledger.book.totals)
        self.gauges |= {f"tokens_dropped/{reason}": tokens for reason, tokens in dropped.items()}
        words = ledger.lengths.concern(
            oldest_batches=age,
            patience=OLD * (ledger.config.max_staleness + 1),
            on_straggler=ledger.config.on_straggler,
        )
        if words and not self._starving:
            self.log.warning(words)
            await self.tell(NoteUpdate(text=words))
        elif self._starving and not words:
            self.log.info("long answers are trained again as they come")
        self._starving = words

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
            if transaction.empty and not self._courier_has_work():
                continue
            began = time.monotonic()
            with self.waits("disk"):
                # Looked up here: the thread may not read what the event loop changes meanwhile.
                evaluator = self.ledger.fleet.only("evaluator")
                outgoing = await self.compute(functools.partial(self._execute, transaction, evaluator))
            self.gauges["buffer/commit_s"] = time.monotonic() - began
            for item, frames in outgoing:
                await self._post(item, frames)
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
        return super().links() | ({} if self._link is None else {"desk": self._link})

    def _courier_has_work(self) -> bool:
        return self._courier is not None and self._courier.has_work

    def _execute(
        self, transaction: Transaction, evaluator: WorkerRecord | None
    ) -> list[tuple[Outgoing, list[bytes]]]:
        """On the compute thread: write, then read what the messages carry."""
        assert self._courier is not None
        came, self._came = self._came, []
        for peer in came:
            self._courier.forget(peer)
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
        outgoing = [
            piece for item in transaction.sends for piece in in_pieces(item, self.store.read(item.bodies))
        ]
        for peer, batch in transaction.deliver:
            self._courier.queue_batch(peer, batch)
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
            await self._show()  # how it ended; a short run may have no tick at all
            await self.tell(PhaseUpdate(phase="finished"))

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close(linger_s=1.0)
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                await self.compute(self._store.close)

    def leave(self, code: ExitCode = ExitCode.FINISHED) -> None:
        super().leave(ExitCode.FINISHED if self.ledger.finished else code)
