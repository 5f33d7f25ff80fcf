"""What the supervisor makes of its peers' words: pure functions of the roster."""

from __future__ import annotations

from pathlib import Path

import msgspec

from asyncrl.actor.health import State
from asyncrl.actor.roster import Roster
from asyncrl.errors import ProtocolError
from asyncrl.messages.control import PROTOCOL
from asyncrl.messages.supervision import (
    AttachReply,
    AttachRequest,
    DetachRequest,
    Drain,
    Reply,
    Stop,
    Telemetry,
)
from asyncrl.obs.view import MemberUpdate, Update
from asyncrl.topology.plan import Plan

ATTACHABLE = ("generator", "reward")
"""Roles that may come and go."""
MAX_ATTACHED = 4096
"""Members that may ever be attached to one run: past ones stay in the roster, and their names in `status`."""

_UPDATES = msgspec.json.Decoder(list[Update])


def attach(
    roster: Roster, request: AttachRequest, *, schema: str, plan: Plan, buffer_address: str, run_dir: Path
) -> AttachReply:
    """All a newcomer needs, or why it cannot come."""
    problem = _problem(roster, request, schema=schema)
    if not problem and (roster.ending or not buffer_address):
        problem = "the run is starting or ending; it takes no newcomers now"
    if problem:
        return AttachReply(problem=problem)
    return AttachReply(
        name=request.name or roster.free_name(f"attached-{request.role}"),
        plan=msgspec.json.encode(plan),
        buffer_address=buffer_address,
        run_dir=str(run_dir.resolve()),
    )


def _problem(roster: Roster, request: AttachRequest, *, schema: str) -> str:
    if request.protocol != PROTOCOL or request.schema != schema:
        return "this run was started by another version of asyncrl; install the same one"
    if request.role not in ATTACHABLE:
        return f'role "{request.role}" cannot be attached; allowed: {", ".join(ATTACHABLE)}'
    known = roster.members.get(request.name)
    if request.name and known is not None and known.state is not State.RETIRED:
        return f'the name "{request.name}" is taken; choose another one'
    return ""


def detach(roster: Roster, request: DetachRequest) -> tuple[Reply, Drain | Stop | None]:
    """The answer, and what to tell the member; None when there is nothing to tell."""
    member = roster.members.get(request.name)
    if member is None or member.state is State.RETIRED or not member.peer:
        here = ", ".join(m.name for m in roster.present() if m.role in ATTACHABLE)
        return Reply(ok=False, text=f'nobody here is called "{request.name}"; present: {here}'), None
    if member.role not in ATTACHABLE:
        return Reply(ok=False, text=f"the {member.role} cannot leave a run; Ctrl-C ends the run"), None
    member.leaving = True
    if request.drain:
        return Reply(ok=True, text=f"{member.name} drains and leaves"), Drain(reason="detached")
    return Reply(ok=True, text=f"{member.name} leaves now"), Stop()


def crowded(roster: Roster) -> str:
    """Why nobody else may attach, in words; empty while there is room."""
    count = sum(member.attached for member in roster.members.values())
    return (
        f"{count} members were attached to this run, and no more are taken" if count >= MAX_ATTACHED else ""
    )


def updates_of(roster: Roster, peer: bytes, message: Telemetry) -> list[Update]:
    """What a member tells people, of itself alone.

    Raises:
        ProtocolError: the peer is not the member it names, or the facts cannot be read.
    """
    member = roster.members.get(message.name)
    if member is None or member.peer != peer:
        raise ProtocolError("telemetry of a member that did not say hello on this connection")
    try:
        updates = _UPDATES.decode(message.facts)
    # As in `messages.codec`: whatever those bytes provoke, the peer is at fault and not this process.
    except Exception as error:
        raise ProtocolError(f"telemetry of {message.name}: {error}") from error
    return [u for u in updates if not isinstance(u, MemberUpdate) or u.name == message.name]
