"""How samples are cut into optimizer steps and micro-batches.

Owns two decisions about indices; sees lengths only. Never reorders samples across optimizer steps, so the
recorded order of a batch fixes what every step trains on. Both are pure functions: the same lengths give the
same cut in a replay.
"""

from __future__ import annotations

from collections.abc import Sequence


def split_steps(num_samples: int, *, num_steps: int) -> list[range]:
    """`num_steps` runs of consecutive samples, as equal as they can be, earlier ones larger.

    With num_samples = global_batch_size x num_steps every run is a global batch. A smaller last batch of the
    data gets as many steps, none of them empty (fewer steps when there are fewer samples).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: {num_steps}; must be at least 1")
    num_steps = min(num_steps, num_samples)
    base, extra = divmod(num_samples, num_steps) if num_steps else (0, 0)
    steps, start = [], 0
    for step in range(num_steps):
        stop = start + base + (step < extra)
        steps.append(range(start, stop))
        start = stop
    return steps


def pack_by_tokens(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """First-fit: each sample goes to the first micro-batch with room for it; indices in recorded order.

    `lengths` in tokens, prompt and response. A sample longer than `max_tokens` sits alone.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}; must be at least 1")
    bins: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        place = next((i for i, free in enumerate(room) if length <= free), None)
        if place is None:
            bins.append([index])
            room.append(max_tokens - length)
        else:
            bins[place].append(index)
            room[place] -= length
    return bins


def pack_by_count(num_samples: int, *, micro_batch_size: int) -> list[list[int]]:
    """Micro-batches of `micro_batch_size` consecutive samples; the last may be smaller."""
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size: {micro_batch_size}; must be at least 1")
    return [
        list(range(start, min(start + micro_batch_size, num_samples)))
        for start in range(0, num_samples, micro_batch_size)
    ]
