"""What a reward is, how one is found, and what it may return.

Owns the specification that travels to a child, the three kinds of result, and the one place that turns a
return value into a `Score`. It never runs user code itself (`child` does). Invariant: nothing but a finite
number becomes a Score; everything else is an error that names the sample and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from asyncrl.errors import RewardError
from asyncrl.messages.codec import MiB
from asyncrl.messages.hooks import Args, HookSample, changed_metadata, hook_sample
from asyncrl.messages.sample import Lane, Sample, Score, pack_logprobs
from asyncrl.topology.plugins import is_plugin_path

DEFAULT_TIMEOUT_S = 30.0
"""The topology's default for `reward.timeout_s`."""
MAX_SCORE_BYTES = 8 * MiB
"""Of an encoded score: the number, what a reward returned beside it, the metadata it added."""


class RewardSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One `[[reward]]` table as its children need it, with the group filters they also run."""

    use: str
    """A built-in name, or a path to a function."""
    rm_url: str | None = None
    """Where `remote_rm` posts."""
    reward_key: str | None = None
    """Key of the number when the reward is a dict."""
    eval_reward_key: str | None = None
    """The same in the lane eval. None: `reward_key`."""
    group_rm: bool = False
    """The function takes a whole group and returns a list."""
    custom_config_path: str | None = None
    """YAML whose keys become attributes of `args`."""
    dynamic_sampling_filter_path: str | None = None
    """(args, samples, **kwargs) -> bool or object with .keep and .reason."""
    buffer_filter_path: str | None = None
    """(args, None, [group], 1) -> groups; none refuses the group."""
    rollout_sample_filter_path: str | None = None
    """(args, [group]) -> None; sets `remove_sample`."""
    options: dict[str, Any] = {}
    """Every option of the topology, flat, by its flag's name: what hooks find on `args`."""
    search_paths: list[str] = []
    """Directories (the topology's) appended to the child's sys.path."""

    def args(self) -> Args:
        """The `args` of every hook. Raises ConfigError when the YAML cannot be read."""
        own = {
            "rm_type": None if is_plugin_path(self.use) else self.use,
            "custom_rm_path": self.use if is_plugin_path(self.use) else None,
            "rm_url": self.rm_url,
            "reward_key": self.reward_key,
            "eval_reward_key": self.eval_reward_key,
            "group_rm": self.group_rm,
            "dynamic_sampling_filter_path": self.dynamic_sampling_filter_path,
            "buffer_filter_path": self.buffer_filter_path,
            "rollout_sample_filter_path": self.rollout_sample_filter_path,
            "custom_config_path": self.custom_config_path,
        }
        return Args({**self.options, **own}, custom_config_path=self.custom_config_path)

    def hook_samples(self, samples: Sequence[Sample]) -> list[HookSample]:
        """What a hook gets for `samples`."""
        group_size = int(self.options.get("n_samples_per_prompt") or 0)
        return [hook_sample(sample, group_size=group_size) for sample in samples]


class FailureKind(StrEnum):
    """Why a sample has no score."""

    TIMEOUT = "timeout"
    """It was not judged before its deadline."""
    CRASH = "crash"
    """The process ended while judging it."""
    INVALID = "invalid"
    """What came back is no reward."""
    EXCEPTION = "exception"
    """The function raised."""


class RewardFailure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sample that could not be judged; never a score."""

    kind: FailureKind
    message: str
    """Names the sample and what happened."""
    traceback: str = ""
    """The function's traceback, or the end of what a crashed process wrote to stderr."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the filters say about a scored group."""

    keep: bool
    reason: str = ""
    """Why it is refused."""
    removed: list[int] = []
    """Positions in the group of samples to keep out of the loss."""


def name_of(sample: Sample) -> str:
    """How errors name a sample."""
    return f"group {sample.group_id} sample {sample.index}"


