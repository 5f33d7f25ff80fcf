"""A run's training with hooks: from the options of a topology file to the weights that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from asyncrl.messages.sample import Sample
from asyncrl.topology import load
from asyncrl.topology.plan import compile_plan
from asyncrl.topology.schema import Topology
from asyncrl.train.backend import train_plan
from asyncrl.train.data import PreparedBatch, prepare_batch
from asyncrl.train.hooks import TrainHooks
from asyncrl.train.torch import TorchBackend, hook_args
from tests.train_support import make_groups
from tools.chaos.world import toml

TIS = "algorithm.custom_tis_function_path"
LOSS = "algorithm.custom_loss_function_path"
REDUCER = "algorithm.custom_pg_loss_reducer_function_path"
ADVANTAGE = "algorithm.custom_advantage_function_path"
REWARD = "algorithm.custom_reward_post_process_path"
CONVERT = "algorithm.custom_convert_samples_to_train_data_path"
POSTPROCESS = "algorithm.rollout_data_postprocess_path"
BEFORE_LOG_PROB = "algorithm.custom_before_log_prob_hook_path"
BEFORE_STEP = "algorithm.custom_before_train_step_hook_path"

USER_HOOKS = Path(__file__).with_name("user_hooks.py")


def user_hook(name: str) -> str:
    return f"{USER_HOOKS}:{name}"


def write_hook(directory: Path, text: str, *, name: str = "hook") -> str:
    """A file of the user's with this text; returns the path of its function `name`."""
    file = directory / "mine.py"
    file.write_text(text, encoding="utf-8")
    return f"{file}:{name}"


def topology_of(model: Path, options: dict[str, Any] | None = None) -> Topology:
    """The checked topology of 4 groups of 4 answers, with plain SGD so that weights show gradients."""
    given = {
        "run.num_rollout": 8,
        "source.prompt_data": "prompts.jsonl",
        "rollout.rollout_batch_size": 4,
        "rollout.n_samples_per_prompt": 4,
        "rollout.rollout_max_response_len": 24,
        "trainer.hf_checkpoint": str(model),
        "trainer.optimizer": "sgd",
        "trainer.lr": 0.1,
        "trainer.clip_grad": 0.0,
        "trainer.max_tokens_per_gpu": 60,
        **(options or {}),
    }
    return compile_plan(load.parse(toml(given), [], source="t.toml"), source="t.toml").topology


def prepared(model: Path, options: dict[str, Any], groups: list[list[Sample]] | None = None) -> PreparedBatch:
    """A batch before any forward pass."""
    plan = train_plan(topology_of(model, options))
    hooks = TrainHooks(plan.algorithm, args=hook_args(plan))
    return prepare_batch(make_groups() if groups is None else groups, plan=plan, hooks=hooks)


class Trained(NamedTuple):
    weights: dict[str, Tensor]
    metrics: dict[str, float]
    backend: TorchBackend


def trained(
    model: Path,
    options: dict[str, Any] | None = None,
    *,
    groups: list[list[Sample]] | None = None,
    rollout_step: int = 0,
) -> Trained:
    """One rollout step from the model's weights."""
    backend = TorchBackend(train_plan(topology_of(model, options)))
    backend.load()
    prepared = backend.prepare(make_groups() if groups is None else groups)
    report = backend.train(prepared, rollout_step=rollout_step)
    weights = {name: tensor.detach().clone() for name, tensor in backend.weights().items()}
    return Trained(weights, report.metrics, backend)


def difference(one: Trained, other: Trained) -> float:
    """The largest difference between two runs' weights."""
    return max(float((one.weights[name] - other.weights[name]).abs().max()) for name in one.weights)
