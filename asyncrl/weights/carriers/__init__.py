"""Ways for a version to reach a receiver: `shm` maps the publisher's file, `stream` fetches it in chunks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from asyncrl.link import Hub, Key
from asyncrl.messages.version import Manifest
from asyncrl.weights.carriers import shm, stream
from asyncrl.weights.host import host_identity


async def receive(
    manifest: Manifest,
    *,
    deadline_s: float,
    host: str | None = None,
    address: str | None = None,
    security: Key | None = None,
    hub: Hub | None = None,
) -> dict[str, torch.Tensor]:
    """The verified tensors of a version, by the shortest way.

    On the publisher's host the file is mapped; elsewhere, or where the file is not visible (containers), the
    bytes are fetched from the publisher's stream endpoint.

    Args:
        manifest: of the version.
        deadline_s: seconds the whole transfer may take.
        host: this host's identity; found out when not given.
        address: of the stream endpoint, where it is not the manifest's.
        security: the run's key, where the endpoint needs it.
        hub: for memory:// endpoints.

    Raises:
        WeightsError: bytes are missing, retired or do not have their digest.
        StalledError: the deadline passed; says what was waited for.
    """
    if chosen(manifest, host=host or host_identity()) == "shm":
        return await asyncio.to_thread(shm.load, manifest)
    return await stream.fetch(manifest, address=address, security=security, hub=hub, deadline_s=deadline_s)


def chosen(manifest: Manifest, *, host: str) -> str:
    """Which carrier `receive` takes on a host with this identity: "shm" or "stream"."""
    return "shm" if manifest.path and manifest.host == host and Path(manifest.path).exists() else "stream"
