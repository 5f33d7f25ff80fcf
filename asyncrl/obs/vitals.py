"""What a doctor wants to know of a run: plain data about processes, their waits, stacks, messages and queues.

`Facts` is what an actor says of itself, `Process` what the kernel says of a process, `Member` both with what
the supervisor knows, `Case` all of them: what `obs.causes` judges and `obs.doctor` shows. `Traffic` and
`LoopLag` are the two meters an actor carries for it. Nothing here waits for another process or decides.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.obs.stacks import Frame, Stack

LAG_TICK_S = 0.25
"""How often the event loop is asked whether it still turns."""
LAG_WINDOW = 40
"""Ticks over which the worst lag is kept: ten seconds of a healthy loop."""


_LOOP = re.compile(r"/(asyncio|uvloop)/|/selectors\.py$")
"""Files of an event loop's own frames."""


class Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything in a report."""


class Wait(Struct, frozen=True, kw_only=True):
    """A named wait that runs now."""

    name: str
    seconds: float


class Spoken(Struct, frozen=True, kw_only=True):
    """Messages of one kind."""

    kind: str
    way: str
    """"said" or "heard"."""
    count: int
    age_s: float
    """Since the last one."""


class Worker(Struct, frozen=True, kw_only=True):
    """Somebody the buffer knows."""

    name: str
    role: str
    silent_s: float
    """Since its last message."""
    credit: dict[str, int] = {}
    """Samples it has room for, by kind of work."""
    credit_bytes: int = 0
    leases: int = 0
    oldest_lease_s: float = 0.0
    version: int = -1


class Desk(Struct, frozen=True, kw_only=True):
    """The buffer's books, in numbers."""

    counts: dict[str, int] = {}
    """Live samples by state."""
    tickets_used: int = 0
    tickets_total: int = 0
    outstanding: int = 0
    """Groups that were issued and are in no recorded batch."""
    refused: int = 0
    """Groups refused by filters, or failed, since the last batch."""
    batch_size: int = 1
    next_batch: int = 0
    num_trained: int = 0
    target: int | None = None
    published: int = -1
    announced: int = -1
    source_ended: bool = False
    draining: bool = False
    low_on_disk: bool = False
    free_bytes: int = 0
    min_free_bytes: int = 0
    failure: str = ""
    workers: list[Worker] = []


class Facts(Struct, frozen=True, kw_only=True):
    """What an actor says of itself."""

    name: str
    role: str
    state: str = "running"
    pid: int = 0
    uptime_s: float = 0.0
    loop_lag_s: float = 0.0
    """The longest the event loop stood still, lately."""
    waits: list[Wait] = []
    """The longest first; empty while it computes."""
    side_waits: list[Wait] = []
    """Of loops beside the one that works: most of them wait most of the time."""
    held: int = 0
    """Leased samples in hand."""
    capacity: int = 0
    oldest_held_s: float = 0.0
    """Age of the oldest lease in hand."""
    version: int | None = None
    announced: int | None = None
    """Version it was told to load and does not serve yet."""
    announced_s: float = 0.0
    """Since when."""
    gauges: dict[str, float] = {}
    queues: dict[str, int] = {}
    """Items by queue."""
    events: dict[str, bool] = {}
    """Whether they are set."""
    links: dict[str, dict[str, Any]] = {}
    """Counters of each link."""
    spoken: list[Spoken] = []
    rss_bytes: int = 0
    desk: Desk | None = None
    stacks: list[Stack] = []


class Process(Struct, frozen=True, kw_only=True):
    """What the kernel says of a process, and the stacks it gave up when it was asked by a signal."""

    pid: int
    state: str
    """The letter of /proc (R, S, D, T, t, Z), or "gone"."""
    command: str = ""
    rss_bytes: int = 0
    stacks: list[Stack] = []


class Member(Struct, frozen=True, kw_only=True):
    """One member, from all sides."""

    name: str
    role: str
    state: str = "running"
    pid: int = 0
    host: str = ""
    attached: bool = False
    restarts: int = 0
    last_words: str = ""
    heard_s: float | None = None
    """Since its last word to the supervisor; None when it never said one."""
    local: bool = True
    """Whether it runs on the host of whoever examines it."""
    asked: bool = True
    """Whether there was a way to ask it."""
    facts: Facts | None = None
    """None: it did not answer."""
    process: Process | None = None
    children: list[Process] = []


class Case(Struct, frozen=True, kw_only=True):
    """Everything that was gathered."""

    run: str
    at: float = 0.0
    """Unix seconds."""
    live: bool = True
    phase: str = ""
    detail: str = ""
    """How it ended, when it has."""
    step: int = 0
    since_step_s: float | None = None
    """Since the last rollout step, or since the start; None when that is not known."""
    stall_s: float = 0.0
    reward_timeout_s: float = 0.0
    supervisor: Member | None = None
    """When the supervisor does not answer, or its own stacks were asked for."""
    members: list[Member] = []
    events: list[str] = []
    """The last things that the records tell, in order."""


