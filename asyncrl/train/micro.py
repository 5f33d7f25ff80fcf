"""Micro-batches: what goes through a model together, and where its results belong.

Owns the layout of a packed row. Knows nothing of rewards, losses or options. Pure.

Shape letters: T tokens of a micro-batch (prompts and responses, sample after sample), R its response tokens,
N tokens of the whole batch in recorded order.
"""

# ruff: noqa: N815 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.train.attention import Segments, plan_segments
from asyncrl.train.rows import Row


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples that go through the model together."""

    names: list[str]
    """group.index of each sample."""
    members: list[int]
    """Position of each sample in the batch."""
    lengths: list[int]
    """Tokens of each sequence: one per sample, and a last one of padding where the row is padded."""
    segments: Segments
    input_T: Tensor
    """int64 token ids."""
    position_T: Tensor
    """int64, from 0 in each sequence."""
    place_T: Tensor
    """int64, the token's position in the batch, N for padding."""
    predict_R: Tensor
    """int64, the position in T whose logits predict each response token."""
    target_R: Tensor
    """int64 response token ids."""
    sample_R: Tensor
    """int64, which sample of the micro-batch."""
    token_R: Tensor
    """int64, the response token's position among all response tokens of the batch."""

    @property
    def num_samples(self) -> int:
        """Samples in the micro-batch."""
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        """Tokens of its samples, without padding."""
        return sum(self.lengths[: len(self.names)])

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


class Layout:
    """Where each sample's tokens lie in the batch: sample after sample in recorded order."""

    def __init__(self, rows: Sequence[Row], *, pad_multiple: int = 1) -> None:
        """`pad_multiple` rounds the tokens of every micro-batch up (Miles: data_pad_size_multiplier)."""
        self._rows = list(rows)
        self._pad_multiple = pad_multiple
        self.token_starts = np.cumsum([0, *(row.num_tokens for row in rows)])
        self.response_starts = np.cumsum([0, *(len(row.response) for row in rows)])

    @property
    def num_tokens(self) -> int:
        """N, prompts and responses."""
        return int(self.token_starts[-1])

    def micro_batch(self, members: Sequence[int]) -> MicroBatch:
        """The micro-batch of these samples, in this order."""
        rows = [self._rows[i] for i in members]
        lengths = [row.num_tokens for row in rows]
        starts = np.cumsum([0, *lengths])
        padding = -int(starts[-1]) % self._pad_multiple
        pad = [np.zeros(padding, np.int64)] if padding else []
        lengths += [padding] if padding else []
        responses = [len(row.response) for row in rows]
        return MicroBatch(
            names=[row.name for row in rows],
            members=list(members),
            lengths=lengths,
            segments=plan_segments(lengths),
            input_T=_integers([part for row in rows for part in (row.prompt, row.response)] + pad),
            position_T=_integers([np.arange(length) for length in lengths]),
            place_T=_integers(
                [self.token_starts[i] + np.arange(self._rows[i].num_tokens) for i in members]
                + [np.full(padding, self.num_tokens)]
            ),
            # Logits at a position predict the next token, so a response is read one position early.
            predict_R=_integers(
                [
                    start + len(row.prompt) - 1 + np.arange(len(row.response))
                    for start, row in zip(starts, rows, strict=False)
                ]
            ),
            target_R=_integers([row.response for row in rows]),
            sample_R=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(responses)),
            token_R=_integers(
                [self.response_starts[i] + np.arange(len(self._rows[i].response)) for i in members]
            ),
        )


def _integers(parts: list[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(torch.int64)
