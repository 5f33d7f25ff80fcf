"""What every training backend must do, whatever it trains with."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from asyncrl.errors import ConfigError, DataError, NumericsError, StorageError
from asyncrl.messages.sample import pack_logprobs
from asyncrl.train.backend import Backend
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend
from tests.train_support import VOCAB, make_groups, make_plan, make_sample, plan_to_json, write_model

ALL_TERMS = {
    "use_tis": True,
    "use_opsm": True,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "low_var_kl",
    "entropy_coef": 0.01,
}
IN_A_FRESH_PROCESS = """
import sys, msgspec
from asyncrl.train.backend import (TrainPlan)
from asyncrl.train.make import make_backend
from asyncrl.train.loop import Trainer
from tests.train_support import make_groups
trainer = Trainer(make_backend(msgspec.json.decode(sys.argv[1], type=TrainPlan)))
trainer.start()
print(*(trainer.train_batch(s, make_groups(seed=s))[1] for s in range(3)))
"""


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(params=["packed", "sdpa", "eager"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Trainer options of each implementation, with several micro-batches a step."""
    return {"attn_implementation": request.param, "max_tokens_per_gpu": 60}


def loaded(model_dir: Path, trainer: dict[str, Any], **others: Any) -> Backend:
    backend = make_backend(make_plan(model_dir, trainer=trainer, **others))
    backend.load()
    return backend


def train(backend: Backend, *, first: int = 0, num_steps: int = 2) -> list[Any]:
    return [
        backend.train(backend.prepare(make_groups(seed=s)), rollout_step=s)
        for s in range(first, first + num_steps)
    ]


