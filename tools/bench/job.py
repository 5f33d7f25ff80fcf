"""The whole quickstart job against a plain single-process loop of the same maths.

Wall time from the start of the process to 0.90 held-out accuracy, and trained samples a second between the
first and the last trained batch. Both evaluate equally often. The loop runs with as many torch threads as
make it fastest here, which a few steps of each decide.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.errors import RunError
from asyncrl.topology.load import load
from tools.bench import jobs
from tools.bench.report import Options, Section, Table, number, spread

QUICKSTART = Path("launchers/quickstart.toml")
ACCURACY = 0.90
EVAL_INTERVAL = 10
"""Rollout steps between evaluations, for both: finer than the quickstart's, to see when 0.90 is reached."""
DEADLINE_S = 900.0
TRIAL_STEPS = 4
QUICK_STEPS = 6


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One run of either side."""

    side: str
    reached_s: float | None
    """From the start of the process to the first evaluation at 0.90; None: never."""
    samples_per_s: float
    final_accuracy: float
    wall_s: float


def run(options: Options) -> Section:
    """Measure both sides in turn; see the module's docstring."""
    repeats = options.choose(quick=1, normal=1, full=3)
    threads = best_threads(options)
    outcomes: list[Outcome] = []
    for attempt in range(repeats):
        outcomes += [run_job(options, attempt), run_plain(options, attempt, threads=threads)]
    sides = {side: [o for o in outcomes if o.side == side] for side in ("asyncrl", "plain loop")}
    return Section(
        name="job",
        title=f"the quickstart job against a plain loop in one process ({threads} torch threads)",
        settings={"runs": repeats, "eval_interval": EVAL_INTERVAL, "steps": _steps(options)},
        tables=[_table(sides)],
        notes=_notes(sides),
        data={"outcomes": msgspec.to_builtins(outcomes), "threads": threads},
    )


def _table(sides: dict[str, list[Outcome]]) -> Table:
    rows = []
    for side, outcomes in sides.items():
        times = [o.reached_s for o in outcomes if o.reached_s is not None]
        rows.append(
            [
                side,
                spread(times) if times else "never",
                spread([o.samples_per_s for o in outcomes]),
                f"{statistics.median(o.final_accuracy for o in outcomes):.3f}",
                spread([o.wall_s for o in outcomes]),
            ]
        )
    columns = ["side", f"s to {ACCURACY:.2f} held out", "trained samples/s", "final accuracy", "whole run s"]
    return Table(title="median (range) of runs", columns=columns, rows=rows)


def _ratio(sides: dict[str, list[Outcome]]) -> float:
    ours, theirs = (
        statistics.median(o.samples_per_s for o in sides[side]) for side in ("asyncrl", "plain loop")
    )
    return ours / theirs


def _notes(sides: dict[str, list[Outcome]]) -> list[str]:
    """The ratios; no figure was asked for, the loop is the yardstick."""
    rate = f"asyncrl trains {number(_ratio(sides))}x the plain loop's samples/s"
    medians = []
    for outcomes in sides.values():
        times = [o.reached_s for o in outcomes if o.reached_s is not None]
        medians.append(statistics.median(times) if times else None)
    ours, theirs = medians
    if ours is None or theirs is None:
        return [rate, f"{ACCURACY:.2f} was not reached by every side"]
    return [rate, f"asyncrl reaches {ACCURACY:.2f} in {number(ours / theirs)} of the plain loop's time"]


def _steps(options: Options) -> int | None:
    return QUICK_STEPS if options.quick else load(QUICKSTART, []).run.num_rollout


def overrides(options: Options) -> list[str]:
    """What both sides change in the quickstart."""
    changed = [
        *jobs.quickstart_overrides(options.model),
        f"eval.eval_interval={EVAL_INTERVAL}",
        "eval.min_final_accuracy=none",
        f"run.seed={1234 + options.seed}",
        f"source.rollout_seed={42 + options.seed}",
    ]
    return [*changed, f"run.num_rollout={QUICK_STEPS}"] if options.quick else changed


def run_job(options: Options, attempt: int) -> Outcome:
    """The job by its command line. Raises RunError when it fails."""
    changed = [*overrides(options), "eval.verify_export=false"]
    with jobs.job(QUICKSTART, options.work / "runs" / f"job-{attempt}", overrides=changed) as launched:
        code = launched.wait(deadline_s=DEADLINE_S)
        if code != 0:
            raise RunError(f"the quickstart job ended with exit code {code}\n{launched.tail()}")
        wall_s = time.time() - launched.started
        ended = [end for _, end in launched.trained()]
        accuracies = jobs.accuracies(launched.run_dir)
        samples = jobs.rows(launched.run_dir, "select max(num_samples) from batches")[0][0]
    return _outcome("asyncrl", launched.started, wall_s, accuracies, ended, samples)


def run_plain(options: Options, attempt: int, *, threads: int, steps: int | None = None) -> Outcome:
    """The loop in its own process. Raises RunError when it fails."""
    out = options.work / f"plain-{attempt}-{threads}-{steps}.json"
    command = [
        sys.executable,
        "-m",
        "tools.bench.plain_loop",
        "--topology",
        str(QUICKSTART),
        "--out",
        str(out),
    ]
    command += ["--threads", str(threads)]
    for text in overrides(options):
        command += ["--set", text]
    if steps is not None:
        command += ["--num-rollout", str(steps)]
    started = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, check=False, timeout=DEADLINE_S, capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        raise RunError(f"the plain loop ended with exit code {done.returncode}\n{done.stderr[-2000:]}")
    wall_s = time.time() - started
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    accuracies = [(when, value) for when, value in found["accuracies"]]
    return _outcome("plain loop", started, wall_s, accuracies, found["ended"], found["samples_per_rollout"])


def best_threads(options: Options) -> int:
    """1 or all cores, whichever trains more samples a second in a few steps."""
    candidates = sorted({1, os.cpu_count() or 1})
    if options.quick or len(candidates) == 1:
        return candidates[0]
    trials = {n: run_plain(options, -1, threads=n, steps=TRIAL_STEPS).samples_per_s for n in candidates}
    return max(trials, key=lambda n: trials[n])


def _outcome(
    side: str, started: float, wall_s: float, accuracies: Sequence[tuple[float, float]],
    ended: Sequence[float], samples: float,
) -> Outcome:  # fmt: skip
    reached = next((when - started for when, value in accuracies if value >= ACCURACY), None)
    return Outcome(
        side=side,
        reached_s=reached,
        samples_per_s=samples * (len(ended) - 1) / (ended[-1] - ended[0]),
        final_accuracy=accuracies[-1][1] if accuracies else 0.0,
        wall_s=wall_s,
    )
