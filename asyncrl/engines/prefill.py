"""Attention over the KV cache, and the filling of the cache with tokens that are already known.

Owns the shapes: which queries see which keys. A decode step is one query per row over a view of the slots;
a fill packs the tokens of many rows for the matrix products and pads them for attention only. Never samples.

Letters: N packed tokens, B rows of a fill, T longest piece, E keys seen, H query heads, D dimension.
"""
# ruff: noqa: N803, N806 -- tensors carry shape suffixes

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from asyncrl.engines.cache import KVCache
from asyncrl.engines.decoder import Attend, Decoder

# Longest piece of one row that is filled at once; longer prompts take several passes.
MAX_PIECE_TOKENS = 512
# Bound of B * T * E, the float32 mask of one pass: 64 MiB.
MAX_MASK_CELLS = 2**24
# Keys are attended to in multiples of this, so that shapes repeat.
KEY_BUCKET = 16


@dataclass(frozen=True)
class Piece:
    """Known tokens of one slot that need keys and values."""

    slot: int
    start: int
    """Position of the first of them; everything before is in the cache."""
    tokens: NDArray[np.int32]

    @property
    def end(self) -> int:
        """Position after the last."""
        return self.start + len(self.tokens)


def bucketed(positions: int, *, bound: int) -> int:
    """Keys to attend to, for so many positions in use."""
    return min(-(-positions // KEY_BUCKET) * KEY_BUCKET, bound)


def decode_attention(cache: KVCache, *, num_kv_heads: int, lengths_n: torch.Tensor, longest: int) -> Attend:
    """Attention of one query per slot 0 .. n-1 over the first `lengths_n` positions of the slot.

    The queries that share a key head are passed as its rows, which is grouped-query attention without
    repeating keys, and one kernel.
    """
    n = len(lengths_n)
    num_keys = bucketed(longest, bound=cache.num_positions)
    hidden_nE = torch.arange(num_keys, device=lengths_n.device) >= lengths_n.unsqueeze(1)
    mask = torch.zeros(hidden_nE.shape, device=lengths_n.device, dtype=cache.data_LSEKD.dtype)
    mask = mask.masked_fill_(hidden_nE, -math.inf)[:, None, None]
    slots = slice(0, n)

    def attend(layer: int, q_nHD: torch.Tensor) -> torch.Tensor:
        keys, values = cache.read(layer, slots=slots, positions=num_keys)
        q = q_nHD.unflatten(1, (num_kv_heads, -1))
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask).reshape(n, -1)

    return attend


def fill(
    decoder: Decoder, cache: KVCache, pieces: Sequence[Piece], *, routed_SELK: NDArray[np.int16] | None = None
) -> int:
    """Compute and store keys and values of the pieces. Returns the tokens computed.

    The experts that their tokens went to are written to `routed_SELK`, by slot and position, if it is given.
    """
    total = sum(len(piece.tokens) for piece in pieces)
    while pieces:
        now = [Piece(p.slot, p.start, p.tokens[:MAX_PIECE_TOKENS]) for p in pieces]
        for batch in _batches(now):
            _fill_batch(decoder, cache, batch, routed_SELK)
        pieces = [
            Piece(p.slot, p.start + MAX_PIECE_TOKENS, p.tokens[MAX_PIECE_TOKENS:])
            for p in pieces
            if len(p.tokens) > MAX_PIECE_TOKENS
        ]
    return total


def _batches(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces of like length together, each batch within the mask's bound."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: len(p.tokens)):
        longest_key = max(p.end for p in [*batch, piece])
        if batch and (len(batch) + 1) * len(piece.tokens) * longest_key > MAX_MASK_CELLS:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _fill_batch(
    decoder: Decoder, cache: KVCache, pieces: list[Piece], routed_SELK: NDArray[np.int16] | None
) -> None:
    device = cache.data_LSEKD.device
    lengths = np.array([len(p.tokens) for p in pieces])
    starts = np.array([p.start for p in pieces])
    slots = np.array([p.slot for p in pieces])
    row_N = np.repeat(np.arange(len(pieces)), lengths)
    step_N = np.concatenate([np.arange(length) for length in lengths])
    positions_N = starts[row_N] + step_N

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    routed_NLK = None if routed_SELK is None else decoder.new_routing(len(row_N))
    decoder.hidden(
        tensor(np.concatenate([p.tokens for p in pieces]).astype(np.int64)),
        positions_N=tensor(positions_N),
        cache=cache,
        places_N=tensor(slots[row_N] * cache.num_positions + positions_N),
        attend=_fill_attention(
            cache,
            slots=tensor(slots),
            starts_B=tensor(starts),
            rows_N=tensor(row_N),
            steps_N=tensor(step_N),
            shape=(int(lengths.max()), max(p.end for p in pieces)),
        ),
        routed_NLK=routed_NLK,
    )
    if routed_SELK is not None and routed_NLK is not None:
        routed_SELK[slots[row_N], positions_N] = routed_NLK.cpu().numpy()


def _fill_attention(
    cache: KVCache,
    *,
    slots: torch.Tensor,
    starts_B: torch.Tensor,
    rows_N: torch.Tensor,
    steps_N: torch.Tensor,
    shape: tuple[int, int],
) -> Attend:
    """Causal attention of B pieces of at most T tokens over E keys, on packed queries; `shape` is (T, E)."""
    num_steps, num_keys = shape
    device, dtype = starts_B.device, cache.data_LSEKD.dtype
    position_BT = starts_B[:, None] + torch.arange(num_steps, device=device)
    hidden_BTE = torch.arange(num_keys, device=device) > position_BT[:, :, None]
    mask = torch.zeros(hidden_BTE.shape, device=device, dtype=dtype).masked_fill_(hidden_BTE, -math.inf)

    def attend(layer: int, q_NHD: torch.Tensor) -> torch.Tensor:
        keys, values = cache.read(layer, slots=slots, positions=num_keys)
        q_BTHD = q_NHD.new_zeros((len(starts_B), num_steps, *q_NHD.shape[1:]))
        q_BTHD[rows_N, steps_N] = q_NHD
        out = functional.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2), keys, values, attn_mask=mask[:, None], enable_gqa=True
        )
        return out.transpose(1, 2)[rows_N, steps_N].flatten(1)

    return attend
