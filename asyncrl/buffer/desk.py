"""Which message is which event: the one table from the desk link's messages to the ledger's methods."""

from __future__ import annotations

from typing import Any

import xxhash

from asyncrl.buffer import gate
from asyncrl.buffer.book import Frame
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.members import Members
from asyncrl.buffer.states import WorkerRecord
from asyncrl.messages import control


class Desk:
    """Hands messages of known workers to the ledger."""

    def __init__(self, ledger: Ledger, members: Members) -> None:
        self.ledger = ledger
        self.members = members

    def take(self, worker: WorkerRecord, message: Any, frames: list[bytes], now: float) -> None:
        """One message with its bodies. Anything but Hello, which needs an answer even when it is refused.

        Raises:
            ProtocolError: the worker may not say this, or not like this; nothing has changed.
        """
        ledger = self.ledger
        gate.check(worker, message, frames, ledger)
        match message:
            case control.Want():
                ledger.fleet.want(worker, message)
            case control.Reports():
                for report, body in zip(message.reports, frames, strict=True):
                    ledger.report(worker, report, _frame(body), now)
            case control.Scores():
                for scored, body in zip(message.scores, frames, strict=True):
                    ledger.score(worker, scored, _frame(body), now)
            case control.Verdict():
                ledger.verdict(worker, message, now)
            case control.Issue():
                if message.first_group > ledger.book.next_group:
                    # Prompts before these were lost on the way: it begins again where our cursor is.
                    self.members.ask_again(worker)
                ledger.issue(message, [_frame(body) for body in frames], now)
            case _:
                self._of_an_actor(worker, message, now)

    def _of_an_actor(self, worker: WorkerRecord, message: Any, now: float) -> None:
        members = self.members
        match message:
            case control.Trained():
                members.trained(worker, message, now)
            case control.Published():
                members.published(worker, message, now)
            case control.Saved():
                members.saved(worker, message, now)
            case control.Swapped():
                members.swapped(worker, message, now)
            case control.EvaluationSeen():
                members.evaluation_seen(message.version, message.incarnation)
            case control.Goodbye():
                members.leave(worker, message.reason or "goodbye", now)
            case control.Heartbeat():
                pass  # any message shows that its sender lives


def _frame(data: bytes) -> Frame:
    return Frame(bytes(data), xxhash.xxh3_128_hexdigest(data))
