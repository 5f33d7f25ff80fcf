"""What the staleness study runs: its arms, their settings, their topologies, and the files of finished arms.

Owns the names of the methods and the arithmetic of the lag. Trains nothing and imports no torch, so that the
command line and the report are quick.

Invariants: a file of an arm appears whole or not at all; files of one directory have the same settings.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.errors import ConfigError
from asyncrl.topology.load import load
from asyncrl.topology.plan import Plan, compile_plan

QUICKSTART = Path(__file__).parents[2] / "launchers" / "quickstart.toml"
NONE = "none"
LAGS = (0, 2, 8, 32)
"""Rollout steps between the weights that sample and the weights that train on it."""
SEEDS = (0, 1, 2)
NUM_STEPS_PER_ROLLOUT = 2
"""Optimizer steps per rollout step: with one alone, old and current policy are the same and nothing clips."""
MIN_SHARE = 0.9
"""An arm counts when its realised mean lag is at least this share of the nominal one."""
NUM_FINAL = 3
"""Evaluations at the end whose mean is an arm's final accuracy."""


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One correction."""

    overrides: list[str]
    """What it sets in [algorithm]."""
    acted: str = ""
    """The metric that says which share of tokens (OPSM: of sequences) it changed or left out."""
    says: str = ""
    """One phrase for the table's legend."""


METHODS = {
    NONE: Method(overrides=[], says="PPO clip alone, old policy recomputed by the trainer"),
    "tis": Method(
        overrides=["algorithm.correction=tis"],
        acted="train/tis_clipfrac",
        says="token weight old/behaviour, truncated; share of tokens truncated",
    ),
    "opsm": Method(
        overrides=["algorithm.correction=opsm"],
        acted="train/opsm_masked_fraction",
        says="whole sequences masked, Miles' delta of 1e-4 nats per token; share of sequences masked",
    ),
    "opsm-0.1": Method(
        # 0.05 to 0.2 is what others found reasonable under the mismatch of a real engine.
        overrides=["algorithm.correction=opsm", "algorithm.opsm_delta=0.1"],
        acted="train/opsm_masked_fraction",
        says="the same with a delta of 0.1; share of sequences masked",
    ),
    "decoupled": Method(
        overrides=["algorithm.correction=decoupled"],
        acted="train/behave_mask_fraction",
        says="clip around the proximal policy, weight untruncated; share of tokens above the cap",
    ),
    "icepop": Method(
        overrides=["algorithm.correction=icepop"],
        acted="train/tis_clipfrac",
        says="token weight, tokens outside the bounds masked; share of tokens masked",
    ),
}
"""Presets as they are shipped, and OPSM with one more delta."""


class Arm(msgspec.Struct, frozen=True, order=True):
    """One run: a lag, a method, a seed."""

    lag: int
    method: str
    seed: int

    @property
    def name(self) -> str:
        """LAG-METHOD-SEED."""
        return f"{self.lag}-{self.method}-{self.seed}"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What all arms of a directory share."""

    steps: int = 300
    """Rollout steps."""
    prompts: int = 16
    """Prompts per rollout step."""
    answers: int = 8
    """Answers per prompt."""
    lr: float = 1e-4
    """Constant; chosen by lag 0 alone (see staleness_study)."""
    eval_every: int = 20
    """Rollout steps between greedy evaluations on all held-out prompts."""
    model: str = ""
    """Digest of the initial weights."""


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One evaluation."""

    step: int
    """Rollout steps trained into the weights."""
    accuracy: float


class ArmResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished arm."""

    arm: Arm
    settings: Settings
    curve: list[Point]
    rewards: list[float]
    """Mean reward of each rollout step's samples."""
    lag: float
    """Realised: mean over all trained tokens of their age in rollout steps."""
    metrics: dict[str, float]
    """Means over the rollout steps."""
    algorithm: dict[str, Any]
    """The [algorithm] table it ran with."""
    cpu_s: float
    """Process time on one thread, start and imports included."""
    wall_s: float
    commit: str
    versions: dict[str, str]
    failure: str | None = None
    """Why it ended early: NaN or Inf."""

    @property
    def share(self) -> float:
        """Realised over nominal lag; 1 at lag 0, where there is nothing to fall short of."""
        return self.lag / self.arm.lag if self.arm.lag else 1.0

    @property
    def counts(self) -> bool:
        """Whether the lag was what the arm is about."""
        return self.share >= MIN_SHARE

    @property
    def final(self) -> float:
        """Mean of the last evaluations; 0 for an arm whose training broke: its weights are of no use."""
        if self.failure is not None:
            return 0.0
        last = self.curve[-NUM_FINAL:]
        return sum(point.accuracy for point in last) / len(last)

    @property
    def mean(self) -> float:
        """Mean of all evaluations after the first: how soon and how steadily it learned."""
        learned = self.curve[1:]
        return sum(point.accuracy for point in learned) / len(learned) if learned else 0.0


