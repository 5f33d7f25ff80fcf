"""Simulated actors that keep the real protocol: what all of them do.

An actor is one life of a process: it dies for good, and the supervisor starts another one under its name. It
can be frozen (stopped) and cut off. When its connection was lost, or the desk does not know it (any more), it
says hello again in the same life with what it holds; welcomed, it repeats what is not acknowledged and names
all the room it has. What it says between the loss of a connection and its notice of that reaches the desk.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncrl.actor.client import HELLO_AGAIN_S
from asyncrl.messages import control
from asyncrl.messages.version import Manifest
from asyncrl.sim.checks import Checks
from asyncrl.sim.clock import Clock
from asyncrl.sim.link import Pipe, Weather
from asyncrl.sim.scenario import Scenario

HEARTBEAT_S = 1.0
"""As run.heartbeat_s by default."""

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
        self.id = f"{name}.{self.incarnation}".encode()
        """Address of its connections, as with the real links."""
        stage.addresses[self.id] = self
        self.alive = self.connected = True
        self.frozen = self.over = False
        self.welcome = False
        """Whether its first hello was answered."""
        self.starting = False
        """It does not read yet: what comes waits."""
        self.talking = False
        self._desk = self._greeted = ""
        """Life of the desk that welcomed it last, and of the one that it has greeted since."""
        self._hellos = 0
        self.up = Pipe(stage.clock, stage.weather, self._at_desk)
        self.down = Pipe(stage.clock, stage.weather, self._take)
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._unread: list[tuple[Any, list[bytes]]] = []
        self._unsent: list[tuple[Any, list[bytes]]] = []
        """Said while there was no connection: the link sends it when there is one again."""

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
        """Say something to the desk. While it is greeted again this is dropped: `restate` says it."""
        if self.talking:
            self._put(message, list(frames))

    def _put(self, message: Any, frames: list[bytes]) -> None:
        if not self.alive:
            return
        if self.connected:
            self.up.send(message, frames)
        else:
            self._unsent.append((message, frames))

    def _at_desk(self, message: Any, frames: list[bytes]) -> None:
        self.stage.receive(self, self.id, message, frames)

    def _take(self, message: Any, frames: list[bytes]) -> None:
        if not self.alive or not self.connected:
            return
        if self.frozen:
            self._held.append((self._take, (message, frames)))
        elif self.starting:
            self._unread.append((message, frames))
        else:
            self._read(message, frames)

    def _read(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case control.Welcome():
                if message.number == self._hellos:
                    self._welcomed(message)
            case control.HelloAgain():
                if message.desk != self._greeted:
                    self._greet(message.desk)
            case control.Refused():
                self.stage.exited(self, message.reason)
            case control.Finish():
                self.finish()
            case _:
                self.handle(message, frames)

    def started(self) -> None:
        """From now on it reads."""
        self.starting = False
        unread, self._unread = self._unread, []
        for message, frames in unread:
            self._take(message, frames)

    # The conversation, as in `actor.client`.

    def hello(self) -> None:
        """The first word."""
        self._put(self._hello(), [])

    def _hello(self) -> control.Hello:
        return control.Hello(
            name=self.name, role=self.role, incarnation=self.incarnation, protocol=control.PROTOCOL,
            schema="", number=self._hellos,
        )  # fmt: skip

    def beat(self) -> None:
        """A heartbeat: the desk that does not know us answers."""
        self._put(control.Heartbeat(), [])

    def _greet(self, life: str) -> None:
        self.talking = False
        self._greeted = life
        self._hellos += 1
        self._put(self.introduce(self._hello()), [])
        self.after(HELLO_AGAIN_S + HEARTBEAT_S * self.stage.dice.random(), self._late, self._hellos)

    def _late(self, number: int) -> None:
        """A hello that has no answer by now is said again."""
        if self._greeted and self._hellos == number and self.welcome:
            self._greet(self._desk)

    def _notice(self) -> None:
        """Whether anything was lost with the connection, nobody knows."""
        if self.starting:
            self.after(HEARTBEAT_S, self._notice)
        elif self.welcome:
            self._greet(self._desk)

    def _welcomed(self, welcome: control.Welcome) -> None:
        first = not self.welcome
        self.welcome = self.talking = True
        self._desk, self._greeted = welcome.desk, ""
        if first:
            self.on_welcome(welcome)
        else:
            self.restate(welcome)

    def introduce(self, hello: control.Hello) -> control.Hello:
        """A further hello, with the leases it holds or its place."""
        return hello

    def on_welcome(self, welcome: control.Welcome) -> None:
        """Its first hello was answered."""

    def restate(self, welcome: control.Welcome) -> None:
        """A further one was: say what is not acknowledged, and name all room there is."""

    # Life.

    def reconnect(self) -> None:
        """There is a connection again; what was on its way through the former one is lost."""
        self.connected = True
        unsent, self._unsent = self._unsent, []
        for message, frames in unsent:
            self.up.send(message, frames)

    def cut_off(self) -> None:
        """The connection is lost with all that is on its way; the next heartbeat notices."""
        self.connected = False
        self.up.cut()
        self.down.cut()
        self.after(HEARTBEAT_S * self.stage.dice.random(), self._notice)

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
        self.alive = self.talking = False
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
        return "work" if self.talking else "an answer to its hello"
