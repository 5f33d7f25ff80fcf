"""From groups of samples to micro-batches: the part of training that needs neither weights nor a device.

Owns advantages, optimizer-step boundaries and packing. Pure: the same groups and plan give the same
micro-batches, in any process and on any thread.

Shape letters: T tokens of a micro-batch (prompts and responses, sample after sample), R its response tokens,
S its samples.

Invariant: the weights of a step's micro-batches are relative to the whole optimizer step, so losses and
gradients are sums over micro-batches, whatever the packing.
"""

# ruff: noqa: N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.algo.advantage import grpo_advantages
from asyncrl.algo.batch import pack_by_count, pack_by_tokens, split_steps
from asyncrl.algo.segment import per_sample_weights, per_token_weights
from asyncrl.errors import DataError
from asyncrl.messages.sample import Sample
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.attention import Segments, plan_segments
from asyncrl.train.backend import TrainPlan
from asyncrl.train.rows import Row, data_metrics, decode

DEFAULT_MAX_TOKENS = 8192
"""Tokens per micro-batch where max_tokens_per_gpu is left out."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples that go through the model together."""

    names: list[str]
    """group.index of each sample."""
    lengths: list[int]
    """Tokens of each sample, prompt and response."""
    segments: Segments
    input_T: Tensor
    """int64 token ids."""
    position_T: Tensor
    """int64, from 0 in each sample."""
    predict_R: Tensor
    """int64, the position in T whose logits predict each response token."""
    target_R: Tensor
    """int64 response token ids."""
    sample_R: Tensor
    """int64, which sample of the micro-batch."""
    version_R: Tensor
    """int64, which version sampled the token."""
    mask_R: Tensor
    """float, 1 where the token is in the loss."""
    weight_R: Tensor
    """float, the token's share in a mean over the optimizer step."""
    rollout_R: Tensor
    """float, the engine's log-prob."""
    advantage_R: Tensor
    """float."""
    advantage_S: Tensor
    """float."""
    num_step_samples: int
    """Samples of the whole optimizer step."""

    @property
    def num_samples(self) -> int:
        """Samples in the micro-batch."""
        return len(self.names)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | Segments)
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """A rollout batch ready to train."""

    steps: list[list[MicroBatch]]
    """Micro-batches by optimizer step."""
    rows: list[Row]
    """The samples in recorded order."""
    metrics: dict[str, float]
    """What is known of the data before any forward (rollout/...)."""
    num_samples: int
    num_tokens: int
    """Response tokens in the loss."""
    prepare_s: float = 0.0


def prepare_batch(groups: Sequence[Sequence[Sample]], *, plan: TrainPlan) -> PreparedBatch:
    """Advantages over each group, optimizer steps in recorded order, micro-batches within each.

    Raises DataError for an empty batch or a malformed sample.
    """
    rows = [decode(sample) for group in groups for sample in group]
    if not rows:
        raise DataError("training batch: no samples in it; at least one is needed")
    rewards_S = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    advantages_S = grpo_advantages(
        rewards_S,
        group_S=torch.tensor([row.group_id for row in rows]),
        rewards_normalization=plan.algorithm.rewards_normalization,
        grpo_std_normalization=plan.algorithm.grpo_std_normalization,
    )
    steps = [
        _optimizer_step([rows[i] for i in step], advantages_S[step.start : step.stop].tolist(), plan)
        for step in split_steps(len(rows), num_steps=plan.num_steps_per_rollout)
    ]
    return PreparedBatch(
        steps=steps,
        rows=rows,
        metrics=data_metrics(rows, advantages_S.tolist()),
        num_samples=len(rows),
        num_tokens=sum(int(row.mask.sum()) for row in rows),
    )


def pack(lengths: Sequence[int], *, trainer: TrainerConfig) -> list[list[int]]:
    """Indices of the samples of each micro-batch, by the trainer's options."""
    if trainer.use_dynamic_batch_size:
        return pack_by_tokens(lengths, max_tokens=trainer.max_tokens_per_gpu or DEFAULT_MAX_TOKENS)
    return pack_by_count(len(lengths), micro_batch_size=trainer.micro_batch_size)


def _optimizer_step(rows: list[Row], advantages: list[float], plan: TrainPlan) -> list[MicroBatch]:
    num_tokens = sum(int(row.mask.sum()) for row in rows) if plan.algorithm.calculate_per_token_loss else None
    return [
        _micro_batch(
            [rows[i] for i in members],
            [advantages[i] for i in members],
            num_step_samples=len(rows),
            num_step_tokens=num_tokens,
        )
        for members in pack([row.num_tokens for row in rows], trainer=plan.trainer)
    ]


def _micro_batch(
    rows: list[Row], advantages: list[float], *, num_step_samples: int, num_step_tokens: int | None
) -> MicroBatch:
    lengths = [row.num_tokens for row in rows]
    starts = np.cumsum([0, *lengths[:-1]])
    responses = torch.tensor([len(row.response) for row in rows])
    sample_R = torch.repeat_interleave(torch.arange(len(rows)), responses)
    mask_R = _tensor([row.mask for row in rows], torch.float32)
    if num_step_tokens is None:
        unmasked_S = torch.tensor([int(row.mask.sum()) for row in rows])
        weight_R = per_sample_weights(
            mask_R, sample_R=sample_R, num_tokens_S=unmasked_S, num_samples=num_step_samples
        )
    else:
        weight_R = per_token_weights(mask_R, num_tokens=num_step_tokens)
    advantage_S = torch.tensor(advantages, dtype=torch.float32)
    return MicroBatch(
        names=[row.name for row in rows],
        lengths=lengths,
        segments=plan_segments(lengths),
        input_T=_tensor([part for row in rows for part in (row.prompt, row.response)], torch.int64),
        position_T=_tensor([np.arange(length) for length in lengths], torch.int64),
        # Logits at a position predict the next token, so a response is read one position early.
        predict_R=_tensor(
            [
                start + len(row.prompt) - 1 + np.arange(len(row.response))
                for start, row in zip(starts, rows, strict=True)
            ],
            torch.int64,
        ),
        target_R=_tensor([row.response for row in rows], torch.int64),
        sample_R=sample_R,
        version_R=_tensor([row.versions for row in rows], torch.int64),
        mask_R=mask_R,
        weight_R=weight_R,
        rollout_R=_tensor([row.logprobs for row in rows], torch.float32),
        advantage_R=advantage_S[sample_R],
        advantage_S=advantage_S,
        num_step_samples=num_step_samples,
    )


def _tensor(parts: list[np.ndarray[Any, Any]], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(dtype)
