"""Keys and values of the running rows, and of the prompts that their groups share.

Owns the memory of the KV cache: one slot per row, slots 0 .. n-1 in use, so that attention reads a view and
copies nothing. It grows by doubling up to its bound and never shrinks. Never decides which row lives where.

Letters: L layers, S slots, E positions, K key and value heads (keys first), D head dimension.
"""
# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from asyncrl.engines.model_config import ModelConfig

# Slots and positions of the first allocation; both double from there.
FIRST_SLOTS = 16
FIRST_POSITIONS = 128


class KVCache:
    """Static slots of shape [L, S, E, K, D]."""

    def __init__(
        self, config: ModelConfig, *, max_slots: int, max_positions: int, device: str, dtype: torch.dtype
    ) -> None:
        self.max_slots, self.max_positions = max_slots, max_positions
        shape = (
            config.num_layers,
            min(FIRST_SLOTS, max_slots),
            min(FIRST_POSITIONS, max_positions),
            2 * config.num_kv_heads,
            config.head_dim,
        )
        self._num_kv_heads = config.num_kv_heads
        self.data_LSEKD = _zeros(shape, device=device, dtype=dtype)

    @property
    def num_positions(self) -> int:
        """Positions that a slot has now."""
        return self.data_LSEKD.shape[2]

    def reserve(self, slots: int, positions: int) -> None:
        """Make room for so many slots and positions, keeping what is there."""
        old = self.data_LSEKD
        num_slots, num_positions = old.shape[1], old.shape[2]
        if slots <= num_slots and positions <= num_positions:
            return
        assert slots <= self.max_slots, (slots, self.max_slots)
        assert positions <= self.max_positions, (positions, self.max_positions)
        new_slots = _grown(num_slots, slots, self.max_slots)
        new_positions = _grown(num_positions, positions, self.max_positions)
        shape = (old.shape[0], new_slots, new_positions, *old.shape[3:])
        self.data_LSEKD = _zeros(shape, device=str(old.device), dtype=old.dtype)
        self.data_LSEKD[:, :num_slots, :num_positions] = old

    def write(self, layer: int, *, places: torch.Tensor, kv_NKD: torch.Tensor) -> None:
        """Store the keys and values of N tokens; `places` [N] is slot * num_positions + position."""
        num_tokens, num_heads, dim = kv_NKD.shape
        rows = self.data_LSEKD[layer].view(-1, num_heads * dim)
        rows.index_copy_(0, places, kv_NKD.reshape(num_tokens, num_heads * dim))

    def read(
        self, layer: int, *, slots: slice | torch.Tensor, positions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [s, heads, positions, D] of the slots; a view where `slots` is a slice."""
        kv_sEKD = self.data_LSEKD[layer, slots, :positions]
        heads = self._num_kv_heads
        return kv_sEKD[:, :, :heads].transpose(1, 2), kv_sEKD[:, :, heads:].transpose(1, 2)

    def move(self, source: int, target: int, positions: int) -> None:
        """Copy a slot's first positions over another's."""
        self.data_LSEKD[:, target, :positions] = self.data_LSEKD[:, source, :positions]

    def save(self, slot: int, positions: int) -> torch.Tensor:
        """A copy [L, e, K, D] of a slot's first positions."""
        return self.data_LSEKD[:, slot, :positions].clone()

    def restore(self, slots: list[int], kv_LeKD: torch.Tensor) -> None:
        """Write a saved prompt into the slots."""
        index = torch.tensor(slots, device=kv_LeKD.device)
        self.data_LSEKD[:, index, : kv_LeKD.shape[1]] = kv_LeKD.unsqueeze(1)


def _zeros(shape: tuple[int, ...], *, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, not garbage: a masked position is multiplied by 0, and 0 * NaN is NaN.

    On a CPU the memory is numpy's, which asks for huge pages where torch does not: attention reads a little
    of every slot, and spends a quarter of its time on page walks without them (measured at 256 rows).
    """
    if device != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _grown(now: int, needed: int, bound: int) -> int:
    return now if needed <= now else min(bound, max(needed, 2 * now))


class SavedPrompt(NamedTuple):
    """What filling a prompt gave."""

    kv_LeKD: torch.Tensor
    routed: NDArray[Any] | None
    """int16 [e, layers, experts per token], where routing is captured."""


class PrefixStore:
    """Filled prompts by prefix key, least recently used out first, bounded in tokens.

    Everything in it was computed under the weights that sample now: a swap clears it.
    """

    def __init__(self, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._entries: OrderedDict[tuple[str, bytes], SavedPrompt] = OrderedDict()

    def get(self, key: tuple[str, bytes]) -> SavedPrompt | None:
        """The saved prompt. The key holds the prompt too: a wrong key costs time, not truth."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: tuple[str, bytes], prompt: SavedPrompt) -> None:
        """Keep a prompt, dropping the oldest ones beyond the bound (which may be this one)."""
        self._entries[key] = prompt
        self.num_tokens += prompt.kv_LeKD.shape[1]
        while self.num_tokens > self.max_tokens:
            self.num_tokens -= self._entries.popitem(last=False)[1].kv_LeKD.shape[1]

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        self._entries.clear()
        self.num_tokens = 0
