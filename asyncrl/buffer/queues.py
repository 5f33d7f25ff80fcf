"""What waits for a worker, in the order it should be taken. Entries are checked when they come out: a group
may have settled, or a sample moved on, since they went in.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from asyncrl.buffer.states import FRESH, GENERATED, SCORED, GroupRecord, SampleRecord
from asyncrl.messages.sample import Lane


class Queues:
    """Group and sample ids by what they wait for."""

    def __init__(self, *, scores_groups: bool = False) -> None:
        self.fresh: deque[int] = deque()
        """Lane train: groups never leased, in ordinal order."""
        self.partial: list[tuple[int, int]] = []
        """Lane train: heap of (group, index) that go back to a generator; the oldest group first."""
        self.evaluation: list[tuple[int, int]] = []
        """Lane eval: heap of (group, index)."""
        self.to_score: deque[tuple[int, int]] = deque()
        self.to_score_groups: deque[int] = deque()
        """Groups whose every sample is generated, for `group_rm`."""
        self.to_filter: deque[int] = deque()
        self.scores_groups = scores_groups

    def return_sample(self, group: GroupRecord, sample: SampleRecord) -> None:
        """A sample waits for a generator (again)."""
        heap = self.evaluation if group.lane is Lane.EVAL else self.partial
        heapq.heappush(heap, (group.group_id, sample.index))

    def return_group(self, group: GroupRecord) -> None:
        """All samples of a group wait for a generator."""
        for sample in group.samples:
            self.return_sample(group, sample)

    def generated(self, group: GroupRecord, sample: SampleRecord) -> None:
        """A sample waits for its score; under `group_rm` its group does, once it is complete."""
        if self.scores_groups and group.lane is Lane.TRAIN:
            self.maybe_score_group(group)
        else:
            self.to_score.append((group.group_id, sample.index))

    def maybe_score_group(self, group: GroupRecord) -> None:
        """Under `group_rm`: the group waits once nobody works on it and a score is still missing."""
        if self.scores_groups and group.lane is Lane.TRAIN and waits_for_group_score(group):
            self.to_score_groups.append(group.group_id)

    def peek(
        self, heap: list[tuple[int, int]], groups: dict[int, GroupRecord]
    ) -> tuple[GroupRecord, SampleRecord] | None:
        """The first entry of a heap that still waits; entries that do not are dropped."""
        while heap:
            group = groups.get(heap[0][0])
            if group is not None:
                sample = group.samples[heap[0][1]]
                if sample.state == FRESH:
                    return group, sample
            heapq.heappop(heap)
        return None

    def take_to_score(
        self, groups: dict[int, GroupRecord], limit: int
    ) -> tuple[GroupRecord, list[int]] | None:
        """Samples of one group that wait for a score, at most `limit`."""
        while self.to_score:
            group_id, index = self.to_score[0]
            group = groups.get(group_id)
            if group is None or group.samples[index].state != GENERATED:
                self.to_score.popleft()
                continue
            indices: list[int] = []
            while self.to_score and self.to_score[0][0] == group_id and len(indices) < limit:
                _, index = self.to_score.popleft()
                if group.samples[index].state == GENERATED and index not in indices:
                    indices.append(index)
            return group, indices
        return None

    def first_group(
        self, queue: deque[int], groups: dict[int, GroupRecord], waits: Callable[[GroupRecord], bool]
    ) -> GroupRecord | None:
        """The first group of a queue that still waits; it stays there until it is leased."""
        while queue:
            group = groups.get(queue[0])
            if group is not None and waits(group):
                return group
            queue.popleft()
        return None


def waits_for_group_score(group: GroupRecord) -> bool:
    """Every sample is generated, none is being scored, and not all are scored."""
    states = {sample.state for sample in group.samples}
    return GENERATED in states and states <= {GENERATED, SCORED}
