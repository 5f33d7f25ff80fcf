"""What every case runs on: a tiny model, made once; prompts; a topology that takes a few seconds.

Answers take a few hundred milliseconds and rewards a few dozen, so that every step of the protocol is under
way while others are; silence is noticed within two seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NUM_PROMPTS = 64
STEPS = 5
BATCH = 4
SAMPLES = 2
RECIPE = {
    "steps": 0,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
}
"""Random weights: nothing here learns, and a step takes milliseconds."""
REWARD = '''"""A reward that takes its time."""

import hashlib
import time


def grade(sample):
    """A coin, tossed by the answer."""
    time.sleep(0.03)
    return float(hashlib.sha256(sample.response.encode()).digest()[0] % 2)
'''
PRELOADED = (
    "asyncrl.actor.host",
    "asyncrl.buffer.audit",
    "asyncrl.cli.live",
    "asyncrl.cli.main",
    "asyncrl.cli.run",
    "asyncrl.engines.scripted",
    "asyncrl.roles.buffer",
    "asyncrl.roles.evaluator",
    "asyncrl.roles.generator",
    "asyncrl.roles.reward",
    "asyncrl.roles.source",
    "asyncrl.roles.trainer",
    "asyncrl.run.ending",
    "asyncrl.run.preflight",
    "asyncrl.run.remote",
    "asyncrl.run.replay",
    "asyncrl.run.session",
    "asyncrl.train.torch",
    "tools.make_tiny_model",
    "transformers.models.qwen3.modeling_qwen3",
    "uvloop",
)
"""Everything a life imports, so that no forked one has to."""


def preload() -> None:
    """Import what forked processes need; starts no thread."""
    for name in PRELOADED:
        importlib.import_module(name)
    # What some versions of typer import when they parse a command line.
    with contextlib.suppress(ImportError):
        importlib.import_module("typer._adapters")


def make_model(directory: Path, *, num_eval: int = 4) -> None:
    """A random two-layer Qwen3 with a character tokenizer and a chat template, train.jsonl and eval.jsonl."""
    from transformers.utils import logging

    from tools.make_tiny_model import Recipe, build

    logging.disable_progress_bar()
    directory.mkdir(parents=True)
    build(Recipe(**RECIPE, num_eval=num_eval), out=directory)


def write_prompts(path: Path, *, count: int, seed: int = 0) -> None:
    """A prompt file: sums with their labels."""
    numbers = random.Random(seed)
    pairs = [(numbers.randrange(10, 99), numbers.randrange(10, 99)) for _ in range(count)]
    rows = [{"prompt": f"{a}+{b}", "label": str(a + b)} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def topology(place: Path, model: Path, options: Mapping[str, Any]) -> Path:
    """The topology file of a case in its own directory, with its prompts and its reward."""
    write_prompts(place / "prompts.jsonl", count=NUM_PROMPTS)
    (place / "patient.py").write_text(REWARD, encoding="utf-8")
    path = place / "topology.toml"
    path.write_text(toml({**_options(place, model), **options}), encoding="utf-8")
    return path


def _options(place: Path, model: Path) -> dict[str, Any]:
    return {
        "run.name": "run",
        "run.dir": str(place / "runs"),
        "run.num_rollout": STEPS,
        "run.stall_s": 10.0,
        "run.heartbeat_s": 0.25,
        "run.dead_after_s": 1.5,
        "source.prompt_data": str(place / "prompts.jsonl"),
        "source.input_key": "prompt",
        "source.label_key": "label",
        "rollout.rollout_batch_size": BATCH,
        "rollout.n_samples_per_prompt": SAMPLES,
        "rollout.rollout_max_response_len": 60,
        "rollout.progress_every_tokens": 8,
        "rollout.max_staleness": 2,
        "generator.name": "generator",
        "generator.replicas": 2,
        "generator.concurrency": 4,
        "generator.engine": "scripted",
        "generator.scripted": {
            "median": 25.0, "sigma": 0.4, "max_tokens": 60, "vocab_size": 90, "token_latency_s": 0.01
        },
        "reward.name": "reward",
        "reward.replicas": 2,
        "reward.use": str(place / "patient.py:grade"),
        "reward.concurrency": 1,
        "reward.batch": 4,
        "trainer.hf_checkpoint": str(model),
        "trainer.lr": 1e-3,
        "trainer.save_interval": 2,
        "trainer.max_tokens_per_gpu": 512,
        "eval.eval_prompt_data": ["held-out", str(model / "eval.jsonl")],
        "eval.eval_interval": 2,
        "eval.skip_eval_before_train": True,
        "eval.verify_export": False,
        "buffer.min_free_bytes": 1,
    }  # fmt: skip


def toml(options: Mapping[str, Any]) -> str:
    """Dotted options as a topology file, with one [[generator]] and one [[reward]]; None takes one out."""
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
