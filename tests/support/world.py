"""What a test run needs on disk: a tiny random model, prompts, a topology file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.chaos import world

NUM_PROMPTS = 48
NUM_EVAL = 8

Options = Mapping[str, Any]
"""Options by dotted name: {"rollout.max_staleness": 0, "generator.replicas": 2}. None takes one out."""


def make_model(directory: Path) -> Path:
    """The tiny model, made there."""
    world.make_model(directory, num_eval=NUM_EVAL)
    return directory


def write_prompts(path: Path, *, count: int = NUM_PROMPTS, seed: int = 0) -> Path:
    """A prompt file: sums with their labels."""
    world.write_prompts(path, count=count, seed=seed)
    return path


def options_for(place: Path, model: Path) -> dict[str, Any]:
    """A small run: 3 rollout steps of 4 groups of 2 answers, scripted answers that take no time."""
    return {
        "run.name": "run",
        "run.dir": str(place / "runs"),
        "run.num_rollout": 3,
        "run.stall_s": 60.0,
        "source.prompt_data": str(place / "prompts.jsonl"),
        "source.input_key": "prompt",
        "source.label_key": "label",
        "rollout.rollout_batch_size": 4,
        "rollout.n_samples_per_prompt": 2,
        "rollout.rollout_max_response_len": 16,
        "rollout.progress_every_tokens": 4,
        "generator.name": "generator",
        "generator.engine": "scripted",
        "generator.concurrency": 8,
        "generator.scripted": {"median": 8.0, "max_tokens": 16, "vocab_size": 90},
        "reward.name": "reward",
        "reward.use": "random",
        "reward.concurrency": 1,
        "trainer.hf_checkpoint": str(model),
        "trainer.lr": 1e-3,
        "trainer.max_tokens_per_gpu": 512,
        "eval.verify_export": False,
        "weights.directory": str(place / "weights"),
        "buffer.min_free_bytes": 1,
    }


def write_topology(place: Path, model: Path, options: Options | None = None) -> Path:
    """The topology file of a small run with these options changed, and its prompts."""
    if not (place / "prompts.jsonl").exists():
        write_prompts(place / "prompts.jsonl")
    path = place / "topology.toml"
    path.write_text(world.toml({**options_for(place, model), **(options or {})}), encoding="utf-8")
    return path
