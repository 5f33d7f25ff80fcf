"""Opening links: the address decides which implementation it is."""

from __future__ import annotations

from typing import Any

from asyncrl.errors import ConfigError
from asyncrl.link.base import ClientLink, Limits, OnMalformed, ServerLink
from asyncrl.link.memory import Hub, MemoryClient, MemoryServer
from asyncrl.link.security import Key, check_private
from asyncrl.link.sockets import SocketClient, SocketServer

_SCHEMES = ("tcp", "ipc", "memory")
_MAX_IDENTITY_BYTES = 255
"""ZeroMQ's limit."""


def bind(
    address: str,
    *,
    receives: Any,
    limits: Limits | None = None,
    security: Key | None = None,
    hub: Hub | None = None,
    on_malformed: OnMalformed | None = None,
) -> ServerLink:
    """Listen on an address. Needs a running event loop.

    Args:
        address: tcp://HOST:PORT (port 0 takes a free one), ipc://PATH or memory://NAME.
        receives: the tagged struct, or the union of them, that clients may send.
        limits: sizes and queue lengths; the same at both ends.
        security: the run's key; every client then has to hold it. Not used on a memory link.
        hub: where memory:// names live.
        on_malformed: called with a peer and a reason for each message that is dropped.

    Raises:
        ConfigError: the address is in use, unusable, or reachable by other machines without a key.
    """
    limits = limits or Limits()
    check_private(address, security=security)
    if _scheme(address) == "memory":
        return MemoryServer(
            address, hub=_known(hub, address), receives=receives, limits=limits, on_malformed=on_malformed
        )
    return SocketServer(
        address, receives=receives, limits=limits, security=security, on_malformed=on_malformed
    )


def connect(
    address: str,
    *,
    identity: bytes,
    receives: Any,
    limits: Limits | None = None,
    security: Key | None = None,
    hub: Hub | None = None,
    on_malformed: OnMalformed | None = None,
) -> ClientLink:
    """Dial an address; returns at once, also before anybody listens there. Needs a running event loop.

    Args:
        address: as the server gave it.
        identity: 1 to 255 bytes, not starting with a zero byte; unique to this life of the process.
        receives: the tagged struct, or the union of them, that the server may send.
        limits: sizes and queue lengths; the same at both ends.
        security: the run's key; the server has to hold it too. Not used on a memory link.
        hub: where memory:// names live.
        on_malformed: called with an empty peer and a reason for each message that is dropped.

    Raises:
        ConfigError: the address is unusable, or on another machine without a key.
    """
    limits = limits or Limits()
    if not 1 <= len(identity) <= _MAX_IDENTITY_BYTES or identity.startswith(b"\0"):
        raise ValueError(f"identity {identity!r} has to be 1 to 255 bytes that do not start with a zero byte")
    check_private(address, security=security)
    if _scheme(address) == "memory":
        return MemoryClient(
            address,
            identity=identity,
            hub=_known(hub, address),
            receives=receives,
            limits=limits,
            on_malformed=on_malformed,
        )
    return SocketClient(
        address,
        identity=identity,
        receives=receives,
        limits=limits,
        security=security,
        on_malformed=on_malformed,
    )


def _scheme(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if scheme not in _SCHEMES or not separator or not rest:
        raise ConfigError(
            f"{address}: not an address; allowed are tcp://HOST:PORT, ipc://PATH and memory://NAME"
        )
    return scheme


def _known(hub: Hub | None, address: str) -> Hub:
    if hub is None:
        raise ValueError(f"{address} needs hub=Hub(), shared by both ends")
    return hub
