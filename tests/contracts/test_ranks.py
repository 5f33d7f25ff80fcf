"""Two processes that train together end with the same weights, and with those of one process alone.

The processes are started once and run every case: torch.distributed over gloo, met in a file. Each writes its
weights and metrics, the tests compare. A case that hangs is ended by the deadline of its collectives.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asyncrl.errors import AsyncrlError
from asyncrl.messages.sample import Sample
from asyncrl.train.backend import TrainPlan
from asyncrl.train.data import PreparedBatch
from asyncrl.train.ranks import BUCKET_NUMBERS, Ranks
from asyncrl.train.torch import TorchBackend
from tests.moe_support import write_moe
from tests.train_support import make_groups, make_plan, write_model

SIZE = 2
COLLECTIVE_S = 30
"""Deadline of one collective: where ranks disagree about the next one, this ends the case."""
PROCESSES_S = 200
"""Deadline of all cases together."""
FLOAT64, FLOAT32 = 1e-6, 1e-5
WORKER = "import sys; from tests.contracts.test_ranks import work; work(*sys.argv[1:])"
PER_RANK = ("train/num_micro_batches",)


pytestmark = pytest.mark.timeout(PROCESSES_S + 60)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What a process trains."""

    plan: TrainPlan
    num_batches: int = 2
    num_samples: int = 16
    double: bool = False
    poison: str = ""
    """Reward of sample 0.3 alone: "nan", or so large that the square of its gradient is not finite."""
    nan_weight: bool = False
    """A weight is NaN, which no sample is to blame for."""


def run(case: Case) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights after, and metrics of, the case's batches."""
    backend = TorchBackend(case.plan)
    backend.load()
    rollout = backend._rollout
    if rollout.critic is not None:
        nn.init.normal_(rollout.critic._head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    if rollout.policies.reference is not None:
        for parameter in rollout.policies.reference.parameters():
            parameter.mul_(1.1)
    if case.double:
        backend._model.double()
    if case.nan_weight:
        with torch.no_grad():
            backend._model.model.norm.weight[0] = float("nan")
    metrics = []
    for step in range(case.num_batches):
        prepared = backend.prepare(groups_of(case, seed=step))
        report = backend.train(_double(prepared) if case.double else prepared, rollout_step=step + 1)
        metrics.append({n: value for n, value in report.metrics.items() if n not in PER_RANK})
    weights = {f"actor.{name}": tensor.clone() for name, tensor in backend.weights().items()}
    if rollout.critic is not None:
        weights |= {f"critic.{name}": t.clone() for name, t in rollout.critic.state()["critic"].items()}
    return weights, metrics


def _double(prepared: PreparedBatch) -> PreparedBatch:
    floats = {
        name: value.double()
        for name, value in vars(prepared.data).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, **floats))


def groups_of(case: Case, *, seed: int) -> list[list[Sample]]:
    samples = [sample for group in make_groups(seed=seed) for sample in group][: case.num_samples]
    if case.poison:
        score = msgspec.structs.replace(samples[3].score, reward=float(case.poison))
        samples[3] = msgspec.structs.replace(samples[3], score=score)
    return [[sample] for sample in samples]


# In the processes.


