"""What the tests of the trainer's models share: a loaded backend, its weights, and a plain second opinion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asyncrl.messages.sample import Sample
from asyncrl.train.backend import StepReport
from asyncrl.train.forward import response_statistics
from asyncrl.train.torch import TorchBackend
from tests.train_support import VOCAB, make_groups, make_plan, make_sample

Groups = list[list[Sample]]


def backend_of(model_dir: Path, *, trainer: dict[str, Any] | None = None, **plan: Any) -> TorchBackend:
    """A backend with several micro-batches a step, not yet loaded."""
    return TorchBackend(make_plan(model_dir, trainer={"max_tokens_per_gpu": 100, **(trainer or {})}, **plan))


def loaded(model_dir: Path, *, trainer: dict[str, Any] | None = None, **plan: Any) -> TorchBackend:
    backend = backend_of(model_dir, trainer=trainer, **plan)
    backend.load()
    return backend


def train(backend: TorchBackend, step: int, groups: Groups | None = None) -> StepReport:
    return backend.train(backend.prepare(groups or make_groups(seed=step)), rollout_step=step)


def samples_of(groups: Groups) -> list[Sample]:
    return [sample for group in groups for sample in group]


def snapshot(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def logprobs_under(probe: TorchBackend, weights: Mapping[str, Tensor], groups: Groups) -> list[list[float]]:
    """The log-probs of each sample's response tokens under other weights."""
    for name, tensor in probe.weights().items():
        tensor.copy_(weights[name])
    prepared = probe.prepare(groups)
    data = replace(prepared.data)
    for micro in prepared.forwards:
        found = response_statistics(probe._model, micro, packed=True, temperature=1.0)
        data.put("old_R", found.logprobs_R, micro=micro)
    assert data.old_R is not None
    return [part.tolist() for part in data.split(data.old_R)]


def sample_mean(values: list[list[float]], groups: Groups) -> float:
    """Mean over samples of the mean over their tokens in the loss."""
    means = []
    for numbers, sample in zip(values, samples_of(groups), strict=True):
        kept = [x for x, m in zip(numbers, sample.loss_mask, strict=True) if m]
        means.append(sum(kept) / max(len(kept), 1))
    return sum(means) / len(means)


def sampled(backend: TorchBackend, *, num_groups: int, seed: int, length: int = 6) -> Groups:
    """Groups of eight answers from the weights by a plain loop; the reward is the share of token 7."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(backend.plan.trainer.hf_checkpoint)
    ).eval()
    model.load_state_dict(dict(backend.weights()), strict=False)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(num_groups).repeat_interleave(8)[:, None] % VOCAB
    logprobs = []
    with torch.no_grad():
        for _ in range(length):
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
            reward=row[1:].count(7) / length,
        )
        for i, row in enumerate(rows.tolist())
    ]
    return [samples[i : i + 8] for i in range(0, len(samples), 8)]
