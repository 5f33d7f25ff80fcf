"""What a number in a message may be, checked while it is decoded.

A stranger's header can hold any 64-bit integer and any float. Those that SQLite cannot store (2^63 and more,
NaN) or that no run reaches are refused with the message that carries them, before anybody computes with them.
Only decoding checks; structs made in this process are ours.
"""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec

MAX = 2**48
"""Larger than any ordinal, count or number of bytes of a run, and far from 2^63 after any sum of two."""
MAX_GROUP = 65_536
"""Samples of one group."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX)]
"""An ordinal, a number of things, a size in bytes."""
CountOrNone = Annotated[int, msgspec.Meta(ge=-1, le=MAX)]
"""The same, or -1 for none."""
Version = Annotated[int, msgspec.Meta(ge=-MAX, le=MAX)]
"""A version of the weights in recorded data; one from before an imported run's own start is negative."""
Change = Annotated[int, msgspec.Meta(ge=-MAX, le=MAX)]
"""So many more, or fewer where it is below zero."""
GroupSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_GROUP)]
"""Samples of a group."""
Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""Neither NaN nor infinite."""
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=sys.float_info.max)]
"""A duration, or a time since 1970."""
