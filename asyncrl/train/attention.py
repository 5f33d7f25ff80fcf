"""Attention over packed sequences: one row of tokens, and a causal square for each sequence in it.

Owns the attention implementation "packed" that is registered with transformers, and the plan it follows.
Never builds a mask over the row: that would be quadratic in the row.

A call per sequence is slow when sequences are short, padding to the longest is slow when lengths differ. So
sequences of similar length are gathered into one call, padded on the right: under a causal mask no real
position sees the padding, and its outputs are never read back.

Shape letters: T tokens of the row, P places in the buckets, B sequences in a bucket, L their padded length,
H heads, D head size.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

NAME = "packed"
"""Under which transformers finds it."""
BUCKET_TOKENS = 8
"""Short sequences share a bucket when their lengths round up to the same multiple of this."""
BUCKET_FRACTION = 8
"""Longer ones when they round up to the same eighth of the power of two below: at most 1/8 is padding."""


class Segments(NamedTuple):
    """Where the sequences of a row lie."""

    shapes: list[tuple[int, int]]
    """(B, L) of each bucket."""
    gather_P: Tensor
    """int64, the row position of each place in the buckets, laid end to end; padding repeats a position."""
    scatter_T: Tensor
    """int64, the place of each row position."""

    def to(self, device: torch.device) -> Segments:
        """The same on a device."""
        return Segments(self.shapes, self.gather_P.to(device), self.scatter_T.to(device))


def bucket_length(length: int) -> int:
    """The padded length of a sequence of `length` >= 1 tokens."""
    unit = max(BUCKET_TOKENS, (1 << (length.bit_length() - 1)) // BUCKET_FRACTION)
    return -(-length // unit) * unit


def plan_segments(lengths: Sequence[int]) -> Segments:
    """The plan for sequences of these lengths laid end to end in one row, in order."""
    lengths_S = np.array(lengths, np.int64)
    starts_S = lengths_S.cumsum() - lengths_S
    members: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        members.setdefault(bucket_length(length), []).append(index)
    shapes, gathers, scatter_T, places = [], [], np.empty(int(lengths_S.sum()), np.int64), 0
    for _, rows in sorted(members.items()):
        if len(rows) == 1:
            # Long answers are often alone in their bucket, and a run of places needs no index arithmetic.
            start, length = int(starts_S[rows[0]]), lengths[rows[0]]
            gathers.append(np.arange(start, start + length))
            scatter_T[start : start + length] = np.arange(places, places + length)
            shapes.append((1, length))
            places += length
            continue
        lengths_B1, starts_B1 = lengths_S[rows, None], starts_S[rows, None]
        steps_1L = np.arange(int(lengths_B1.max()))[None]
        index_BL = starts_B1 + np.minimum(steps_1L, lengths_B1 - 1)
        valid_BL = steps_1L < lengths_B1
        place_BL = places + np.arange(index_BL.size).reshape(index_BL.shape)
        scatter_T[index_BL[valid_BL]] = place_BL[valid_BL]
        shapes.append((index_BL.shape[0], index_BL.shape[1]))
        gathers.append(index_BL.reshape(-1))
        places += index_BL.size
    return Segments(shapes, torch.from_numpy(np.concatenate(gathers)), torch.from_numpy(scatter_T))


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the row: [1, T, H, D], by transformers' convention.

    Key and value may have fewer heads. Raises ValueError where the model wants what this cannot do, rather
    than compute something else.
    """
    del module, attention_mask
    unknown = [name for name in ("softcap", "s_aux") if others.get(name) is not None]
    if segments is None or unknown:
        raise ValueError(
            f"packed attention: {'the model wants ' + ', '.join(unknown) if unknown else 'got no segments'}; "
            'trainer.attn_implementation = "eager" takes any'
        )
    buckets = zip(*(_buckets(row, segments) for row in (query_1HTD, key_1HTD, value_1HTD)), strict=True)
    outputs = []
    for query_BHLD, key_BHLD, value_BHLD in buckets:
        mask_LL = _window(query_BHLD.shape[2], sliding_window, query_BHLD.device)
        output_BHLD = nn.functional.scaled_dot_product_attention(
            query_BHLD,
            key_BHLD,
            value_BHLD,
            attn_mask=mask_LL,
            dropout_p=dropout,
            is_causal=mask_LL is None,
            scale=scaling,
            enable_gqa=query_BHLD.shape[1] != key_BHLD.shape[1],
        )
        outputs.append(output_BHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, segments.scatter_T).unsqueeze(0), None


def _buckets(row_1HTD: Tensor, segments: Segments) -> list[Tensor]:
    """The row's tokens by bucket, each [B, H, L, D]."""
    places_PHD = row_1HTD[0].transpose(0, 1).index_select(0, segments.gather_P)
    sizes = [rows * length for rows, length in segments.shapes]
    return [
        part.unflatten(0, shape).transpose(1, 2)
        for part, shape in zip(places_PHD.split(sizes), segments.shapes, strict=True)
    ]


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """A causal band as a mask, only where the window is shorter than the sequences."""
    if sliding_window is None or length <= sliding_window:
        return None
    ones_LL = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones_LL.tril() & ones_LL.triu(1 - sliding_window)


def register() -> None:
    """Make "packed" known to transformers; may be called twice."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
