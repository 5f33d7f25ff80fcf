"""The buffer's process in virtual time: the real ledger, pump, members, store, courier and restore.

It drives them as the buffer's role does: events go in as they arrive, one commit is under way at a time and
takes its time, and what rests on it leaves after it. It can die at any moment, before a commit or between a
commit and its messages; then everything in memory is gone and the next life is rebuilt from the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncrl.buffer.delivery import Courier
from asyncrl.buffer.desk import Desk
from asyncrl.buffer.gate import check_hello
from asyncrl.buffer.ledger import TICK_S, Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.pump import Pump
from asyncrl.buffer.restore import release_all, restore
from asyncrl.buffer.states import Transaction
from asyncrl.buffer.store import Store
from asyncrl.errors import ProtocolError
from asyncrl.messages import control
from asyncrl.messages.control import Kind
from asyncrl.sim.bodies import InvariantError
from asyncrl.sim.checks import require
from asyncrl.sim.peers import Peer, Stage

EPOCH_S = 1_700_000_000.0
"""What the desk's clock shows at the beginning."""
KEEP_CHECKPOINTS = 2
PUMP_TICKS = 8
"""The role pumps at every tick. Here an event that forgets to is to show as a delay, and costs time."""

Post = Callable[[bytes, Any, list[bytes]], None]


