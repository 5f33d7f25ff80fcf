"""The whole cluster: the desk, its actors and the supervisor that starts them again, until the run ends.

A run that stands still is a finding: when nothing but ticks is left in the queue, or no batch was trained
for hours, the error says who waits for what.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncrl.messages.version import Manifest
from asyncrl.sim.actors import Evaluator, Reward, Source
from asyncrl.sim.bodies import InvariantError
from asyncrl.sim.checks import Checks
from asyncrl.sim.clock import Clock
from asyncrl.sim.desk import SimulatedDesk
from asyncrl.sim.generator import Generator
from asyncrl.sim.link import Weather
from asyncrl.sim.peers import Peer, Stage
from asyncrl.sim.scenario import Scenario
from asyncrl.sim.trainer import Trainer

STALL_S = 6 * 3600.0
"""Virtual seconds without a trained batch that count as a wedge, even if messages go round."""
LOOK_EVERY = 8
"""Events between two looks at whether a fault is due, the run is over, or it stands still."""
RESTART_S = {"generator": 25.0, "reward": 4.0, "trainer": 40.0, "source": 4.0, "evaluator": 4.0, "desk": 4.0}
"""Median time until the next life says hello; a generator's is the scenario's."""


class Cluster:
    """See the module's docstring."""

    def __init__(self, scenario: Scenario, run_dir: Path) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.dice = random.Random(scenario.seed)
        self.weather = Weather(
            scenario.seed + 1, latency_s=scenario.latency_s, duplicates=scenario.duplicates,
            reordered=scenario.reordered,
        )  # fmt: skip
        self.checks = Checks(scenario)
        self.stage = Stage(
            scenario, self.clock, self.dice, self.weather, self.checks, receive=self._receive,
            exited=self._exited, has_bytes=self._has_bytes, addresses={},
        )  # fmt: skip
        self.peers: dict[str, Peer] = {}
        self.replaced: list[Peer] = []
        """Lives that were stopped, have a successor, and may go on."""
        self.lives: Counter[str] = Counter()
        self.leaving: set[str] = set()
        """Names that nobody starts again."""
        self.desk = SimulatedDesk(run_dir, self.stage, self._post, self._present)
        names = ["source", "trainer", *(f"reward-{i}" for i in range(scenario.rewards))]
        names += ["evaluator"] * scenario.evaluates
        for name in names + [f"generator-{i}" for i in range(scenario.generators)]:
            self.clock.after(self.dice.random() * 2.0, self.start, name)
        self._progress = (0, 0.0)
        """Batches trained, and when that was last seen to change."""
        self._idle_since: float | None = None

    # Actors.

    def start(self, name: str) -> None:
        """A new life of an actor."""
        if name in self.peers or name in self.leaving:
            return
        self.lives[name] += 1
        role, _, number = name.partition("-")
        life = self.lives[name]
        peer: Peer
        if role == "generator":
            peer = Generator(name, life, self.stage, number=int(number))
        else:
            kinds = {"reward": Reward, "source": Source, "evaluator": Evaluator, "trainer": Trainer}
            peer = kinds[role](name, life, self.stage)
        self.peers[name] = peer
        peer.connected = self.desk.up
        peer.hello()

    def kill(self, name: str, *, seen: bool = True, ours: bool = False) -> None:
        """A process is gone. The supervisor tells the desk, or its silence does; it is started again."""
        peer = self.peers.pop(name, None)
        if peer is None:
            return
        peer.die()
        if seen:
            self.clock.after(0.1 + 0.4 * self.dice.random(), self._tell, peer, ours)
        median = self.scenario.restart_s if peer.role == "generator" else RESTART_S[peer.role]
        self.clock.after(1.0 + self.stage.about(median, 0.5), self.start, name)

    def _tell(self, peer: Peer, ours: bool) -> None:
        self.desk.lost(peer, ours=ours)

    def replace(self, name: str, resume_s: float) -> None:
        """A process is stopped and taken for dead; it goes on when its successor is here."""
        peer = self.peers.pop(name)
        peer.freeze()
        self.replaced.append(peer)
        self._tell(peer, False)
        self.start(name)
        self.clock.after(resume_s, peer.thaw)

    def _exited(self, peer: Peer, why: str) -> None:
        del why
        if self.peers.get(peer.name) is peer:
            self.kill(peer.name)
        else:
            peer.die()
            self.replaced = [other for other in self.replaced if other is not peer]

    def _everybody(self) -> list[Peer]:
        return [*self.peers.values(), *self.replaced]

    def _has_bytes(self, manifest: Manifest) -> bool:
        trainer = self.peers.get("trainer")
        return trainer is not None and trainer.incarnation == manifest.path

    def _present(self) -> list[Peer]:
        return [peer for peer in self._everybody() if peer.connected and not peer.frozen]

    # Messages.

    def _receive(self, peer: Peer, address: bytes, message: Any, frames: list[bytes]) -> None:
        self.desk.receive(address, message, frames)
        if type(message).__name__ == "Goodbye" and self.desk.up and self.peers.get(peer.name) is peer:
            del self.peers[peer.name]
            peer.die()

    def _post(self, peer_id: bytes, message: Any, frames: list[bytes]) -> None:
        peer = self.stage.addresses.get(peer_id)
        if peer is not None and peer.connected:
            peer.down.send(message, frames)

    # The desk's life.

    def kill_desk(self, *, committed: bool) -> None:
        """The buffer dies; every connection is lost. It comes back, and the survivors with it."""
        if not self.desk.up:
            return
        self.desk.die(committed=committed)
        for peer in self._everybody():
            peer.cut_off()
        self.clock.after(1.0 + self.stage.about(RESTART_S["desk"]), self._desk_again, False)

    def lose_machine(self) -> None:
        """Every process dies at once; the run is resumed."""
        if not self.desk.up:
            return
        self.desk.die(committed=self.dice.random() < 0.5)
        for peer in self.replaced:
            peer.die()
        self.replaced.clear()
        for name in list(self.peers):
            self.kill(name, seen=False)
        self.clock.after(1.0, self._desk_again, True)

    def _desk_again(self, resumed: bool) -> None:
        self.desk.restart(resumed=resumed)
        for peer in self._everybody():
            self.clock.after(self.dice.random() * 2.0, self.heal, peer)

    def heal(self, peer: Peer) -> None:
        """A connection comes back."""
        if peer.alive and not peer.connected and self.desk.up:
            if peer.frozen:
                self.clock.after(1.0, self.heal, peer)
            else:
                peer.reconnect()

    # The run.

    def run(self, look: Callable[[], None]) -> None:
        """To the end; `look` is called every few events.

        Raises:
            InvariantError: a promise does not hold, or the run stands still. Whatever the ledger raises
                passes through.
        """
        clock = self.clock
        while not self._over():
            for _ in range(LOOK_EVERY):
                if not clock.step():
                    self._wedged("no events are left")
            look()
            self._watch()
        self.checks.full(self.desk.ledger)
        self.checks.end(self.desk.ledger, self.desk.ledger.batches.target or 0)

    def _over(self) -> bool:
        return self.desk.up and self.desk.ledger.finished and self.desk.at_rest

    def _watch(self) -> None:
        now, trained = self.clock.now, self.desk.ledger.batches.num_trained
        if trained != self._progress[0]:
            self._progress = (trained, now)
        elif now - self._progress[1] > STALL_S:
            self._wedged(f"no batch was trained for {STALL_S:.0f} virtual s")
        if self.clock.foreground:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > 3 * self.scenario.dead_after_s + 10.0:
            self._wedged("only ticks are left in the queue")

    def _wedged(self, why: str) -> None:
        raise InvariantError("the run goes on", f"{why}\n{self.story()}")

    def story(self) -> str:
        """Who waits for what."""
        ledger = self.desk.ledger
        batches, versions = ledger.batches, ledger.versions
        published = versions.published.name if versions.published else "none"
        announced = versions.announced.name if versions.announced else "none"
        lines = [
            f"desk: {ledger.counts()}",
            (
                f"  batches: next {batches.next_batch} of {batches.target}, trained {batches.num_trained}, "
                f"dues {dict(sorted(batches.dues.items()))}, saved {ledger.saved}"
            ),
            (
                f"  versions: published {published}, announced {announced}, held {versions.held}, available "
                f"{versions.available}, evaluation {versions.evaluation}"
            ),
            (
                f"  prompts: fresh {len(ledger.queues.fresh)}, ended {ledger.source_ended}; partial "
                f"{len(ledger.queues.partial)}, to score {len(ledger.queues.to_score)}, to filter "
                f"{len(ledger.queues.to_filter)}, low on disk {ledger.low_on_disk}"
            ),
        ]
        for name, peer in self.peers.items():
            worker = ledger.fleet.workers.get(peer.id)
            desk = "unknown to the desk"
            if worker is not None:
                credit = {str(kind): n for kind, n in worker.credit.items()}
                desk = (
                    f"credit {credit}, {worker.credit_bytes} bytes, version {worker.version}, "
                    f"{len(worker.leases)} leases, alone {worker.alone}"
                )
            lines.append(f"{name}: waits for {peer.waits_for()}; {desk}")
        return "\n".join(lines)
