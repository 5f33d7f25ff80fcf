"""Simulated actors that keep the real protocol: what all of them do, and source, reward worker, evaluator.

An actor is one life of a process: it dies for good, and the supervisor starts another one under its name. It
can be frozen (stopped) and cut off; when its connection is lost it says hello again in the same life, names
all the room it has, and repeats what was not acknowledged.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncrl.messages import control
from asyncrl.messages.control import Kind
from asyncrl.messages.sample import Lane
from asyncrl.messages.version import Manifest
from asyncrl.sim import bodies
from asyncrl.sim.checks import Checks
from asyncrl.sim.clock import Clock
from asyncrl.sim.link import Pipe, Weather
from asyncrl.sim.scenario import Scenario

Receive = Callable[["Peer", bytes, Any, list[bytes]], None]


@dataclass(slots=True)
class Stage:
    """What every actor shares."""

    scenario: Scenario
    clock: Clock
    dice: random.Random
    weather: Weather
    checks: Checks
    receive: Receive
    """The desk takes a message of an actor at an address."""
    exited: Callable[[Peer, str], None]
    """An actor has failed by itself; the supervisor sees it."""
    has_bytes: Callable[[Manifest], bool]
    """Whether the life of the trainer that published a version still serves its bytes."""
    addresses: dict[bytes, Peer]
    """Connections there are."""
    finished_samples: int = 0
    """Answers of the lane train that generators have finished; faults are timed by it."""

    def about(self, median: float, sigma: float = 0.3) -> float:
        """A lognormal time around a median."""
        return median * self.dice.lognormvariate(0.0, sigma)


class Peer:
    """See the module's docstring."""

    role = ""

    def __init__(self, name: str, life: int, stage: Stage) -> None:
        self.name, self.incarnation, self.stage = name, f"life{life}", stage
        self.id = b""
        """Address of its connection."""
        self._connections = 0
        self._connect()
        self.alive = self.connected = True
        self.frozen = self.welcome = self.over = False
        self.up = Pipe(stage.clock, stage.weather, self._at_desk)
        self.down = Pipe(stage.clock, stage.weather, self._take)
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def _connect(self) -> None:
        """A new connection has a new address: what is still said to the old one is lost with it."""
        self.stage.addresses.pop(self.id, None)
        self._connections += self.stage.scenario.new_addresses
        self.id = f"{self.name}.{self.incarnation}#{self._connections}".encode()
        self.stage.addresses[self.id] = self

    # Time and messages.

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Do this later, if still alive then."""
        self.stage.clock.after(delay_s, self._fire, call, args)

    def _fire(self, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.frozen:
            self._held.append((call, args))
        elif self.alive:
            call(*args)

    def send(self, message: Any, *frames: bytes) -> None:
        """Say something to the desk."""
        if self.alive and self.connected:
            self.up.send(message, list(frames))

    def _at_desk(self, message: Any, frames: list[bytes]) -> None:
        self.stage.receive(self, self.id, message, frames)

    def _take(self, message: Any, frames: list[bytes]) -> None:
        if not self.alive or not self.connected:
            return
        if self.frozen:
            self._held.append((self._take, (message, frames)))
        elif isinstance(message, control.Refused):
            if self.welcome:  # else our hello is on its way
                self.reconnect()
        elif isinstance(message, control.Finish):
            self.finish()
        else:
            self.welcome = self.welcome or isinstance(message, control.Welcome)
            self.handle(message, frames)

    # Life.

    def hello(self) -> None:
        """The first word on a connection."""
        self.send(
            control.Hello(
                name=self.name, role=self.role, incarnation=self.incarnation, protocol=control.PROTOCOL,
                schema="",
            )
        )  # fmt: skip

    def reconnect(self) -> None:
        """The connection was lost with all that was on its way."""
        self.up.cut()
        self.down.cut()
        self._connect()
        self.connected, self.welcome = True, False
        self.hello()
        self.greet_again()

    def greet_again(self) -> None:
        """After a repeated hello: name all room, repeat what is not acknowledged."""

    def cut_off(self) -> None:
        """Nothing reaches anybody until it reconnects."""
        self.connected = False
        self.up.cut()
        self.down.cut()

    def freeze(self) -> None:
        """The process is stopped."""
        self.frozen = True

    def thaw(self) -> None:
        """It goes on, with all that has come meanwhile."""
        self.frozen = False
        held, self._held = self._held, []
        for call, args in held:
            self._fire(call, args)

    def die(self) -> None:
        """It is gone, with everything on its way."""
        self.alive = False
        self.stage.addresses.pop(self.id, None)
        self.up.cut()
        self.down.cut()

    def handle(self, message: Any, frames: list[bytes]) -> None:
        """A message of the desk."""
        del message, frames

    def finish(self) -> None:
        """The run is over."""
        self.over = True

    def waits_for(self) -> str:
        """What it is doing, in words, for the report of a wedge."""
        if not self.connected:
            return "its connection"
        if self.frozen:
            return "the signal to go on"
        return "work" if self.welcome else "an answer to its hello"


class Source(Peer):
    """Hands in as many prompts as it is asked for."""

    role = "source"
    given = next_group = 0

    def handle(self, message: Any, frames: list[bytes]) -> None:
        del frames
        match message:
            case control.Welcome():
                self.given, self.next_group = int(message.cursor or b"0"), message.next_group
            case control.Need(lane=Lane.EVAL):
                count = self.stage.scenario.eval_prompts
                self.after(0.5, self._issue, Lane.EVAL, count, True, message.version)
            case control.Need():
                self.after(0.05, self._issue_train, message.groups)

    def _issue_train(self, groups: int) -> None:
        left = self.stage.scenario.prompts
        count = groups if left is None else min(groups, left - self.given)
        self.given += count
        self._issue(Lane.TRAIN, count, left is not None and self.given >= left, 0)

    def _issue(self, lane: Lane, count: int, ended: bool, version: int) -> None:
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

    def reconnect(self) -> None:
        super().reconnect()
        self.next_group = -1  # what is still to be issued belongs to the lost connection

    def send(self, message: Any, *frames: bytes) -> None:
        if not isinstance(message, control.Issue) or (self.welcome and message.first_group >= 0):
            super().send(message, *frames)


class Reward(Peer):
    """Scores samples and judges groups, after a while; sometimes it fails, sometimes it refuses."""

    role = "reward"

    def __init__(self, name: str, life: int, stage: Stage) -> None:
        super().__init__(name, life, stage)
        self.jobs: dict[int, tuple[control.Lease, int]] = {}
        self.unacked: dict[int, tuple[Any, list[bytes]]] = {}

    def hello(self) -> None:
        super().hello()
        self._want(Kind.SCORE, self.stage.scenario.reward_batch, self.stage.scenario.window_bytes)
        self._want(Kind.FILTER, self.stage.scenario.reward_batch, 0)

    def _want(self, kind: Kind, samples: int, num_bytes: int) -> None:
        capacity = self.stage.scenario.reward_batch
        self.send(control.Want(kind=kind, samples=samples, num_bytes=num_bytes, capacity=capacity))

    def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case control.Acks():
                for ack in message.acks:
                    self.unacked.pop(ack.fence, None)
            case control.Leases():
                stream = iter(frames)
                for lease in message.leases:
                    self._start(lease, stream)

    def _start(self, lease: control.Lease, stream: Any) -> None:
        own = [next(stream) for _ in range(lease.parts.num_frames)]
        bodies.read(lease.parts, iter(own))
        self.jobs[lease.fence] = (lease, sum(map(len, own)))
        self.after(self.stage.about(0.5, 0.8), self._do, lease.fence)

    def _do(self, fence: int) -> None:
        if fence not in self.jobs:
            return  # started before the connection was lost, and done after
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
        self.unacked[fence] = (message, list(frames))
        self.send(message, *frames)

    def greet_again(self) -> None:
        self.jobs.clear()  # what the desk still counts as ours comes again, and is scored again
        for message, frames in self.unacked.values():
            self.send(message, *frames)

    def waits_for(self) -> str:
        return f"{len(self.jobs)} jobs to end" if self.jobs else super().waits_for()


class Evaluator(Peer):
    """Logs finished evaluations."""

    role = "evaluator"

    def handle(self, message: Any, frames: list[bytes]) -> None:
        if not isinstance(message, control.Evaluated):
            return
        key = (message.version, message.incarnation)
        for group_id, answers in bodies.read_all(message.groups, frames):
            self.stage.checks.evaluated(group_id, answers, key)
        if message.part + 1 == message.num_parts:
            seen = control.EvaluationSeen(version=message.version, incarnation=message.incarnation)
            self.after(0.2, self.send, seen)
