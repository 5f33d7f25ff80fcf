"""Do generation and training really overlap? Achieved step time over the slower of the two alone.

Real processes; the scripted engine (lognormal lengths, 2% stragglers of 8 times the length) and the scripted
trainer, which sleeps. Tgen is the step time with an instant trainer and no bound, Ttrain the time of the
trainer's step alone. Then whole runs under every bound. Step times are those of the steady part: the first
steps fill the pipeline, and the runs are ended before their own end empties it.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from asyncrl.engines.scripted import Lengths
from asyncrl.messages.sample import Prompt, Sample, Score, Span, pack_logprobs, pack_tokens
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.backend import TrainPlan
from asyncrl.train.make import make_backend
from tools.bench.jobs import job
from tools.bench.report import Options, Section, Table, Target, number

GROUPS, GROUP_SIZE = 32, 8
GENERATORS, CONCURRENCY = 2, 32
MEDIAN, SIGMA, LONGEST = 25.0, 0.6, 128
STRAGGLERS, FACTOR = 0.02, 8.0
LATENCY_S = 0.0045
SEED = 42
"""Lengths are functions of it, of the group and of the sample: every run has the same work."""
UNBOUNDED = 64
"""More than the steps of any run here: never binds."""
BOUNDS = (0, 1, 2, 4, 8, UNBOUNDED)
QUICK_BOUNDS = (0, 8)
STEPS = {0: (10, 2), 1: (14, 3), 2: (18, 4), 4: (24, 8)}
"""By bound: steps of a run, and how many of them fill the pipeline. A small bound fills it soon."""
MORE_STEPS = (28, 10)
QUICK_STEPS = {0: (7, 2)}
QUICK_MORE_STEPS = (12, 4)
TRAINER_BOUND = 1.5
"""Ttrain over Tgen in the second case."""
FITS = 8
"""The bound that the longest answer fits."""
TARGET = 1.10
DEADLINE_S = 240.0

TOPOLOGY = """
[run]
num_rollout = 1000
[source]
prompt_data = "{model}/train.jsonl"
input_key = "prompt"
label_key = "label"
rollout_seed = {seed}
[rollout]
rollout_batch_size = {groups}
n_samples_per_prompt = {group_size}
rollout_max_response_len = {max_len}
rollout_max_context_len = {context}
max_staleness = {bound}
[[generator]]
replicas = {generators}
engine = "scripted"
concurrency = {concurrency}
on_new_weights = "keep"
[generator.scripted]
median = {median}
sigma = {sigma}
max_tokens = {longest}
straggler_fraction = {stragglers}
straggler_factor = {factor}
token_latency_s = {latency}
[[reward]]
use = "random"
concurrency = 1
batch = 256
[trainer]
hf_checkpoint = "{model}"
backend = "scripted"
scripted_step_s = {step_s}
"""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    bound: int
    train_s: float
    """Ttrain."""
    step_s: float
    """Mean step time of the steady part."""


def run(options: Options) -> Section:
    """Measure Tgen and Ttrain alone, then every bound; see the module's docstring."""
    generate_s = measure(options, bound=UNBOUNDED, train_s=0.0)
    cases = {"balanced": generate_s, "trainer-bound": TRAINER_BOUND * generate_s}
    if options.quick:
        del cases["trainer-bound"]
    tables, targets, data = [], [], {}
    for name, asked_s in cases.items():
        train_s = trainer_alone_s(asked_s)
        results = [
            Measured(
                bound=bound,
                train_s=train_s,
                step_s=measure(options, bound=bound, train_s=asked_s),
            )
            for bound in _bounds(options)
        ]
        tables.append(_table(name, generate_s, results))
        targets.append(_target(name, generate_s, results))
        data[name] = msgspec.to_builtins(results)
    return Section(
        name="overlap",
        title="step time over max(Tgen, Ttrain), real processes, scripted engine and trainer",
        settings=_settings(options),
        tables=tables,
        targets=targets,
        notes=[_lengths(generate_s)],
        data={"generate_s": generate_s, "cases": data},
    )


def _lengths(generate_s: float) -> str:
    longest = FACTOR * LONGEST
    return (
        f"answers: median {MEDIAN:.0f}, mean {mean_tokens():.0f}, longest {longest:.0f} tokens, which takes "
        f"{longest * LATENCY_S / generate_s:.1f} steps of generation alone"
    )


