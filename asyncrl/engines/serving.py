"""Which version a generator is told to serve, and which one it serves.

    announced -> fetched, verified, swapped (engines.swap) -> `swapped` (the role asks for work under it)

Bytes that are not what was announced are refused: what it serves stays, and the version is fetched again or
the next one instead. It never speaks to the buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from asyncrl.actor.client import DeskActor
from asyncrl.actor.waiting import awaiting
from asyncrl.engines import session
from asyncrl.engines.base import Engine, OnNewWeights
from asyncrl.engines.swap import Swapper, push_metrics
from asyncrl.errors import WeightsError
from asyncrl.messages.control import Swapped
from asyncrl.messages.version import Manifest
from asyncrl.obs.log import version_line
from asyncrl.obs.view import NoteUpdate
from asyncrl.obs.vitals import Part

FETCH_AGAIN_S = 5.0
"""How long a version whose bytes are bad is left alone before it is fetched again."""


class Serving(Part):
    """See the module's docstring."""

    def __init__(
        self, actor: DeskActor, *, mode: OnNewWeights, swapped: Callable[[Manifest, Swapped], Awaitable[None]]
    ) -> None:
        """`mode` is what happens to running requests when a version comes.

        `swapped` is called with each version that is served from now on; it sets `actor.version`.
        """
        self._actor = actor
        self._swapper = Swapper(
            mode=mode,
            deadline_s=actor.plan.topology.weights.push_timeout_s,
            security=actor.context.key,
            hub=actor.context.hub,
        )
        self._swapped = swapped
        self._announced: Manifest | None = None
        self._announced_at = 0.0
        self._news = asyncio.Event()
        self._moved = asyncio.Event()
        """The version that is being fetched is announced again, or by another publisher."""
        self.pause_s: float | None = None
        """Of the last swap."""
        self.load_s: float | None = None
        """From the announcement of the version it serves to the swap."""
        self.digest = ""
        """Of the version it serves."""
        self.refused = ""
        """Why it does not serve the announced version."""
        self._failures = 0
        """Versions that could not be served, each attempt counted."""

    def announce(self, manifest: Manifest) -> None:
        """This version is to be served, unless a newer one has overtaken its announcement."""
        old = self._announced
        if old is not None and (manifest.version, manifest.incarnation) < (old.version, old.incarnation):
            return  # leases come for the newer one: no token may be of an older one
        if old is not None and (old.version == manifest.version or old.address != manifest.address):
            self._moved.set()
        self._announced, self._announced_at = manifest, time.monotonic()
        self._news.set()

    @property
    def missing(self) -> Manifest | None:
        """The announced version, while it does not serve it; None when it does."""
        news = self._announced
        return None if news is None or (news.version, news.incarnation) == self._actor.version else news

    @property
    def loading_s(self) -> float:
        """Since a version was announced that it does not serve yet."""
        return 0.0 if self.missing is None else time.monotonic() - self._announced_at

    async def follow(self, engine: Engine) -> None:
        """consumes: announced versions    waits for: the trainer's pushes    produces: Swapped, credit"""
        while True:
            with self._actor.idle("version", beside=True):
                await self._news.wait()
            self._news.clear()
            manifest = self.missing
            if manifest is not None:
                await self._swap(engine, manifest)

    async def _swap(self, engine: Engine, manifest: Manifest) -> None:
        actor = self._actor
        self._moved.clear()
        try:
            with actor.side_waits("weights"):  # its deadline is weights.push_timeout_s
                swapped = await self._swapper.swap(
                    engine, manifest, is_newest=lambda m: m is self._announced, moved=self._moved
                )
        except WeightsError as error:
            await self._refuse(error)
            return
        if swapped is None:
            return  # retired while we were fetching it, or to be had elsewhere: there is news
        self.refused = ""
        if actor.version[0] < 0:
            await self._warm_up(engine)
        self.digest = manifest.digest
        self.pause_s, self.load_s = swapped.pause_s, time.monotonic() - self._announced_at
        await self._swapped(manifest, swapped)
        actor.metrics.write(push_metrics(swapped, manifest))
        version_line(
            actor.log,
            version=manifest.version,
            incarnation=manifest.incarnation,
            step=manifest.step,
            digest=manifest.digest,
            num_bytes=manifest.num_bytes,
            seconds=swapped.transfer_s,
            pause_s=swapped.pause_s,
        )

    async def _refuse(self, error: WeightsError) -> None:
        """Bytes that are not what was announced: what it serves stays, and the version is fetched again.

        Dying would not mend them: they stay bad until they are fetched well, or the next version is there.
        """
        actor = self._actor
        if self.refused != str(error):
            self.refused = str(error)
            actor.log.error("version refused", reason=self.refused)
            await actor.tell(NoteUpdate(text=f"{actor.name} does not serve what it was sent: {self.refused}"))
        self._failures += 1
        actor.metrics.write({"push/failures": self._failures})
        with contextlib.suppress(TimeoutError), actor.side_waits("version"):
            async with asyncio.timeout(FETCH_AGAIN_S):
                await self._news.wait()
        self._news.set()

    async def _warm_up(self, engine: Engine) -> None:
        async with awaiting(
            self._actor.side_waits,
            "engine",
            who=self._actor.name,
            what="the first token of its engine",
            deadline_s=self._actor.plan.topology.run.stall_s,
            advice="look at the engine's own log, or raise run.stall_s",
        ):
            await session.warm_up(engine)
