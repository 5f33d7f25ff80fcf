"""Orders: a test instrument that makes a process of a run fail at an exact moment of its conversation.

It is off unless the environment variable ASYNCRL_ORDERS names a JSON file, a list of orders; without it no
link is wrapped and nothing is counted. Set it for `asyncrl launch` (every process of the run inherits it):

    [{"actor": "generator-0", "at": "sent:Reports", "where": {"status": "pending"}, "action": "kill"},
     {"actor": "trainer", "at": "file:os.rename:*.step-000006.tmp", "action": "stop"},
     {"actor": "buffer", "at": "send:Acks", "peer": "generator-1", "action": "drop", "nth": 3, "count": 2}]

`Order` says what the fields mean. What happened is in RUN_DIR/orders.jsonl, written before it was done: a
line for every life of an actor that has read the orders, and one for every order (and further message) that
fired. An order fires once in a run, whatever is restarted.

This package wraps links and acts on its own process; it knows no roles and never touches another process.
"""

from __future__ import annotations

from asyncrl.chaos.journal import JOURNAL, read_journal
from asyncrl.chaos.life import ORDERS, Life, begin_life
from asyncrl.chaos.orders import Order, check
from asyncrl.chaos.tap import TappedClient, TappedServer, tapped_client, tapped_server

__all__ = [
    "JOURNAL",
    "ORDERS",
    "Life",
    "Order",
    "TappedClient",
    "TappedServer",
    "begin_life",
    "check",
    "read_journal",
    "tapped_client",
    "tapped_server",
]
