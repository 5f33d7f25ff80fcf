"""What the ledger wants done, done: transactions are written, and only then read what their messages carry.

    Transaction -> store (written, synced) -> settled groups to the log -> bodies of leases, pieces of batches

It owns the store and the courier. `open`, `execute` and `close` block and belong on the compute thread; the
rest is called by the event loop. It decides nothing and sends nothing.
"""

from __future__ import annotations

from asyncrl.actor.base import Actor
from asyncrl.buffer.delivery import Courier, in_pieces
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.restore import restore
from asyncrl.buffer.settled import settled
from asyncrl.buffer.states import Outgoing, Transaction, WorkerRecord
from asyncrl.buffer.store import Store
from asyncrl.messages.control import Kind, Want
from asyncrl.obs.log import group_line

DELIVERED = (Kind.TRAIN, Kind.EVALUATE)
"""Wants that give back bytes of what the courier delivers."""


class Executor:
    """See the module's docstring."""

    def __init__(self, actor: Actor, *, ledger: Ledger, members: Members) -> None:
        self._actor = actor
        self._ledger = ledger
        self._members = members
        self._store: Store | None = None
        self._courier: Courier | None = None
        self._came: list[bytes] = []
        """Who came since the last commit and is delivered to: what was on its way to them is not for now."""

    def open(self) -> None:
        """Open the store, and rebuild the ledger from what it holds. Raises StorageError."""
        options = self._actor.plan.topology.buffer
        self._store = Store(self._actor.context.run_dir, segment_bytes=options.segment_bytes)
        with self._store.reading():
            restore(self._ledger, self._members, self._store)
        self._courier = Courier(self._store, window_bytes=options.window_bytes)

    @property
    def courier(self) -> Courier:
        """Who delivers batches and evaluations, once the store is open."""
        assert self._courier is not None
        return self._courier

    @property
    def store(self) -> Store:
        """The open store."""
        assert self._store is not None
        return self._store

    @property
    def has_work(self) -> bool:
        """Whether `execute` would return something for an empty transaction, too."""
        return self.courier.has_work

    def came(self, peer: bytes) -> None:
        """A receiver of deliveries said hello (again)."""
        self._came.append(peer)

    def credit(self, want: Want, *, peer: bytes) -> None:
        """A receiver of deliveries has taken in bytes; other wants are nothing to us."""
        if want.kind in DELIVERED:
            self.courier.credit(want.num_bytes, peer=peer)

    def execute(
        self, transaction: Transaction, evaluator: WorkerRecord | None
    ) -> list[tuple[Outgoing, list[bytes]]]:
        """Write, then read what the messages carry: they may leave now, with these frames.

        Args:
            transaction: of the ledger.
            evaluator: looked up by the event loop, as this thread may not read what that changes meanwhile.

        Raises:
            StorageError: nothing was committed, or it cannot be read; nothing may leave.
        """
        with self.store.reading():
            return self._execute(transaction, evaluator)

    def _execute(
        self, transaction: Transaction, evaluator: WorkerRecord | None
    ) -> list[tuple[Outgoing, list[bytes]]]:
        came, self._came = self._came, []
        for peer in came:
            self.courier.forget(peer)
        self.store.write(transaction)
        self._tell_settled(transaction)
        if any(name == "checkpoint" for name, _ in transaction.rows):
            self._prune()
        outgoing = [
            piece for item in transaction.sends for piece in in_pieces(item, self.store.read(item.bodies))
        ]
        for peer, batch in transaction.deliver:
            self.courier.queue_batch(peer, batch)
        if evaluator is not None:
            for version, incarnation in transaction.evaluated:
                self.courier.queue_evaluation(evaluator.peer, version, incarnation)
        return outgoing + self.courier.take()

    def _tell_settled(self, transaction: Transaction) -> None:
        for group in settled(self.store.db, transaction):
            group_line(
                self._actor.log,
                group_id=group.group_id,
                settled=group.reason,
                lane=group.lane,
                issue_version=group.version if group.version >= 0 else None,
                num_samples=group.num_samples,
                num_tokens=group.num_tokens,
                step=group.batch + 1 if group.batch >= 0 else None,
                detail=group.note,
            )

    def _prune(self) -> None:
        """A checkpoint was committed: bodies that no kept checkpoint needs may go."""
        keep = self._actor.plan.topology.trainer.keep_checkpoints
        steps = sorted(self._members.checkpoints)[-keep:]
        if self._actor.plan.topology.buffer.keep == "checkpoint" and len(steps) == keep:
            self.store.prune(steps[0])

    def close(self) -> None:
        """Close the store; on the compute thread, too."""
        if self._store is not None:
            self._store.close()
