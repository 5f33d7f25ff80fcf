"""The ledger in numbers, for the doctor. A pure function."""

from __future__ import annotations

from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.states import WorkerRecord
from asyncrl.obs.vitals import Desk, Worker


def desk_facts(ledger: Ledger, *, now: float, free_bytes: int, min_free_bytes: int) -> Desk:
    """What the books say now."""
    counts = ledger.counts()
    used, free = counts.pop("tickets_used"), counts.pop("tickets_free")
    batches, versions = ledger.batches, ledger.versions
    return Desk(
        counts=counts,
        tickets_used=used,
        tickets_total=used + free,
        outstanding=batches.dues.total(),
        refused=batches.refused,
        batch_size=batches.batch_size,
        next_batch=batches.next_batch,
        num_trained=batches.num_trained,
        target=batches.target,
        published=versions.published.version if versions.published is not None else -1,
        announced=versions.announced.version if versions.announced is not None else -1,
        source_ended=ledger.source_ended,
        draining=ledger.draining,
        low_on_disk=ledger.low_on_disk,
        free_bytes=free_bytes,
        min_free_bytes=min_free_bytes,
        failure=ledger.failure,
        workers=[_worker(ledger, worker, now=now) for worker in ledger.fleet.workers.values()],
    )


def _worker(ledger: Ledger, worker: WorkerRecord, *, now: float) -> Worker:
    held = [ledger.fleet.leases[fence] for fence in worker.leases if fence in ledger.fleet.leases]
    return Worker(
        name=worker.name,
        role=worker.role,
        silent_s=max(0.0, ledger.fleet.steady - worker.last_seen),
        credit={str(kind): count for kind, count in worker.credit.items() if count},
        credit_bytes=worker.credit_bytes,
        leases=len(held),
        oldest_lease_s=max((now - lease.granted_at for lease in held), default=0.0),
        version=worker.version,
    )