class SimulatedDesk:
    """See the module's docstring."""

    def __init__(self, run_dir: Path, stage: Stage, post: Post, present: Callable[[], list[Peer]]) -> None:
        """`post` sends a message to a peer; `present` names the actors that are heard of."""
        self.run_dir, self.stage = run_dir, stage
        self._post, self._present = post, present
        self.life = 0
        self.up = False
        self.jumped_s = 0.0
        """What was added to its clock."""
        self._ticks = 0
        self.num_commits = self.num_restores = 0
        self._next_full = stage.scenario.check_every
        self.open(resumed=False)
        stage.clock.background(TICK_S, self._tick, self.life)

    @property
    def now(self) -> float:
        """Its clock, Unix seconds."""
        self.ledger.fleet.steady = self.stage.clock.now
        return EPOCH_S + self.stage.clock.now + self.jumped_s

    @property
    def _name(self) -> str:
        """Incarnation of its present life."""
        return f"desk{self.life}"

    @property
    def at_rest(self) -> bool:
        """Everything that has happened is committed."""
        return self._writing is None and not self._changed

    def open(self, *, resumed: bool) -> None:
        """A new life, from the tables."""
        self.life += 1
        self.up, self.stalled_until = True, 0.0
        self.store = Store(self.run_dir, synchronous="off")
        self.ledger = Ledger(self.stage.scenario.ledger)
        self.members = Members(self.ledger, run_id="sim", life=self._name)
        self.pump = Pump(self.ledger)
        self.desk = Desk(self.ledger, self.members)
        restore(self.ledger, self.members, self.store)
        if resumed:
            release_all(self.ledger, "the run was resumed", self.now)
        scenario = self.stage.scenario
        self.courier = Courier(
            self.store, window_bytes=scenario.window_bytes, piece_bytes=scenario.piece_bytes
        )
        self._came: list[bytes] = []
        self._writing: Transaction | None = None
        self._changed = False

    def restart(self, *, resumed: bool) -> None:
        """The supervisor starts it again."""
        self.open(resumed=resumed)
        self.num_restores += 1
        self.stage.checks.full(self.ledger)
        self.stage.clock.background(TICK_S, self._tick, self.life)
        self.changed()

    def die(self, *, committed: bool) -> None:
        """The process is gone; a commit under way has reached the disk or not."""
        if not self.up:
            return
        if self._writing is not None and committed:
            self._write(self._writing)
        self.up = False
        self._writing = None
        self.store.close()

    # Events.

    def receive(self, address: bytes, message: Any, frames: list[bytes]) -> None:
        """A message arrives."""
        if not self.up:
            return
        if self.stalled_until > self.stage.clock.now:
            self.stage.clock.at(self.stalled_until, self._later, self.life, address, message, frames)
            return
        now = self.now
        if isinstance(message, control.Hello):
            self._join(address, message, now)
        else:
            worker = self.ledger.fleet.workers.get(address)
            if worker is None:
                self._post(address, control.HelloAgain(desk=self._name), [])
                return
            self.ledger.fleet.heard_of(worker)
            try:
                self.desk.take(worker, message, frames, now)
            except ProtocolError as error:
                raise InvariantError("the protocol is kept", f"{worker.name}: {error}") from error
            if isinstance(message, control.Want) and message.kind in {Kind.TRAIN, Kind.EVALUATE}:
                self.courier.credit(message.num_bytes, peer=address)
        self.changed()

    def _join(self, address: bytes, hello: control.Hello, now: float) -> None:
        require(not check_hello(hello), "the protocol is kept", f"{hello}: {check_hello(hello)}")
        self.members.join(address, hello, now)
        if hello.role in {"trainer", "evaluator"}:
            self._came.append(address)

    def _later(self, life: int, address: bytes, message: Any, frames: list[bytes]) -> None:
        if life == self.life:
            self.receive(address, message, frames)

    def lost(self, peer: Peer, *, ours: bool) -> None:
        """The supervisor says that a process is gone; while the desk is down, nobody hears it."""
        if self.up:
            lost = control.MemberLost(
                name=peer.name, incarnation=peer.incarnation, reason="killed", ours=ours
            )
            self.members.lost(lost, self.now)
            self.changed()

    def _tick(self, life: int) -> None:
        if life != self.life or not self.up:
            return
        clock = self.stage.clock
        if self.stalled_until > clock.now:
            clock.background(self.stalled_until - clock.now, self._tick, life)
            return
        for peer in self._present():
            worker = self.ledger.fleet.workers.get(peer.id)
            if worker is not None:
                self.ledger.fleet.heard_of(worker)
            else:
                peer.beat()
        gone = self.members.tick(self.now)
        clock.background(TICK_S, self._tick, life)
        self._ticks += 1
        if gone or self._ticks % PUMP_TICKS == 0:
            self.changed()

    # Commits.

    def changed(self) -> None:
        """Something has happened: commit it, now or after the commit under way."""
        self.stage.checks.event(self.ledger)
        if self.stage.clock.num_events >= self._next_full:
            self._next_full = self.stage.clock.num_events + self.stage.scenario.check_every
            self.stage.checks.full(self.ledger)
        self._changed = True
        if self._writing is None:
            self._begin()

    def _begin(self) -> None:
        self._changed = False
        self.pump.run(self.now)
        self.stage.checks.event(self.ledger)
        if self.ledger.failure:
            raise InvariantError("the run goes on", self.ledger.failure)
        transaction = self.ledger.book.take()
        self.stage.checks.leases(self.ledger, transaction)
        if transaction.empty and not self.courier.has_work:
            return
        self._writing = transaction
        came, self._came = self._came, []
        for peer in came:
            self.courier.forget(peer)
        seconds = self.stage.scenario.commit_s * (0.1 + 0.9 * self.stage.dice.random())
        self.stage.clock.after(seconds, self._end, self.life, transaction)

    def _end(self, life: int, transaction: Transaction) -> None:
        if life != self.life or not self.up:
            return
        outgoing = self._write(transaction)
        self._writing = None
        for peer, message, frames in outgoing:
            self.stage.checks.sends(peer, message)
            self._post(peer, message, frames)
        if self._changed:
            self._begin()

    def _write(self, transaction: Transaction) -> list[tuple[bytes, Any, list[bytes]]]:
        self.store.write(transaction)
        self.num_commits += 1
        self.stage.checks.committed(transaction)
        if any(name == "checkpoint" for name, _ in transaction.rows):
            steps = sorted(self.members.checkpoints)[-KEEP_CHECKPOINTS:]
            self.store.prune(steps[0])
        outgoing = [(item, self.store.read(item.bodies)) for item in transaction.sends]
        for peer, batch in transaction.deliver:
            self.courier.queue_batch(peer, batch)
        evaluator = self.ledger.fleet.only("evaluator")
        if evaluator is not None:
            for version, incarnation in transaction.evaluated:
                self.courier.queue_evaluation(evaluator.peer, version, incarnation)
        outgoing += self.courier.take()
        return [(item.peer, item.message, frames) for item, frames in outgoing]

    def close(self) -> None:
        """Let go of the files."""
        if self.up:
            self.store.close()
