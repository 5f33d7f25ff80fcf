"""The conversation between a receiver of weights and the publisher's stream endpoint."""

from __future__ import annotations

import msgspec

from asyncrl.messages.codec import MiB

MAX_CHUNK_BYTES = MiB
"""The most bytes one request may ask for."""
MAX_OUTSTANDING = 8
"""Requests that a receiver has under way at once: they hide a round trip and fit in memory."""


class ChunkRequest(msgspec.Struct, frozen=True, kw_only=True, tag="chunk_request"):
    """Receiver -> publisher: some bytes of a version, please."""

    digest: str
    """Of the version."""
    offset: int
    """Bytes from its start."""
    num_bytes: int
    """1 to `MAX_CHUNK_BYTES`."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True, tag="chunk"):
    """Publisher -> receiver: the bytes asked for, as the only body."""

    digest: str
    offset: int


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal"):
    """Publisher -> receiver: the bytes asked for do not exist (any more)."""

    digest: str
    offset: int
    reason: str


ToPublisher = ChunkRequest
ToReceiver = Chunk | Refusal
