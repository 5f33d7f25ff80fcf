"""The conversations: every message that may cross a link, grouped by who says it to whom.

On the *desk* link every actor talks to the buffer: credit, leases, results, batches, versions. The *control*
link, on which every actor talks to the supervisor, is `supervision`. Bodies (encoded `Prompt`, `Segment`,
`Score`) travel as frames beside a message; `GroupParts` says which frame is what.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from asyncrl.messages.numbers import Change, Count, CountOrNone, Finite, GroupSize, Seconds
from asyncrl.messages.parts import GroupParts
from asyncrl.messages.sample import Lane, Span, Status
from asyncrl.messages.version import Manifest

PROTOCOL = 1
"""Raised when the conversation changes; peers with another number are refused by name."""


class Kind(StrEnum):
    """What credit and leases are for."""

    GENERATE = "generate"
    SCORE = "score"
    FILTER = "filter"
    TRAIN = "train"
    EVALUATE = "evaluate"
    """Finished evaluations, of which only bytes are counted."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of everything that is sent as a header."""


# Any actor to the buffer, and back.


class Hello(Message, frozen=True, kw_only=True):
    """First message on both links."""

    name: str
    role: str
    incarnation: str
    """Random for every life of a process: a name that comes back is not the old process."""
    protocol: Count
    schema: str
    """Hash of every struct of this module; peers built from other code are refused by name."""
    host: str = ""
    pid: Count = 0
    address: str = ""
    """Where this actor listens, when it does (the buffer's desk)."""
    run_id: str = ""
    number: int = 0
    """Counts the hellos of this life to the desk."""
    leases: list[int] = []
    """Fences this life still works on, or whose results are not acknowledged: it was here before."""
    batches: int = 0
    """For the trainer: rollout steps in its weights, counting the one it trains now."""


class Welcome(Message, frozen=True, kw_only=True):
    """The buffer's answer to Hello."""

    run_id: str
    desk: str = ""
    """Incarnation of the buffer's process."""
    number: int = 0
    """Of the hello that it answers."""
    held: list[int] = []
    """Fences that are the actor's; work under any other has gone to others."""
    announced: Manifest | None = None
    """The version generators serve now; None before version 0 is published."""
    trainer: TrainerStart | None = None
    """For the trainer only."""
    cursor: bytes = b""
    """For the source only: where it stopped."""
    next_group: int = 0
    """For the source only: the ordinal of its next group."""


class TrainerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer that starts must know."""

    incarnation: int
    """The number of this life; stamped on versions, checkpoints and trained batches."""
    checkpoint: str = ""
    """Directory of the newest committed checkpoint; empty: start from `hf_checkpoint`."""
    published: Manifest | None = None
    """The newest committed version: nothing is published before it is reached again."""


class Refused(Message, frozen=True, kw_only=True):
    """The answer to a Hello that cannot be served (other code, or a newer life took its place). It stops."""

    reason: str


class HelloAgain(Message, frozen=True, kw_only=True):
    """The answer to anybody unknown: this is another life of the desk, or it gave the sender up.

    The message it answers was not taken. The peer says hello again, and states anew what it holds and wants.
    """

    desk: str
    """Incarnation of the buffer's process."""


class Heartbeat(Message, frozen=True, kw_only=True):
    """I am alive; renews every lease I hold."""

    version: CountOrNone = -1
    incarnation: Count = 0
    asks: bool = False
    """Whether to answer: with `Alive`, or with `Finish` once that is so. One that does not read yet does not
    ask: answers would pile up."""


class Alive(Message, frozen=True, kw_only=True):
    """The answer to a heartbeat that asks, and the supervisor's to telemetry: so am I. Rests on no commit."""


class Goodbye(Message, frozen=True, kw_only=True):
    """I leave on purpose; whatever I still hold goes to others."""

    reason: str = ""


class Want(Message, frozen=True, kw_only=True):
    """Credit: room for so much more work of this kind. The only flow control there is."""

    kind: Kind
    samples: Change
    """Samples (batches, for TRAIN; none, for EVALUATE). Below zero only after a further hello, by whoever
    holds more than it has room for: a group larger than the worker, a body larger than its window."""
    num_bytes: Change = 0
    """Body bytes; given back with the same message when bodies have been taken in. Below zero as above."""
    version: CountOrNone = -1
    """Version the worker serves (GENERATE)."""
    incarnation: Count = 0
    capacity: Count = 0
    """Most samples the worker ever holds: a group that exceeds it is split."""


