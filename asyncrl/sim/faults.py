"""Faults: what may go wrong, how often, and to whom. Each one is an event at the cluster, and nothing more.

Random faults are spread over the run by the share of its samples that are finished, so that their number does
not depend on how fast the simulated cluster is.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable

from asyncrl.errors import ConfigError
from asyncrl.sim.cluster import Cluster
from asyncrl.sim.generator import Generator
from asyncrl.sim.peers import Peer
from asyncrl.sim.scenario import Fault, Scenario
from asyncrl.sim.trainer import Trainer

KINDS: dict[str, int] = {
    "generator_kill": 20,
    "generator_vanish": 6,
    "generator_stop": 10,
    "generator_slow": 6,
    "generator_detach": 6,
    "generator_attach": 5,
    "load_slow": 5,
    "load_corrupt": 3,
    "reward_kill": 8,
    "reward_stop": 3,
    "trainer_kill": 4,
    "trainer_stop": 3,
    "replaced": 3,
    "source_kill": 3,
    "evaluator_kill": 2,
    "connection_lost": 12,
    "partition": 5,
    "buffer_kill": 3,
    "buffer_kill_committed": 3,
    "buffer_stall": 2,
    "machine_loss": 1,
    "disk_low": 2,
    "clock_jump": 2,
    "links_slow": 3,
    "versions_slow": 3,
}
"""Every kind of fault, and how often it comes in relation to the others."""
EXTRA = 8
"""Generators that may be attached beyond those there were at the start."""


def random_schedule(scenario: Scenario) -> list[Fault]:
    """`scenario.faults` faults, evenly spread with some jitter, the same for the same seed."""
    dice = random.Random(scenario.seed + 2)
    kinds = dice.choices(list(KINDS), weights=list(KINDS.values()), k=scenario.faults)
    return [
        Fault((number + dice.random()) / (scenario.faults + 1), kind, dice.randrange(1 << 30))
        for number, kind in enumerate(kinds)
    ]


class Faults:
    """Strikes a cluster by a schedule."""

    def __init__(self, cluster: Cluster, schedule: list[Fault]) -> None:
        """Raises ConfigError for a kind that is not known."""
        unknown = {fault.kind for fault in schedule} - KINDS.keys()
        if unknown:
            raise ConfigError(f"schedule: unknown faults {sorted(unknown)}; known: {', '.join(KINDS)}")
        self.cluster = cluster
        self.done: Counter[str] = Counter()
        self._left = sorted(schedule, reverse=True)
        self._total = cluster.scenario.target * cluster.scenario.batch_size * cluster.scenario.group_size
        self._attached = cluster.scenario.generators

    def look(self) -> None:
        """Strike whatever is due."""
        while self._left and self.cluster.stage.finished_samples >= self._left[-1].at * self._total:
            fault = self._left.pop()
            strike: Callable[[int], None] = getattr(self, f"_{fault.kind}")
            strike(fault.pick)
            self.done[fault.kind] += 1

    def _victim(self, role: str, pick: int) -> Peer | None:
        found = [p for p in self.cluster.peers.values() if (not role or p.role == role) and not p.frozen]
        return found[pick % len(found)] if found else None

    def _seconds(self, pick: int, longest: float) -> float:
        return longest * (0.05 + 0.95 * random.Random(pick).random())

    def _kill(self, role: str, pick: int, *, seen: bool = True) -> None:
        victim = self._victim(role, pick)
        if victim is not None:
            self.cluster.kill(victim.name, seen=seen, ours=seen and pick % 7 == 0)

    def _stop(self, role: str, pick: int, longest: float) -> None:
        """SIGSTOP, and SIGCONT later: if the desk has given it up meanwhile, it says hello again."""
        victim = self._victim(role, pick)
        if victim is not None:
            victim.freeze()
            self.cluster.clock.after(self._seconds(pick, longest), victim.thaw)

    # Generators.

    def _generator_kill(self, pick: int) -> None:
        self._kill("generator", pick)

    def _generator_vanish(self, pick: int) -> None:
        self._kill("generator", pick, seen=False)

    def _generator_stop(self, pick: int) -> None:
        self._stop("generator", pick, 30.0)

    def _generator_slow(self, pick: int) -> None:
        victim = self._victim("generator", pick)
        if isinstance(victim, Generator):
            victim.slow_down(5.0)
            self.cluster.clock.after(self._seconds(pick, 300.0), self._normal, victim)

    @staticmethod
    def _normal(generator: Generator) -> None:
        if generator.alive:
            generator.slow_down(0.2)

    def _generator_detach(self, pick: int) -> None:
        """Drained and gone; another one is attached under its name later."""
        victim = self._victim("generator", pick)
        if isinstance(victim, Generator) and victim.connected:
            victim.drain()
            self.cluster.clock.after(60.0 + self._seconds(pick, 300.0), self._replace, victim)

    def _replace(self, generator: Generator) -> None:
        if self.cluster.peers.get(generator.name) is generator:
            self.cluster.kill(generator.name)  # it was to leave and could not
        else:
            self.cluster.start(generator.name)

    def _generator_attach(self, pick: int) -> None:
        del pick
        if self._attached < self.cluster.scenario.generators + EXTRA:
            self.cluster.start(f"generator-{self._attached}")
            self._attached += 1

    def _load_slow(self, pick: int) -> None:
        victim = self._victim("generator", pick)
        if isinstance(victim, Generator):
            victim.bad_load = "slow"

    def _load_corrupt(self, pick: int) -> None:
        victim = self._victim("generator", pick)
        if isinstance(victim, Generator):
            victim.bad_load = "corrupt"

    # The others.

    def _replaced(self, pick: int) -> None:
        """Stopped, given up, replaced, and continued: whatever the old life says changes nothing."""
        victim = self._victim("" if pick % 2 else "trainer", pick // 2)
        if victim is not None and victim.connected and self.cluster.desk.up:
            self.cluster.replace(victim.name, 1.0 + self._seconds(pick, 60.0))

    def _reward_kill(self, pick: int) -> None:
        self._kill("reward", pick, seen=pick % 3 > 0)

    def _reward_stop(self, pick: int) -> None:
        self._stop("reward", pick, 20.0)

    def _trainer_kill(self, pick: int) -> None:
        self._kill("trainer", pick, seen=pick % 3 > 0)

    def _trainer_stop(self, pick: int) -> None:
        self._stop("trainer", pick, 20.0)

    def _versions_slow(self, pick: int) -> None:
        """The disk for versions is slow; every other time the trainer dies with a newer checkpoint."""
        victim = self._victim("trainer", pick)
        if isinstance(victim, Trainer):
            victim.disk_slow_until = self.cluster.clock.now + self._seconds(pick, 300.0)
            if pick % 2:
                victim.on_saved = functools.partial(self._trainer_kill, pick)

    def _source_kill(self, pick: int) -> None:
        self._kill("source", pick, seen=pick % 3 > 0)

    def _evaluator_kill(self, pick: int) -> None:
        self._kill("evaluator", pick, seen=pick % 3 > 0)

    def _connection_lost(self, pick: int) -> None:
        victim = self._victim("", pick)
        if victim is not None and victim.connected:
            victim.cut_off()
            self.cluster.clock.after(self._seconds(pick, 2.0), self.cluster.heal, victim)

    def _partition(self, pick: int) -> None:
        """Cut off for so long that the desk gives it up."""
        victim = self._victim("", pick)
        if victim is not None and victim.connected:
            victim.cut_off()
            seconds = self.cluster.scenario.dead_after_s + 1.0 + self._seconds(pick, 20.0)
            self.cluster.clock.after(seconds, self.cluster.heal, victim)

    def _buffer_kill(self, pick: int) -> None:
        del pick
        self.cluster.kill_desk(committed=False)

    def _buffer_kill_committed(self, pick: int) -> None:
        del pick
        self.cluster.kill_desk(committed=True)

    def _buffer_stall(self, pick: int) -> None:
        self.cluster.desk.stalled_until = self.cluster.clock.now + self._seconds(pick, 30.0)

    def _machine_loss(self, pick: int) -> None:
        del pick
        self.cluster.lose_machine()

    def _disk_low(self, pick: int) -> None:
        self.cluster.desk.ledger.low_on_disk = True
        self.cluster.clock.after(self._seconds(pick, 60.0), self._disk_again)

    def _disk_again(self) -> None:
        if self.cluster.desk.up:
            self.cluster.desk.ledger.low_on_disk = False
            self.cluster.desk.changed()

    def _clock_jump(self, pick: int) -> None:
        """Somebody sets the clock: forwards by up to an hour, or back by up to ten minutes."""
        self.cluster.desk.jumped_s += self._seconds(pick, 3600.0) if pick % 2 else -self._seconds(pick, 600.0)

    def _links_slow(self, pick: int) -> None:
        self.cluster.weather.slow_until = self.cluster.clock.now + self._seconds(pick, 30.0)
