"""The real buffer process, with a sampling profiler beside it where one is asked for.

    python -m tools.bench.desk [--profile FILE] [--volatile] RUN_DIR buffer --control ADDRESS ...

Everything after these goes to `asyncrl.actor.host`, unchanged. The profiler looks at every thread's stack
200 times a second: it sees both threads of the buffer, and it costs a percent or two. --volatile takes the
syncs away and nothing else: what durability costs is the difference.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

from asyncrl.actor import host
from asyncrl.buffer.store import Store
from asyncrl.roles import buffer as role

INTERVAL_S = 0.005
TOP = 25
"""Lines per thread in the report."""


class Sampler:
    """Counts where threads are, by function: on top of the stack (self) and anywhere in it (total)."""

    def __init__(self) -> None:
        self.own: dict[str, Counter[str]] = {}
        self.total: dict[str, Counter[str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():  # noqa: SLF001 - what it is there for
                if ident != threading.get_ident():
                    self._count(names.get(ident, "?"), frame)

    def _count(self, thread: str, frame: FrameType | None) -> None:
        own = self.own.setdefault(thread, Counter())
        total = self.total.setdefault(thread, Counter())
        seen: set[str] = set()
        top = True
        while frame is not None:
            name = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"
            if top:
                own[f"{name}:{frame.f_lineno}"] += 1
            if name not in seen:
                seen.add(name)
                total[name] += 1
            frame, top = frame.f_back, False

    def write(self, path: Path) -> None:
        """Stop, and write the report."""
        self._stop.set()
        lines = []
        for thread, own in self.own.items():
            samples = sum(own.values())
            lines.append(f"thread {thread}: {samples} samples")
            for title, counts in (("in the function and below", self.total[thread]), ("at the line", own)):
                lines.append(f"  {title}")
                lines += [f"    {100 * n / samples:5.1f}%  {name}" for name, n in counts.most_common(TOP)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def forget_to_sync() -> None:
    """From here on nothing in this process waits for the disk."""
    os.fdatasync = lambda _: None
    role.Store = functools.partial(Store, synchronous="off")  # type: ignore[assignment,misc]


def main() -> None:
    """Run the buffer until it is told to stop."""
    profile = None
    if sys.argv[1] == "--profile":
        profile = Path(sys.argv[2])
        del sys.argv[1:3]
    if sys.argv[1] == "--volatile":
        del sys.argv[1]
        forget_to_sync()
    if profile is None:
        host.main()
        return
    sampler = Sampler()
    sampler.start()
    try:
        host.main()
    finally:
        sampler.write(profile)


if __name__ == "__main__":
    main()
