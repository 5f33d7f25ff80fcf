"""The control link: what actors and commands say to the supervisor, and what it answers.

Hello and its answers are those of the desk link (`control`); the rest is telemetry, the end of an actor, and
the questions of `attach`, `detach`, `status` and `doctor`.
"""

from __future__ import annotations

from asyncrl.messages.control import Alive, Hello, MemberLost, Message, Refused, Welcome


class Drain(Message, frozen=True, kw_only=True):
    """Supervisor to an actor: finish or hand back what you hold, then leave."""

    reason: str = ""


class Stop(Message, frozen=True, kw_only=True):
    """Supervisor to an actor: leave now."""


class Telemetry(Message, frozen=True, kw_only=True):
    """Actor to supervisor: what people may see. Losing one loses nothing else. Answered with `Alive`."""

    name: str
    facts: bytes = b""
    """JSON list of updates for the view (`obs.view.Update`); the last one is the member's own."""


class Exiting(Message, frozen=True, kw_only=True):
    """Actor to supervisor: my last words."""

    name: str
    code: int
    message: str = ""
    final: bool = False
    """Another try would end the same way."""


class Diagnose(Message, frozen=True, kw_only=True):
    """`asyncrl doctor` to the supervisor, and the supervisor to actors: say how you are.

    A supervisor answers with a Reply whose data is a report, an actor with Diagnosis.
    """

    number: int = 0
    """Of the round; comes back in the answer."""


class Diagnosis(Message, frozen=True, kw_only=True):
    """Actor to supervisor: how I am."""

    name: str
    number: int
    facts: bytes = b""
    """JSON of `obs.vitals.Facts`."""


class Alarm(Message, frozen=True, kw_only=True):
    """Actor to supervisor: the run cannot go on, and I wait a moment so that you can see why."""

    name: str
    reason: str


class Acquitted(Message, frozen=True, kw_only=True):
    """Buffer to supervisor: workers died because of a sample, not of themselves."""

    incarnations: list[str]
    """The lives that it ended."""
    reason: str
    """Which sample it was, and how that is known."""


class AttachRequest(Message, frozen=True, kw_only=True):
    """A newcomer to the supervisor."""

    role: str
    name: str = ""
    protocol: int
    schema: str
    host: str = ""


class AttachReply(Message, frozen=True, kw_only=True):
    """All a newcomer needs; it dials the buffer itself."""

    name: str = ""
    plan: bytes = b""
    """The plan as JSON."""
    buffer_address: str = ""
    run_dir: str = ""
    problem: str = ""
    """Not empty: refused, and why."""


class DetachRequest(Message, frozen=True, kw_only=True):
    """`asyncrl detach` to the supervisor."""

    name: str
    drain: bool = True


class StatusRequest(Message, frozen=True, kw_only=True):
    """`asyncrl status` to the supervisor."""


class Reply(Message, frozen=True, kw_only=True):
    """The supervisor's answer to detach and status."""

    ok: bool
    text: str = ""
    data: bytes = b""
    """JSON."""


ToSupervisor = (
    Hello
    | Telemetry
    | Exiting
    | Alarm
    | Acquitted
    | Diagnose
    | Diagnosis
    | AttachRequest
    | DetachRequest
    | StatusRequest
)
FromSupervisor = Welcome | Refused | Alive | MemberLost | Drain | Stop | Diagnose | AttachReply | Reply
