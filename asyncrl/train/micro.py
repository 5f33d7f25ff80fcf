"""Micro-batches: what goes through a model together, and where its results belong.

Owns the layout of a packed row. Knows nothing of rewards, losses or options. Pure.

Shape letters: T tokens of a micro-batch (prompts and responses, sample after sample), R its response tokens,
N tokens of the whole batch in recorded order.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.train.attention import Segments, plan_segments
from asyncrl.train.rows import Row

Integers = np.ndarray[Any, np.dtype[np.int64]]


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
        self._names = [row.name for row in rows]
        self._pad_multiple = pad_multiple
        self._prompts_S = np.array([len(row.prompt) for row in rows], np.int64)
        self._responses_S = np.array([len(row.response) for row in rows], np.int64)
        self._lengths_S = self._prompts_S + self._responses_S
        self.token_starts = np.concatenate(([0], self._lengths_S.cumsum()))
        self.response_starts = np.concatenate(([0], self._responses_S.cumsum()))
        self._input_N = _joined([part for row in rows for part in (row.prompt, row.response)])
        self._target_N = _joined([row.response for row in rows])

    @property
    def num_tokens(self) -> int:
        """N, prompts and responses."""
        return int(self.token_starts[-1])

    def micro_batch(self, members: Sequence[int]) -> MicroBatch:
        """The micro-batch of these samples, in this order."""
        index_S = np.array(members, np.int64)
        lengths_S, responses_S = self._lengths_S[index_S], self._responses_S[index_S]
        ends_S = lengths_S.cumsum()
        padding = -int(ends_S[-1]) % self._pad_multiple
        place_T = _ranges(self.token_starts[index_S], lengths_S)
        token_R = _ranges(self.response_starts[index_S], responses_S)
        lengths = [*lengths_S.tolist(), padding] if padding else lengths_S.tolist()
        return MicroBatch(
            names=[self._names[i] for i in members],
            members=list(members),
            lengths=lengths,
            segments=plan_segments(lengths),
            input_T=_tensor(self._input_N[place_T], np.zeros(padding, np.int64)),
            position_T=_tensor(_ranges(np.zeros_like(lengths_S), lengths_S), np.arange(padding)),
            place_T=_tensor(place_T, np.full(padding, self.num_tokens)),
            # Logits at a position predict the next token, so a response is read one position early.
            predict_R=_tensor(_ranges(ends_S - responses_S - 1, responses_S)),
            target_R=_tensor(self._target_N[token_R]),
            sample_R=_tensor(np.repeat(np.arange(len(members)), responses_S)),
            token_R=_tensor(token_R),
        )


def _ranges(starts_S: Integers, lengths_S: Integers) -> Integers:
    """start, start + 1, ... of each length, laid end to end; a few calls however many there are."""
    before_S = lengths_S.cumsum() - lengths_S
    return np.repeat(starts_S - before_S, lengths_S) + np.arange(int(lengths_S.sum()))


def _joined(parts: list[Integers]) -> Integers:
    return np.concatenate(parts).astype(np.int64)


def _tensor(values: Integers, padding: Integers | None = None) -> Tensor:
    return torch.from_numpy(values if padding is None or not len(padding) else np.append(values, padding))
