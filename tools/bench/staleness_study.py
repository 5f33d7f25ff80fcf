"""Which corrections hold up on old data? Held-out accuracy against steps, by lag and method, over seeds.

    python -m tools.bench.staleness_study [--quick] [--out DIR] [--arms 0-none 8-tis ...] [--seeds 0 1 2]

The quickstart's model, prompts, reward and clip range. Each arm is a process of one thread that samples with
weights exactly LAG rollout steps behind those it trains (see study_arm), two at a time. A finished arm is a
file in DIR: the same command goes on where it was stopped. At the end: DIR/table.md, DIR/*.png.

The learning rate is the best of four at lag 0 without correction, over 300 steps of one seed: final accuracy
0.965 at 5e-5, 0.969 at 1e-4, 0.927 at 3e-4 (the quickstart's first), a collapse at 1e-3. No corrected arm was
run before it was fixed; lags 8 and 32 without correction had been seen at 1e-4 and 3e-4, worse at the latter.
It is held constant: a decaying one makes old weights ever more like new ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import FrameType

import msgspec

from asyncrl.errors import ConfigError, RunError
from tools.bench import report, study_report
from tools.bench.study_plan import (
    LAGS,
    METHODS,
    MIN_SHARE,
    SEEDS,
    Arm,
    ArmResult,
    Settings,
    digest_of,
    expected_lag,
    finished,
    make_arms,
    path_of,
    read_result,
)

MAKE_MODEL = Path(__file__).parents[1] / "make_tiny_model.py"
QUICK_STEPS, QUICK_LAGS, QUICK_SEEDS = 60, (0, 2, 6), (0,)
SIGNAL_S = 0.5
"""How soon an interrupt is noticed at the latest."""
INTERRUPTED = 130
"""Exit code of a program that the keyboard ended."""


class Children:
    """The processes of the arms that run now."""

    def __init__(self, out: Path, *, settings: Settings, model: Path) -> None:
        self._out, self._settings, self._model = out, settings, model
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, arm: Arm) -> ArmResult | None:
        """Waits for: the arm's process. None after `stop`. Raises RunError when it left no result."""
        log = path_of(arm, self._out).with_suffix(".log")
        with log.open("wb") as output:
            process = self._start(arm, output.fileno())
            if process is None:
                return None
            code = process.wait()
        with self._lock:
            self._live.discard(process)
            if self._stopped:
                return None
        result = read_result(arm, self._out)
        if code or result is None:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RunError(f"arm {arm.name}: exit code {code}\n{tail}")
        return result

    def _start(self, arm: Arm, output: int) -> subprocess.Popen[bytes] | None:
        spec = {"arm": arm, "settings": self._settings, "model": str(self._model), "out": str(self._out)}
        text = msgspec.json.encode(spec).decode()
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.bench.study_arm", text],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                # An interrupt from the keyboard is ours to pass on.
                start_new_session=True,
            )
            self._live.add(process)
            return process

    def stop(self) -> None:
        """End what runs; nothing starts any more."""
        with self._lock:
            self._stopped = True
            for process in self._live:
                process.terminate()


def run_arms(
    arms: Sequence[Arm], *, children: Children, workers: int
) -> Generator[tuple[Arm, ArmResult | RunError]]:
    """Arms as they finish. Closing the iterator, or an exception in its user, ends those that run."""
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[ArmResult | None], Arm] = {}
        try:
            # An interrupt may come between two of these: leaving the pool waits for what runs.
            for arm in arms:
                futures[pool.submit(children.run, arm)] = arm
            waiting = set(futures)
            while waiting:
                # Bounded: a signal that the system hands to another thread does not wake this one.
                done, waiting = wait(waiting, timeout=SIGNAL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    yield futures[future], _outcome(future)
        finally:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[ArmResult | None]) -> ArmResult | RunError:
    try:
        result = future.result()
    except RunError as error:
        return error
    assert result is not None, "stopped while somebody waits"
    return result