def snapshot(backend: Backend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.weights().items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_rollout_step_trains_every_sample_and_says_so(model_dir: Path, options: dict[str, Any]) -> None:
    backend = loaded(model_dir, options, algorithm=ALL_TERMS, num_steps_per_rollout=2)
    before, groups = snapshot(backend), make_groups(version=3)
    report = backend.train(backend.prepare(groups), rollout_step=5)
    samples = [sample for group in groups for sample in group]
    assert (report.step, report.num_samples) == (2, 16)
    assert report.num_tokens == sum(sum(sample.loss_mask) for sample in samples)
    assert not same_bits(before, snapshot(backend))
    metrics = report.metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["staleness/mean"] == metrics["staleness/max"] == 2
    assert metrics["rollout/raw_reward"] == pytest.approx(
        sum(s.score.reward for s in samples if s.score) / 16
    )
    assert metrics["train/global_batch_size"] == 8
    for name in ("train/pg_loss", "train/kl_loss", "train/entropy_loss", "train/tis", "train/opsm_clipfrac"):
        assert name in metrics
    assert report.phase_s.keys() >= {"prepare", "log_probs", "ref_log_probs", "train", "optimizer"}


def test_weights_are_the_live_tensors_under_hugging_face_names(
    model_dir: Path, options: dict[str, Any]
) -> None:
    from safetensors.torch import load_file

    backend = loaded(model_dir, options)
    weights, stored = backend.weights(), load_file(model_dir / "model.safetensors")
    assert same_bits(dict(weights), stored)
    digest = backend.digest()
    train(backend, num_steps=1)
    assert not same_bits(dict(weights), stored)
    assert backend.digest() != digest


def test_the_same_batches_give_the_same_bits(model_dir: Path, options: dict[str, Any]) -> None:
    runs = []
    for _ in range(2):
        backend = loaded(model_dir, options, algorithm=ALL_TERMS, num_steps_per_rollout=2)
        train(backend)
        runs.append(snapshot(backend))
    assert same_bits(*runs)


def test_the_same_batches_give_the_same_bits_in_fresh_processes(model_dir: Path) -> None:
    plan = make_plan(model_dir, trainer={"max_tokens_per_gpu": 60}, algorithm=ALL_TERMS)
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_A_FRESH_PROCESS, plan_to_json(plan)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    digests = [process.communicate(timeout=100)[0].split() for process in processes]
    assert len(set(digests[0])) == 3
    assert digests[0] == digests[1]


def test_micro_batches_change_nothing_but_rounding(model_dir: Path, options: dict[str, Any]) -> None:
    losses = []
    for trainer in ({"max_tokens_per_gpu": 8192}, {"use_dynamic_batch_size": False, "micro_batch_size": 1}):
        backend = loaded(model_dir, {**options, **trainer}, algorithm=ALL_TERMS)
        losses.append([report.metrics["train/loss"] for report in train(backend)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)


def test_restoring_goes_on_with_the_same_bits_as_never_stopping(
    model_dir: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    plan = {"algorithm": ALL_TERMS, "num_steps_per_rollout": 2, "num_rollout": 6}
    trainer = {**options, "lr_decay_style": "cosine", "lr_warmup_iters": 3}
    backend = loaded(model_dir, trainer, **plan)
    train(backend)
    checkpoint = backend.save(tmp_path, rollout_step=2)
    stored = snapshot(backend)
    reports = train(backend, first=2)
    other = make_backend(make_plan(model_dir, trainer=trainer, **plan))
    assert other.restore(checkpoint) == 2
    assert same_bits(stored, snapshot(other))
    again = train(other, first=2)
    assert [r.metrics for r in again] == [r.metrics for r in reports]
    assert again[-1].step == reports[-1].step == 8
    assert same_bits(snapshot(backend), snapshot(other))
    assert backend.digest() == other.digest()


def test_a_checkpoint_is_a_hugging_face_model(
    model_dir: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    backend = loaded(model_dir, options)
    train(backend, num_steps=1)
    checkpoint = backend.save(tmp_path, rollout_step=1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in backend.weights().items())
    assert AutoTokenizer.from_pretrained(checkpoint)("w5 w6")["input_ids"] == [5, 6]


def test_threads_change_nothing(model_dir: Path, options: dict[str, Any]) -> None:
    """The role prepares on one thread and trains on another; replay does both on the main one."""
    alone = loaded(model_dir, options)
    train(alone, num_steps=3)
    backend = loaded(model_dir, options)
    with ThreadPoolExecutor(1) as preparing, ThreadPoolExecutor(1) as training:
        ahead = preparing.submit(backend.prepare, make_groups(seed=0))
        for s in range(3):
            prepared = ahead.result(timeout=30)
            ahead = preparing.submit(backend.prepare, make_groups(seed=s + 1))
            training.submit(backend.train, prepared, rollout_step=s).result(timeout=30)
    assert same_bits(snapshot(alone), snapshot(backend))


def poisoned(reward: float) -> Any:
    """One sample's reward is NaN, or so large that the gradient of each of its group is not finite."""
    groups = make_groups()
    for sample in groups[2][1:2] if math.isnan(reward) else groups[2]:
        sample.score = msgspec.structs.replace(sample.score, reward=reward)
    return groups


@pytest.mark.parametrize(
    ("reward", "algorithm", "what"),
    [
        (math.nan, {}, "the loss is nan: samples 2.1 (reward nan);"),
        # Finite in the loss, not in the squares that the norm sums.
        (1e38, {"rewards_normalization": False}, "NaN or Inf in the gradient: samples 2.0, 2.1, 2.2, 2.3;"),
    ],
    ids=["loss", "gradient"],
)
def test_numbers_that_are_not_stop_the_run_by_name_or_skip_the_step(
    model_dir: Path, options: dict[str, Any], reward: float, algorithm: dict[str, Any], what: str
) -> None:
    small = {**options, "use_dynamic_batch_size": False, "micro_batch_size": 4}
    backend = loaded(model_dir, small, algorithm=algorithm)
    before = snapshot(backend)
    with pytest.raises(NumericsError) as caught:
        backend.train(backend.prepare(poisoned(reward)), rollout_step=7)
    assert f"rollout step 7, optimizer step 0: {what}" in str(caught.value)
    assert same_bits(before, snapshot(backend))

    skipping = loaded(model_dir, {**small, "on_nan": "skip"}, algorithm=algorithm)
    report = skipping.train(skipping.prepare(poisoned(reward)), rollout_step=7)
    assert report.metrics["train/skipped_steps"] == 1
    assert same_bits(before, snapshot(skipping))


def test_a_log_prob_of_the_engine_that_is_nan_is_named(model_dir: Path, options: dict[str, Any]) -> None:
    backend = loaded(model_dir, options, algorithm={"use_tis": True})
    groups = make_groups()
    sample = groups[1][2]
    sample.logprobs = pack_logprobs([math.nan] * sample.num_tokens)
    with pytest.raises(NumericsError, match=r"engine's log-probs is nan: samples 1\.2 \(log-probs of the"):
        backend.train(backend.prepare(groups), rollout_step=0)


def test_malformed_samples_are_refused_by_name(model_dir: Path, options: dict[str, Any]) -> None:
    backend = loaded(model_dir, options)
    short, unscored = make_groups(), make_groups()
    short[1][2].logprobs = pack_logprobs([-1.0])
    unscored[0][3].score = None
    with pytest.raises(DataError, match=r"sample 1\.2: .* response tokens, 1 log-probs"):
        backend.prepare(short)
    with pytest.raises(DataError, match=r"sample 0\.3: has no score"):
        backend.prepare(unscored)
    with pytest.raises(DataError, match="no samples"):
        backend.prepare([])


def test_samples_without_a_token_in_the_loss_are_trained_as_nothing(
    model_dir: Path, options: dict[str, Any]
) -> None:
    empty = make_sample(group_id=0, index=0, prompt=[5], response=[], logprobs=[], reward=1)
    masked = make_sample(group_id=0, index=1, prompt=[5], response=[6], logprobs=[-1.0], reward=0, mask=[0])
    backend = loaded(model_dir, options, algorithm=ALL_TERMS)
    before = snapshot(backend)
    report = backend.train(backend.prepare([[empty, masked]]), rollout_step=0)
    assert (report.num_samples, report.num_tokens) == (2, 0)
    assert report.metrics["train/grad_norm"] == 0
    assert same_bits(before, snapshot(backend))


def test_a_torn_checkpoint_and_a_missing_model_are_refused(
    model_dir: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    backend = loaded(model_dir, options)
    checkpoint = backend.save(tmp_path, rollout_step=0)
    (checkpoint / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(StorageError, match=r"model\.safetensors has 4 bytes"):
        backend.restore(checkpoint)
    with pytest.raises(DataError, match=r"has no config\.json"):
        loaded(tmp_path / "nowhere", options)


def test_other_reference_weights_are_refused(
    model_dir: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    backend = loaded(model_dir, options, algorithm=ALL_TERMS)
    checkpoint = backend.save(tmp_path, rollout_step=0)
    other = write_model(tmp_path / "other", seed=1)
    changed = make_backend(
        make_plan(model_dir, trainer={**options, "ref_load": str(other)}, algorithm=ALL_TERMS)
    )
    with pytest.raises(ConfigError, match=r"trainer\.ref_load: .*other does not hold the reference weights"):
        changed.restore(checkpoint)


def sampled(backend: Backend, *, num_groups: int, seed: int) -> Any:
    """Groups sampled from the weights by a plain loop; the reward is the share of token 7."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = backend.plan  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plan.trainer.hf_checkpoint))
    model.load_state_dict(dict(backend.weights()), strict=False)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(num_groups).repeat_interleave(8)[:, None] % VOCAB
    logprobs = []
    with torch.no_grad():
        for _ in range(6):
            log_softmax = torch.log_softmax(model(rows).logits[:, -1], -1)
            token = torch.multinomial(log_softmax.exp(), 1, generator=generator)
            logprobs.append(log_softmax.gather(-1, token))
            rows = torch.cat([rows, token], dim=1)
    found = torch.cat(logprobs, dim=1).tolist()
    samples = [
        make_sample(
            group_id=i // 8,
            index=i % 8,
            prompt=row[:1],
            response=row[1:],
            logprobs=found[i],
            reward=row[1:].count(7) / 6,
        )
        for i, row in enumerate(rows.tolist())
    ]
    return [samples[i : i + 8] for i in range(0, len(samples), 8)]


def test_it_learns(model_dir: Path, options: dict[str, Any]) -> None:
    plan = make_plan(model_dir, trainer={**options, "max_tokens_per_gpu": None}, num_steps_per_rollout=2)
    trainer = Trainer(make_backend(plan))
    trainer.start()
    rewards = []
    for s in range(25):
        report, _ = trainer.train_batch(s, sampled(trainer.backend, num_groups=8, seed=s))
        rewards.append(report.metrics["rollout/raw_reward"])
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.8
    with pytest.raises(ValueError, match="25 is next"):
        trainer.train_batch(3, make_groups())


def test_the_plan_survives_json(model_dir: Path) -> None:
    plan = make_plan(model_dir, algorithm=ALL_TERMS)
    assert msgspec.json.decode(plan_to_json(plan), type=type(plan)) == plan
    assert json.loads(plan_to_json(plan))["trainer"]["hf_checkpoint"] == str(model_dir)
