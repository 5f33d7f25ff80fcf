"""What a convert-samples hook returned, as the rows that are trained.

Owns the checks of slime's training-data dictionary and what an entry takes from the sample it came from.
Knows nothing of rewards' normalisation or of the loss.

Shape letters: P prompt tokens, R response tokens, L layers, K experts per token.

Invariant: a row's log-probs and versions belong to its tokens. They are the sample's where the entry's tokens
begin the sample's tokens; elsewhere the hook has to give log-probs, and the oldest version counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from asyncrl.errors import PluginError
from asyncrl.train.hook_data import check_length, described, numbers
from asyncrl.train.rows import Row

REQUIRED = ("tokens", "response_lengths", "rewards", "loss_masks", "sample_indices")
"""Keys that converted training data must have."""
OPTIONAL = ("raw_reward", "truncated", "rollout_log_probs", "teacher_log_probs", "rollout_routed_experts")
"""Keys that are taken over where they are there; others (metadata, round_number) train nothing."""

Array = np.ndarray[Any, Any]


def converted_rows(found: Any, known: Mapping[int, Row], *, what: str) -> tuple[list[Row], list[float]]:
    """Rows and rewards from what the hook returned; `known` are the samples by index. Raises PluginError."""
    if not isinstance(found, Mapping) or any(key not in found for key in REQUIRED):
        raise PluginError(f"{what}: returned {described(found)}; expected a dict with {', '.join(REQUIRED)}")
    count = len(found["tokens"]) if hasattr(found["tokens"], "__len__") else 0
    given = [*REQUIRED, *(key for key in OPTIONAL if found.get(key) is not None)]
    for key in given:
        check_length(found[key], count, what=f'{what}: "{key}"')
    if any(each is not None for each in found.get("multimodal_train_inputs") or ()):
        raise PluginError(f'{what}: "multimodal_train_inputs" came with inputs; only text can be trained')
    bases = [_base(index, place, known, what=what) for place, index in enumerate(found["sample_indices"])]
    names = _names([base.name for base in bases])
    rewards = numbers(found["rewards"], names, what=f'{what}: "rewards"')
    raw = (
        rewards
        if "raw_reward" not in given
        else numbers(found["raw_reward"], names, what=f"{what}: raw_reward")
    )
    rows = []
    for place, (base, name) in enumerate(zip(bases, names, strict=True)):
        entry = {key: found[key][place] for key in given}
        rows.append(_Entry(entry, base, name=name, what=f"{what}: sample {name}").row(raw[place]))
    return rows, rewards


def _base(index: Any, place: int, known: Mapping[int, Row], *, what: str) -> Row:
    try:
        return known[int(index)]
    except (TypeError, ValueError, KeyError) as error:
        raise PluginError(
            f'{what}: "sample_indices"[{place}] is {index!r:.40}; expected the index of a sample it was '
            f"given, {min(known)} to {max(known)}"
        ) from error


def _names(names: Sequence[str]) -> list[str]:
    """The samples' names, those of siblings with their number behind."""
    counts, seen = Counter(names), Counter[str]()
    made = []
    for name in names:
        made.append(f"{name}/{seen[name]}" if counts[name] > 1 else name)
        seen[name] += 1
    return made


