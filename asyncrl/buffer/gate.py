"""What a worker may say to the desk: its role's messages, whole, about leases that are its own.

Pure checks before the ledger sees a message, so that a message either counts or changes nothing. One that
fails breaks the protocol: its sender is another program than ours, or a broken one. What only comes late (a
result of a lease that has ended, a repeat) is no such thing and passes: the ledger refuses it by name.

Invariant: whatever was decoded as one of `ToBuffer` and passes here is an event the ledger can take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.states import WorkerRecord
from asyncrl.errors import ProtocolError
from asyncrl.messages import control
from asyncrl.messages.control import Kind, Report
from asyncrl.messages.sample import Lane

MAX_NAME = 255
"""Characters of a name and of an incarnation."""
ROLES = ("source", "generator", "reward", "trainer", "evaluator")
"""Who may say hello to the desk."""
SPEAKER: dict[type, str] = {
    control.Reports: "generator",
    control.Swapped: "generator",
    control.Scores: "reward",
    control.Verdict: "reward",
    control.Issue: "source",
    control.EvaluationSeen: "evaluator",
    control.Trained: "trainer",
    control.Published: "trainer",
    control.Saved: "trainer",
}
"""Who says what; heartbeats and goodbyes are everybody's."""
WANTS = {
    Kind.GENERATE: "generator",
    Kind.SCORE: "reward",
    Kind.FILTER: "reward",
    Kind.TRAIN: "trainer",
    Kind.EVALUATE: "evaluator",
}
"""Who may ask for what."""


def check_hello(hello: control.Hello) -> str:
    """Why a hello cannot be taken, in words; empty when it can."""
    if hello.role not in ROLES:
        return f'role "{hello.role[:MAX_NAME]}" is none of {", ".join(ROLES)}'
    if not (0 < len(hello.name) <= MAX_NAME and 0 < len(hello.incarnation) <= MAX_NAME):
        return f"name and incarnation have 1 to {MAX_NAME} characters each"
    return ""


def check(worker: WorkerRecord, message: Any, frames: Sequence[bytes], ledger: Ledger) -> None:
    """Accept a message of a known worker. Raises ProtocolError, before anything has changed."""
    want = isinstance(message, control.Want)
    speaker = WANTS[message.kind] if want else SPEAKER.get(type(message), worker.role)
    if worker.role != speaker:
        raise ProtocolError(f"a {worker.role} sent {type(message).__name__}, which only a {speaker} may")
    bodies = _bodies(message)
    if len(frames) != bodies:
        raise ProtocolError(f"{type(message).__name__} with {len(frames)} bodies; {bodies} belong to it")
    match message:
        case control.Want(kind=Kind.GENERATE):
            if message.version >= 0:
                _check_weights(message.version, message.incarnation, ledger)
        case control.Swapped():
            _check_weights(message.version, message.incarnation, ledger)
        case control.Reports():
            for report, body in zip(message.reports, frames, strict=True):
                _check_report(worker, report, body, ledger)
        case control.Scores():
            for scored in message.scores:
                _check_owner(worker, scored.fence, ledger)
        case control.Verdict():
            _check_owner(worker, message.fence, ledger)
            _check_removed(message, ledger)
        case control.Issue():
            _check_retries(message, ledger)
        case control.Published():
            _check_step("version", message.manifest.version, ledger)
        case control.Saved():
            _check_step("checkpoint", message.rollout_step, ledger)


def _bodies(message: Any) -> int:
    """Frames that belong to a message."""
    match message:
        case control.Reports():
            return len(message.reports)
        case control.Scores():
            return len(message.scores)
        case control.Issue():
            return len(message.prompts)
        case _:
            return 0


def _check_owner(worker: WorkerRecord, fence: int, ledger: Ledger) -> None:
    lease = ledger.fleet.leases.get(fence)
    if lease is not None and (lease.worker, lease.incarnation) != (worker.name, worker.incarnation):
        raise ProtocolError(f"it handed in a result under fence {fence}, which is {lease.worker}'s")


def _check_report(worker: WorkerRecord, report: Report, body: bytes, ledger: Ledger) -> None:
    _check_owner(worker, report.fence, ledger)
    spans = sum(span.num_tokens for span in report.spans)
    if spans != report.num_tokens or bool(body) != bool(report.num_tokens):
        raise ProtocolError(
            f"sample {report.group_id}.{report.index}: {report.num_tokens} tokens, spans of {spans} and "
            f"a body of {len(body)} bytes"
        )
    for span in report.spans:
        _check_weights(span.version, span.incarnation, ledger)


def _check_weights(version: int, incarnation: int, ledger: Ledger) -> None:
    """Nobody has weights of a version, or of a life of the trainer, that was never published."""
    newest = ledger.versions.published
    if newest is None or not 0 <= version <= newest.version or not 1 <= incarnation <= newest.incarnation:
        raise ProtocolError(
            f"it names version {version}.{incarnation}; the newest one is {newest.name if newest else 'none'}"
        )


def _check_removed(verdict: control.Verdict, ledger: Ledger) -> None:
    group = ledger.book.groups.get(verdict.group_id)
    if group is not None and any(index >= len(group.samples) for index in verdict.removed):
        raise ProtocolError(
            f"it took samples {verdict.removed[:8]} out of group {group.group_id} of {len(group.samples)}"
        )


def _check_retries(issue: control.Issue, ledger: Ledger) -> None:
    wrong = [prompt.retry_of for prompt in issue.prompts if prompt.retry_of >= ledger.book.next_group]
    if wrong or (issue.lane is Lane.EVAL and any(prompt.retry_of >= 0 for prompt in issue.prompts)):
        raise ProtocolError(
            f"it retries groups {wrong[:8]} of {ledger.book.next_group}, or some in lane {issue.lane}"
        )


def _check_step(what: str, step: int, ledger: Ledger) -> None:
    if step > ledger.batches.next_batch:
        raise ProtocolError(f"{what} {step} after {ledger.batches.next_batch} recorded batches")
