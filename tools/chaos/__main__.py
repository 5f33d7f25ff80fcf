"""Kills every process of small real runs at every step, and checks what must hold afterwards.

python -m tools.chaos --cases N --seed S [--jobs J] [--json OUT] [--keep] [--list]
python -m tools.chaos --case SPEC

The same seed gives the same cases: first the systematic matrix in an order of the seed's, then random
schedules. Exit code 0 when every case is ok or skipped, 1 otherwise, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.chaos import harness, report, world
from tools.chaos.checks import Outcome
from tools.chaos.matrix import expand, matrix, schedules
from tools.chaos.spec import read

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    given = _arguments(sys.argv[1:] if argv is None else argv)
    cases = [read(text) for text in given.case] or expand(given.seed, given.cases)
    if given.random:
        cases = schedules(given.seed, given.cases)
    if given.only:
        cases = [case for case in matrix() if given.only in case.name]
    if given.list:
        for case in cases:
            print(case.spec)
        return 0
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # Threads of numpy and torch are made when these are imported, and who has threads cannot fork.
        os.environ["OMP_NUM_THREADS"] = "1"
        arguments = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, "-m", "tools.chaos", *arguments])  # noqa: S606 - ourselves
    world.preload()
    work = given.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    outcomes: list[Outcome] = []

    def told(number: int, outcome: Outcome) -> None:
        print(report.line(number, len(cases), outcome), flush=True)

    code = 0
    try:
        outcomes.extend(harness.run(cases, work=work, jobs=given.jobs, told=told, keep=given.keep))
    except KeyboardInterrupt:
        code = INTERRUPTED
    wall_s = time.monotonic() - began
    print("\n".join(["", *report.table(outcomes), "", report.totals(outcomes, wall_s=wall_s)]), flush=True)
    if given.json is not None:
        given.json.write_bytes(report.to_json(outcomes, seed=given.seed, wall_s=wall_s))
    bad = any(outcome.verdict in {"failed", "missed"} for outcome in outcomes)
    return code or int(bad)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--case", action="append", default=[], metavar="SPEC", help="as a failing case prints it"
    )
    parser.add_argument("--random", action="store_true", help="random schedules only")
    parser.add_argument("--only", metavar="WORDS", help="cases of the matrix whose name has these words")
    parser.add_argument("--jobs", type=int, default=2, metavar="J", help="cases at a time")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where runs lie; default: a new directory")
    parser.add_argument("--keep", action="store_true", help="keep the directories of all cases")
    parser.add_argument("--list", action="store_true", help="print the specs and leave")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