class _Entry:
    """One entry of the dictionary beside the sample it came from."""

    def __init__(self, entry: Mapping[str, Any], base: Row, *, name: str, what: str) -> None:
        self._entry, self._base, self._name, self._what = entry, base, name, what
        self._length = self._whole("response_lengths")
        self._tokens = self._array("tokens", np.int64, None)
        num_prompt = len(self._tokens) - self._length
        if self._length < 0 or num_prompt < 1:
            raise PluginError(
                f'{what}: "tokens" has {len(self._tokens)} and "response_lengths" says {self._length}; '
                "expected at least one prompt token before the response"
            )
        if self._tokens.min() < 0:
            raise PluginError(f'{what}: "tokens" has {self._tokens.min()}; expected token ids')
        whole = np.concatenate([base.prompt, base.response])
        start = num_prompt - len(base.prompt)
        self._part: slice | None = None
        """Where in the sample's response this one lies; None where its tokens are others."""
        if start >= 0 and np.array_equal(self._tokens, whole[: len(self._tokens)]):
            self._part = slice(start, start + self._length)

    def row(self, raw_reward: float) -> Row:
        """The entry as a row."""
        base, tokens = self._base, self._tokens.astype(np.int32)
        mask = self._array("loss_masks", np.int64, self._length)
        if not np.isin(mask, (0, 1)).all():
            raise PluginError(
                f'{self._what}: "loss_masks" holds {sorted(set(mask.tolist()))[:4]}; expected 0 and 1'
            )
        return Row(
            name=self._name,
            prompt=tokens[: len(tokens) - self._length],
            response=tokens[len(tokens) - self._length :],
            logprobs=self._log_probs("rollout_log_probs", base.logprobs),
            mask=mask.astype(np.uint8),
            versions=self._versions(),
            reward=raw_reward,
            group_id=base.group_id,
            truncated=bool(self._whole("truncated")) if "truncated" in self._entry else base.truncated,
            sample_index=base.sample_index,
            teacher_logprobs=self._teacher(),
            routed_experts=self._experts(),
        )

    def _log_probs(self, key: str, recorded: Array) -> Array:
        if key in self._entry:
            return self._array(key, np.float32, self._length)
        if self._part is not None:
            return recorded[self._part]
        raise PluginError(
            f'{self._what}: its tokens are no beginning of those it was given, and there is no "{key}"; '
            "return them beside the tokens"
        )

    def _versions(self) -> Array:
        if self._part is not None:
            return self._base.versions[self._part]
        oldest = self._base.versions.min() if len(self._base.versions) else 0
        return np.full(self._length, oldest, dtype=np.int64)

    def _teacher(self) -> Array | None:
        recorded = self._base.teacher_logprobs
        if recorded is None and "teacher_log_probs" not in self._entry:
            return None
        return self._log_probs("teacher_log_probs", np.zeros(0) if recorded is None else recorded)

    def _experts(self) -> Array | None:
        num_rows = len(self._tokens) - 1
        given = self._entry.get("rollout_routed_experts")
        if given is None:
            recorded = self._base.routed_experts
            return None if recorded is None or self._part is None else recorded[:num_rows]
        experts = self._numeric("rollout_routed_experts", np.int16)
        if experts.ndim != 3 or len(experts) != num_rows:
            raise PluginError(
                f'{self._what}: "rollout_routed_experts" has shape {list(experts.shape)}; expected '
                f"[{num_rows}, layers, experts per token]"
            )
        return experts

    def _array(self, key: str, dtype: Any, length: int | None) -> Array:
        """A list of numbers; of `length`, where that is known."""
        array = self._numeric(key, dtype)
        if array.ndim != 1 or (length is not None and len(array) != length):
            expected = "one list of token ids" if length is None else f"[{length}], its response length"
            raise PluginError(f'{self._what}: "{key}" has shape {list(array.shape)}; expected {expected}')
        return array

    def _whole(self, key: str) -> int:
        array = self._numeric(key, np.int64)
        if array.ndim:
            raise PluginError(f'{self._what}: "{key}" has shape {list(array.shape)}; expected a whole number')
        return int(array)

    def _numeric(self, key: str, dtype: Any) -> Array:
        value = self._entry[key]
        try:
            array = np.asarray(value)
            cast = array.astype(dtype)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise PluginError(
                f'{self._what}: "{key}" came with {described(value)}; expected numbers ({error})'
            ) from error
        if np.issubdtype(dtype, np.integer) and not np.array_equal(cast, array):
            raise PluginError(f'{self._what}: "{key}" came with fractions; expected whole numbers')
        return cast
