"""The quickstart over three seeds: does it learn every time, and is it asynchronous every time?

Each seed makes a model and prompts of its own and seeds sampling, shuffling and training. Every figure comes
from the run's records: accuracy of each evaluation, overlap of generation and training, staleness, samples
with tokens of several versions, groups finished by each generator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec

from asyncrl.buffer.audit import audit
from asyncrl.buffer.records import Records
from asyncrl.errors import RunError
from tools.bench import jobs
from tools.bench.report import Options, Section, Table, Target

QUICKSTART = Path("launchers/quickstart.toml")
MAKE_MODEL = Path("tools/make_tiny_model.py")
DEADLINE_S = 900.0
WARMUP = 10
"""Rollout steps left out of the overlap."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One seed."""

    seed: int
    accuracy: dict[int, float]
    """By version."""
    exported: float | None
    """Of the checkpoint, by transformers."""
    rl_s: float
    """From the first batch to the last."""
    overlap: float
    staleness: float
    mixed_samples: int
    samples: int
    groups: dict[str, int]
    """Finished groups by generator."""
    closes: bool


def run(options: Options) -> Section:
    """Run every seed in turn."""
    seeds = options.choose(quick=[2], normal=[2, 3, 4], full=[2, 3, 4, 5, 6])
    outcomes = [_one(options, seed) for seed in seeds]
    worst = min(o.accuracy[max(o.accuracy)] for o in outcomes)
    return Section(
        name="seeds",
        title="the quickstart over seeds",
        settings={"seeds": seeds, "overlap after": f"{WARMUP} steps"},
        tables=[_accuracies(outcomes), _asynchrony(outcomes)],
        targets=[
            Target(what="held-out accuracy at the end, worst seed", value=worst, bound=0.90),
            Target(
                what="before training, best seed",
                value=max(o.accuracy[0] for o in outcomes),
                bound=0.45,
                at_least=False,
            ),
            Target(
                what="RL, slowest seed",
                value=max(o.rl_s for o in outcomes),
                bound=180.0,
                unit="s",
                at_least=False,
            ),
            Target(what="overlap, worst seed", value=min(o.overlap for o in outcomes), bound=0.80),
        ],
        data={"outcomes": msgspec.to_builtins(outcomes)},
    )


def _one(options: Options, seed: int) -> Outcome:
    model = options.work / f"model-{seed}"
    subprocess.run(
        [sys.executable, str(MAKE_MODEL), "--out", str(model), "--seed", str(seed)],
        check=True, capture_output=True, timeout=DEADLINE_S,
    )  # fmt: skip
    changed = [*jobs.quickstart_overrides(model), f"run.seed={seed}", f"source.rollout_seed={seed}"]
    with jobs.job(QUICKSTART, options.work / "runs" / f"seed-{seed}", overrides=changed) as launched:
        code = launched.wait(deadline_s=DEADLINE_S)
        if not (launched.run_dir / "summary.json").exists():
            raise RunError(f"seed {seed} ended with exit code {code}\n{launched.tail()}")
        return _outcome(seed, launched.run_dir)


def _outcome(seed: int, run_dir: Path) -> Outcome:
    summary = json.loads((run_dir / "summary.json").read_bytes())
    with Records(run_dir) as records:
        figures = records.figures(warmup=WARMUP)
        accuracy = {v: sum(m.values()) / len(m) for v, m in records.evaluations().items()}
        lineage = records.lineage()
        groups = {name: worker.groups for name, worker in figures.workers.items()}
        samples = records.totals().get("settled.trained.samples", 0)
    return Outcome(
        seed=seed,
        accuracy=accuracy,
        exported=summary.get("accuracy_exported"),
        rl_s=lineage[-1].ended - lineage[0].started,
        overlap=figures.overlap_share or 0.0,
        staleness=figures.staleness_mean or 0.0,
        mixed_samples=figures.mixed_samples,
        samples=samples,
        groups=groups,
        closes=audit(run_dir).closes,
    )


def _accuracies(outcomes: list[Outcome]) -> Table:
    versions = sorted({version for outcome in outcomes for version in outcome.accuracy})
    rows = [
        [
            str(o.seed),
            *(f"{o.accuracy[v]:.3f}" if v in o.accuracy else "-" for v in versions),
            _number(o.exported),
        ]
        for o in outcomes
    ]
    columns = ["seed", *(f"step {version}" for version in versions), "exported"]
    return Table(title="greedy held-out accuracy", columns=columns, rows=rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _asynchrony(outcomes: list[Outcome]) -> Table:
    rows = [
        [
            str(o.seed),
            f"{o.rl_s:.0f}",
            f"{o.overlap:.0%}",
            f"{o.staleness:.2f}",
            f"{o.mixed_samples} of {o.samples}",
            ", ".join(f"{name} {count}" for name, count in sorted(o.groups.items())),
            "closes" if o.closes else "DOES NOT CLOSE",
        ]
        for o in outcomes
    ]
    columns = ["seed", "RL s", "overlap", "mean lag", "several versions", "groups finished", "audit"]
    return Table(title="from the records", columns=columns, rows=rows)
