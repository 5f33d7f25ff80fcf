"""What user code sees: `HookSample`, a mutable object with slime's `Sample` attributes, and `Args`.

    Sample (packed, shared)  -- hook_sample -->  HookSample (lists, the hook's own copy)
    HookSample  -- prompt_of -->   Prompt      a data source yielded it
    HookSample  -- segment_of -->  Segment     a custom generate function returned it

It owns the translation and its checks; it never runs a hook and never tokenises. Invariant: what a hook does
to its HookSample reaches a Sample only through the functions here, so every length is checked once.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncrl.errors import ConfigError, DataError, ProtocolError
from asyncrl.messages.routing import routing_of, rows_of_hook
from asyncrl.messages.sample import (
    Prompt,
    Sample,
    Segment,
    Span,
    Status,
    logprobs_of,
    mask_of,
    merge_spans,
    pack_logprobs,
    pack_mask,
    pack_tokens,
    tokens_of,
)

GENERATED_REWARD = "generated_reward"
"""Metadata key: the reward a custom generate function set itself; the reward worker takes it as returned."""
REMOVE_SAMPLE = "remove_sample"
"""Metadata key: a custom generate function set `sample.remove_sample`."""

Rendered = tuple[str, Sequence[int]]
"""A prompt after the chat template: its text and its token ids."""


@dataclasses.dataclass
class HookSample:
    """One answer as hooks know it. Names and meanings are slime's; lists are the hook's own to change."""

    group_index: int | None = None
    """The group's ordinal, monotonic over the run."""
    index: int | None = None
    """The sample's ordinal, monotonic over the run; n consecutive ones per group."""
    prompt: str | list[dict[str, Any]] = ""
    """Rendered text, or the OpenAI messages where there is none."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Prompt and response ids, P + R."""
    response: str = ""
    """The decoded response."""
    response_length: int = 0
    """R, tool and observation tokens included."""
    label: Any = None
    """Ground truth as the data has it."""
    reward: Any = None
    """float, or the dict a reward returned; None is not scored."""
    loss_mask: list[int] | None = None
    """R values of 0 and 1. None: all ones."""
    weight_versions: list[str] = dataclasses.field(default_factory=list)
    """One entry per finished call of the engine, "VERSION" or "VERSION.INCARNATION"."""
    rollout_log_probs: list[float] | None = None
    """R values; 0.0 where the loss mask is 0."""
    rollout_routed_experts: Any = None
    """int32 [P + R - 1, layers, experts per token], an array or lists; None where nobody recorded it (rewards
    never get it)."""
    teacher_log_probs: Any = None
    """R values, an array or a list: a teacher's log-probs, for distillation; a reward may set them."""
    remove_sample: bool = False
    """Out of the loss, still part of its group's statistics."""
    status: Status = Status.PENDING
    """Compares equal to slime's strings ("completed", ...)."""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The data's metadata with what generation added; what a hook adds is kept."""
    train_metadata: dict[str, Any] | None = None
    """Given to training hooks."""
    session_id: str | None = None
    """Names the answer; the same through all its resumptions."""
    non_generation_time: float = 0.0
    """Seconds spent in tools and environments."""
    spans: list[Span] = dataclasses.field(default_factory=list)
    """Exact versions of the R response tokens; kept by `append_response_tokens`."""

    Status = Status
    """`sample.Status.COMPLETED`, `Sample.Status.COMPLETED`: as in slime."""

    def get_reward_value(self, args: Any) -> Any:
        """The number of a dict reward (`args.reward_key`), or the reward itself. Raises KeyError."""
        key = getattr(args, "reward_key", None)
        return self.reward[key] if key else self.reward

    @property
    def effective_response_length(self) -> int:
        """Response tokens that are trained on."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, ad-hoc ones too; the status as its string."""
        return {**vars(self), "status": str(self.status.value)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> HookSample:
        """The inverse of `to_dict`; keys that are no field become attributes, as in slime."""
        sample = HookSample()
        for name, value in data.items():
            setattr(sample, name, Status(value) if name == "status" else value)
        return sample

    def append_response_tokens(
        self,
        tokens: Sequence[int],
        *,
        text: str = "",
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
    ) -> None:
        """Add tokens to the response, keeping mask, log-probs and versions in step. Raises ProtocolError.

        Trainable tokens need `log_probs`; the others (tools, hints) get mask 0 and log-prob 0.0. `meta_info`
        is the engine's, for its `weight_version` (and `spans`, where the engine knows them per token).
        """
        if trainable and (log_probs is None or len(log_probs) != len(tokens)):
            given = "none" if log_probs is None else str(len(log_probs))
            raise ProtocolError(
                f"append_response_tokens: {len(tokens)} trainable tokens but {given} log_probs; pass one "
                "log-prob per token, or trainable=False"
            )
        mask = [1] * self.response_length if self.loss_mask is None else self.loss_mask
        self.loss_mask = mask + [int(trainable)] * len(tokens)
        filler = [0.0] * len(tokens)
        self.rollout_log_probs = (self.rollout_log_probs or []) + list(
            log_probs if trainable and log_probs else filler
        )
        self.tokens = self.tokens + list(tokens)
        self.response += text
        self.response_length += len(tokens)
        self._record_version(len(tokens), meta_info or {})

    def _record_version(self, num_tokens: int, meta_info: Mapping[str, Any]) -> None:
        version = meta_info.get("weight_version")
        if version is not None:
            self.weight_versions.append(str(version))
        if "spans" in meta_info:
            self.spans += [Span(*span) for span in meta_info["spans"]]
        elif version is not None:
            self.spans.append(parse_version(str(version), num_tokens=num_tokens, incarnation=0))
        elif self.spans:  # text that no weights sampled counts as its left neighbour's
            last = self.spans.pop()
            self.spans.append(Span(last.version, last.incarnation, last.num_tokens + num_tokens))


def hook_sample(sample: Sample, *, group_size: int = 0) -> HookSample:
    """A hook's own copy of `sample`; `group_size` (n_samples_per_prompt) makes `index` run-wide.

    Without it `index` is the position in the group.
    """
    score = sample.score
    reward: Any = None
    if score is not None:
        reward = score.reward if score.detail is None else copy.deepcopy(score.detail)
    routing = routing_of(sample)
    return HookSample(
        group_index=sample.group_id,
        index=sample.group_id * group_size + sample.index,
        prompt=sample.prompt.text or copy.deepcopy(sample.prompt.messages) or "",
        tokens=tokens_of(sample.prompt.tokens + sample.tokens).tolist(),
        response=sample.text,
        response_length=sample.num_tokens,
        label=copy.deepcopy(sample.prompt.label),
        reward=reward,
        loss_mask=mask_of(sample.loss_mask).tolist(),
        weight_versions=[f"{span.version}.{span.incarnation}" for span in sample.spans],
        rollout_log_probs=logprobs_of(sample.logprobs).tolist(),
        rollout_routed_experts=None if routing is None else routing.astype("int32"),
        teacher_log_probs=logprobs_of(score.teacher_logprobs).tolist()
        if score is not None and score.teacher_logprobs
        else None,
        remove_sample=sample.metadata.get(REMOVE_SAMPLE, False)
        or (score is not None and score.remove_sample),
        status=sample.status,
        metadata=copy.deepcopy(sample.metadata),
        session_id=f"{sample.group_id}-{sample.index}",
        spans=list(sample.spans),
    )


def prompt_of(hook: HookSample, tokenize: Callable[[Any], Rendered], *, dataset: str = "") -> Prompt:
    """The prompt of a sample that a custom data source yielded.

    `tokenize` renders a string or messages to (text, ids); it is not asked where `hook.tokens` is set. Raises
    DataError for an empty prompt and for a sample that has a response already.
    """
    where = f"data source: sample {hook.index}"
    if hook.response_length:
        raise DataError(
            f"{where} has {hook.response_length} response tokens; a data source yields fresh samples"
        )
    messages = None if isinstance(hook.prompt, str) else hook.prompt
    text, ids = (hook.prompt, hook.tokens) if hook.tokens and messages is None else tokenize(hook.prompt)
    if not len(ids):
        raise DataError(f"{where} has an empty prompt; set sample.prompt to text or to a list of messages")
    return Prompt(
        tokens=pack_tokens(ids),
        text=str(text),
        messages=messages,
        label=hook.label,
        metadata=dict(hook.metadata),
        dataset=dataset,
    )


def segment_of(hook: HookSample, base: Sample, *, incarnation: int) -> Segment:
    """What a custom generate function added to `base`, the sample it was given. Raises ProtocolError.

    `incarnation` stamps versions that were written without one. Where the function did not use
    `append_response_tokens`, all its tokens count as the oldest of `weight_versions`.
    """
    where = f"custom generate: group {base.group_id} sample {base.index}"
    mask, log_probs = _checked_arrays(hook, where)
    start = base.num_tokens
    num_prompt = len(base.prompt.tokens) // 4
    given = pack_tokens(hook.tokens)
    if len(hook.tokens) != num_prompt + hook.response_length or not given.startswith(
        base.prompt.tokens + base.tokens
    ):
        raise ProtocolError(
            f"{where}: tokens ({len(hook.tokens)}) must be the prompt's {num_prompt} tokens, unchanged, then "
            f"response_length ({hook.response_length}) response tokens; put inserted text into the response "
            "with loss_mask 0"
        )
    if not hook.response.startswith(base.text):
        raise ProtocolError(
            f"{where}: response no longer starts with the text generated before; append to it"
        )
    routed_experts, routed_top_k = rows_of_hook(
        hook.rollout_routed_experts,
        first=num_prompt + start - 1 if start else 0,
        last=num_prompt + hook.response_length - 1 if hook.response_length > start else 0,
        where=where,
    )
    return Segment(
        tokens=given[4 * (num_prompt + start) :],
        logprobs=pack_logprobs(log_probs[start:]),
        loss_mask=pack_mask(mask[start:]),
        spans=_new_spans(hook, base, incarnation=incarnation, where=where),
        text=hook.response[len(base.text) :],
        metadata=_generated_metadata(hook, base),
        routed_experts=routed_experts,
        routed_top_k=routed_top_k,
    )


def _checked_arrays(hook: HookSample, where: str) -> tuple[list[int], list[float]]:
    mask = [1] * hook.response_length if hook.loss_mask is None else list(hook.loss_mask)
    log_probs = hook.rollout_log_probs
    if log_probs is None:
        if any(mask):
            raise ProtocolError(f"{where}: rollout_log_probs is None but {sum(mask)} tokens are trainable")
        log_probs = [0.0] * hook.response_length
    for name, values in (("loss_mask", mask), ("rollout_log_probs", log_probs)):
        if len(values) != hook.response_length:
            raise ProtocolError(
                f"{where}: {name} has {len(values)} values, response_length is {hook.response_length}"
            )
    if not set(mask) <= {0, 1}:
        raise ProtocolError(f"{where}: loss_mask holds {sorted(set(mask) - {0, 1})[:3]}; 0 and 1 are allowed")
    if bad := [i for i, p in enumerate(log_probs) if mask[i] and (p is None or not math.isfinite(p))]:
        raise ProtocolError(
            f"{where}: rollout_log_probs[{bad[0]}] of a trainable token is {log_probs[bad[0]]}"
        )
    return mask, [p or 0.0 for p in log_probs]


def _new_spans(hook: HookSample, base: Sample, *, incarnation: int, where: str) -> list[Span]:
    num_new = hook.response_length - base.num_tokens
    if num_new == 0:
        return []
    own = hook.spans[len(base.spans) :] if hook.spans[: len(base.spans)] == base.spans else []
    if sum(span.num_tokens for span in own) == num_new:
        return merge_spans(
            [Span(s.version, s.incarnation or incarnation, s.num_tokens) for s in own if s.num_tokens]
        )
    if sum(span.num_tokens for span in hook.spans) == hook.response_length:
        return merge_spans(_after(hook.spans, base.num_tokens, incarnation=incarnation))
    versions = hook.weight_versions[len(base.spans) :] or hook.weight_versions
    if not versions:
        raise ProtocolError(
            f"{where}: weight_versions is empty; append meta_info['weight_version'] of every engine call"
        )
    parsed = [parse_version(v, num_tokens=num_new, incarnation=incarnation) for v in versions]
    return [min(parsed, key=lambda span: (span.version, span.incarnation))]


def _after(spans: list[Span], start: int, *, incarnation: int) -> list[Span]:
    """The part of `spans` behind the first `start` tokens."""
    kept: list[Span] = []
    for span in spans:
        num_tokens = min(span.num_tokens, span.num_tokens - start)
        start = max(0, start - span.num_tokens)
        if num_tokens > 0:
            kept.append(Span(span.version, span.incarnation or incarnation, num_tokens))
    return kept


def parse_version(text: str, *, num_tokens: int, incarnation: int) -> Span:
    """The span that an engine's weight_version ("12", "12.1" or "v12.1") describes. Raises ProtocolError."""
    version, _, life = text.removeprefix("v").partition(".")
    if not version.isdecimal() or (life and not life.isdecimal()):
        raise ProtocolError(
            f'weight version {text!r} is none; "VERSION" or "VERSION.INCARNATION" are allowed'
        )
    return Span(int(version), int(life) if life else incarnation, num_tokens)


def _generated_metadata(hook: HookSample, base: Sample) -> dict[str, Any]:
    added = changed_metadata(hook.metadata, base.metadata)
    if hook.reward is not None:
        added[GENERATED_REWARD] = hook.reward
    if hook.remove_sample:
        added[REMOVE_SAMPLE] = True
    return added


def changed_metadata(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a hook added or changed."""
    return {key: value for key, value in after.items() if key not in before or before[key] != value}


class Args(argparse.Namespace):
    """Every option under its flag's name, as hooks of slime and Miles know `args`.

    `getattr(args, name, default)`, `hasattr` and `vars` work. An option that does not exist raises
    AttributeError with the names close to it.
    """

    def __init__(self, options: Mapping[str, Any], *, custom_config_path: str | None = None) -> None:
        """`options` is flat; keys of the YAML at `custom_config_path` are set over it. Raises ConfigError."""
        custom = read_custom_config(custom_config_path) if custom_config_path else {}
        super().__init__(**{**options, **custom})

    def __getattr__(self, name: str) -> Any:
        close = difflib.get_close_matches(name, vars(self), n=3)
        hint = f"close to it: {', '.join(close)}" if close else "nothing is close to it"
        raise AttributeError(f"args.{name}: no such option; {hint}; own ones come from custom_config_path")


def read_custom_config(path: str) -> dict[str, Any]:
    """The keys of a YAML mapping (slime: --custom-config-path). Raises ConfigError."""
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"custom_config_path: {path} cannot be read: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"custom_config_path: {path} must hold a mapping of names to values")
    return loaded
