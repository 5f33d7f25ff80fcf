"""Workers and leases: who is here, how much room each has, what each holds, who fell silent.

Pure bookkeeping. Silence is counted on a clock of its own (`steady`), which whoever brings events sets:
somebody may set the machine's clock, by which the records are written, forwards or back. Identity is name
plus incarnation, never an address.
"""

from __future__ import annotations

from asyncrl.actor.waiting import Looks
from asyncrl.buffer.states import GroupRecord, LeaseRecord, WorkerRecord
from asyncrl.messages.control import Hello, Kind, Want


class Fleet:
    """See the module's docstring."""

    def __init__(self, *, dead_after_s: float) -> None:
        self.dead_after_s = dead_after_s
        self.workers: dict[bytes, WorkerRecord] = {}
        self.leases: dict[int, LeaseRecord] = {}
        self.steady = 0.0
        """Seconds of a clock that nobody can set, at the event under way."""
        self._by_identity: dict[tuple[str, str], WorkerRecord] = {}
        self._looks = Looks()
        self._absent_since: dict[tuple[str, str], float] = {}
        """Identities that hold leases from before the buffer's restart and have not come back."""

    def join(self, peer: bytes, hello: Hello) -> WorkerRecord:
        """A worker said hello; leases of the same life stay its own (it reconnected)."""
        before = self.find(hello.name, hello.incarnation)
        if before is not None and before.peer != peer:
            self.workers.pop(before.peer, None)
        worker = WorkerRecord(peer, hello.name, hello.role, hello.incarnation, self.steady, hello.number)
        worker.leases = {
            lease.fence
            for lease in self.leases.values()
            if (lease.worker, lease.incarnation) == (hello.name, hello.incarnation)
        }
        self.workers[peer] = worker
        self._by_identity[(worker.name, worker.incarnation)] = worker
        return worker

    def leave(self, worker: WorkerRecord) -> list[LeaseRecord]:
        """Forget a worker; returns the leases it held, which are no longer valid."""
        self.workers.pop(worker.peer, None)
        self._by_identity.pop((worker.name, worker.incarnation), None)
        return [self.leases.pop(fence) for fence in sorted(worker.leases) if fence in self.leases]

    def heard_of(self, worker: WorkerRecord) -> None:
        """It has said something."""
        worker.last_seen = self.steady

    def orphaned(self) -> list[tuple[str, str]]:
        """Identities whose leases outlived a restart of the buffer and who stayed away for `dead_after_s`."""
        if len(self.leases) == sum(len(worker.leases) for worker in self.workers.values()):
            self._absent_since.clear()
            return []
        now = self.steady
        holders = {(lease.worker, lease.incarnation) for lease in self.leases.values()}
        absent = holders - self._by_identity.keys()
        self._absent_since = {who: self._absent_since.get(who, now) for who in absent}
        return sorted(who for who, since in self._absent_since.items() if now - since > self.dead_after_s)

    def absent(self, name: str) -> list[tuple[str, str]]:
        """Lives of this name that hold leases but are not here."""
        holders = {
            (lease.worker, lease.incarnation) for lease in self.leases.values() if lease.worker == name
        }
        return sorted(holders - self._by_identity.keys())

    def take_leases(self, identity: tuple[str, str]) -> list[LeaseRecord]:
        """Withdraw what somebody who is not here holds."""
        held = [x for x in self.leases.values() if (x.worker, x.incarnation) == identity]
        for lease in held:
            del self.leases[lease.fence]
        return held

    def find(self, name: str, incarnation: str) -> WorkerRecord | None:
        """The worker with this identity, if it is here."""
        return self._by_identity.get((name, incarnation))

    def with_role(self, role: str) -> list[WorkerRecord]:
        """Workers of one role, in the order they came."""
        return [worker for worker in self.workers.values() if worker.role == role]

    def only(self, role: str) -> WorkerRecord | None:
        """The one actor of a role that has one (source, trainer, evaluator); the newest of several."""
        workers = self.with_role(role)
        return workers[-1] if workers else None

    def want(self, worker: WorkerRecord, want: Want) -> None:
        """Add credit."""
        worker.credit[want.kind] = worker.credit.get(want.kind, 0) + want.samples
        worker.credit_bytes += want.num_bytes
        worker.capacity = max(worker.capacity, want.capacity)
        if want.kind is Kind.GENERATE:
            worker.version, worker.version_incarnation = want.version, want.incarnation

    def grant(self, worker: WorkerRecord, lease: LeaseRecord) -> None:
        """Spend credit on a lease."""
        self.leases[lease.fence] = lease
        worker.leases.add(lease.fence)
        worker.credit[lease.kind] -= len(lease.indices)
        worker.credit_bytes -= lease.num_bytes

    def leases_on(self, group: GroupRecord) -> list[LeaseRecord]:
        """Leases on any sample of a group, or on the group itself."""
        fences = {sample.fence for sample in group.samples} | {group.fence}
        return [self.leases[fence] for fence in sorted(fences) if fence in self.leases]

    def fits(self, worker: WorkerRecord, num_bytes: int) -> bool:
        """Whether the worker's byte window takes an item; one larger than it passes when it holds nothing."""
        return worker.credit_bytes >= num_bytes or not worker.leases

    def end(self, lease: LeaseRecord) -> None:
        """A lease has nothing left to do."""
        self.leases.pop(lease.fence, None)
        worker = self.find(lease.worker, lease.incarnation)
        if worker is not None:
            worker.leases.discard(lease.fence)
            if worker.alone == lease.fence:
                worker.alone = 0

    def silent(self, *, every_s: float) -> list[WorkerRecord]:
        """Workers not heard of for `dead_after_s`; a buffer that stood still charges nobody: see `Looks`.

        To be called before `orphaned`.

        Args:
            every_s: how often this is called when nothing is wrong.
        """
        now = self.steady
        self._looks.look(now, every_s=every_s, limit_s=self.dead_after_s)
        for worker in self.workers.values():
            worker.last_seen = self._looks.since(worker.last_seen)
        self._absent_since = {who: self._looks.since(start) for who, start in self._absent_since.items()}
        return [worker for worker in self.workers.values() if now - worker.last_seen > self.dead_after_s]
