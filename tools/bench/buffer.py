"""How many samples a second go through every stage of the buffer, durably?

The real buffer role in its own process, `synchronous = FULL`, over ZeroMQ on loopback; scripted peers in this
one. A sample counts when its batch is committed as trained: issued, generated, scored, batched on the way.
Beside it a bare loop appends and syncs the same bytes in the same groups. RSS is read in a longer
run of its own, after a tenth of its groups and at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from asyncrl.errors import RunError
from asyncrl.link import ServerLink, bind
from asyncrl.messages.control import Hello
from asyncrl.messages.supervision import Stop, ToSupervisor
from asyncrl.topology.plan import Plan, compile_plan
from asyncrl.topology.schema import RolloutConfig, RunConfig, SourceConfig, Topology
from asyncrl.topology.training import TrainerConfig
from tools.bench.peers import Bodies, Generator, Peer, Reward, Source, Trainer
from tools.bench.report import MIB, Options, Section, Table, Target, number, spread

GROUP_SIZE = 8
BATCH_GROUPS = 64
BATCH = GROUP_SIZE * BATCH_GROUPS
"""Samples of one batch."""
MAX_STALENESS = 8
BATCHES = {100: 120, 1_000: 40, 10_000: 20}
"""Batches of one measurement, by tokens per sample."""
QUICK_BATCHES = {100: 20, 1_000: 12, 10_000: 10}
MEMORY_TOKENS = 100
MEMORY_BATCHES = 400
SKIP = 4
"""Batches before the clock starts: the pipeline fills."""
DEADLINE_S = 120.0
START_S = 20.0
TARGET_SAMPLES = (100, 10_000.0)
TARGET_MB = (10_000, 100.0)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement."""

    tokens: int
    samples_per_s: float
    mb_per_s: float
    """10^6 bytes of bodies."""
    bare_mb_per_s: float
    commits: int
    """Commits that made answers durable."""
    cpu_us: float
    """Processor time of the buffer per sample, all its threads, microseconds."""
    rss_mib: list[float]
    """Of the buffer: before the first group, after a tenth of the batches, after all."""


def run(options: Options) -> Section:
    """Measure all sizes; see the module's docstring."""
    import uvloop

    repeats = options.choose(quick=1, normal=3, full=5)
    batches = QUICK_BATCHES if options.quick else BATCHES
    runs = [
        uvloop.run(measure(options, tokens=tokens, batches=count, attempt=attempt))
        for attempt in range(repeats)
        for tokens, count in batches.items()
    ]
    count = options.choose(quick=40, normal=MEMORY_BATCHES)
    memory = uvloop.run(measure(options, tokens=MEMORY_TOKENS, batches=count, attempt=repeats))
    profile = options.work / "profile-100-0.txt"
    notes = profile.read_text(encoding="utf-8").splitlines() if profile.exists() else []
    by_tokens = {tokens: [r for r in runs if r.tokens == tokens] for tokens in batches}
    return Section(
        name="buffer",
        title="samples through issue, generation, scoring, batching and training, synchronous = FULL",
        settings={"group": GROUP_SIZE, "batch": BATCH, "max_staleness": MAX_STALENESS, "repeats": repeats},
        tables=[_rates(by_tokens), _memory(memory, count)],
        targets=_targets(by_tokens, memory),
        notes=notes,
        data={"runs": msgspec.to_builtins(runs), "memory": msgspec.to_builtins(memory)},
    )


def _rates(by_tokens: dict[int, list[Run]]) -> Table:
    columns = [
        "tokens/sample",
        "samples/s",
        "tokens/s",
        "bodies MB/s",
        "bare loop MB/s",
        "ratio",
        "commits",
        "cpu us",
    ]
    rows = []
    for tokens, runs in by_tokens.items():
        ratio = statistics.median(r.mb_per_s / r.bare_mb_per_s for r in runs)
        rows.append(
            [
                f"{tokens:,}",
                spread([r.samples_per_s for r in runs]),
                number(statistics.median(r.samples_per_s for r in runs) * tokens),
                spread([r.mb_per_s for r in runs]),
                spread([r.bare_mb_per_s for r in runs]),
                f"{ratio:.2f}",
                number(statistics.median(r.commits for r in runs)),
                number(statistics.median(r.cpu_us for r in runs)),
            ]
        )
    return Table(
        title="median (range) of repeats; cpu us: processor time of the buffer for each sample",
        columns=columns,
        rows=rows,
    )


def _memory(run: Run, batches: int) -> Table:
    groups = batches * BATCH_GROUPS
    return Table(
        title=f"resident memory of the buffer at {run.tokens} tokens",
        columns=["", "start", f"after {groups // 10:,} groups", f"after {groups:,} groups"],
        rows=[["MiB", *(number(mib) for mib in run.rss_mib)]],
    )


def _targets(by_tokens: dict[int, list[Run]], memory: Run) -> list[Target]:
    tokens, bound = TARGET_SAMPLES
    rate = statistics.median(r.samples_per_s for r in by_tokens[tokens])
    large, megabytes = TARGET_MB
    flow = statistics.median(r.mb_per_s for r in by_tokens[large])
    growth = memory.rss_mib[2] / memory.rss_mib[1]
    return [
        Target(what=f"through all stages at {tokens} tokens", value=rate, bound=bound, unit=" samples/s"),
        Target(what=f"bodies at {large:,} tokens", value=flow, bound=megabytes, unit=" MB/s"),
        Target(what="memory after 10x the groups", value=growth, bound=1.1, unit="x", at_least=False),
    ]


