"""The response tokens of a batch with everything a loss may ask about them.

Owns the flat tensors that a rollout step works on: what was recorded, what the forward passes found, the
advantages, and each token's weight in its optimizer step. Runs no model and applies no formula but the
reducers'.

Shape letters: R response tokens of the whole batch, or of a micro-batch taken from it; S its samples; N all
tokens, prompts too; L layers, K experts per token.

Invariant: weights come from the loss mask as it was recorded; `keep_R` only takes numerators away.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.algo.segment import per_sample_weights, per_token_weights, sample_sums
from asyncrl.train.micro import MicroBatch
from asyncrl.train.rows import Row


@dataclass(kw_only=True)
class TokenData:
    """Response tokens in recorded order; `None` where nothing asked for it."""

    names: list[str]
    """group.index of each sample."""
    lengths: list[int]
    """Tokens of each sample, prompt and response."""
    sample_R: Tensor
    """int64."""
    mask_R: Tensor
    """float, 1 where the token is in the loss."""
    rollout_R: Tensor
    """float, the engine's log-prob."""
    version_R: Tensor
    """int64, which version sampled the token."""
    reward_S: Tensor
    """float, normalised."""
    weight_R: Tensor
    """float, the token's share in a mean over its optimizer step."""
    keep_R: Tensor
    """float, 0 where staleness takes the token out of every numerator."""
    num_step_samples: int = 0
    """Samples of the optimizer step at hand."""
    step_divisor: float = 1.0
    """What a sum over samples (tokens, with calculate_per_token_loss) is divided by for the step's mean."""
    tis_normalizer: float = 1.0
    """Mean of the step's importance weights, which tis_batch_normalize divides them by."""
    old_R: Tensor | None = None
    """The trainer's log-prob at the start of the rollout step."""
    reference_R: Tensor | None = None
    teacher_R: Tensor | None = None
    """The teacher's log-prob: recorded, where every sample's score has them, or a frozen model's."""
    value_R: Tensor | None = None
    """The critic's value before the token, at the start of the rollout step."""
    kl_R: Tensor | None = None
    """KL to the reference that shaped the reward."""
    advantage_R: Tensor | None = None
    return_R: Tensor | None = None
    current_R: Tensor | None = None
    """The log-prob that training last saw, without gradient."""
    routing_NLK: Tensor | None = None
    """int16 [N + 1, L, K], experts by token; -1 leaves the choice to the model. The last row is padding's."""

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.lengths)

    def copy_to(self, device: torch.device) -> TokenData:
        """A copy on a device; what a rollout step and its hooks do to it leaves this one as it is."""
        moved: dict[str, Any] = {
            name: value.to(device, copy=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def take(self, micro: MicroBatch) -> TokenData:
        """The tokens of a micro-batch, with its samples numbered from 0."""
        taken: dict[str, Any] = {
            name: value.index_select(0, micro.token_R)
            for name, value in vars(self).items()
            if name.endswith("_R") and value is not None
        }
        index_S = torch.tensor(micro.members, device=self.reward_S.device)
        return TokenData(
            **{
                **taken,
                "names": micro.names,
                "lengths": micro.lengths[: micro.num_samples],
                "sample_R": micro.sample_R,
                "reward_S": self.reward_S[index_S],
                "num_step_samples": self.num_step_samples,
                "step_divisor": self.step_divisor,
                "tis_normalizer": self.tis_normalizer,
            }
        )

    def put(self, name: str, values_R: Tensor, *, micro: MicroBatch) -> None:
        """Store what a forward pass over `micro` found under the field `name`."""
        flat_R = getattr(self, name)
        if flat_R is None:
            flat_R = torch.zeros_like(self.rollout_R)
            setattr(self, name, flat_R)
        flat_R[micro.token_R] = values_R.to(flat_R.dtype)

    def split(self, values_R: Tensor) -> list[Tensor]:
        """Views of the values of each sample."""
        counts_S = torch.bincount(self.sample_R, minlength=self.num_samples)
        return list(values_R.split(counts_S.tolist()))

    def weigh(self, *, samples: range, per_token: bool) -> None:
        """Set `weight_R` and `num_step_samples` for the optimizer step of these samples."""
        self.num_step_samples = len(samples)
        counts_S = sample_sums(self.mask_R, sample_R=self.sample_R, num_samples=self.num_samples)
        if per_token:
            num_tokens = int(counts_S[samples.start : samples.stop].sum())
            self.step_divisor = float(max(num_tokens, 1))
            self.weight_R = per_token_weights(self.mask_R, num_tokens=num_tokens)
            return
        self.step_divisor = float(len(samples))
        self.weight_R = per_sample_weights(
            self.mask_R, sample_R=self.sample_R, num_tokens_S=counts_S, num_samples=len(samples)
        )


def token_data(rows: Sequence[Row], *, reward_S: Tensor, routing_NLK: Tensor | None = None) -> TokenData:
    """What is known of the samples before any forward pass."""
    responses = torch.tensor([len(row.response) for row in rows])
    mask_R = _floats([row.mask for row in rows])
    teachers = [row.teacher_logprobs for row in rows]
    return TokenData(
        names=[row.name for row in rows],
        lengths=[row.num_tokens for row in rows],
        sample_R=torch.repeat_interleave(torch.arange(len(rows)), responses),
        mask_R=mask_R,
        rollout_R=_floats([row.logprobs for row in rows]),
        version_R=torch.from_numpy(np.concatenate([row.versions for row in rows])).to(torch.int64),
        reward_S=reward_S.to(torch.float32),
        weight_R=torch.zeros_like(mask_R),
        keep_R=torch.ones_like(mask_R),
        teacher_R=None
        if any(t is None for t in teachers)
        else _floats([t for t in teachers if t is not None]),
        routing_NLK=routing_NLK,
    )


def _floats(parts: list[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(torch.float32)
