"""The trainer's pushes: a snapshot that stops training, then writing and announcing beside the next step.

It owns the publisher and its stream endpoint. It decides only what a restarted trainer may publish: nothing
until the last published step is reached again; there the digests are compared, and equal is the same version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from asyncrl.actor.waiting import WATCHDOG_S, awaiting
from asyncrl.link import Hub, Key, ServerLink
from asyncrl.messages.control import Published, TrainerStart
from asyncrl.messages.version import Manifest
from asyncrl.obs.metrics import Waits
from asyncrl.topology.plan import Plan
from asyncrl.weights.carriers.stream import StreamServer, bind_stream
from asyncrl.weights.files import directory_of, run_id
from asyncrl.weights.publisher import MAX_SNAPSHOTS, Publisher, Snapshot


class PushSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how versions are published."""

    run_id: str
    directory: str | None
    """None: /dev/shm where it is, else `run_dir`."""
    run_dir: str
    keep: int
    """Versions whose bytes stay, at least."""
    address: str
    """Of the stream endpoint; empty: none."""
    mapped: bool = True
    """Whether receivers of this host may map the files (carrier "auto" and "shm")."""
    stall_s: float = 300.0
    """How long nothing may move."""


def push_settings(plan: Plan, run_dir: Path, *, in_memory: bool) -> PushSettings:
    """What a plan says about pushes."""
    topology = plan.topology
    address = (
        "memory://publisher" if in_memory else topology.run.publisher_address or _beside(topology.run.address)
    )
    return PushSettings(
        run_id=run_id(topology.run.name, run_dir),
        directory=topology.weights.directory,
        run_dir=str(run_dir),
        keep=2,
        address="" if topology.weights.carrier == "shm" else address,
        mapped=topology.weights.carrier != "stream",
        stall_s=topology.run.stall_s,
    )


def _beside(address: str) -> str:
    """A free port of the same host."""
    return address.rpartition(":")[0] + ":0" if address.startswith("tcp://") else "tcp://127.0.0.1:0"


class _Job(NamedTuple):
    snapshot: Snapshot
    version: int
    step: int


class Pushes:
    """See the module's docstring."""

    def __init__(
        self,
        settings: PushSettings,
        *,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        send: Callable[[Published], Awaitable[None]],
        record: Callable[[dict[str, float], int], None],
        waits: Waits | None = None,
        side_waits: Waits | None = None,
        security: Key | None = None,
        hub: Hub | None = None,
    ) -> None:
        """`weights` gives live tensors, `send` speaks to the buffer, `record` writes a version's metrics.

        `waits` are those of whoever pushes, `side_waits` those of the loop that writes.
        """
        self._settings = settings
        self._weights = weights
        self._send = send
        self._record = record
        self._waits, self._side_waits = waits or Waits(), side_waits or Waits()
        self._security = security
        self._hub = hub
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._room = asyncio.Semaphore(MAX_SNAPSHOTS)
        """For snapshots that the buffer was not told of: where disk or buffer are slow, training waits."""
        self._publisher: Publisher | None = None
        self._link: ServerLink | None = None
        self._last = -1
        self._recorded: Manifest | None = None

    async def open(self, start: TrainerStart) -> None:
        """Begin this life of the trainer."""
        self._recorded = start.published
        if self._settings.address:
            self._link = bind_stream(self._settings.address, security=self._security, hub=self._hub)
        self._publisher = Publisher(
            directory_of(self._settings.directory, self._settings.run_dir),
            run_id=self._settings.run_id,
            incarnation=start.incarnation,
            keep=self._settings.keep,
            address=self._link.address if self._link is not None else "",
        )

    def due(self, version: int) -> bool:
        """Whether this version may be published, given what was published before the trainer's last death."""
        return version > self._last and (self._recorded is None or version >= self._recorded.version)

    async def push(self, version: int, step: int) -> None:
        """Snapshot now (this is what training waits for); the rest happens beside the next step.

        Raises:
            StalledError: an older version was not written and told in time.
        """
        if not self.due(version) or self._publisher is None:
            return
        self._last = version
        publisher = self._publisher
        directory = directory_of(self._settings.directory, self._settings.run_dir)
        async with awaiting(
            self._waits,
            "push",
            who="the trainer",
            what=f"a version before {version} to be written and told to the buffer",
            deadline_s=self._settings.stall_s + WATCHDOG_S,
            advice=f"look at the disk of {directory} and at the buffer's log",
        ):
            await self._room.acquire()
        began = time.monotonic()
        snapshot = await asyncio.to_thread(lambda: publisher.snapshot(self._weights()))
        self._record({"push/snapshot_s": time.monotonic() - began, "push/bytes": snapshot.num_bytes}, version)
        self._jobs.put_nowait(_Job(snapshot, version, step))

    async def write(self) -> None:
        """consumes: snapshots    waits for: the disk    produces: published versions"""
        while True:
            with self._side_waits("snapshot"):
                job = await self._jobs.get()
            publisher = self._publisher
            assert publisher is not None, "a snapshot comes from a publisher"
            began = time.monotonic()
            manifest = await asyncio.to_thread(
                publisher.write, job.snapshot, version=job.version, step=job.step
            )
            old = self._recorded
            if old is not None and (old.version, old.digest) == (manifest.version, manifest.digest):
                manifest = msgspec.structs.replace(manifest, incarnation=old.incarnation)
            if not self._settings.mapped:
                manifest = msgspec.structs.replace(manifest, path="", host="")
            self._record({"perf/update_weights_time": time.monotonic() - began}, job.version)
            await self._send(Published(manifest=manifest))
            self._room.release()

    async def serve(self) -> None:
        """Answer receivers that cannot map our files."""
        if self._link is None or self._publisher is None:
            await asyncio.Event().wait()
            return
        await StreamServer(self._link, self._publisher).serve()

    def retire(self, below: int) -> None:
        """Nobody needs versions below this any more."""
        if self._publisher is None:
            return
        for manifest in self._publisher.published():
            if manifest.version < below:
                self._publisher.retire(manifest.version)

    async def close(self) -> None:
        """Remove the published files and close the endpoint."""
        if self._link is not None:
            await self._link.close(linger_s=0)
        if self._publisher is not None:
            self._publisher.close()
