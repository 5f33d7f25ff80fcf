"""The simulated source, reward worker and evaluator; see `peers` for what all actors do."""

from __future__ import annotations

from typing import Any

import msgspec

from asyncrl.actor.pieces import Pieces
from asyncrl.messages import control
from asyncrl.messages.control import Kind
from asyncrl.messages.sample import Lane
from asyncrl.sim import bodies
from asyncrl.sim.peers import Peer, Stage


class Source(Peer):
    """Hands in as many prompts as it is asked for."""

    role = "source"
    given = next_group = 0
    _welcomes = 0

    def on_welcome(self, welcome: control.Welcome) -> None:
        self._welcomes += 1  # whatever was asked for before is asked for anew
        self.given, self.next_group = int(welcome.cursor or b"0"), welcome.next_group

    def restate(self, welcome: control.Welcome) -> None:
        self.on_welcome(welcome)

    def handle(self, message: Any, frames: list[bytes]) -> None:
        del frames
        match message:
            case control.Need(lane=Lane.EVAL):
                count = self.stage.scenario.eval_prompts
                self.after(0.5, self._issue, self._welcomes, Lane.EVAL, count, True, message.version)
            case control.Need():
                self.after(0.05, self._issue_train, self._welcomes, message.groups)

    def _issue_train(self, asked: int, groups: int) -> None:
        if asked != self._welcomes:
            return
        left = self.stage.scenario.prompts
        count = groups if left is None else min(groups, left - self.given)
        self.given += count
        self._issue(asked, Lane.TRAIN, count, left is not None and self.given >= left, 0)

    def _issue(self, asked: int, lane: Lane, count: int, ended: bool, version: int) -> None:
        if asked != self._welcomes:
            return
        first = self.next_group
        self.next_group += count
        issue = control.Issue(
            lane=lane,
            first_group=first,
            prompts=[control.Issued(self.stage.scenario.group_size, 3, "set")] * count,
            cursor=b"%d" % self.given if lane is Lane.TRAIN else b"",
            ended=ended,
            version=version,
        )
        self.send(issue, *(bodies.prompt(first + i) for i in range(count)))


class Reward(Peer):
    """Scores samples and judges groups, after a while; sometimes it fails, sometimes it refuses."""

    role = "reward"

    def __init__(self, name: str, life: int, stage: Stage) -> None:
        super().__init__(name, life, stage)
        self.jobs: dict[int, tuple[control.Lease, int]] = {}
        """By fence: leases that are not handed in, with their bytes."""
        self.unsaid: dict[int, tuple[Any, list[bytes]]] = {}
        """By fence: results that are not acknowledged."""

    def on_welcome(self, welcome: control.Welcome) -> None:
        self.restate(welcome)

    def introduce(self, hello: control.Hello) -> control.Hello:
        return msgspec.structs.replace(hello, leases=sorted({*self.jobs, *self.unsaid}))

    def restate(self, welcome: control.Welcome) -> None:
        del welcome
        for message, frames in self.unsaid.values():
            self.send(message, *frames)
        room = dict.fromkeys((Kind.SCORE, Kind.FILTER), self.stage.scenario.reward_batch)
        num_bytes = self.stage.scenario.window_bytes
        for lease, size in self.jobs.values():
            room[lease.kind] -= len(lease.parts.indices)
            num_bytes -= size
        self._want(Kind.SCORE, room[Kind.SCORE], num_bytes)
        self._want(Kind.FILTER, room[Kind.FILTER], 0)

    def _want(self, kind: Kind, samples: int, num_bytes: int) -> None:
        capacity = self.stage.scenario.reward_batch
        self.send(control.Want(kind=kind, samples=samples, num_bytes=num_bytes, capacity=capacity))

    def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case control.Acks():
                for ack in message.acks:
                    self.unsaid.pop(ack.fence, None)
            case control.Leases():
                stream = iter(frames)
                for lease in message.leases:
                    self._start(lease, [next(stream) for _ in range(lease.parts.num_frames)])

    def _start(self, lease: control.Lease, frames: list[bytes]) -> None:
        bodies.read(lease.parts, iter(frames))
        num_bytes = sum(map(len, frames))
        if lease.fence in self.jobs or lease.fence in self.unsaid:
            self._want(lease.kind, len(lease.parts.indices), num_bytes)  # told twice: only its charge is new
            return
        self.jobs[lease.fence] = (lease, num_bytes)
        self.after(self.stage.about(0.5, 0.8), self._do, lease.fence)

    def _do(self, fence: int) -> None:
        lease, num_bytes = self.jobs.pop(fence)
        dice, scenario, group_id = self.stage.dice, self.stage.scenario, lease.parts.group_id
        if lease.kind is Kind.FILTER:
            keep = dice.random() >= scenario.refused_share
            self._answer(fence, control.Verdict(fence=fence, group_id=group_id, keep=keep, reason="flat"))
        else:
            failed = [dice.random() < scenario.reward_failures for _ in lease.parts.indices]
            scores = [
                control.Scored(
                    fence=fence, group_id=group_id, index=i, reward=1.0, error="timeout" if bad else ""
                )
                for i, bad in zip(lease.parts.indices, failed, strict=True)
            ]
            frames = [
                b"" if bad else bodies.score(group_id, i)
                for i, bad in zip(lease.parts.indices, failed, strict=True)
            ]
            self._answer(fence, control.Scores(scores=scores), *frames)
        self._want(lease.kind, len(lease.parts.indices), num_bytes)

    def _answer(self, fence: int, message: Any, *frames: bytes) -> None:
        self.unsaid[fence] = (message, list(frames))
        self.send(message, *frames)

    def waits_for(self) -> str:
        return f"{len(self.jobs)} jobs to end" if self.jobs else super().waits_for()


class Evaluator(Peer):
    """Logs finished evaluations."""

    role = "evaluator"

    def __init__(self, name: str, life: int, stage: Stage) -> None:
        super().__init__(name, life, stage)
        self._pieces = Pieces()
        self._groups: list[tuple[int, list[bodies.Answer]]] = []

    def handle(self, message: Any, frames: list[bytes]) -> None:
        if not isinstance(message, control.Evaluated):
            return
        key = (message.version, message.incarnation)
        self.send(control.Want(kind=Kind.EVALUATE, samples=0, num_bytes=sum(map(len, frames))))
        if not self._pieces.follows(key, message.part):
            return
        self._groups = self._groups if message.part else []
        self._groups += bodies.read_all(message.groups, frames)
        if message.part + 1 == message.num_parts:
            self.stage.checks.evaluated(self._groups, key)
            seen = control.EvaluationSeen(version=message.version, incarnation=message.incarnation)
            self.after(0.2, self.send, seen)
