"""The benchmarks of the README, all or some, one after the other.

python -m tools.bench [engine buffer faults overlap job seeds cli logprobs options] [--quick] [--json DIR]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tools.bench import report
from tools.bench.report import Options, Section

NAMES = ("engine", "buffer", "faults", "overlap", "job", "seeds", "cli", "logprobs", "options")
"""In the order in which they run."""
TAKE_THE_MODEL = frozenset({"faults", "overlap", "job", "cli", "options"})


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="short runs: to see that they work")
    parser.add_argument("--full", action="store_true", help="more repeats of the long ones")
    parser.add_argument("--profile", action="store_true", help="where the buffer's time goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=Path("tiny_model"), help="the quickstart's model")
    parser.add_argument("--json", type=Path, default=Path("bench-results"), metavar="DIR")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; leaves with exit code 2 for a benchmark that there is not."""
    parser = arguments()
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(NAMES)}")
    options.names = [name for name in NAMES if not options.names or name in options.names]
    return options


def check_model(given: argparse.Namespace) -> None:
    """Leave with exit code 2 where one of them takes a model and there is none."""
    if TAKE_THE_MODEL.intersection(given.names) and not (given.model / "config.json").is_file():
        arguments().error(
            f"--model: {given.model.resolve()} holds no model; "
            "make one with `python tools/make_tiny_model.py --out tiny_model`, or give another"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; returns 1 when one could not be run. A target that is missed is a result, not a failure."""
    given = parse(sys.argv[1:] if argv is None else argv)
    check_model(given)
    machine = report.machine()
    print("  ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    code = 0
    for name in given.names:
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as work:
            options = Options(
                quick=given.quick, full=given.full, seed=given.seed, profile=given.profile, model=given.model,
                work=Path(work),
            )  # fmt: skip
            section = _run(name, options)
        if section is None:
            code = 1
            continue
        print("\n".join(section.lines()), flush=True)
        report.write(given.json, section, machine=machine, options=options)
    return code


def _run(name: str, options: Options) -> Section | None:
    print(f"\n{name} ...", flush=True)
    began = time.monotonic()
    try:
        section: Section = importlib.import_module(f"tools.bench.{name}").run(options)
    # One benchmark that cannot run must not cost the tables of the others.
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        return None
    print(f"{name} took {time.monotonic() - began:.0f} s", flush=True)
    return section


if __name__ == "__main__":
    sys.exit(main())
