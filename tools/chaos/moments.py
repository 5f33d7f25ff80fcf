"""The steps of the protocol at which each role is hit, as moments of orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LEASED = (
    "select 1 from leases where worker = :actor and kind = '{kind}' and granted_at <= :time"
    " and (ended_at is null or ended_at >= :time)"
)
"""Whether a worker held a lease at that moment."""
UNTRAINED = (
    "select 1 from batches where cut_at <= :time"
    " and batch not in (select batch from trained where ended <= :time)"
)
"""Whether a batch was recorded and not trained."""
UNPUBLISHED = (
    "select 1 where (select max(batch) + 1 from trained where ended <= :time)"
    " > (select coalesce(max(version), -1) from versions where published_at <= :time)"
)
"""Whether the weights were ahead of the newest version."""
UNSAVED = (
    "select 1 where (select max(batch) + 1 from trained where ended <= :time)"
    " > (select coalesce(max(rollout_step), 0) from checkpoints where saved_at <= :time)"
)
"""Whether the weights were ahead of the newest checkpoint."""
LEFT_OUT = "select 1 where not exists (select 1 from versions where version = 1)"
"""Whether version 1 was never published, as the trainer died with it and began again after it."""


@dataclass(frozen=True)
class Moment:
    """A step of the protocol in one role's life."""

    name: str
    """In words."""
    at: str
    nth: int = 1
    where: Mapping[str, Any] = field(default_factory=dict)
    state: str = ""
    """Query that shows that the moment was the right one."""


GENERATE, SCORE = LEASED.format(kind="generate"), LEASED.format(kind="score")