class Traffic:
    """Counts messages by kind and remembers when each was last said or heard."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[tuple[str, str], tuple[int, float]] = {}

    def heard(self, message: object) -> None:
        """A message has come."""
        self._note("heard", message)

    def said(self, message: object) -> None:
        """A message has gone."""
        self._note("said", message)

    def _note(self, way: str, message: object) -> None:
        key = (way, type(message).__name__)
        self._last[key] = (self._last.get(key, (0, 0.0))[0] + 1, self._clock())

    def snapshot(self) -> list[Spoken]:
        """All kinds, the newest first."""
        now = self._clock()
        rows = [
            Spoken(kind=kind, way=way, count=count, age_s=now - at)
            for (way, kind), (count, at) in self._last.items()
        ]
        return sorted(rows, key=lambda row: row.age_s)


class LoopLag:
    """Measures how long the event loop stands still: a sleep that ends late says by how much."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, tick_s: float = LAG_TICK_S) -> None:
        self._clock = clock
        self._tick_s = tick_s
        self._lags: deque[float] = deque([0.0], maxlen=LAG_WINDOW)
        self._untold_s = 0.0

    @property
    def worst_s(self) -> float:
        """The longest standstill of the last `LAG_WINDOW` ticks."""
        return max(self._lags)

    async def watch(self) -> None:
        """produces: lags    waits for: the clock"""
        while True:
            began = self._clock()
            await asyncio.sleep(self._tick_s)
            lag_s = max(0.0, self._clock() - began - self._tick_s)
            self._lags.append(lag_s)
            self._untold_s = max(self._untold_s, lag_s)

    def take(self) -> float:
        """The longest standstill since the last call: each is told once."""
        lag_s, self._untold_s = self._untold_s, 0.0
        return lag_s


class Part:
    """Of an actor, a part with queues and events of its own: they are shown as the actor's."""


def queues_of(owner: object) -> dict[str, int]:
    """Sizes of the asyncio queues among an object's attributes, and among those of its `Part`s."""
    return {name: q.qsize() for name, q in _attributes(owner) if isinstance(q, asyncio.Queue)}


def events_of(owner: object) -> dict[str, bool]:
    """The asyncio events among an object's attributes and those of its `Part`s, and whether they are set."""
    return {name: e.is_set() for name, e in _attributes(owner) if isinstance(e, asyncio.Event)}


def _attributes(owner: object) -> Iterator[tuple[str, object]]:
    for name, value in vars(owner).items():
        yield name.strip("_"), value
        if isinstance(value, Part):
            yield from _attributes(value)


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process of this host; 0 where nobody says."""
    return _status_number(pid, "VmRSS") * 1024


def process_of(pid: int, *, stacks: list[Stack] | None = None) -> Process:
    """What /proc says of a process of this host."""
    command, state = _command_and_state(pid)
    if not state:
        return Process(pid=pid, state="gone")
    return Process(
        pid=pid,
        state=state,
        # Not its command line: reading that waits for the memory lock of a process that hangs in the kernel.
        command=command,
        rss_bytes=rss_bytes(pid),
        stacks=stacks or [],
    )


def is_stopped(pid: int) -> bool:
    """Whether a process of this host is stopped (SIGSTOP); False where the kernel has no /proc."""
    return _command_and_state(pid)[1] == "T"


def _command_and_state(pid: int) -> tuple[str, str]:
    """The process's name and its letter of /proc; empty once it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    head, _, tail = text.rpartition(")")
    return head.partition("(")[2], tail.split()[0]


def _status_number(pid: int | str, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) if found else 0


def blocking(main: Stack) -> Frame | None:
    """What the thread of an event loop runs instead of turning it; None while the loop waits for events."""
    last = max((i for i, f in enumerate(main.frames) if _LOOP.search(f.file)), default=-1)
    return place([Stack(kind=main.kind, name=main.name, frames=main.frames[last + 1 :])])


def waits_of(now: list[tuple[str, float]], *, clock: float) -> list[Wait]:
    """Waits as `Waits.now` gives them (name, clock reading at the start), with their ages."""
    return [Wait(name=name, seconds=clock - since) for name, since in now]


def place(
    stacks: Sequence[Stack], *, containing: str = "", kinds: Sequence[str] = ("user", "ours", "library")
) -> Frame | None:
    """The frame an operator would look at: users' code before ours before libraries', the innermost first.

    Args:
        stacks: of one process.
        containing: consider only stacks in which a function of this name runs.
        kinds: whose code to consider, the most telling first.
    """
    chosen = [s for s in stacks if any(f.function.endswith(containing) for f in s.frames)]
    frames = [frame for stack in chosen for frame in reversed(stack.frames)]
    return next((frame for kind in kinds for frame in frames if frame.kind == kind), None)