def plain(value: Any) -> Any:
    """Numpy and torch values, at any depth, as Python ones. Raises RewardError for what cannot travel."""

    def convert(given: Any) -> Any:
        if hasattr(given, "tolist"):
            return given.tolist()
        raise TypeError(f"{type(given).__name__} is neither a number, a text, a list nor a dict")

    try:
        return msgspec.to_builtins(value, enc_hook=convert, str_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(str(error)) from error


def _number(value: Any) -> float | None:
    """`value` as a float when it is a number (of numpy or torch too), else None."""
    if not isinstance(value, (bool, int, float)) and hasattr(value, "item"):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # an array of several numbers
            return None
    try:
        return float(value) if isinstance(value, (bool, int, float)) else None
    except OverflowError:
        return None


def normalise(value: Any, sample: Sample, hook: HookSample, *, spec: RewardSpec) -> Score:
    """The Score that `value`, returned for `sample`, means. Raises RewardError naming both.

    What the function added to the metadata of `hook`, its copy, its `remove_sample` and its
    `teacher_log_probs` come along.
    """
    where = f'reward "{spec.use}": {name_of(sample)}'
    key = (spec.eval_reward_key or spec.reward_key) if sample.lane == Lane.EVAL else spec.reward_key
    number, detail = _selected(value, key, where)
    if number is None or not math.isfinite(number):
        raise RewardError(f"{where}: returned {_shown(value)}; a finite number, a bool or a dict is allowed")
    teacher = _teacher_logprobs(hook.teacher_log_probs, sample, where)
    try:
        score = Score(
            reward=number,
            detail=plain(detail),
            remove_sample=bool(hook.remove_sample),
            metadata=plain(changed_metadata(hook.metadata, sample.metadata)),
            teacher_logprobs=teacher,
        )
    except RewardError as error:
        raise RewardError(
            f"{where}: a returned dict or added metadata holds a value that cannot travel: {error}"
        ) from error
    size = len(msgspec.msgpack.encode(score))
    if size > MAX_SCORE_BYTES:
        raise RewardError(
            f"{where}: the score has {size} bytes with the returned dict and the metadata it added; at most "
            f"{MAX_SCORE_BYTES} are allowed; return less, or write it to a file"
        )
    return score


def _selected(value: Any, key: str | None, where: str) -> tuple[float | None, dict[str, Any] | None]:
    """The number in a return value, and the dict it was in."""
    if not isinstance(value, dict):
        return _number(value), None
    if not key:
        raise RewardError(
            f"{where}: returned a dict with {sorted(map(str, value))}; set reward_key to one of them"
        )
    if key not in value:
        raise RewardError(
            f'{where}: returned a dict without reward_key "{key}"; it has {sorted(map(str, value))}'
        )
    return _number(value[key]), value


def _teacher_logprobs(values: Any, sample: Sample, where: str) -> bytes:
    """`sample.teacher_log_probs` as a function left it, packed; empty for None. Raises RewardError."""
    if values is None:
        return b""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or len(values) != sample.num_tokens:
        came = f"{len(values)} values" if isinstance(values, (list, tuple)) else _shown(values)
        raise RewardError(
            f"{where}: set teacher_log_probs to {came}; {sample.num_tokens} numbers are needed, one per "
            "response token"
        )
    numbers = [_number(value) for value in values]
    for place, number in enumerate(numbers):
        if number is None or not math.isfinite(number):
            raise RewardError(
                f"{where}: set teacher_log_probs[{place}] to {_shown(values[place])}; a finite number is "
                "needed"
            )
    return pack_logprobs(numbers)


def _shown(value: Any) -> str:
    return (
        f"{value!r:.80}"
        if value is None or isinstance(value, float)
        else f"{type(value).__name__} {value!r:.80}"
    )


def check_group(values: Any, samples: Sequence[Sample], *, spec: RewardSpec) -> list[Any]:
    """What a batched reward returned, one value a sample. Raises RewardError when it is no such list."""
    where = f'reward "{spec.use}": group {samples[0].group_id}'
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"{where}: returned {_shown(values)}; a list of {len(samples)} rewards is needed")
    if len(values) != len(samples):
        raise RewardError(f"{where}: returned {len(values)} rewards for {len(samples)} samples")
    return list(values)
