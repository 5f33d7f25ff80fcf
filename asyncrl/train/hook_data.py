"""A batch as training hooks of slime and Miles know it: dictionaries of lists, one entry per sample.

Owns the translation there and back, with every length and value checked on the way back. Hooks get copies:
what they change in place or replace in a dictionary of `rollout_data` counts once `read_back` took it over,
and the batch they were made from can be trained again.

Shape letters: R response tokens, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.errors import PluginError
from asyncrl.train.micro import MicroBatch
from asyncrl.train.rows import Row
from asyncrl.train.tokens import TokenData

PER_TOKEN = {
    "loss_masks": "mask_R",
    "rollout_log_probs": "rollout_R",
    "log_probs": "old_R",
    "ref_log_probs": "reference_R",
    "teacher_log_probs": "teacher_R",
    "values": "value_R",
    "kl": "kl_R",
    "advantages": "advantage_R",
    "returns": "return_R",
}
"""slime's key -> field of TokenData."""


def rollout_data(data: TokenData, rows: Sequence[Row]) -> dict[str, Any]:
    """The whole batch: what slime calls rollout_data."""
    device = data.mask_R.device
    tokens = [np.concatenate([row.prompt, row.response]) for row in rows]
    return {
        "tokens": [torch.from_numpy(each).long().to(device) for each in tokens],
        "total_lengths": list(data.lengths),
        "raw_reward": [row.reward for row in rows],
        "truncated": [int(row.truncated) for row in rows],
        "sample_indices": [row.sample_index for row in rows],
        **_lists(data),
    }


def loss_batch(tokens: TokenData, micro: MicroBatch) -> dict[str, Any]:
    """A micro-batch: what slime hands a loss function as batch."""
    return {
        "tokens": micro.input_T[None],
        "unconcat_tokens": list(micro.input_T.split(micro.lengths))[: micro.num_samples],
        "total_lengths": list(tokens.lengths),
        **_lists(tokens),
    }


def masks_of(data: TokenData, mask_R: Tensor) -> list[Tensor]:  # noqa: N803 -- a shape suffix
    """A loss mask as hooks get it: int32, a copy, one entry per sample."""
    return data.split(mask_R.to(torch.int32))


def copies(data: TokenData, values_R: Tensor) -> list[Tensor]:  # noqa: N803 -- a shape suffix
    """Per-token values as hooks get them: a copy, one entry per sample."""
    return data.split(values_R.detach().clone())


def _lists(data: TokenData) -> dict[str, Any]:
    found = {key: getattr(data, field) for key, field in PER_TOKEN.items()}
    masks = masks_of(data, data.mask_R)
    return {
        **{key: copies(data, values_R) for key, values_R in found.items() if values_R is not None},
        "loss_masks": masks,
        "response_lengths": [len(mask_R) for mask_R in masks],
        "rollout_mask_sums": [int(mask_R.sum()) for mask_R in masks],
        "rewards": data.reward_S.tolist(),
    }


def read_back(
    data: TokenData, changed: Mapping[str, Any], *, what: str, required: Sequence[str] = ()
) -> None:
    """Take over what a hook left in a dictionary of `rollout_data`. Raises PluginError naming `what`."""
    missing = [key for key in required if changed.get(key) is None]
    if missing:
        raise PluginError(
            f"{what}: left rollout_data without {' and '.join(missing)}; set each to a list of "
            f"{data.num_samples} tensors, one per sample, as long as its response"
        )
    for key, field in PER_TOKEN.items():
        if changed.get(key) is not None:
            setattr(data, field, joined(changed[key], data, what=f'{what}: rollout_data["{key}"]'))
    check_binary(data.mask_R, data, what=f'{what}: rollout_data["loss_masks"]')
    for key in required:
        _check_finite(getattr(data, PER_TOKEN[key]), data, what=f'{what}: rollout_data["{key}"]')
    if changed.get("rewards") is not None:
        rewards = numbers(changed["rewards"], data.names, what=f'{what}: rollout_data["rewards"]')
        data.reward_S = torch.tensor(rewards).to(data.reward_S)


def joined(values: Any, data: TokenData, *, what: str) -> Tensor:
    """A list of per-sample values as one tensor [R] without gradient.

    Raises PluginError naming the sample whose values are no numbers or of another length.
    """
    expected = [len(part) for part in data.split(data.mask_R)]
    check_length(values, len(expected), what=what)
    parts = []
    for name, value, length in zip(data.names, values, expected, strict=True):
        part = tensor_of(value, what=f"{what}: sample {name}").to(data.mask_R)
        if tuple(part.shape) != (length,):
            raise PluginError(
                f"{what}: sample {name} came with shape {list(part.shape)}; expected [{length}], one value "
                "per response token"
            )
        parts.append(part)
    return torch.cat(parts) if parts else data.mask_R.new_zeros(0)


def tensor_of(value: Any, *, what: str) -> Tensor:
    """`value` as a tensor without gradient. Raises PluginError where it holds anything but numbers."""
    try:
        return torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PluginError(f"{what} came with {described(value)}; expected numbers ({error})") from error


def numbers(values: Any, names: Sequence[str], *, what: str) -> list[float]:
    """A list of one finite number per sample. Raises PluginError naming the sample that has none."""
    check_length(values, len(names), what=what)
    found = []
    for name, value in zip(names, values, strict=True):
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PluginError(
                f"{what}: sample {name} came with {described(value)}; expected a number"
            ) from error
        if not math.isfinite(number):
            raise PluginError(f"{what}: sample {name} came with {number}; expected a finite number")
        found.append(number)
    return found


def check_length(values: Any, expected: int, *, what: str) -> None:
    """Raise PluginError where `values` is no list of `expected` entries."""
    sized = hasattr(values, "__len__") and not isinstance(values, str | bytes | Mapping)
    if isinstance(values, Tensor) and values.ndim == 0:
        sized = False
    if not sized or len(values) != expected:
        raise PluginError(
            f"{what}: came with {described(values)}; expected a list of {expected}, one per sample"
        )


def check_binary(mask_R: Tensor, data: TokenData, *, what: str) -> None:  # noqa: N803 -- a shape suffix
    """Raise PluginError naming a sample whose mask holds anything but 0 and 1."""
    wrong = _first((mask_R != 0) & (mask_R != 1))
    if wrong is not None:
        raise PluginError(
            f"{what}: sample {data.names[int(data.sample_R[wrong])]} has {float(mask_R[wrong]):g}; expected "
            "0 or 1"
        )


def _check_finite(values_R: Tensor, data: TokenData, *, what: str) -> None:  # noqa: N803 -- a shape suffix
    wrong = _first(~torch.isfinite(values_R) & (data.mask_R > 0))
    if wrong is not None:
        raise PluginError(
            f"{what}: sample {data.names[int(data.sample_R[wrong])]} has {float(values_R[wrong])} at a token "
            "in the loss; expected finite numbers"
        )


def _first(wrong_R: Tensor) -> int | None:  # noqa: N803 -- a shape suffix
    places = wrong_R.nonzero()
    return int(places[0]) if len(places) else None


def described(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, str | int | float):
        return f"{type(value).__name__} {value!r:.40}"
    return type(value).__name__
