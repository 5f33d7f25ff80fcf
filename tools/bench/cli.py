"""How long until a user sees something: `asyncrl --help`, and the quickstart's first optimizer step."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from tools.bench.jobs import COMMAND, job, quickstart_overrides
from tools.bench.report import Options, Section, Table, Target, spread

QUICKSTART = Path("launchers/quickstart.toml")
HELP_TARGET_S = 0.3
FIRST_STEP_TARGET_S = 20.0
DEADLINE_S = 180.0


def run(options: Options) -> Section:
    """Measure both; see the module's docstring."""
    helps = [help_s() for _ in range(options.choose(quick=3, normal=10))]
    steps = [first_step_s(options, i) for i in range(options.choose(quick=1, normal=3, full=5))]
    rows = [
        ["asyncrl --help", str(len(helps)), spread(helps)],
        ["launch to first optimizer step", str(len(steps)), spread(steps)],
    ]
    return Section(
        name="cli",
        title="seconds until something happens",
        tables=[Table(title="median (range)", columns=["what", "runs", "seconds"], rows=rows)],
        targets=[
            Target(
                what="--help", value=statistics.median(helps), bound=HELP_TARGET_S, unit=" s", at_least=False
            ),
            Target(
                what="launch to first optimizer step",
                value=statistics.median(steps),
                bound=FIRST_STEP_TARGET_S,
                unit=" s",
                at_least=False,
            ),
        ],
        data={"help_s": helps, "first_step_s": steps},
    )


def help_s() -> float:
    """One `asyncrl --help`, by its console script where it is installed."""
    script = Path(sys.executable).with_name("asyncrl")
    command = [str(script)] if script.exists() else list(COMMAND)
    began = time.perf_counter()
    subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step_s(options: Options, attempt: int) -> float:
    """From the start of the process to the end of batch 0's training, in the quickstart as it is shipped."""
    run_dir = options.work / "runs" / f"first-{attempt}"
    with job(QUICKSTART, run_dir, overrides=quickstart_overrides(options.model)) as launched:
        return launched.wait_trained(1, deadline_s=DEADLINE_S)[0][1] - launched.started
