"""A version of the weights as it is announced: who made it, what it contains, where its bytes are."""

from __future__ import annotations

import msgspec

from asyncrl.messages.numbers import Count


class TensorEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where one tensor lies in a version's bytes."""

    name: str
    """Hugging Face parameter name."""
    shape: list[Count]
    dtype: str
    """Name of the torch dtype: "float32", "bfloat16", ..."""
    offset: Count
    """Bytes from the start, a multiple of 64."""
    num_bytes: Count
    digest: str
    """xxh3-128 of the bytes, hex."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One published version. `digest` covers every tensor's name, shape, dtype and digest, in order."""

    run_id: str
    version: Count
    """Rollout steps trained into these weights; 0 is the initial model."""
    incarnation: Count
    """Which life of the trainer made them; 1 is the first."""
    step: Count
    """Optimizer steps trained into these weights."""
    digest: str
    """xxh3-128, hex."""
    num_bytes: Count
    tensors: list[TensorEntry]
    path: str = ""
    """File that holds the bytes, for receivers on the publisher's host (carrier `shm`)."""
    host: str = ""
    """The publisher's host identity: a receiver with the same one may map `path`."""
    address: str = ""
    """Address of the publisher's stream endpoint, for receivers elsewhere (carrier `stream`)."""

    @property
    def name(self) -> str:
        """Short name for people: v12.1 is version 12 of incarnation 1."""
        return f"v{self.version}.{self.incarnation}"
