"""The desk in numbers for people: gauges, the live view, and a warning when long answers begin to starve.

It reads the ledger and changes nothing in it; it waits for nobody but the supervisor, through `tell`.
"""

from __future__ import annotations

import time

from asyncrl.actor.base import Actor
from asyncrl.buffer import deaths
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.lengths import tokens_dropped
from asyncrl.messages.sample import Settled
from asyncrl.obs.view import NoteUpdate, QueueUpdate

OLD = 2
"""A group is old that is unfinished after so many times max_staleness + 1 batches."""


class Showing:
    """See the module's docstring."""

    def __init__(self, actor: Actor, ledger: Ledger) -> None:
        self._actor = actor
        self._ledger = ledger
        self._starving = ""

    async def show(self) -> None:
        """Write the gauges down and tell the supervisor."""
        ledger, gauges = self._ledger, self._actor.gauges
        counts = ledger.counts()
        used = counts.pop("tickets_used")
        free = counts.pop("tickets_free")
        gauges |= {f"queue/{state}": float(n) for state, n in counts.items()}
        gauges |= {"queue/tickets_used": used, "queue/tickets_free": free}
        for reason in Settled:
            gauges[f"ledger/settled/{reason}"] = ledger.book.totals[f"settled.{reason}.groups"]
        gauges |= deaths.metrics(ledger.book.totals)
        await self._show_lengths()
        self._actor.metrics.write(gauges, step=ledger.batches.num_trained)
        await self._actor.tell(
            QueueUpdate(
                counts=counts,
                tickets_used=used,
                tickets_total=ledger.batches.tickets,
                evaluated=ledger.book.totals[f"settled.{Settled.EVALUATED}.groups"],
            )
        )

    async def _show_lengths(self) -> None:
        """Gauges of lengths and of tokens thrown away; a warning when long answers begin to starve."""
        ledger, gauges = self._ledger, self._actor.gauges
        oldest = ledger.book.oldest_unfinished()
        age = 0 if oldest is None else max(0, ledger.batches.next_batch - oldest.version)
        gauges |= ledger.lengths.metrics()
        gauges["lengths/oldest_group_batches"] = age
        gauges["lengths/oldest_group_s"] = 0.0 if oldest is None else time.time() - oldest.created_at
        dropped = tokens_dropped(ledger.book.totals)
        gauges |= {f"tokens_dropped/{reason}": tokens for reason, tokens in dropped.items()}
        words = ledger.lengths.concern(
            oldest_batches=age,
            patience=OLD * (ledger.config.max_staleness + 1),
            on_straggler=ledger.config.on_straggler,
        )
        if words and not self._starving:
            self._actor.log.warning(words)
            await self._actor.tell(NoteUpdate(text=words))
        elif self._starving and not words:
            self._actor.log.info("long answers are trained again as they come")
        self._starving = words
