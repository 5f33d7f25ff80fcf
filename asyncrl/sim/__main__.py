"""`python -m asyncrl.sim`: simulate a run, say what happened, exit 1 when a promise does not hold."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import msgspec

from asyncrl.errors import ConfigError, ExitCode
from asyncrl.sim.report import simulate, text
from asyncrl.sim.scenario import Scenario

MEMORY = Path("/dev/shm")  # noqa: S108 - the ledger's files of a simulation need no disk
GC_THRESHOLD = (100_000, 50, 100)
"""When the cycle collector runs; Python's own default is (700, 10, 10)."""


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory for the ledger's files that goes away with them, in memory where there is such a place."""
    return tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m asyncrl.sim", description=__doc__)
    parser.add_argument("--scenario", default="{}", help="a scenario as JSON; see asyncrl/sim/scenario.py")
    parser.add_argument("--samples", type=int, help="samples to train")
    parser.add_argument("--faults", type=int, help="faults at random")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--run-dir", type=Path, help="keep the ledger's files in this empty directory")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    given = parser.parse_args(arguments)
    try:
        scenario = msgspec.json.decode(given.scenario, type=Scenario, strict=True)
        names = ("samples", "faults", "seed")
        over = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
        scenario = msgspec.structs.replace(scenario, **over)
        with scratch() as folder:
            outcome = simulate(scenario, given.run_dir or Path(folder))
    except (msgspec.DecodeError, ConfigError) as error:
        sys.stderr.write(f"{error}\n")
        return ExitCode.CONFIG
    shown = msgspec.json.encode(outcome).decode() if given.json else text(scenario, outcome)
    sys.stdout.write(f"{shown}\n")
    return ExitCode.FINISHED if outcome.holds else ExitCode.FAILED


if __name__ == "__main__":
    # As in the buffer's own process: its many small records are in no cycle, and looking for one takes time.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    sys.exit(main())
