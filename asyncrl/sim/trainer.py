"""A simulated trainer: trains what it is handed, publishes and saves beside it, and starts again from its
newest committed checkpoint, publishing nothing until it reaches the last published step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from asyncrl.actor.pieces import Pieces
from asyncrl.messages import control
from asyncrl.messages.control import Kind
from asyncrl.messages.version import Manifest
from asyncrl.sim import bodies
from asyncrl.sim.bodies import Answer
from asyncrl.sim.peers import Peer, Stage

Groups = list[tuple[int, list[Answer]]]
MAX_SNAPSHOTS = 2
"""As in weights.publisher, which needs torch."""
WRITE_S = 1.5
"""Median time of writing a version."""


class Trainer(Peer):
    """See the module's docstring."""

    role = "trainer"

    def __init__(self, name: str, life: int, stage: Stage) -> None:
        super().__init__(name, life, stage)
        self.number = self.step = self.saved = 0
        self._at_work = self._introduced = self._told = 0
        """As in the trainer's role: steps in the weights soon, in the last hello, told to the desk."""
        self._last_push = -1
        self._writing: deque[control.Published] = deque()
        """Versions whose snapshots are taken; one writer takes one after the other, beside the next step."""
        self._after_push: Callable[[], None] | None = None
        """What waits for room for a snapshot."""
        self.disk_slow_until = 0.0
        self.on_saved: Callable[[], None] | None = None
        """Called at a checkpoint that is committed before a version older than it is written."""
        self._recorded: Manifest | None = None
        self._batches: deque[tuple[int, Groups]] = deque()
        self._parts: Groups = []
        self._pieces = Pieces()
        self._words: dict[tuple[str, int], Any] = {}
        self._busy = "welcome"
        """What it is doing; empty: it waits for a batch."""
        self.ending = False

    def handle(self, message: Any, frames: list[bytes]) -> None:
        match message:
            case control.BatchPart():
                self._take_part(message, frames)
            case control.Committed():
                self._words.pop((message.what, message.number), None)
                if self._busy == "checkpoint" and message.what == "checkpoint":
                    self._busy = ""
                    if self.on_saved is not None and len(self._writing) == MAX_SNAPSHOTS:
                        self.on_saved()
                self._next()

    def on_welcome(self, welcome: control.Welcome) -> None:
        start = welcome.trainer
        assert start is not None, "the desk tells a trainer where to start"
        self.number, self._recorded = start.incarnation, start.published
        self._busy, self.starting = "its checkpoint to be loaded", True
        self.after(self.stage.about(6.0), self._begin, start.checkpoint)

    def _begin(self, checkpoint: str) -> None:
        self.step = self.saved = self._at_work = self._told = int(checkpoint.rpartition("-")[2] or 0)
        self._busy = ""
        self._push(self._begun)

    def _begun(self) -> None:
        self._want(1 + self.stage.scenario.prefetch, self.stage.scenario.window_bytes)
        self.started()
        self._next()

    def introduce(self, hello: control.Hello) -> control.Hello:
        self._introduced = max(self._at_work, self.step)
        return msgspec.structs.replace(hello, batches=self._introduced)

    def restate(self, welcome: control.Welcome) -> None:
        start = welcome.trainer
        if start is None or start.incarnation != self.number:
            self.stage.exited(self, "another life of the trainer has taken its place")
            return
        for word in self._words.values():
            self.send(word)
        scenario = self.stage.scenario
        at_work = max(0, self._introduced - self._told)
        self._want(1 + scenario.prefetch - at_work, scenario.window_bytes)

    def _want(self, batches: int, num_bytes: int) -> None:
        self.send(control.Want(kind=Kind.TRAIN, samples=batches, num_bytes=num_bytes))

    # Batches.

    def _take_part(self, part: control.BatchPart, frames: list[bytes]) -> None:
        self.stage.checks.delivered(part, frames)
        self._want(0, part.num_bytes)
        if not self._pieces.follows(part.batch, part.part):
            return
        self._parts = self._parts if part.part else []
        self._parts += bodies.read_all(part.groups, frames)
        if part.part + 1 == part.num_parts:
            self._batches.append((part.batch, self._parts))
            ahead = {batch for batch, _ in self._batches if batch >= self._at_work}
            room = 1 + self.stage.scenario.prefetch - (self._at_work > self._told)
            self.stage.checks.holds(self.name, len(ahead), room)
            self._next()

    def _next(self) -> None:
        while self._batches and not self._busy:
            batch, groups = self._batches.popleft()
            if batch != self.step:
                continue  # delivered again after we had trained it, or the one before it was lost on its way
            self._busy, self._at_work = f"batch {batch} to be trained", batch + 1
            self.after(self.stage.about(self.stage.scenario.step_s, 0.2), self._trained, batch, groups)
        if self.ending and not self._busy and not self._batches:
            self._push(self._save)

    def _trained(self, batch: int, groups: Groups) -> None:
        self.stage.checks.trains(self.number, batch, groups)
        self.step, self._busy = batch + 1, ""
        tokens = sum(answer.num_tokens for _, group in groups for answer in group)
        now = self.stage.clock.now
        message = control.Trained(
            batch=batch, incarnation=self.number, step=self.step, digest=self._digest(), started=now - 1.0,
            ended=now, tokens=tokens,
        )  # fmt: skip
        self._told = batch + 1
        self._say("trained", batch, message)
        self._want(1, 0)
        if self.step % self.stage.scenario.interval == 0 or self._is_last:
            self._push(self._pushed)
        else:
            self._pushed()

    def _pushed(self) -> None:
        if self.step % self.stage.scenario.save_interval == 0 or self._is_last:
            self._save()
        self._next()

    @property
    def _is_last(self) -> bool:
        scenario = self.stage.scenario
        return scenario.prompts is None and self.step == scenario.target

    def _digest(self) -> str:
        return f"digest{self.step}" + ("" if self.stage.scenario.exact else f".{self.number}")

    def _say(self, what: str, number: int, message: Any) -> None:
        self._words[(what, number)] = message
        self.send(message)

    def _push(self, then: Callable[[], None]) -> None:
        """Publish the weights, unless that was done, then go on; where the disk is slow, training waits."""
        recorded = self._recorded
        if self.step <= self._last_push or (recorded is not None and self.step < recorded.version):
            then()
            return
        if len(self._writing) == MAX_SNAPSHOTS:
            self._busy, self._after_push = "an older version to be written", then
            return
        self._last_push = self.step
        digest, incarnation = self._digest(), self.number
        if recorded is not None and (recorded.version, recorded.digest) == (self.step, digest):
            incarnation = recorded.incarnation
        manifest = Manifest(
            run_id="sim", version=self.step, incarnation=incarnation, step=self.step, digest=digest,
            num_bytes=0, tensors=[], path=self.incarnation,
        )  # fmt: skip
        self._writing.append(control.Published(manifest=manifest))
        if len(self._writing) == 1:
            self._write()
        then()

    def _write(self) -> None:
        slow = 60.0 if self.stage.clock.now < self.disk_slow_until else 1.0
        self.after(self.stage.about(WRITE_S) * slow, self._written)

    def _written(self) -> None:
        message = self._writing.popleft()
        self._say("version", message.manifest.version, message)
        if self._writing:
            self._write()
        if self._after_push is not None:
            then, self._after_push, self._busy = self._after_push, None, ""
            self._push(then)

    def _save(self) -> None:
        if self.step > self.saved:
            self.saved = self.step
            self._busy = "checkpoint"
            self.after(self.stage.about(2.0), self._checkpoint, self.step)

    def _checkpoint(self, step: int) -> None:
        saved = control.Saved(rollout_step=step, incarnation=self.number, path=f"step-{step}", step=step)
        self._say("checkpoint", step, saved)

    def finish(self) -> None:
        if self.ending or self.step == self.stage.scenario.target:
            super().finish()
        self.ending = True
        self._next()

    def waits_for(self) -> str:
        if self._busy == "checkpoint":
            return "its checkpoint to be committed"
        return self._busy or (f"batch {self.step}" if self.welcome else super().waits_for())
