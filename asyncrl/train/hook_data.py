"""A batch as training hooks of slime and Miles know it: dictionaries of lists, one entry per sample.

Owns the translation there and back, with every length checked on the way back. The per-token entries are
views, so a hook that changes them in place has changed the batch; entries it replaces are read back.

Shape letters: R response tokens, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.errors import PluginError
from asyncrl.messages.hooks import HookSample
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
REQUIRED = ("tokens", "response_lengths", "rewards", "loss_masks", "sample_indices")
"""Keys that converted training data must have."""


def rollout_data(data: TokenData, rows: Sequence[Row]) -> dict[str, Any]:
    """The whole batch: what slime calls rollout_data."""
    return {
        "tokens": [torch.from_numpy(np.concatenate([row.prompt, row.response])).long() for row in rows],
        "total_lengths": [row.num_tokens for row in rows],
        "response_lengths": [len(row.response) for row in rows],
        "rewards": data.reward_S.tolist(),
        "raw_reward": [row.reward for row in rows],
        "truncated": [int(row.truncated) for row in rows],
        "sample_indices": [row.sample_index for row in rows],
        **_token_lists(data),
    }


def loss_batch(tokens: TokenData, micro: MicroBatch) -> dict[str, Any]:
    """A micro-batch: what slime hands a loss function as batch."""
    sequences = list(micro.input_T.split(micro.lengths))[: micro.num_samples]
    lists = _token_lists(tokens)
    return {
        "tokens": micro.input_T[None],
        "unconcat_tokens": sequences,
        "total_lengths": tokens.lengths,
        "response_lengths": [len(mask_R) for mask_R in lists["loss_masks"]],
        **lists,
    }


def _token_lists(data: TokenData) -> dict[str, list[Tensor]]:
    found = {key: getattr(data, field) for key, field in PER_TOKEN.items()}
    return {key: data.split(values_R) for key, values_R in found.items() if values_R is not None}


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
    if "rewards" in changed:
        rewards = changed["rewards"]
        check_length(rewards, data.num_samples, what=f'{what}: rollout_data["rewards"]', unit="samples")
        data.reward_S = torch.as_tensor(rewards, dtype=data.reward_S.dtype).to(data.reward_S.device)


def joined(values: Any, data: TokenData, *, what: str) -> Tensor:
    """A list of per-sample values as one tensor [R]. Raises PluginError where a length differs."""
    expected = [len(part) for part in data.split(data.mask_R)]
    check_length(values, len(expected), what=what, unit="samples")
    parts = [torch.as_tensor(part).to(data.mask_R) for part in values]
    for name, part, length in zip(data.names, parts, expected, strict=True):
        if tuple(part.shape) != (length,):
            raise PluginError(
                f"{what}: sample {name} came with shape {list(part.shape)}; expected [{length}], one value "
                "per response token"
            )
    return torch.cat(parts) if parts else data.mask_R.new_zeros(0)


def check_length(values: Any, expected: int, *, what: str, unit: str) -> None:
    """Raise PluginError where `values` is no list of `expected` entries."""
    found = len(values) if hasattr(values, "__len__") else None
    if found != expected:
        came = type(values).__name__ if found is None else f"{found} entries"
        raise PluginError(f"{what}: came with {came}; expected a list of {expected}, one per {unit[:-1]}")


def converted_rows(
    found: Any, rows: Sequence[Row], samples: Sequence[HookSample], *, what: str
) -> tuple[list[Row], list[float]]:
    """Rows and rewards from what a convert-samples hook returned. Raises PluginError.

    Versions, and log-probs where the hook gives none, are those of the sample that `sample_indices` names.
    """
    if not isinstance(found, Mapping) or any(key not in found for key in REQUIRED):
        came = f"keys {sorted(found)}" if isinstance(found, Mapping) else type(found).__name__
        raise PluginError(f"{what}: returned {came}; expected a dict with {', '.join(REQUIRED)}")
    known = {sample.index: row for sample, row in zip(samples, rows, strict=True)}
    count = len(found["tokens"])
    for key in (*REQUIRED, *(k for k in ("rollout_log_probs", "raw_reward", "truncated") if k in found)):
        check_length(found[key], count, what=f'{what}: "{key}"', unit="samples")
    made = [_converted(found, place, known, what=what) for place in range(count)]
    return made, [float(reward) for reward in found["rewards"]]


def _converted(found: Mapping[str, Any], place: int, known: Mapping[Any, Row], *, what: str) -> Row:
    index, length = found["sample_indices"][place], int(found["response_lengths"][place])
    if index not in known:
        raise PluginError(
            f'{what}: "sample_indices"[{place}] is {index}; expected the index of a sample it was given'
        )
    base = known[index]
    tokens = np.asarray(found["tokens"][place], dtype=np.int32)
    same = length == len(base.response)
    given = found.get("rollout_log_probs")
    if given is None and not same:
        raise PluginError(
            f"{what}: sample {index} has another response length than it was given ({length}, not "
            f'{len(base.response)}) and no "rollout_log_probs"; return them beside the tokens'
        )
    logprobs = base.logprobs if given is None else np.asarray(given[place], dtype=np.float32)
    mask = np.asarray(found["loss_masks"][place], dtype=np.uint8)
    for name, values in (("loss_masks", mask), ("rollout_log_probs", logprobs)):
        if values.shape != (length,):
            raise PluginError(
                f'{what}: "{name}"[{place}] has shape {list(values.shape)}; expected [{length}], its '
                "response length"
            )
    oldest = base.versions.min() if len(base.versions) else 0
    return Row(
        name=f"{base.name}/{place}" if not same else base.name,
        prompt=tokens[: len(tokens) - length],
        response=tokens[len(tokens) - length :],
        logprobs=logprobs,
        mask=mask,
        versions=base.versions if same else np.full(length, oldest, dtype=np.int64),
        reward=float(found.get("raw_reward", found["rewards"])[place]),
        group_id=base.group_id,
        truncated=bool(found["truncated"][place]) if "truncated" in found else base.truncated,
        sample_index=base.sample_index,
        teacher_logprobs=base.teacher_logprobs if same else None,
    )
