"""The staleness rule, as pure functions over counts: which groups a batch may take, and when it must wait.

B groups make a batch; a group issued under version v is due in batch v + max_staleness. Batch s may be cut
only if afterwards, for every d >= s, at most (d - s) x B outstanding groups are due by d. The ledger, the
audit and the property test call the same `feasible`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


def feasible(dues: Mapping[int, int], next_batch: int, batch_size: int) -> bool:
    """Whether every outstanding group can still be trained by the batch it is due in.

    Args:
        dues: due batch -> number of outstanding groups (issued, neither settled nor in a recorded batch).
        next_batch: the first batch that is not recorded yet.
        batch_size: groups per batch, B.
    """
    return first_overdue(dues, next_batch, batch_size) is None


def first_overdue(dues: Mapping[int, int], next_batch: int, batch_size: int) -> int | None:
    """The smallest due batch by which more groups are due than the batches up to it can hold; else None."""
    total = 0
    for due in sorted(dues):
        total += dues[due]
        if total > max(0, due - next_batch + 1) * batch_size:
            return due
    return None


def choose(
    ready: Sequence[tuple[int, int]], dues: Mapping[int, int], next_batch: int, batch_size: int
) -> list[int] | None:
    """Groups for the next batch, earliest due first; None when it must wait.

    Args:
        ready: (due, group id) of complete groups.
        dues: due -> outstanding groups, the ready ones included.
        next_batch: the batch to cut.
        batch_size: groups per batch.
    """
    if len(ready) < batch_size:
        return None
    chosen = sorted(ready)[:batch_size]
    if not feasible(after(dues, [due for due, _ in chosen]), next_batch + 1, batch_size):
        return None
    return [group_id for _, group_id in chosen]


def after(dues: Mapping[int, int], taken: Sequence[int]) -> Counter[int]:
    """The outstanding counts once groups with these dues are gone."""
    rest = Counter(dues)
    rest.subtract(taken)
    return +rest
