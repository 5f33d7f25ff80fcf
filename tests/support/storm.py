"""Rubbish for the wire, by seed: valid messages, and what damage and malice make of them.

Numbers of frames come from the environment, so that one test serves a quick run and a long one.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

FRAMES = int(os.environ.get("FUZZ_FRAMES", "100000"))
"""Messages thrown in all fuzz tests together; the chaos suite asks for more."""
SEED = int(os.environ.get("FUZZ_SEED", "0"))
"""Another storm."""

LENGTHS = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff")
"""Array, map, bytes and string of (nearly) four billion elements."""
NUMBERS = (-1, 0, 1, 2**31, 2**48 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), float("nan"), float("inf"))
"""What counters and times may not all be."""


def share(part: float) -> int:
    """Messages for one test that takes this part of all."""
    return max(1000, int(FRAMES * part))


def rss_bytes() -> int:
    """Resident memory of this process, without what the allocator keeps of freed memory."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Storm:
    """An endless sequence of messages (header and bodies as bytes), made from a corpus of valid ones."""

    def __init__(self, corpus: Sequence[list[bytes]], *, seed: int) -> None:
        self.corpus = corpus
        self.draw = random.Random(f"{SEED}:{seed}")

    def message(self) -> list[bytes]:
        """The next one: one in four is valid, though seldom at the right time."""
        frames = list(self.draw.choice(self.corpus))
        kind = self.draw.randrange(12)
        if kind < 3:
            return frames
        if kind == 3:
            return [self.draw.randbytes(self.draw.randrange(200)) for _ in range(self.draw.randrange(1, 4))]
        if kind in {4, 5, 6}:
            return self._flipped(frames)
        if kind == 7:
            which = self.draw.randrange(len(frames))
            frames[which] = frames[which][: self.draw.randrange(len(frames[which]) + 1)]
            return frames
        if kind == 8:
            return self._other_count(frames)
        if kind == 9:
            return [self._huge(frames[0]), *frames[1:]]
        if kind == 10:
            return [self._nested(frames[0]), *frames[1:]]
        return [self._renumbered(frames[0]), *frames[1:]]

    def _flipped(self, frames: list[bytes]) -> list[bytes]:
        which = self.draw.randrange(len(frames))
        data = bytearray(frames[which] or b"\0")
        for _ in range(self.draw.randrange(1, 4)):
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        return [*frames[:which], bytes(data), *frames[which + 1 :]]

    def _other_count(self, frames: list[bytes]) -> list[bytes]:
        if len(frames) > 1 and self.draw.random() < 0.5:
            return frames[:1]
        return [*frames, *[b"x"] * self.draw.choice([1, 2, 300])]

    def _huge(self, header: bytes) -> bytes:
        place = self.draw.randrange(len(header) + 1)
        return header[:place] + self.draw.choice(LENGTHS) + header[place:]

    def _nested(self, header: bytes) -> bytes:
        deep = self.draw.choice([b"\x91", b"\x81\xa1x"]) * self.draw.choice([10, 3000])
        return header[: self.draw.randrange(1, len(header) + 1)] + deep

    def _renumbered(self, header: bytes) -> bytes:
        """The same message with one number, at any depth, that no honest program sends."""
        return renumbered(header, self.draw)


def renumbered(header: bytes, draw: random.Random) -> bytes:
    """A msgpack document with one of its numbers replaced by one of NUMBERS."""
    document = msgspec.msgpack.decode(header)
    places: list[tuple[object, object]] = []
    _numbers_in(document, places)
    if not places:
        return header
    holder, key = draw.choice(places)
    holder[key] = draw.choice(NUMBERS)  # type: ignore[index]
    return msgspec.msgpack.encode(document)


def _numbers_in(value: object, places: list[tuple[object, object]]) -> None:
    pairs: list[tuple[object, object]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, item in pairs:
        if isinstance(item, int | float) and not isinstance(item, bool):
            places.append((value, key))
        else:
            _numbers_in(item, places)