MOMENTS: dict[str, tuple[Moment, ...]] = {
    "source": (
        Moment("at its start", "start"),
        Moment("after hello", "sent:Hello", nth=2),
        Moment("before welcome", "receive:Welcome"),
        Moment("asked for prompts", "receive:Need", nth=2),
        Moment("prompts read", "send:Issue", nth=2),
        Moment("prompts sent", "sent:Issue", nth=2),
    ),
    "evaluator": (
        Moment("before welcome", "receive:Welcome"),
        Moment("evaluation comes", "receive:Evaluated"),
        Moment("evaluation taken", "received:Evaluated"),
        Moment("before it says seen", "send:EvaluationSeen"),
        Moment("seen is said", "sent:EvaluationSeen"),
    ),
    "generator": (
        Moment("at its start", "start"),
        Moment("mid-attach, after hello", "sent:Hello", nth=2),
        Moment("mid-attach, before welcome", "receive:Welcome"),
        Moment("after welcome", "received:Welcome"),
        Moment("before a lease", "receive:Leases", nth=2),
        Moment("after a lease", "received:Leases", nth=2, state=GENERATE),
        Moment("before progress", "send:Reports", nth=2, where={"status": "pending"}, state=GENERATE),
        Moment("mid-generation", "sent:Reports", nth=3, where={"status": "pending"}, state=GENERATE),
        Moment("answer done", "send:Reports", nth=2, where={"status": "completed"}, state=GENERATE),
        Moment("answer handed in", "sent:Reports", nth=2, where={"status": "completed"}),
        Moment("before acknowledgement", "receive:Acks", nth=3),
        Moment("after acknowledgement", "received:Acks", nth=3),
        Moment("before a version", "receive:NewVersion", nth=2),
        Moment("version loaded", "send:Swapped", nth=2),
        Moment("credit given", "sent:Want", nth=3),
    ),
    "reward": (
        Moment("at its start", "start"),
        Moment("mid-attach, after hello", "sent:Hello", nth=2),
        Moment("mid-attach, before welcome", "receive:Welcome"),
        Moment("before a lease", "receive:Leases", nth=2),
        Moment("mid-scoring", "received:Leases", nth=2, state=SCORE),
        Moment("before a score", "send:Scores", nth=2, state=SCORE),
        Moment("score sent", "sent:Scores", nth=2),
        Moment("before acknowledgement", "receive:Acks", nth=2),
        Moment("after acknowledgement", "received:Acks", nth=2),
    ),
    "buffer": (
        Moment("at its start", "start"),
        Moment("hello comes", "receive:Hello", nth=3),
        Moment("before welcome", "send:Welcome", nth=3),
        Moment("prompts come", "receive:Issue", nth=2),
        Moment("before a lease", "send:Leases", nth=4),
        Moment("lease sent", "sent:Leases", nth=4),
        Moment("progress comes", "receive:Reports", nth=4, where={"status": "pending"}),
        Moment("answer taken", "received:Reports", nth=2, where={"status": "completed"}),
        Moment("before acknowledgement", "send:Acks", nth=5),
        Moment("acknowledged", "sent:Acks", nth=5),
        Moment("score comes", "receive:Scores", nth=2),
        Moment("batch recorded, not delivered", "send:BatchPart", nth=2, state=UNTRAINED),
        Moment("batch delivered", "sent:BatchPart", nth=2, state=UNTRAINED),
        Moment("trained comes", "receive:Trained", nth=2),
        Moment("trained taken", "received:Trained", nth=2),
        Moment("before committed", "send:Committed", nth=3),
        Moment("version comes", "receive:Published", nth=2, state=UNPUBLISHED),
        Moment("before a version", "send:NewVersion", nth=2),
        Moment("checkpoint comes", "receive:Saved", state=UNSAVED),
        Moment("before an evaluation", "send:Evaluated"),
        Moment("segment opened", "file:open:*/bodies/*"),
    ),
    "trainer": (
        Moment("at its start", "start"),
        Moment("mid-attach, after hello", "sent:Hello", nth=2),
        Moment("mid-attach, before welcome", "receive:Welcome"),
        Moment("batch comes", "receive:BatchPart", nth=2, state=UNTRAINED),
        Moment("batch delivered, not trained", "received:BatchPart", nth=3, state=UNTRAINED),
        Moment("trained, not told", "send:Trained", nth=3),
        Moment("trained told", "sent:Trained", nth=3),
        Moment("before committed", "receive:Committed", nth=4),
        Moment("mid-publish, writing", "file:open:/dev/shm/asyncrl-*.tmp", nth=3, state=UNPUBLISHED),
        Moment("mid-publish, written", "file:os.rename:/dev/shm/asyncrl-*.tmp", nth=3, state=UNPUBLISHED),
        Moment("mid-publish, not told", "send:Published", nth=3, state=UNPUBLISHED),
        Moment("published told", "sent:Published", nth=3),
        Moment("mid-checkpoint, begun", "file:os.mkdir:*/.step-000002.tmp*", state=UNSAVED),
        Moment("mid-checkpoint, torn", "file:os.rename:*/.step-000002.tmp", state=UNSAVED),
        Moment("mid-checkpoint again", "file:os.rename:*/.step-000004.tmp", state=UNSAVED),
        Moment("saved, not told", "send:Saved", state=UNSAVED),
        Moment("saved told", "sent:Saved"),
        Moment("a version retires", "receive:Retire"),
        Moment("the run ends", "receive:Finish"),
    ),
    "supervisor": (
        Moment("a hello comes", "receive:Hello", nth=3),
        Moment("hello taken", "received:Hello", nth=6),
        Moment("all loads", "receive:Telemetry", nth=9),
        Moment("all are ready", "receive:Telemetry", nth=17),
        Moment("mid-run", "receive:Telemetry", nth=40),
        Moment("last words come", "receive:Exiting"),
    ),
}
"""By role, in the order of a life."""

LOADING = (
    "at its start", "after hello", "before welcome", "mid-attach, after hello", "mid-attach, before welcome",
    "after welcome",
)  # fmt: skip
"""Moments before an actor is ready: one that is slow there looks like one that loads a model."""

MESSAGES: dict[str, tuple[str, ...]] = {
    "source": ("send:Hello", "send:Issue", "receive:Need"),
    "evaluator": ("send:Hello", "send:EvaluationSeen", "receive:Evaluated"),
    "generator": (
        "send:Hello", "send:Want", "send:Reports", "send:Swapped", "send:Heartbeat", "send:Telemetry",
        "receive:Welcome", "receive:Leases", "receive:Acks", "receive:NewVersion",
    ),
    "reward": ("send:Hello", "send:Want", "send:Scores", "receive:Leases", "receive:Acks"),
    "trainer": (
        "send:Hello", "send:Want", "send:Trained", "send:Published", "send:Saved", "receive:Welcome",
        "receive:BatchPart", "receive:Committed", "receive:Retire", "receive:Finish",
    ),
}  # fmt: skip
"""Messages of each client's links that are lost, late, repeated or swapped."""
ONCE = ("receive:Welcome", "receive:Finish", "receive:Retire")
"""Messages of which there is one in a life."""
HELLOS = {"send:Hello": ("the supervisor", "the buffer")}
"""To whom a life's hellos go, in order."""
