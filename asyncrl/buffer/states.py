"""What the ledger knows of groups, samples, leases and workers, and what it wants written and sent.

Records are mutable and live only while their group is unsettled; the tables keep everything. A
`Transaction` is the ledger's whole output since the last one: final rows of whatever changed, new rows,
and the messages that may leave once all of it is committed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asyncrl.messages.control import Kind, Message
from asyncrl.messages.parts import GroupParts
from asyncrl.messages.sample import Lane, Settled, Status

FRESH = "fresh"
GENERATING = "generating"
GENERATED = "generated"
SCORING = "scoring"
SCORED = "scored"
FILTERING = "filtering"
READY = "ready"
BATCHED = "batched"

PROMPT_INDEX = -1
"""`idx` of a prompt's body."""


@dataclass(slots=True)
class SampleRecord:
    """One sample of a live group."""

    index: int
    state: str = FRESH
    status: Status = Status.PENDING
    tokens: int = 0
    """Response tokens committed."""
    bodies: list[int] = field(default_factory=list)
    """Body ids of its segments, in order."""
    body_bytes: int = 0
    score_bytes: int = 0
    fence: int = 0
    """Number of the newest lease on it; results under another one are refused."""
    attempts: int = 0
    """Attempts without progress at the present stage."""
    worker: str = ""
    """Who generated its newest tokens."""
    oldest: int | None = None
    """Smallest version among its tokens."""
    newest: int | None = None
    reward: float | None = None
    removed: bool = False
    score_body: int = 0


@dataclass(slots=True)
class GroupRecord:
    """One unsettled group."""

    group_id: int
    lane: Lane
    dataset: str
    prompt_body: int
    prompt_tokens: int
    prompt_bytes: int
    samples: list[SampleRecord]
    created_at: float
    state: str = FRESH
    version: int = -1
    """Lane train: the issue version, -1 before the first lease. Lane eval: the version it evaluates."""
    incarnation: int = 0
    """Of that version."""
    due: int = -1
    """Batch it must be trained by; -1 before the first lease and in the lane eval."""
    batch: int = -1
    reason: Settled | None = None
    note: str = ""
    fence: int = 0
    """Of the filter's lease."""
    issued_seq: int = -1
    settled_seq: int = -1
    settled_at: float = 0.0

    @property
    def tokens(self) -> int:
        """Response tokens committed in the whole group."""
        return sum(sample.tokens for sample in self.samples)

    @property
    def body_ids(self) -> list[int]:
        """Every body of the group."""
        ids = [self.prompt_body]
        for sample in self.samples:
            ids += sample.bodies
            if sample.score_body:
                ids.append(sample.score_body)
        return ids


@dataclass(slots=True)
class LeaseRecord:
    """A lease that has not ended."""

    fence: int
    kind: Kind
    worker: str
    incarnation: str
    group_id: int
    indices: list[int]
    remaining: set[int]
    version: int
    granted_at: float
    num_bytes: int
    progressed: bool = False
    excused: bool = False
    """Its end is our own doing and counts against nobody."""


@dataclass(slots=True)
class WorkerRecord:
    """An actor that said hello to the desk."""

    peer: bytes
    name: str
    role: str
    incarnation: str
    last_seen: float
    """On the clock of `Fleet.steady`."""
    hellos: int = 0
    """How often this life had said hello before it said the present one."""
    credit: dict[Kind, int] = field(default_factory=dict)
    credit_bytes: int = 0
    capacity: int = 0
    version: int = -1
    version_incarnation: int = 0
    leases: set[int] = field(default_factory=set)
    eval_held: int = 0
    """Samples of the lane eval it holds."""
    alone: int = 0
    """Fence of a suspect leased alone to it; nothing else is given out until that ends."""


@dataclass(slots=True)
class BodyRow:
    """A body to append: its bytes, and the row that will name them."""

    id: int
    kind: str
    group_id: int
    index: int
    num_tokens: int
    spans: list[Any]
    fence: int
    worker: str
    data: bytes
    digest: str


@dataclass(slots=True)
class Outgoing:
    """A message for one peer; its frames are the bodies named by `bodies`."""

    peer: bytes
    message: Message
    bodies: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Transaction:
    """Everything to commit, then to send; see the module's docstring."""

    groups: list[tuple[Any, ...]]
    """Rows, not records: the ledger goes on while they are written, and no row may be ahead of its bodies."""
    samples: list[tuple[Any, ...]]
    bodies: list[BodyRow]
    rows: list[tuple[str, tuple[Any, ...]]]
    """(statement name of the store, parameters), in order."""
    sends: list[Outgoing]
    deliver: list[tuple[bytes, int]]
    """(trainer's peer, batch): recorded batches to hand out."""
    evaluated: list[tuple[int, int]]
    """(version, incarnation) of evaluations to hand to the evaluator."""
    forget: list[int]
    """Bodies nobody will ask the desk for again (they stay on disk)."""

    @property
    def empty(self) -> bool:
        """Nothing to write and nothing to send."""
        return not (
            self.groups
            or self.samples
            or self.bodies
            or self.rows
            or self.sends
            or self.deliver
            or self.evaluated
            or self.forget
        )


def parts_of(group: GroupRecord, indices: list[int], *, scored: bool = False) -> tuple[GroupParts, list[int]]:
    """The parts of some samples of a group, and the ids of the bodies that are their frames."""
    samples = [group.samples[index] for index in indices]
    bodies = [group.prompt_body]
    for sample in samples:
        bodies += sample.bodies
        if scored:
            bodies.append(sample.score_body)
    parts = GroupParts(
        group_id=group.group_id,
        lane=group.lane,
        issue_version=group.version,
        indices=indices,
        statuses=[sample.status for sample in samples],
        segments=[len(sample.bodies) for sample in samples],
        scored=scored,
        removed=[sample.index for sample in samples if sample.removed],
    )
    return parts, bodies


def size_of(group: GroupRecord, indices: list[int], *, scored: bool) -> int:
    """Bytes of the frames of `parts_of`."""
    samples = [group.samples[index] for index in indices]
    return group.prompt_bytes + sum(s.body_bytes + (s.score_bytes if scored else 0) for s in samples)


def group_row(g: GroupRecord) -> tuple[Any, ...]:
    """The row of `groups`, as the record stands now."""
    reason = None if g.reason is None else str(g.reason)
    return (
        g.group_id, str(g.lane), g.dataset, len(g.samples), g.state, reason, g.version, g.incarnation, g.due,
        g.batch, g.prompt_body, g.prompt_tokens, g.fence, g.issued_seq, g.settled_seq, g.created_at,
        g.settled_at, g.note,
    )  # fmt: skip


def sample_row(group_id: int, s: SampleRecord) -> tuple[Any, ...]:
    """The row of `samples`, as the record stands now."""
    return (
        group_id, s.index, s.state, str(s.status), s.tokens, s.attempts, s.fence, s.worker, s.oldest,
        s.newest, s.reward, int(s.removed), s.score_body,
    )  # fmt: skip