async def measure(
    options: Options, *, tokens: int, batches: int, attempt: int, volatile: bool = False
) -> Run:
    """One buffer from start to stop, then the bare loop. Raises TimeoutError, RunError.

    A `volatile` one never waits for the disk.
    """
    bodies = Bodies(tokens=tokens, group_size=GROUP_SIZE)
    directory = options.work / f"buffer-{tokens}-{attempt}{'-volatile' if volatile else ''}"
    profile = options.work / f"profile-{tokens}-{attempt}.txt" if options.profile else None
    generator, trainer = Generator(bodies), Trainer(bodies)
    peers = [trainer, Source(bodies), Reward(bodies), generator]
    async with (
        asyncio.timeout(DEADLINE_S),
        serving(directory, plan(batches), profile, volatile=volatile) as (child, address),
    ):
        pid = child.pid
        rss = [rss_mib(pid)]
        async with joined(peers, address, child):
            await trainer.reached(SKIP)
            began, cpu = len(trainer.trained), cpu_s(pid)
            await trainer.reached(max(SKIP, batches // 10))
            rss.append(rss_mib(pid))
            await trainer.reached(batches)
            rss.append(rss_mib(pid))
            cpu = (cpu_s(pid) - cpu) / ((len(trainer.trained) - began) * BATCH)
    seconds = trainer.trained[-1] - trainer.trained[SKIP - 1]
    samples = (batches - SKIP) * BATCH
    return Run(
        tokens=tokens,
        samples_per_s=samples / seconds,
        mb_per_s=samples * bodies.bytes_per_sample / seconds / 1e6,
        bare_mb_per_s=bare_loop(options.work / "bare.bin", bodies, generator.commits),
        commits=len(generator.commits),
        cpu_us=1e6 * cpu,
        rss_mib=rss,
    )


@contextlib.asynccontextmanager
async def joined(peers: Sequence[Peer], address: str, child: Process) -> AsyncIterator[None]:
    """The peers at work; an error of one of them, or the buffer's end, ends the block."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for peer in peers:
                await peer.join(address)
            running = [tasks.create_task(peer.run()) for peer in peers]
            running.append(tasks.create_task(_alive(child)))
            yield
            for task in running:
                task.cancel()
    finally:
        for peer in peers:
            await peer.close()


async def _alive(child: Process) -> None:
    """Waits for: the buffer's end, which is an error as long as somebody waits for it"""
    code = await child.wait()
    raise RunError(f"the buffer ended with exit code {code}; see its log")


@contextlib.asynccontextmanager
async def serving(
    directory: Path, plan: Plan, profile: Path | None = None, *, volatile: bool = False
) -> AsyncIterator[tuple[Process, str]]:
    """A buffer process and its address. We are its supervisor."""
    log = directory / "attempt-001" / "log"
    for folder in (log, directory / "metrics"):
        folder.mkdir(parents=True)
    (directory / "plan.json").write_bytes(msgspec.json.encode(plan))
    control = bind("tcp://127.0.0.1:0", receives=ToSupervisor)
    arguments = [
        *(["--profile", str(profile)] if profile else []), *(["--volatile"] if volatile else []),
        str(directory), "buffer", "--attempt-dir", str(log.parent), "--control", control.address,
        "--buffer", "tcp://127.0.0.1:0", "--incarnation", "bench", "--parent", str(os.getpid()),
    ]  # fmt: skip
    with (log / "buffer.out").open("wb") as output:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tools.bench.desk", *arguments, stdout=output, stderr=output
        )
    try:
        async with asyncio.timeout(START_S):
            peer, address = await _address(control)
        telemetry = asyncio.create_task(_ignore(control))
        try:
            yield child, address
        finally:
            telemetry.cancel()
        await control.send(peer, Stop())
        await asyncio.wait_for(child.wait(), 30)
    except BaseException:
        for path in log.iterdir():
            sys.stderr.write(path.read_text(encoding="utf-8")[-2000:])
        raise
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
        await control.close(linger_s=0)


async def _address(control: ServerLink) -> tuple[bytes, str]:
    while True:
        delivery = await control.recv()
        if isinstance(delivery.message, Hello) and delivery.message.address:
            return delivery.peer, delivery.message.address


async def _ignore(control: ServerLink) -> None:
    while True:
        await control.recv()


def plan(batches: int) -> Plan:
    """The run that the buffer believes to serve; it goes on for longer than we measure."""
    return compile_plan(
        Topology(
            run=RunConfig(name="bench", num_rollout=batches + 2 * MAX_STALENESS, dead_after_s=120.0),
            source=SourceConfig(prompt_data="nothing.jsonl"),
            rollout=RolloutConfig(
                rollout_batch_size=BATCH_GROUPS, n_samples_per_prompt=GROUP_SIZE, max_staleness=MAX_STALENESS
            ),
            trainer=TrainerConfig(hf_checkpoint="nothing"),
        )
    )


def bare_loop(path: Path, bodies: Bodies, commits: Sequence[int]) -> float:
    """MB/s of appending and syncing the same bytes, as many at a time as the buffer's commits held."""
    size = round(bodies.bytes_per_sample)
    blob = (bodies.segment * (size // len(bodies.segment) + 1))[:size]
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    written = 0
    began = time.perf_counter()
    try:
        for count in commits:
            written += os.write(descriptor, blob * count)
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - began
    path.unlink()
    return written / seconds / 1e6


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB
