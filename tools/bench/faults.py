"""What do the promises cost? Throughput with and without syncs; what the death of a generator takes along.

Durability: the buffer benchmark's pipeline, once as it is and once in a process that never waits for the
disk, in turns. Deaths: real processes, two scripted generators with answers of one length, one rollout step.
A generator is killed when its answers are so far along, once with generation checkpoints
(`rollout.progress_every_tokens`) and once without, beside the same job undisturbed. The tokens lost are read
from the records: what the lease's age allows to have been generated, less what was committed under its fence.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from pathlib import Path

import msgspec

from asyncrl.errors import RunError
from tools.bench import buffer
from tools.bench.jobs import Job, job, rows
from tools.bench.report import Options, Section, Table, number, spread

TOKENS = (100, 1_000)
"""Tokens per sample in the comparison of durable with volatile."""
ANSWER = 400
"""Tokens of every answer."""
LATENCY_S = 0.02
KILL_AT = 0.7
"""Share of an answer after which its generator is killed."""
OFF = 1 << 20
PROGRESS = (128, OFF)
"""Tokens that a death may cost an answer; OFF: more than an answer has."""
GROUPS, GROUP_SIZE = 4, 4
DEADLINE_S = 120.0
POLL_S = 0.02

TOPOLOGY = """
[run]
num_rollout = 1
heartbeat_s = 0.5
dead_after_s = 3.0
[source]
prompt_data = "{model}/train.jsonl"
input_key = "prompt"
label_key = "label"
[rollout]
rollout_batch_size = {groups}
n_samples_per_prompt = {group_size}
rollout_max_response_len = {answer}
rollout_max_context_len = {context}
progress_every_tokens = {progress}
progress_every_s = 0
[[generator]]
replicas = 2
engine = "scripted"
concurrency = {concurrency}
[generator.scripted]
median = {answer}.0
sigma = 0.0
max_tokens = {answer}
token_latency_s = {latency}
[[reward]]
use = "random"
[trainer]
hf_checkpoint = "{model}"
backend = "scripted"
"""

LEASED = "select min(granted_at) from leases where kind = 'generate' and worker = 'generator-0'"
VICTIM = "select pid from members where name = 'generator-0' order by joined_at limit 1"
LOST = (
    "select l.granted_at, l.ended_at, length(l.indices) - length(replace(l.indices, ',', '')) + 1,"
    " coalesce(sum(b.num_tokens), 0)"
    " from leases l left join bodies b on b.fence = l.fence and b.kind = 'segment'"
    " where l.worker = 'generator-0' and l.kind = 'generate' and l.granted_at < ? group by l.fence"
)
SPAN = "select min(granted_at), (select max(ended) from trained) from leases where kind = 'generate'"


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """One job, disturbed or not."""

    seconds: float
    """From the first lease to the end of the only training step."""
    lost: int = 0
    """Tokens that the dead generator had sampled and nobody had."""


def run(options: Options) -> Section:
    """Measure both; see the module's docstring."""
    repeats = options.choose(quick=1, normal=3, full=5)
    rates = durability(options, repeats)
    deaths = {every: [_pair(options, every, n) for n in range(repeats)] for every in PROGRESS}
    return Section(
        name="faults",
        title="what durability costs, and what a generator's death takes along",
        settings={
            "repeats": repeats,
            "answers": f"{GROUPS}x{GROUP_SIZE} of {ANSWER} tokens, {1000 * LATENCY_S:g} ms each",
            "killed": f"after {KILL_AT:.0%} of an answer",
        },
        tables=[_durability(rates), _deaths(deaths)],
        data={
            "durability": {str(k): v for k, v in rates.items()},
            "deaths": {str(k): msgspec.to_builtins(v) for k, v in deaths.items()},
        },
    )


def durability(options: Options, repeats: int) -> dict[int, list[tuple[float, float]]]:
    """By tokens per sample: samples per second (durable, volatile) of every repeat."""
    import uvloop

    batches = buffer.QUICK_BATCHES if options.quick else buffer.BATCHES
    found: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in TOKENS}
    for attempt in range(repeats):
        for tokens in TOKENS:
            durable, volatile = (
                uvloop.run(
                    buffer.measure(
                        options, tokens=tokens, batches=batches[tokens], attempt=attempt, volatile=volatile
                    )
                ).samples_per_s
                for volatile in (False, True)
            )
            found[tokens].append((durable, volatile))
    return found


def _durability(rates: dict[int, list[tuple[float, float]]]) -> Table:
    return Table(
        title="samples/s through all stages of the buffer: median (range); ratio of medians within repeats",
        columns=["tokens/sample", "durable", "no syncs", "ratio"],
        rows=[
            [
                f"{tokens:,}",
                spread([durable for durable, _ in pairs]),
                spread([volatile for _, volatile in pairs]),
                f"{statistics.median(durable / volatile for durable, volatile in pairs):.2f}",
            ]
            for tokens, pairs in rates.items()
        ],
    )


def _pair(options: Options, every: int, attempt: int) -> tuple[Death, Death]:
    """(undisturbed, with a death)"""
    calm, killed = (_job(options, every, f"{every}-{attempt}-{kill}", kill=kill) for kill in (False, True))
    return calm, killed


def _job(options: Options, every: int, name: str, *, kill: bool) -> Death:
    model = options.model.resolve()
    topology = options.work / "death.toml"
    topology.write_text(
        TOPOLOGY.format(
            model=model, groups=GROUPS, group_size=GROUP_SIZE, answer=ANSWER, context=2 * ANSWER,
            progress=every, concurrency=GROUPS * GROUP_SIZE // 2, latency=LATENCY_S,
        ),
        encoding="utf-8",
    )  # fmt: skip
    run_dir = options.work / "runs" / name
    with job(topology, run_dir) as started:
        killed_at = _kill(started) if kill else None
        if started.wait(deadline_s=DEADLINE_S) != 0:
            raise RunError(f"{run_dir}: the job failed\n{started.tail()}")
    began, ended = rows(run_dir, SPAN)[0]
    return Death(seconds=ended - began, lost=0 if killed_at is None else lost_tokens(run_dir, killed_at))


def _kill(started: Job) -> float:
    """SIGKILL of generator-0 when its first answers are so far along; returns when. Raises RunError."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        leased = rows(started.run_dir, LEASED)
        if leased and leased[0][0] is not None and time.time() - leased[0][0] > KILL_AT * ANSWER * LATENCY_S:
            os.kill(int(rows(started.run_dir, VICTIM)[0][0]), signal.SIGKILL)
            return time.time()
        time.sleep(POLL_S)
    raise RunError(f"{started.run_dir}: generator-0 got no work\n{started.tail()}")


def lost_tokens(run_dir: Path, killed_at: float) -> int:
    """Tokens that the leases held at that time had been worked at for, and that nobody has."""
    lost = 0
    with_parameter = LOST.replace("?", repr(killed_at))
    for granted, ended, samples, committed in rows(run_dir, with_parameter):
        if ended is None or ended >= killed_at:
            generated = samples * min(ANSWER, int((killed_at - granted) / LATENCY_S))
            lost += max(0, generated - int(committed))
    return lost


def _deaths(deaths: dict[int, list[tuple[Death, Death]]]) -> Table:
    return Table(
        title="one rollout step of two generators; one of them is killed: median (range)",
        columns=["progress_every_tokens", "undisturbed s", "with a death s", "time lost s", "tokens lost"],
        rows=[
            [
                "off" if every == OFF else str(every),
                spread([calm.seconds for calm, _ in pairs]),
                spread([killed.seconds for _, killed in pairs]),
                spread([killed.seconds - calm.seconds for calm, killed in pairs]),
                number(statistics.median(killed.lost for _, killed in pairs)),
            ]
            for every, pairs in deaths.items()
        ],
    )
