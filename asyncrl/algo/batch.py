"""How samples are cut into optimizer steps, dealt to ranks and packed into micro-batches.

Owns decisions about indices; sees lengths and sizes only. Never reorders samples across optimizer steps, so
the recorded order of a batch fixes what every step trains on. All are pure functions: the same lengths give
the same cut on every rank and in a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from asyncrl.algo.partition import karmarkar_karp

Bins = list[list[int]]
"""Micro-batches: sample indices of each."""


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


def schedule(
    lengths: Sequence[int],
    *,
    num_steps: int,
    num_ranks: int = 1,
    max_tokens: int | None = None,
    micro_batch_size: int | None = None,
    sizes: Sequence[int] | None = None,
    balance: bool = False,
) -> list[list[Bins]]:
    """Sample indices as [step][rank][micro_batch]: the whole plan of a batch, the same on every rank.

    Steps are those of `split_steps`. Each is packed first-fit into micro-batches of at most `max_tokens`, or
    into consecutive ones of `micro_batch_size` samples: exactly one of the two is given. All ranks of a step
    get equally many, since collectives run per micro-batch; where packing gives fewer, the largest are split.

    balance=False deals micro-batches in turn (slime's rule). balance=True gives each rank samples of like
    summed `sizes`, counts differing by at most one, and packs every rank on its own (Miles: --balance-data).
    `lengths` in tokens, prompt and response; `sizes` in any unit of work (`partition.flops`); None: tokens.

    A sample longer than `max_tokens` sits alone. Where a step's samples do not divide by `num_ranks` and
    hardly two of them fit together, no equal number of non-empty micro-batches keeps the budget: only then
    the smallest are joined past it, fewer than num_ranks times a step (the same with micro_batch_size).
    Raises ValueError where a step has fewer samples than ranks: one without samples would miss collectives.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks: {num_ranks}; must be at least 1")
    if (max_tokens is None) == (micro_batch_size is None):
        raise ValueError(
            f"max_tokens: {max_tokens}, micro_batch_size: {micro_batch_size}; exactly one must be given"
        )
    work = lengths if sizes is None else sizes
    if len(work) != len(lengths):
        raise ValueError(f"sizes: {len(work)} of them for {len(lengths)} lengths; one per sample is needed")

    def pack(members: Sequence[int]) -> Bins:
        if max_tokens is None:
            # The check above leaves micro_batch_size.
            local = pack_by_count(len(members), micro_batch_size=micro_batch_size or 0)
        else:
            local = pack_by_tokens([lengths[i] for i in members], max_tokens=max_tokens)
        return [[members[i] for i in bin_] for bin_ in local]

    steps = split_steps(len(lengths), num_steps=num_steps)
    for number, step in enumerate(steps):
        if len(step) < num_ranks:
            raise ValueError(
                f"optimizer step {number}: {len(step)} samples for {num_ranks} ranks; a rank without samples "
                "would miss the collectives of the others; use fewer steps or ranks, or more samples"
            )
    deal = _deal_samples if balance else _deal_bins
    return [deal(step, pack=pack, num_ranks=num_ranks, lengths=lengths, work=work) for step in steps]


def _deal_samples(
    step: Sequence[int],
    *,
    pack: Callable[[Sequence[int]], Bins],
    num_ranks: int,
    lengths: Sequence[int],
    work: Sequence[int],
) -> list[Bins]:
    """Samples to ranks by work, then micro-batches on each; see `schedule`."""
    parts = karmarkar_karp([work[i] for i in step], num_parts=num_ranks, equal_count=True)
    shares = [[step[i] for i in part] for part in parts]
    ranks = [pack(share) for share in shares]
    count = max(len(bins) for bins in ranks)
    if count > min(len(share) for share in shares):
        # A rank with one sample less cannot fill as many: whole micro-batches are dealt by work instead.
        bins = _resize(pack(step), num_ranks=num_ranks, lengths=lengths, work=work)
        totals = [_total(bin_, work) for bin_ in bins]
        parts = karmarkar_karp(totals, num_parts=num_ranks, equal_count=True)
        return [[bins[i] for i in part] for part in parts]
    return [_split(bins, count=count, work=work) for bins in ranks]


def _deal_bins(
    step: Sequence[int],
    *,
    pack: Callable[[Sequence[int]], Bins],
    num_ranks: int,
    lengths: Sequence[int],
    work: Sequence[int],
) -> list[Bins]:
    """Micro-batches of the whole step to ranks in turn; see `schedule`."""
    bins = _resize(pack(step), num_ranks=num_ranks, lengths=lengths, work=work)
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def _resize(bins: Bins, *, num_ranks: int, lengths: Sequence[int], work: Sequence[int]) -> Bins:
    """As many micro-batches as the next multiple of `num_ranks` that the samples can fill."""
    num_samples = sum(len(bin_) for bin_ in bins)
    count = min(-(-len(bins) // num_ranks), num_samples // num_ranks) * num_ranks
    while len(bins) > count:
        bins = sorted(bins, key=lambda bin_: (_total(bin_, lengths), bin_))
        bins = [sorted(bins[0] + bins[1]), *bins[2:]]
    return _split(bins, count=count, work=work)


def _split(bins: Bins, *, count: int, work: Sequence[int]) -> Bins:
    """The largest micro-batches cut in two, where the halves are most alike, until there are `count`."""
    bins = list(bins)
    while len(bins) < count:
        largest = max((bin_ for bin_ in bins if len(bin_) > 1), key=lambda bin_: (_total(bin_, work), bin_))
        bins.remove(largest)
        before = list(accumulate((work[i] for i in largest), initial=0))
        cut = min(range(1, len(largest)), key=lambda at: max(before[at], before[-1] - before[at]))
        bins += [largest[:cut], largest[cut:]]
    return sorted(bins)


def _total(members: Sequence[int], numbers: Sequence[int]) -> int:
    return sum(numbers[i] for i in members)
