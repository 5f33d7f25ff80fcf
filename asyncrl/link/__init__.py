"""Typed messages between processes: one interface (`base`), over ZeroMQ (`sockets`) or in memory (`memory`).

server = bind("tcp://127.0.0.1:0", receives=Hello | Result)
client = connect(server.address, identity=b"generator-0.7f3a", receives=Welcome | Work)
"""

from __future__ import annotations

from asyncrl.link.base import (
    ClientLink,
    Delivery,
    Limits,
    LinkClosed,
    LinkStatistics,
    OnMalformed,
    PeerGone,
    ServerLink,
)
from asyncrl.link.complaints import Complaints, complain, shown
from asyncrl.link.endpoints import bind, connect
from asyncrl.link.memory import Hub
from asyncrl.link.security import Key, check_private, is_private, make_key, read_key
from asyncrl.link.window import Window

__all__ = [
    "ClientLink",
    "Complaints",
    "Delivery",
    "Hub",
    "Key",
    "Limits",
    "LinkClosed",
    "LinkStatistics",
    "OnMalformed",
    "PeerGone",
    "ServerLink",
    "Window",
    "bind",
    "check_private",
    "complain",
    "connect",
    "is_private",
    "make_key",
    "read_key",
    "shown",
]