def line(result: ArmResult, *, place: str) -> str:
    """One arm, for people."""
    arm, share = result.arm, METHODS[result.arm.method].acted
    acted = f"  acted on {result.metrics[share]:.2%}" if share in result.metrics else ""
    counts = "" if result.counts else f"  NOT COUNTED: below {MIN_SHARE:.0%}"
    broke = f"  BROKE: {result.failure}" if result.failure else ""
    first = result.curve[0].accuracy if result.curve else 0.0
    return (
        f"{place} lag {arm.lag} {arm.method} seed {arm.seed}: accuracy {first:.3f} -> {result.final:.3f}  "
        f"realised lag {result.lag:.2f} ({result.share:.0%}){counts}{acted}  "
        f"{result.cpu_s:.0f} core-s, {result.wall_s:.0f} s{broke}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.staleness_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK_STEPS} steps, one seed: to see that it works")
    add("--out", type=Path, metavar="DIR", help="default: study, or study-quick")
    add("--arms", nargs="+", default=[], metavar="LAG-METHOD", help=f"methods: {', '.join(METHODS)}")
    add("--seeds", nargs="+", type=int, metavar="N", help=f"default: {' '.join(map(str, SEEDS))}")
    add("--steps", type=int, help=f"rollout steps of an arm; default: {Settings().steps}")
    add("--lr", type=float, default=Settings().lr, help="learning rate; default: %(default)s")
    add("--workers", type=int, default=2, help="arms at a time, one core each; default: %(default)s")
    add("--model", type=Path, default=Path("tiny_model"), help="made when it is not there")
    add("--report", action="store_true", help="run nothing: table and plots of what is there")
    return parser


def make_model(model: Path) -> None:
    """Make the quickstart's model where there is none. Raises RunError."""
    if (model / "config.json").exists():
        return
    print(f"making {model} ...", flush=True)
    done = subprocess.run([sys.executable, str(MAKE_MODEL), "--out", str(model)], check=False)
    if done.returncode:
        raise RunError(f"{MAKE_MODEL}: exit code {done.returncode}")


def study(options: argparse.Namespace) -> int:
    """Run what is missing, report what is there; 1 when an arm failed. Raises ConfigError, RunError."""
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: at least 1")
    steps = options.steps or (QUICK_STEPS if options.quick else Settings().steps)
    out: Path = options.out or Path("study-quick" if options.quick else "study")
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    arms = make_arms(options.arms, seeds=seeds, lags=QUICK_LAGS if options.quick else LAGS)
    make_model(options.model)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(steps=steps, lr=options.lr, model=digest_of(options.model))
    results = finished(arms, out, settings=settings)
    missing = [] if options.report else [arm for arm in arms if arm not in results]
    began, failed = time.monotonic(), 0
    print(f"{len(arms)} arms of {steps} steps, {len(results)} finished before; {out}", flush=True)
    _warn(missing, steps=steps)
    children = Children(out.absolute(), settings=settings, model=options.model.absolute())
    with contextlib.closing(run_arms(missing, children=children, workers=options.workers)) as found:
        for arm, result in found:
            if isinstance(result, RunError):
                failed += 1
                print(result, flush=True)
                continue
            results[arm] = result
            print(line(result, place=f"[{len(results):{len(str(len(arms)))}}/{len(arms)}]"), flush=True)
    if missing:
        print(f"{len(missing) - failed} arms in {time.monotonic() - began:.0f} s", flush=True)
    if results:
        write_report([results[arm] for arm in sorted(results)], out=out, command=_command(options))
    return 1 if failed else 0


def _warn(arms: Sequence[Arm], *, steps: int) -> None:
    for lag in sorted({arm.lag for arm in arms}):
        reached = expected_lag(steps, lag=lag)
        if reached < MIN_SHARE * lag:
            print(
                f"lag {lag}: a mean of {reached:.1f} ({reached / lag:.0%}) in {steps} steps; will not count",
                flush=True,
            )


def _command(options: argparse.Namespace) -> str:
    given = ["--quick"] if options.quick else []
    for name in ("arms", "seeds"):
        if getattr(options, name):
            given += [f"--{name}", *map(str, getattr(options, name))]
    if options.steps:
        given += ["--steps", str(options.steps)]
    if options.lr != Settings().lr:
        given += ["--lr", str(options.lr)]
    return shlex.join(["python", "-m", "tools.bench.staleness_study", *given])


def write_report(results: Sequence[ArmResult], *, out: Path, command: str) -> None:
    """Print the report and keep it as table.md, with the plots beside it."""
    lines = study_report.document(results, command=command, machine=report.machine())
    print("", *lines, sep="\n", flush=True)
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        paths = study_report.plot(results, out)
    except ImportError as error:
        print(f"no plots: {error}; they need matplotlib (pip install -e '.[dev]')", flush=True)
        return
    print(f"plots: {', '.join(map(str, paths)) or 'none: no arm counts'}", flush=True)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an arm failed, 2 a wrong option, 130 interrupted (the same command goes on)."""
    options = arguments().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return study(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
