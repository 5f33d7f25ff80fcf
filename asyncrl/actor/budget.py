"""How often one name may be started again, and how long to wait before. Pure: time comes in with every call.

    death of its own ---> charged ---> `max_restarts` charged already: no further life
    proven to be a sample's doing, or healthy for `window_s` ---> not charged any more

A death that we caused ourselves is never charged. Every death makes the next wait longer, up to a ceiling.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 30.0
"""No wait is longer."""
JITTER = 0.25
"""Share of a wait that differs from name to name: a fleet that died at once does not return at once."""


@dataclass(slots=True)
class Budget:
    """Restarts of one name, over all its lives."""

    restarts: int = 0
    """All that there were."""
    deaths: Counter[str] = field(default_factory=Counter)
    """Its ends that were not asked for, by reason."""
    charged: list[str] = field(default_factory=list)
    """Incarnations whose deaths count against it."""

    def grant(
        self, incarnation: str, *, max_restarts: int, well_s: float, window_s: float, ours: bool
    ) -> bool:
        """Whether another life may follow this one's death; counts it.

        Args:
            incarnation: the life that has ended.
            max_restarts: deaths that may be charged at a time.
            well_s: how long that life had been healthy; 0 for one that never was.
            window_s: a life that was healthy for so long starts the count anew.
            ours: whether we killed it for a reason of our own.
        """
        if well_s >= window_s:
            self.charged.clear()
        if not ours:
            if len(self.charged) >= max_restarts:
                return False
            self.charged.append(incarnation)
        self.restarts += 1
        return True

    def acquit(self, incarnation: str) -> bool:
        """This death was not its own doing after all; whether it had been charged."""
        known = incarnation in self.charged
        if known:
            self.charged.remove(incarnation)
        return known

    def backoff_s(self, name: str) -> float:
        """How long to wait before the next life: doubles with each charged death, up to the ceiling.

        The jitter is a function of the name and of the number of its restarts, so a run can be repeated.
        """
        # 2**60 is beyond any ceiling; the exponent of a float is not.
        doubled = FIRST_BACKOFF_S * 2.0 ** min(max(len(self.charged) - 1, 0), 60)
        share = zlib.crc32(f"{name}.{self.restarts}".encode()) / 2**32
        return float(min(doubled, MAX_BACKOFF_S) * (1.0 - JITTER * share))

    def reasons(self) -> str:
        """Its deaths by reason, in words; empty where there was none."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.deaths.items()))
