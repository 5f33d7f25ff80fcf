"""What a version's bytes are: where each tensor lies, its digest, and the way back to tensors.

A version is one run of bytes. Tensors lie in it sorted by name, each on a 64-byte boundary; tensors that are
one and the same memory (tied embeddings) lie in it once. The digest of a version covers names, shapes, dtypes
and contents and nothing else, so it does not depend on offsets, hosts or the order of a mapping.

This module reads no file and sends nothing. Invariant: tensors come out of a buffer only after `verify`, or
not at all, where the caller follows `tensors_of`'s advice.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import msgspec
import torch
import xxhash

from asyncrl.errors import WeightsError
from asyncrl.messages.codec import Body
from asyncrl.messages.version import Manifest, TensorEntry

Buffer = Body | mmap.mmap
"""What may hold the bytes of a version."""

ALIGNMENT = 64
"""Bytes; a cache line, and a multiple of every dtype's size."""


def layout(tensors: Mapping[str, torch.Tensor]) -> list[TensorEntry]:
    """Where each tensor will lie, sorted by name, digests still empty. Any device, any strides."""
    entries: list[TensorEntry] = []
    offsets: dict[tuple[Any, ...], int] = {}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        num_bytes = tensor.numel() * tensor.element_size()
        offset = offsets.setdefault(_memory_of(tensor), _aligned(end)) if num_bytes else _aligned(end)
        entries.append(
            TensorEntry(name, list(tensor.shape), dtype_name(tensor.dtype), offset, num_bytes, digest="")
        )
        end = max(end, offset + num_bytes)
    return entries


def size_of(entries: Iterable[TensorEntry]) -> int:
    """Bytes from the start to the end of the last tensor."""
    return max((entry.offset + entry.num_bytes for entry in entries), default=0)


def copy_into(
    staging: torch.Tensor, tensors: Mapping[str, torch.Tensor], *, entries: list[TensorEntry]
) -> None:
    """Copy tensors to their places in a uint8 buffer [num_bytes] on the CPU."""
    done: set[int] = set()
    with torch.no_grad():
        for entry in entries:
            if entry.num_bytes and entry.offset not in done:
                done.add(entry.offset)
                _view(staging, entry).copy_(tensors[entry.name])


def with_digests(entries: list[TensorEntry], buffer: Buffer) -> list[TensorEntry]:
    """The same entries with the digests of what lies in the buffer."""
    view = memoryview(buffer)
    known: dict[tuple[int, int], str] = {}
    filled = []
    for entry in entries:
        place = (entry.offset, entry.num_bytes)
        digest = known.get(place)
        if digest is None:
            digest = digest_of_bytes(view[entry.offset : entry.offset + entry.num_bytes])
            known[place] = digest
        filled.append(msgspec.structs.replace(entry, digest=digest))
    return filled


def digest_of_bytes(data: Body) -> str:
    """xxh3-128 in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_of_entries(entries: list[TensorEntry]) -> str:
    """The digest of a version: over every tensor's name, shape, dtype and digest, in order."""
    facts = [(entry.name, entry.shape, entry.dtype, entry.digest) for entry in entries]
    return digest_of_bytes(msgspec.msgpack.encode(facts))


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest that a version of these tensors would have."""
    entries = []
    for entry in layout(tensors):
        data = tensors[entry.name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        entries.append(msgspec.structs.replace(entry, digest=digest_of_bytes(data.data)))
    return digest_of_entries(entries)


def verify(manifest: Manifest, buffer: Buffer) -> None:
    """Raises WeightsError, naming the first bad tensor, unless the buffer is what the manifest says."""
    size = memoryview(buffer).nbytes
    if size != manifest.num_bytes:
        raise WeightsError(f"weights {manifest.name}: {size} bytes instead of {manifest.num_bytes}")
    for entry in manifest.tensors:
        problem = _impossible(entry, size=size)
        if problem:
            raise WeightsError(f"weights {manifest.name}: tensor {entry.name!r} {problem}")
    for entry, actual in zip(manifest.tensors, with_digests(manifest.tensors, buffer), strict=True):
        if actual.digest != entry.digest:
            raise WeightsError(
                f"weights {manifest.name}: tensor {entry.name!r} has digest {actual.digest}, not "
                f"{entry.digest} as announced; the bytes were damaged or overwritten, fetch the version again"
            )
    if digest_of_entries(manifest.tensors) != manifest.digest:
        raise WeightsError(f"weights {manifest.name}: the manifest's tensors do not have its digest")


def tensors_of(manifest: Manifest, buffer: Buffer) -> dict[str, torch.Tensor]:
    """Views [shape] on a writable buffer, by name; nothing is copied. The views keep the buffer alive.

    Call `verify` first: this function trusts the manifest.

    Raises:
        ValueError: the buffer is read-only, which torch tensors cannot be.
    """
    if memoryview(buffer).readonly:
        raise ValueError("tensors need a writable buffer: map the file privately, or use a bytearray")
    if manifest.num_bytes == 0:
        return {e.name: torch.empty(e.shape, dtype=dtype_of(e.dtype)) for e in manifest.tensors}
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    return {entry.name: _view(whole, entry) for entry in manifest.tensors}


def dtype_name(dtype: torch.dtype) -> str:
    """The name in a manifest: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name. Raises WeightsError."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightsError(f"unknown dtype {name!r}; names are torch's, as in bfloat16 or float32")
    return dtype


def _view(whole: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    dtype = dtype_of(entry.dtype)
    return whole[entry.offset : entry.offset + entry.num_bytes].view(dtype).view(entry.shape)


def _memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory read in the same way."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _impossible(entry: TensorEntry, *, size: int) -> str:
    """What is wrong with an entry, whatever the bytes are; empty if nothing."""
    if entry.offset % ALIGNMENT or entry.offset < 0:
        return f"starts at {entry.offset}, not at a multiple of {ALIGNMENT}"
    if any(length < 0 for length in entry.shape):
        return f"has the impossible shape {entry.shape}"
    if entry.num_bytes != prod(entry.shape) * dtype_of(entry.dtype).itemsize:
        return f"has {entry.num_bytes} bytes, which is not {entry.dtype} {entry.shape}"
    if entry.offset + entry.num_bytes > size:
        return f"ends at {entry.offset + entry.num_bytes}, behind the last byte"
    return ""