def work(rank: str, store: str, cases: str, out: str) -> None:
    """One process: every case in turn, results in `out`."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=SIZE,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    for name, case in msgspec.json.decode(Path(cases).read_bytes(), type=dict[str, Case]).items():
        found: dict[str, Any] = {}
        try:
            weights, found["metrics"] = run(case)
            save_file(weights, Path(out) / f"{name}.{rank}.safetensors")
        except AsyncrlError as error:
            found["error"] = [type(error).__name__, str(error)]
        (Path(out) / f"{name}.{rank}.json").write_text(json.dumps(found))
    save_file(summed(int(rank)), Path(out) / f"sums.{rank}.safetensors")
    torch.distributed.destroy_process_group()


def summed(rank: int) -> dict[str, Tensor]:
    """Gradients of parameters that both ranks, one rank and no rank touched, summed; no entry without one."""
    shapes = {"both": (3, 2), "first": (5,), "none": (2,), "second": (1,), "large": (BUCKET_NUMBERS + 1,)}
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    parameters["half"] = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    parameters["frozen"] = nn.Parameter(torch.zeros(2), requires_grad=False)
    touched = {"both", "large", "half", "first" if rank == 0 else "second"}
    for name in touched:
        parameters[name].grad = torch.full_like(parameters[name], 1.0 + rank)
    Ranks.current().sum_gradients(parameters.values())
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


# The cases.

TRAINER: dict[str, Any] = {"optimizer": "sgd", "lr": 0.3, "max_tokens_per_gpu": 60}
GRPO: dict[str, Any] = {
    "use_tis": True,
    "use_opsm": True,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "low_var_kl",
    "get_mismatch_metrics": True,
}
PLUS_PLUS = {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "kl_coef": 0.05}


def cases_of(dense: Path, experts: Path) -> dict[str, Case]:
    def plan(model: Path = dense, *, algorithm: dict[str, Any] | None = None, **trainer: Any) -> TrainPlan:
        options = {**TRAINER, **trainer}
        return make_plan(model, trainer=options, algorithm=algorithm, num_steps_per_rollout=2)

    raw = {**GRPO, "rewards_normalization": False}
    balanced: dict[str, Any] = {
        "balance_data": True,
        "balance_by_flops": True,
        "log_probs_max_tokens_per_gpu": 90,
    }
    replay: dict[str, Any] = {
        "use_routing_replay": True,
        "max_tokens_per_gpu": 40,
        "log_probs_max_tokens_per_gpu": 90,
    }
    return {
        "grpo": Case(plan=plan(algorithm=GRPO)),
        "grpo_double": Case(plan=plan(algorithm=GRPO, data_pad_size_multiplier=8), double=True),
        "ppo": Case(plan=plan(algorithm={"advantage_estimator": "ppo", "normalize_advantages": True})),
        "plus_plus": Case(plan=plan(algorithm=PLUS_PLUS, attn_implementation="sdpa")),
        "balanced": Case(plan=plan(algorithm=GRPO, **balanced)),
        "one_by_one": Case(plan=plan(algorithm=GRPO, use_dynamic_batch_size=False), num_samples=13),
        "normalized_tis": Case(plan=plan(algorithm={"use_tis": True, "tis_batch_normalize": True})),
        "routing": Case(plan=plan(experts, lr=3.0, **replay), num_batches=1),
        "skipped": Case(plan=plan(algorithm=raw, on_nan="skip"), poison="nan"),
        "nan_reward": Case(plan=plan(algorithm=raw), poison="nan"),
        "large_reward": Case(plan=plan(algorithm=raw), poison="1e38"),
        "nan_weight": Case(plan=plan(), nan_weight=True),
        "too_few": Case(plan=plan(algorithm=GRPO), num_samples=3),
    }


GOOD = ("grpo", "grpo_double", "ppo", "plus_plus", "balanced", "one_by_one", "normalized_tis", "routing")


@dataclasses.dataclass(frozen=True)
class World:
    cases: dict[str, Case]
    out: Path

    def weights(self, name: str, rank: int) -> dict[str, Tensor]:
        return load_file(self.out / f"{name}.{rank}.safetensors")

    def found(self, name: str, rank: int) -> dict[str, Any]:
        return json.loads((self.out / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Both processes have run every case."""
    out = tmp_path_factory.mktemp("ranks")
    cases = cases_of(write_model(out / "dense", hidden=16), write_moe(out / "experts"))
    (out / "cases.json").write_bytes(msgspec.json.encode(cases))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [str(out / "store"), str(out / "cases.json"), str(out)]
    processes = []
    for rank in range(SIZE):
        with (out / f"log.{rank}").open("wb") as log:
            command = [sys.executable, "-c", WORKER, str(rank), *arguments]
            processes.append(
                subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(PROCESSES_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * SIZE, "\n".join((out / f"log.{rank}").read_text()[-3000:] for rank in range(SIZE))
    return World(cases, out)


@pytest.mark.parametrize("name", GOOD)
def test_both_ranks_end_with_the_same_bits_and_the_same_metrics(world: World, name: str) -> None:
    first, second = (world.weights(name, rank) for rank in range(SIZE))
    assert first.keys() == second.keys()
    assert [tensor for tensor in first if not torch.equal(first[tensor], second[tensor])] == []
    assert world.found(name, 0) == world.found(name, 1)


@pytest.mark.parametrize("name", GOOD)
def test_two_processes_train_what_one_does(world: World, name: str) -> None:
    case = world.cases[name]
    tolerance = FLOAT64 if case.double else FLOAT32
    weights, metrics = run(case)
    together = world.weights(name, 0)
    start = run(msgspec.structs.replace(case, num_batches=0))[0]
    for model in ("actor.", "critic."):
        names = [tensor for tensor in weights if tensor.startswith(model)]
        largest = max((float((weights[n] - start[n]).abs().max()) for n in names), default=1.0)
        assert largest > 1e-3, "the case trains nothing"
        for tensor in names:
            difference = float((weights[tensor] - together[tensor]).abs().max())
            assert difference <= tolerance * largest, (tensor, difference, largest)
    for ours, theirs in zip(world.found(name, 0)["metrics"], metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def test_routing_that_is_recorded_on_one_rank_is_replayed_on_the_other(world: World) -> None:
    """Without replay the second optimizer step sends tokens elsewhere, so the case above would see a loss."""
    case = world.cases["routing"]
    plan = case.plan
    free = msgspec.structs.replace(
        plan, trainer=msgspec.structs.replace(plan.trainer, use_routing_replay=False)
    )
    without = run(msgspec.structs.replace(case, plan=free))[0]
    together = world.weights("routing", 0)
    assert any(float((without[n] - together[n]).abs().max()) > 1e-4 for n in together)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nan_reward", "NumericsError", "the loss is nan: samples 0.3 (reward nan);"),
        ("large_reward", "NumericsError", "NaN or Inf in the gradient: samples 0.3;"),
        ("nan_weight", "NumericsError", "samples 0.0, 0.1, 0.2, 0.3, 1.0, 1.1, 1.2, 1.3;"),
        ("too_few", "DataError", "optimizer step 1 of 2 has 1 samples for 2 ranks"),
    ],
)
def test_what_one_rank_finds_every_rank_raises(world: World, name: str, error: str, message: str) -> None:
    found = [world.found(name, rank)["error"] for rank in range(SIZE)]
    assert found[0] == found[1]
    assert found[0][0] == error
    assert message in found[0][1]


def test_a_skipped_step_is_skipped_by_every_rank(world: World) -> None:
    found = [world.found("skipped", rank)["metrics"] for rank in range(SIZE)]
    assert found[0] == found[1]
    assert found[0][0]["train/skipped_steps"] == 1
    first, second = (world.weights("skipped", rank) for rank in range(SIZE))
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)


def test_gradients_add_up_and_one_that_nobody_has_stays_away(world: World) -> None:
    for rank in range(SIZE):
        found = world.weights("sums", rank)
        values = {name: set(gradient.unique().tolist()) for name, gradient in found.items()}
        assert values == {"both": {3.0}, "large": {3.0}, "half": {3.0}, "first": {1.0}, "second": {2.0}}
        assert found["both"].shape == (3, 2)
        assert found["half"].dtype == torch.float64


def test_one_process_needs_no_collective() -> None:
    ranks = Ranks.current()
    assert ranks == Ranks(0, 1)
    parameter = nn.Parameter(torch.zeros(2))
    ranks.sum_gradients([parameter])
    assert parameter.grad is None