def _settings(options: Options) -> dict[str, object]:
    return {
        "batch": f"{GROUPS}x{GROUP_SIZE}",
        "generators": f"{GENERATORS}x{CONCURRENCY}",
        "token latency": f"{1000 * LATENCY_S:g} ms",
        "steps (skipped)": ", ".join("{} ({})".format(*schedule(options, b)) for b in _bounds(options)),
    }


def _table(name: str, generate_s: float, results: list[Measured]) -> Table:
    slower = max(generate_s, results[0].train_s)
    synchronous = results[0].step_s
    rows = [
        [
            "unbounded" if result.bound == UNBOUNDED else str(result.bound),
            number(result.step_s),
            f"{result.step_s / slower:.2f}",
            f"{synchronous / result.step_s:.2f}x",
        ]
        for result in results
    ]
    title = f"{name}: Tgen {generate_s:.2f} s, Ttrain {results[0].train_s:.2f} s, each alone"
    columns = ["max_staleness", "step s", "over max(Tgen, Ttrain)", "faster than synchronous"]
    return Table(title=title, columns=columns, rows=rows)


def _target(name: str, generate_s: float, results: list[Measured]) -> Target:
    result = next(r for r in results if r.bound == FITS)
    value = result.step_s / max(generate_s, result.train_s)
    return Target(what=f"{name}, max_staleness = {FITS}", value=value, bound=TARGET, unit="x", at_least=False)


def _bounds(options: Options) -> tuple[int, ...]:
    return QUICK_BOUNDS if options.quick else BOUNDS


def schedule(options: Options, bound: int) -> tuple[int, int]:
    """Steps of a run under this bound, and how many of them do not count."""
    if options.quick:
        return QUICK_STEPS.get(bound, QUICK_MORE_STEPS)
    return STEPS.get(bound, MORE_STEPS)


def measure(options: Options, *, bound: int, train_s: float) -> float:
    """Mean step time, in seconds, of the steps that count."""
    steps, skip = schedule(options, bound)
    name = f"overlap-{bound}-{round(1000 * train_s)}"
    path = options.work / f"{name}.toml"
    path.write_text(
        topology(options.model, bound=bound, train_s=train_s, seed=options.seed + SEED), encoding="ascii"
    )
    with job(path, options.work / "runs" / name) as launched:
        rows = launched.wait_trained(steps, deadline_s=DEADLINE_S)
    step_s = (rows[steps - 1][1] - rows[skip - 1][1]) / (steps - skip)
    print(f"  max_staleness {bound}, training {train_s:.2f} s: {step_s:.2f} s a step", flush=True)
    return step_s


def topology(model: Path, *, bound: int, train_s: float, seed: int) -> str:
    """The topology file of one run."""
    longest = round(FACTOR * LONGEST)
    return TOPOLOGY.format(
        model=model.resolve(), groups=GROUPS, group_size=GROUP_SIZE, max_len=longest, context=4 * longest,
        bound=bound, generators=GENERATORS, concurrency=CONCURRENCY, median=MEDIAN, sigma=SIGMA,
        longest=LONGEST, stragglers=STRAGGLERS, factor=FACTOR, latency=LATENCY_S, step_s=train_s, seed=seed,
    )  # fmt: skip


def trainer_alone_s(step_s: float, *, steps: int = 3) -> float:
    """Seconds that the scripted trainer takes for a step, measured with nothing beside it."""
    backend = make_backend(
        TrainPlan(trainer=TrainerConfig(hf_checkpoint="", backend="scripted", scripted_step_s=step_s))
    )
    backend.load()
    prepared = backend.prepare([[_sample()]])
    backend.digest()  # imports torch
    began = time.perf_counter()
    for step in range(steps):
        backend.train(prepared, rollout_step=step)
        backend.digest()
    return (time.perf_counter() - began) / steps


def _sample() -> Sample:
    return Sample(
        group_id=0,
        index=0,
        prompt=Prompt(tokens=pack_tokens([1])),
        tokens=pack_tokens([1]),
        logprobs=pack_logprobs([0.0]),
        loss_mask=b"\x01",
        spans=[Span(0, 1, 1)],
        score=Score(),
    )


def mean_tokens(count: int = 20_000) -> float:
    """Mean length of the engine's answers."""
    lengths = Lengths(
        median=MEDIAN, sigma=SIGMA, max_tokens=LONGEST, straggler_fraction=STRAGGLERS, straggler_factor=FACTOR
    )
    return sum(lengths.draw(seed) for seed in range(count)) / count
