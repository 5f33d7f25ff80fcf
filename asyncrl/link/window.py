"""The credit window: how many samples and bytes may be under way to somebody who asked for them.

Pure arithmetic, no clock and no waiting. Whoever has room grants credit; whoever sends takes from it, and
gives it back when the receiver is done. An item larger than the whole byte window passes when the window is
empty: otherwise one long response would wait for ever.

Invariant: `used_samples <= granted_samples` and `used_bytes <= granted_bytes` after every `take`, but while
one oversized item is the only thing under way (or after `resize` shrank the window under what is under way).
"""

from __future__ import annotations

import msgspec


class WindowStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a window."""

    granted_samples: int
    granted_bytes: int
    used_samples: int
    used_bytes: int
    peak_samples: int
    """The most samples that were ever under way at once."""
    peak_bytes: int
    refused: int
    """How often `can_take` said no."""


class Window:
    """Credit in samples and bytes."""

    def __init__(self, *, granted_samples: int, granted_bytes: int) -> None:
        self.granted_samples = _not_negative("granted_samples", granted_samples)
        self.granted_bytes = _not_negative("granted_bytes", granted_bytes)
        self.used_samples = 0
        self.used_bytes = 0
        self._peak_samples = 0
        self._peak_bytes = 0
        self._refused = 0

    @property
    def free_samples(self) -> int:
        """Samples that may be taken now, never negative."""
        return max(0, self.granted_samples - self.used_samples)

    @property
    def free_bytes(self) -> int:
        """Bytes that may be taken now, never negative."""
        return max(0, self.granted_bytes - self.used_bytes)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way."""
        return self.used_samples == 0

    def can_take(self, num_bytes: int, *, num_samples: int = 1) -> bool:
        """Whether an item of so many samples and bytes may go now."""
        fits_bytes = self.used_bytes + num_bytes <= self.granted_bytes or self.is_empty
        allowed = num_samples <= self.free_samples and fits_bytes
        self._refused += not allowed
        return allowed

    def take(self, num_bytes: int, *, num_samples: int = 1) -> None:
        """Put an item under way. Raises ValueError where `can_take` says no."""
        if num_samples < 1 or num_bytes < 0:
            raise ValueError(
                f"an item has 1 sample or more and 0 bytes or more, got {num_samples}, {num_bytes}"
            )
        if not self.can_take(num_bytes, num_samples=num_samples):
            raise ValueError(
                f"{num_samples} samples of {num_bytes} bytes do not fit: {self.free_samples} samples and "
                f"{self.free_bytes} bytes are free; ask can_take first"
            )
        self.used_samples += num_samples
        self.used_bytes += num_bytes
        self._peak_samples = max(self._peak_samples, self.used_samples)
        self._peak_bytes = max(self._peak_bytes, self.used_bytes)

    def give_back(self, num_bytes: int, *, num_samples: int = 1) -> None:
        """The receiver is done with an item. Raises ValueError for more than is under way."""
        if not (0 <= num_samples <= self.used_samples and 0 <= num_bytes <= self.used_bytes):
            raise ValueError(
                f"cannot give back {num_samples} samples of {num_bytes} bytes: {self.used_samples} samples "
                f"of {self.used_bytes} bytes are under way"
            )
        self.used_samples -= num_samples
        self.used_bytes -= num_bytes

    def resize(self, *, granted_samples: int, granted_bytes: int) -> None:
        """A new grant in place of the old one; what is under way stays under way."""
        self.granted_samples = _not_negative("granted_samples", granted_samples)
        self.granted_bytes = _not_negative("granted_bytes", granted_bytes)

    def statistics(self) -> WindowStatistics:
        """A snapshot."""
        return WindowStatistics(
            granted_samples=self.granted_samples,
            granted_bytes=self.granted_bytes,
            used_samples=self.used_samples,
            used_bytes=self.used_bytes,
            peak_samples=self._peak_samples,
            peak_bytes=self._peak_bytes,
            refused=self._refused,
        )


def _not_negative(name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{name} has to be 0 or more, got {value}")
    return value
