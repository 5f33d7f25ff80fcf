"""What a sandbox and its child say to each other: msgpack behind a length (4 bytes, little-endian).

    parent:  Setup, then any number of Work
    child:   Ready | Refused, then for each Work: Started and Done once per job, in any order

The channel is a pipe within one host and one installation; nothing in it can execute.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from asyncrl.errors import ProtocolError
from asyncrl.messages.sample import Sample, Score
from asyncrl.rewards.base import RewardFailure, RewardSpec, Verdict

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 30
"""Checked before anything is allocated."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the reward or of the filters."""

    kind: Literal["sample", "group", "verdict"]
    samples: list[Sample]
    """One for "sample", the whole group otherwise."""


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message: what to load."""

    spec: RewardSpec
    timeout_s: float
    """A coroutine that waits longer is cancelled in the child; the parent kills what stays."""


class Work(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Jobs to do now."""

    jobs: list[Job]


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Everything is loaded."""


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Something cannot be loaded; the child ends."""

    problems: list[str]


class Started(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """User code for this job runs from here on."""

    job: int


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outcome of a job: one score or failure for each sample, or a verdict."""

    scores: list[Score | None] = []
    failures: list[RewardFailure | None] = []
    verdict: Verdict | None = None

    def results(self) -> list[Score | RewardFailure]:
        """One for each sample."""
        return [
            one for pair in zip(self.scores, self.failures, strict=True) for one in pair if one is not None
        ]

    @staticmethod
    def of(results: list[Score | RewardFailure]) -> Reply:
        """The reply that holds `results`."""
        return Reply(
            scores=[one if isinstance(one, Score) else None for one in results],
            failures=[one if isinstance(one, RewardFailure) else None for one in results],
        )


class Done(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A job's outcome."""

    job: int
    reply: Reply


ToChild = Setup | Work
FromChild = Ready | Refused | Started | Done


def frame(body: bytes) -> bytes:
    """`body` behind its length. Raises ProtocolError when it is too long."""
    return frame_length(len(body)).to_bytes(HEADER_BYTES, "little") + body


def frame_length(num_bytes: int) -> int:
    """`num_bytes`, checked. Raises ProtocolError."""
    if num_bytes > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a frame of {num_bytes} bytes; {MAX_FRAME_BYTES} are allowed: score fewer samples at once"
        )
    return num_bytes
