"""One actor's connection to the desk: delays, duplicates, overtaking, and loss of everything on its way.

A connection keeps order, as the real links do, but for messages of which the order says nothing. A message is
lost only together with its connection, after which the actor says hello again in the same life.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from asyncrl.messages import control
from asyncrl.sim.clock import Clock

REPEATABLE = frozenset((
    control.Reports, control.Scores, control.Verdict, control.Issue, control.Trained, control.Published,
    control.Saved, control.EvaluationSeen, control.Heartbeat, control.Acks, control.Committed, control.Retire,
))  # fmt: skip
"""Messages that may come twice. Not so credit (it is added up) and leases (they are told again on hello)."""
OVERTAKEN = frozenset((control.Reports, control.Scores, control.Verdict, control.Acks))
"""Messages that later ones of the same connection may overtake."""
LATE_S = 20.0
"""How late a repeat or an overtaken message may be."""

Deliver = Callable[[Any, list[bytes]], None]


class Weather(random.Random):
    """The dice of all links, and what they are loaded with."""

    def __init__(self, seed: int, *, latency_s: float, duplicates: float, reordered: float) -> None:
        super().__init__(seed)
        self.latency_s = latency_s
        self.duplicates = duplicates
        self.reordered = reordered
        self.slow_until = 0.0
        """Until then every message takes fifty times as long."""
        self.repeated = self.overtaken = self.lost = 0
        """Messages so far."""


class Pipe:
    """One direction of a connection."""

    def __init__(self, clock: Clock, weather: Weather, deliver: Deliver) -> None:
        self._clock, self._weather, self._deliver = clock, weather, deliver
        self._epoch = 0
        self._last = 0.0
        """When the newest message in order arrives."""

    def send(self, message: Any, frames: list[bytes]) -> None:
        """The message leaves now."""
        clock, dice = self._clock, self._weather
        delay = dice.latency_s * (0.25 + dice.expovariate(1.0))
        if clock.now < dice.slow_until:
            delay *= 50
        late = type(message) in OVERTAKEN and dice.random() < dice.reordered
        arrival = clock.now + delay
        if late:
            dice.overtaken += 1
            arrival = max(arrival, self._last) + LATE_S * dice.random() ** 4
        else:
            arrival = self._last = max(arrival, self._last)
        clock.at(arrival, self._arrive, self._epoch, message, frames)
        if type(message) in REPEATABLE and dice.random() < dice.duplicates:
            dice.repeated += 1
            clock.at(arrival + LATE_S * dice.random() ** 2, self._arrive, self._epoch, message, frames)

    def cut(self) -> None:
        """Whatever is on its way is lost."""
        self._epoch += 1
        self._last = 0.0

    def _arrive(self, epoch: int, message: Any, frames: list[bytes]) -> None:
        if epoch == self._epoch:
            self._deliver(message, frames)
        else:
            self._weather.lost += 1