class Lease(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The right to work on samples of one group."""

    fence: Count
    """Names the lease in results; a result under an older number is refused."""
    kind: Kind
    parts: GroupParts
    version: CountOrNone = 0
    """GENERATE: serve at least this version; lane eval: exactly this one."""


class Leases(Message, frozen=True, kw_only=True):
    """Work. Frames: those of each lease's parts, in order."""

    leases: list[Lease]


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Response tokens of one sample, and how it stands. One frame each (empty when no tokens are handed in).

    PENDING is progress; COMPLETED and TRUNCATED are ends; ABORTED hands the sample back; FAILED is an error.
    """

    fence: Count
    group_id: Count
    index: Count
    status: Status
    offset: Count
    """Response tokens committed before this report, as the worker knows it."""
    num_tokens: Count = 0
    """Tokens in the frame."""
    spans: list[Span] = []
    reason: str = ""
    """Why it was handed back or failed."""


class Reports(Message, frozen=True, kw_only=True):
    """Generator to buffer."""

    reports: list[Report]


class Ack(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A result is committed (`accepted`) or was refused by name."""

    fence: int
    group_id: int
    index: int
    offset: int
    """Response tokens committed now."""
    accepted: bool
    reason: str = ""
    last: bool = False
    """GENERATE: how the sample ended is committed; nothing more is to come under this fence."""


class Acks(Message, frozen=True, kw_only=True):
    """Buffer to worker; sent after the commit it tells of."""

    acks: list[Ack]


class Scored(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One sample's score. One frame each (empty when it failed)."""

    fence: Count
    group_id: Count
    index: Count
    reward: Finite = 0.0
    remove_sample: bool = False
    error: str = ""
    """Not empty: scoring failed, and why."""


class Scores(Message, frozen=True, kw_only=True):
    """Reward worker to buffer."""

    scores: list[Scored]


class Verdict(Message, frozen=True, kw_only=True):
    """What the filters say of a complete group."""

    fence: Count
    group_id: Count
    keep: bool
    reason: str = ""
    removed: list[Count] = []
    """Samples to keep out of the loss."""
    error: str = ""
    """Not empty: the filter failed, and why."""


# Source and evaluator.


class Need(Message, frozen=True, kw_only=True):
    """Buffer to source: so many more groups, or the evaluation sets for one version."""

    lane: Lane
    groups: int = 0
    version: int = 0


class Issued(msgspec.Struct, frozen=True, array_like=True):
    """One prompt of an `Issue`; its body is one frame."""

    num_samples: GroupSize
    num_tokens: Count
    """Prompt tokens."""
    dataset: str = ""
    retry_of: CountOrNone = -1
    """The failed group that this one tries again; -1: none."""


class Issue(Message, frozen=True, kw_only=True):
    """Source to buffer: prompts, and the cursor after them (committed together)."""

    lane: Lane
    first_group: Count
    """Ordinal of the first one; anything but the next free ordinal is a repeat and ignored."""
    prompts: list[Issued]
    cursor: bytes = b""
    ended: bool = False
    """Lane train: there are no more. Lane eval: this was the last part of the set."""
    version: Count = 0
    """Lane eval: the version to evaluate."""


class Evaluated(Message, frozen=True, kw_only=True):
    """Buffer to evaluator: part of a finished evaluation. Frames: those of the groups, in order."""

    version: int
    incarnation: int
    part: int
    num_parts: int
    groups: list[GroupParts]


class EvaluationSeen(Message, frozen=True, kw_only=True):
    """Evaluator to buffer: logged; need not be delivered again."""

    version: Count
    incarnation: Count


# Trainer.


class BatchPart(Message, frozen=True, kw_only=True):
    """Buffer to trainer: a piece of a recorded batch. Frames: those of the groups, in order."""

    batch: int
    part: int
    num_parts: int
    groups: list[GroupParts]
    num_bytes: int
    """Body bytes of this piece; the trainer gives them back as credit."""
    recorded_digest: str = ""
    """Weights' digest after this batch when it was trained before; empty otherwise."""


class Trained(Message, frozen=True, kw_only=True):
    """Trainer to buffer: the batch's groups may settle."""

    batch: Count
    incarnation: Count
    step: Count
    """Optimizer steps done."""
    digest: str
    """Of the weights after it."""
    started: Seconds
    """Unix seconds."""
    ended: Seconds
    tokens: Count = 0
    """Response tokens trained."""


class Published(Message, frozen=True, kw_only=True):
    """Trainer to buffer: a version's bytes are complete. It exists once the buffer has committed this."""

    manifest: Manifest


class NewVersion(Message, frozen=True, kw_only=True):
    """Buffer to generators: load this, verify it, then ask for work under it."""

    manifest: Manifest


class Retire(Message, frozen=True, kw_only=True):
    """Buffer to trainer: bytes of versions below this are needed by nobody."""

    below: int


class Swapped(Message, frozen=True, kw_only=True):
    """Generator to buffer: how a push went here."""

    version: Count
    incarnation: Count
    pause_s: Seconds
    transfer_s: Seconds
    aborted: Count
    recomputed_tokens: Count


class Saved(Message, frozen=True, kw_only=True):
    """Trainer to buffer: a checkpoint directory is complete."""

    rollout_step: Count
    incarnation: Count
    path: str
    step: Count


class Committed(Message, frozen=True, kw_only=True):
    """Buffer to trainer: a "version", a "checkpoint" or a batch ("trained") is on disk."""

    what: str
    number: int


class Finish(Message, frozen=True, kw_only=True):
    """Buffer to actors: every batch of the run is trained, or none can be formed any more."""

    reason: str
    done: bool = True
    """False: no batch will come, but what there is has still to be published and saved."""


# Supervisor to the buffer.


class MemberLost(Message, frozen=True, kw_only=True):
    """Supervisor to buffer: this process is gone; do not wait for its silence."""

    name: str
    incarnation: str
    reason: str
    ours: bool = False
    """We killed it: its attempts do not count."""


ToBuffer = (
    Hello | Heartbeat | Goodbye | Want | Reports | Scores | Verdict | Issue | EvaluationSeen | Trained
    | Published | Swapped | Saved
)  # fmt: skip
FromBuffer = (
    Welcome | Refused | HelloAgain | Alive | Leases | Acks | Need | Evaluated | BatchPart | NewVersion
    | Retire | Committed | Finish
)  # fmt: skip
