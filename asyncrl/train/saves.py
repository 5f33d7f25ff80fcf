"""The trainer's checkpoints: written on the compute thread, told to the buffer, then older ones removed.

It never decides when one is due. Invariant: an older checkpoint goes only once the buffer has committed a
newer one, so whatever the buffer names to a trainer that starts again is on the disk.
"""

from __future__ import annotations

import time

from asyncrl.actor.base import Actor
from asyncrl.messages.control import Saved
from asyncrl.obs.view import NoteUpdate
from asyncrl.train.checkpoint import prune
from asyncrl.train.loop import Trainer
from asyncrl.train.promises import Promises

CHECKPOINTS = "checkpoints"


class Saves:
    """See the module's docstring."""

    def __init__(self, actor: Actor, *, trainer: Trainer, promises: Promises) -> None:
        self._actor = actor
        self._trainer = trainer
        self._promises = promises
        self._saved = -1

    def begin(self, step: int) -> None:
        """The trainer starts from what is saved of this rollout step."""
        self._saved = step

    async def save(self, *, step: int, incarnation: int) -> None:
        """Save the present weights, unless they are saved; waits until the buffer has committed it.

        Args:
            step: optimizer steps in them.
            incarnation: of the trainer's life.

        Raises:
            StalledError: the buffer did not commit it in time.
        """
        actor, at = self._actor, self._trainer.rollout_step
        if at <= self._saved:
            return
        directory = actor.context.run_dir / CHECKPOINTS
        began = time.monotonic()
        with actor.waits("checkpoint"):
            path = await actor.compute(lambda: self._trainer.save(directory))
            await self._promises.promise(
                Saved(rollout_step=at, incarnation=incarnation, path=str(path), step=step)
            )
        await self._promises.committed("checkpoint", at)
        self._saved = at
        # Older ones go only now that the buffer knows the new one.
        keep = actor.plan.topology.trainer.keep_checkpoints
        await actor.compute(lambda: prune(directory, keep=keep))
        actor.metrics.write({"perf/save_model_time": time.monotonic() - began}, step=at)
        await actor.tell(NoteUpdate(text=f"checkpoint of rollout step {at} in {path}"))
