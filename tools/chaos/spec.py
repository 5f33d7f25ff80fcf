"""What a case is, and how it is written on a command line.

A case is a topology's changed options, the orders its processes carry, what the driver does when an order
has fired or the launch has ended, and how all that has to end. Its spec, a line of JSON, repeats it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from asyncrl.chaos import Order

Deed = Literal["continue", "lose", "fill", "attach"]
"""SIGCONT to the one that fired; SIGKILL to every process; no free byte on the disk; one more generator."""
Damage = Literal["", "read-only", "corrupt page", "torn segment", "cut segment", "torn log"]
"""To what lies on disk, after the first launch has ended and before it is resumed."""
Expected = Literal["finish", "fail", "finish or stall"]
"""Of the launch that met the fault: it goes on to the end (resumed where the supervisor itself died), or it
fails with words that name the cause. After a failure a resumed launch has to finish, unless `lasting`."""


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Something the driver does."""

    do: Deed
    order: int = 0
    """When this order has fired."""
    after_s: float = 0.0


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One case; see the module's docstring."""

    name: str
    """ROLE ACTION MOMENT, for people."""
    role: str
    """Whose fault it is, for the table."""
    orders: list[Order] = []
    steps: list[Step] = []
    options: dict[str, Any] = {}
    """Of the topology, by dotted name."""
    damage: Damage = ""
    disk: bool = False
    """The run lies on a small disk of its own, which can be full or read-only."""
    expect: Expected = "finish"
    says: str = ""
    """Words, one of which (separated by "|") the failure's text has to contain."""
    lasting: bool = False
    """What was damaged cannot be repaired: no launch has to finish."""
    may_miss: bool = False
    """Not every order has to fire: a random schedule may ask for what does not come."""
    state: str = ""
    """Query of the run's records, with :time and :actor, that shows that the moment was the right one."""

    @property
    def spec(self) -> str:
        """The case as one line of JSON."""
        return msgspec.json.encode(self).decode()


def read(text: str) -> Case:
    """The case of a spec. Raises ValueError, which says where it is wrong."""
    try:
        return msgspec.json.decode(text.encode(), type=Case)
    except msgspec.DecodeError as error:
        raise ValueError(f"--case: {error}; give a line of JSON as a failing case prints it") from error