def behaviour_version(step: int, *, lag: int) -> int:
    """The version that samples for rollout step `step`, which starts from version `step`."""
    return max(0, step - lag)


def expected_lag(steps: int, *, lag: int) -> float:
    """Mean lag over so many rollout steps of equal size: the first `lag` of them have less than `lag`."""
    return sum(step - behaviour_version(step, lag=lag) for step in range(steps)) / steps


def make_arms(names: Sequence[str], *, seeds: Sequence[int], lags: Sequence[int] = LAGS) -> list[Arm]:
    """The arms of names such as 8-tis; without names every lag under every method, lag 0 under none alone.

    Ordered by seed first, so that a study that is cut short has every arm at least once. Raises ConfigError.
    """
    chosen = [_parsed(name) for name in names] or [
        (lag, method) for lag in lags for method in (METHODS if lag else (NONE,))
    ]
    return [Arm(lag, method, seed) for seed in seeds for lag, method in dict.fromkeys(chosen)]


def _parsed(name: str) -> tuple[int, str]:
    lag, dash, method = name.partition("-")
    if not dash or not lag.isdecimal() or method not in METHODS:
        raise ConfigError(
            f"--arms {name}: write LAG-METHOD, such as 8-tis; methods: {', '.join(METHODS)}; "
            "a lag is a number of rollout steps"
        )
    return int(lag), method


def make_plan(arm: Arm, *, settings: Settings, model: Path) -> Plan:
    """The quickstart's plan with the study's batch, learning rate, seed and method. Raises ConfigError."""
    overrides = [
        f"trainer.hf_checkpoint={model}",
        f"source.prompt_data={model / 'train.jsonl'}",
        f'eval.eval_prompt_data=["heldout", "{model / "eval.jsonl"}"]',
        f"run.seed={arm.seed}",
        f"run.num_rollout={settings.steps}",
        f"source.rollout_seed={arm.seed}",
        f"rollout.rollout_batch_size={settings.prompts}",
        f"rollout.n_samples_per_prompt={settings.answers}",
        f"trainer.lr={settings.lr}",
        "trainer.lr_decay_style=constant",
        "trainer.min_lr=none",
        f"trainer.num_steps_per_rollout={NUM_STEPS_PER_ROLLOUT}",
        "trainer.num_threads=1",
        # The quickstart's own correction goes; its clip range stays for every method.
        "algorithm.correction=none",
        "algorithm.use_tis=none",
        *METHODS[arm.method].overrides,
    ]
    return compile_plan(load(QUICKSTART, overrides), source=f"arm {arm.name}")


def digest_of(model: Path) -> str:
    """Sixteen hexadecimal digits of a model directory's weights: other weights make another study."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]


def path_of(arm: Arm, directory: Path) -> Path:
    """The arm's file."""
    return directory / f"arm-{arm.name}.json"


def read_result(arm: Arm, directory: Path) -> ArmResult | None:
    """The finished arm; None where there is no file or a torn one."""
    try:
        result = msgspec.json.decode(path_of(arm, directory).read_bytes(), type=ArmResult)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return result if result.arm == arm else None


def write_result(result: ArmResult, directory: Path) -> Path:
    """Keep a finished arm; the file appears whole or not at all."""
    path = path_of(result.arm, directory)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return path


def finished(arms: Sequence[Arm], directory: Path, *, settings: Settings) -> dict[Arm, ArmResult]:
    """The arms whose files are there. Raises ConfigError when one has other settings."""
    found = {arm: result for arm in arms if (result := read_result(arm, directory)) is not None}
    for arm, result in found.items():
        if result.settings != settings:
            given, there = msgspec.structs.asdict(settings), msgspec.structs.asdict(result.settings)
            differing = ", ".join(f"{k} {there[k]} (now {given[k]})" for k in given if given[k] != there[k])
            raise ConfigError(
                f"--out {directory}: {path_of(arm, directory).name} was made with {differing}; give the same "
                "settings to go on with it, or another --out"
            )
    return found
