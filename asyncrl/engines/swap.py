"""A push at its receiving end: fetch a version, verify it, swap the engine's weights, say how it went."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
import torch

from asyncrl.engines.base import Engine, OnNewWeights
from asyncrl.errors import WeightsError
from asyncrl.link import Hub, Key
from asyncrl.messages.control import Swapped
from asyncrl.messages.version import Manifest
from asyncrl.weights.carriers import receive


class Swapper:
    """How one generator takes new weights."""

    def __init__(
        self, *, mode: OnNewWeights, deadline_s: float, security: Key | None = None, hub: Hub | None = None
    ) -> None:
        """`deadline_s` bounds the transfer; `mode` is what happens to running requests."""
        self._mode = mode
        self._deadline_s = deadline_s
        self._security = security
        self._hub = hub

    async def swap(
        self,
        engine: Engine,
        manifest: Manifest,
        *,
        is_newest: Callable[[Manifest], bool],
        moved: asyncio.Event,
    ) -> Swapped | None:
        """Serve this version; None when there is news that make this attempt pointless.

        Args:
            engine: that shall serve it.
            manifest: of the version.
            is_newest: whether nothing newer is announced; a version that was retired meanwhile is no error.
            moved: set when its publisher is gone and other bytes are announced: what was asked of it will
                never come.

        Raises:
            WeightsError: the newest version's bytes are missing or do not have their digest.
            StalledError: they did not arrive in time.
        """
        began = time.monotonic()
        try:
            tensors = await self._fetch(manifest, moved)
        except WeightsError:
            if is_newest(manifest):
                raise
            return None
        if tensors is None:
            return None
        transfer_s = time.monotonic() - began
        report = await engine.load_weights(manifest.version, manifest.incarnation, tensors, self._mode)
        return Swapped(
            version=manifest.version,
            incarnation=manifest.incarnation,
            transfer_s=transfer_s,
            **msgspec.structs.asdict(report),
        )

    async def _fetch(self, manifest: Manifest, moved: asyncio.Event) -> dict[str, torch.Tensor] | None:
        """The version's tensors; None when they are to be had elsewhere."""
        fetching = asyncio.ensure_future(
            receive(manifest, deadline_s=self._deadline_s, security=self._security, hub=self._hub)
        )
        leaving = asyncio.ensure_future(moved.wait())
        try:
            await asyncio.wait((fetching, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not fetching.done():
                fetching.cancel()
                await asyncio.wait([fetching])
        return None if fetching.cancelled() else fetching.result()


def push_metrics(swapped: Swapped, manifest: Manifest) -> dict[str, float]:
    """The push/* numbers of one receiver."""
    return {
        "push/version": swapped.version,
        "push/pause_s": swapped.pause_s,
        "push/transfer_s": swapped.transfer_s,
        "push/bytes": manifest.num_bytes,
        "push/aborted": swapped.aborted,
        "push/recomputed_tokens": swapped.recomputed_tokens,
    }
