"""What a test run needs on disk: a tiny random model, prompts, a topology file."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NUM_PROMPTS = 48
RECIPE = {
    "steps": 0,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_eval": 8,
}
"""Random weights: nothing here learns, and a step takes milliseconds."""

Options = Mapping[str, Any]
"""Options by dotted name: {"rollout.max_staleness": 0, "generator.replicas": 2}. None takes one out."""


def make_model(directory: Path) -> Path:
    """A random two-layer Qwen3 with a character tokenizer and a chat template, train.jsonl and eval.jsonl."""
    from transformers.utils import logging

    from tools.make_tiny_model import Recipe, build

    logging.disable_progress_bar()
    directory.mkdir(parents=True)
    build(Recipe(**RECIPE), out=directory)
    return directory


def write_prompts(path: Path, *, count: int = NUM_PROMPTS, seed: int = 0) -> Path:
    """A prompt file: sums with their labels."""
    numbers = random.Random(seed)
    pairs = [(numbers.randrange(10, 99), numbers.randrange(10, 99)) for _ in range(count)]
    rows = [{"prompt": f"{a}+{b}", "label": str(a + b)} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
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
    path.write_text(toml({**options_for(place, model), **(options or {})}), encoding="utf-8")
    return path


def toml(options: Options) -> str:
    """Dotted options as a topology file; [[generator]] and [[reward]] have one table each."""
    tables: dict[str, list[str]] = {}
    for name, value in options.items():
        table, _, key = name.partition(".")
        if value is not None:
            tables.setdefault(table, []).append(f"{key} = {_value(value)}")
    lines = []
    for table, entries in tables.items():
        lines += [f"[[{table}]]" if table in {"generator", "reward"} else f"[{table}]", *entries, ""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
