"""How work is spread evenly, and how much work a sequence is.

Owns the partition of numbers into parts of like sums, and the estimate of training FLOPs that may be those
numbers. Knows no samples, ranks or tensors. Both are pure functions of integers: the same numbers give the
same parts on every rank and in a replay.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class _Part(NamedTuple):
    total: int
    members: list[int]


def karmarkar_karp(sizes: Sequence[int], *, num_parts: int, equal_count: bool = False) -> list[list[int]]:
    """Indices of `sizes` in `num_parts` parts of like sums: the largest differencing method.

    Starts from partial partitions of one number each and merges the two of largest spread (largest sum minus
    smallest), laying the largest part of one on the smallest of the other, until one is left (Karmarkar and
    Karp, 1982; Miles: --balance-data). With `equal_count` the starting partitions hold num_parts numbers of
    like size, one in each part, so that parts differ by at most one member.

    `sizes` in any unit, none negative. Sums of two parts differ by at most the largest size. Parts come in
    the order of their smallest index, members ascending; no part is empty where there are as many numbers as
    parts. O(n x parts x log(n x parts)). Raises ValueError for no parts or a negative size.
    """
    if num_parts < 1:
        raise ValueError(f"num_parts: {num_parts}; must be at least 1")
    if any(size < 0 for size in sizes):
        raise ValueError(f"sizes: {min(sizes)}; must not be negative")
    ascending = [_Part(sizes[i], [i]) for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], i))]
    width = num_parts if equal_count else 1
    # Places without a number stand beside the smallest ones, where a missing member costs the least.
    ascending = [_Part(0, [])] * (-len(ascending) % width) + ascending
    partial = [
        _sorted(ascending[start : start + width] + [_Part(0, [])] * (num_parts - width))
        for start in range(0, len(ascending), width)
    ]
    # The running number decides between equal spreads, and keeps the heap from comparing parts.
    heap = [(_negative_spread(parts), number, parts) for number, parts in enumerate(partial)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = _sorted(
            [
                _Part(large.total + small.total, large.members + small.members)
                for large, small in zip(first, reversed(second), strict=True)
            ]
        )
        heapq.heappush(heap, (_negative_spread(merged), number, merged))
        number += 1
    parts = heap[0][2] if heap else [_Part(0, [])] * num_parts
    return sorted((sorted(part.members) for part in parts), key=lambda members: members or [len(sizes)])


def _sorted(parts: list[_Part]) -> list[_Part]:
    # The count tells a part that holds only sizes of 0 from an empty one: both have sum 0.
    return sorted(parts, key=lambda part: (-part.total, -len(part.members), part.members))


def _negative_spread(parts: list[_Part]) -> int:
    return parts[-1].total - parts[0].total


def flops(lengths: Sequence[int], *, num_parameters: int, num_layers: int, attention_size: int) -> list[int]:
    """Floating-point operations of training on each sequence alone, a multiply-add counted as two.

        6 x T x num_parameters + 6 x num_layers x attention_size x T x (T + 1)

    for T tokens, prompt and response. The first term: every parameter that is multiplied with every token
    does 2 in the forward and 4 in the backward pass (arXiv:2001.08361). The second: T (T + 1) / 2 causal
    pairs of tokens, each 2 x attention_size for the score and as much for the weighted value, three times for
    both passes (arXiv:2204.02311, appendix B, there without causality).

    `num_parameters`: weights of linear layers, the output head included and the embedding table not; of a
    mixture of experts only those a token reaches. `attention_size`: query heads x head dimension. Leaves out
    norms, softmax, recomputation and sliding windows. As an estimate for balancing only proportions matter.
    """
    return [6 * length * (num_parameters + num_layers * attention_size * (length + 1)) for length in lengths]
