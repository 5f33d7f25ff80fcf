"""A push at its receiving end: fetch a version, verify it, swap the engine's weights, say how it went."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

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
        self, engine: Engine, manifest: Manifest, *, is_newest: Callable[[Manifest], bool]
    ) -> Swapped | None:
        """Serve this version; None when it was retired meanwhile and a newer one is announced.

        Raises:
            WeightsError: the newest version's bytes are missing or do not have their digest.
            StalledError: they did not arrive in time.
        """
        began = time.monotonic()
        try:
            tensors = await receive(
                manifest, deadline_s=self._deadline_s, security=self._security, hub=self._hub
            )
        except WeightsError:
            if is_newest(manifest):
                raise
            return None
        transfer_s = time.monotonic() - began
        report = await engine.load_weights(manifest.version, manifest.incarnation, tensors, self._mode)
        return Swapped(
            version=manifest.version,
            incarnation=manifest.incarnation,
            transfer_s=transfer_s,
            **msgspec.structs.asdict(report),
        )


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
