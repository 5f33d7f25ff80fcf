"""From a row of data to a `Prompt`: which keys mean what, the chat template, the tokens, the length limit.

Owns no file and no position. The rules are slime's: the prompt is under `input_key`, tools are also copied
into the metadata, no special tokens are added to what the template wrote. Invariant: a prompt that leaves
here can be encoded for the wire and has at least one token.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from asyncrl.data.jsonl import LineError, Row
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.errors import DataError
from asyncrl.messages.codec import MiB
from asyncrl.messages.sample import Prompt, pack_tokens

MAX_PROMPT_BYTES = 16 * MiB
"""Of an encoded prompt: it travels with every lease of its samples. A million tokens with their text fit."""


class PromptSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to read a row; names, meanings and defaults are slime's and Miles'."""

    input_key: str = "input"
    """Key of the prompt: a string or a list of OpenAI messages."""
    label_key: str | None = None
    """Key of the ground truth; every row must then have one that is not null. None: no labels."""
    metadata_key: str = "metadata"
    """Key of an object for the reward; rows may lack it."""
    tool_key: str | None = "tools"
    """Key of tool definitions: a list, or a string of JSON that is one; rows may lack it."""
    apply_chat_template: bool = False
    """Render the prompt with the chat template; a string becomes one user message."""
    apply_chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template."""
    rollout_max_prompt_len: int | None = None
    """Prompts of more tokens are left out. None: no limit."""


class PromptBuilder:
    """Makes prompts for one data set. Stateless, so a row gives the same prompt every time."""

    def __init__(
        self, tokenizer: Tokenizer, *, spec: PromptSpec, dataset: str = "", option: str = "prompt_data"
    ) -> None:
        """`dataset` goes into every prompt. DataError: a chat template is asked for and there is none."""
        if spec.apply_chat_template and not tokenizer.has_chat_template:
            raise DataError(
                f"{option}: apply_chat_template is true, but the tokenizer has no chat template; set "
                "apply_chat_template = false, or add chat_template.jinja to the model directory."
            )
        self.tokenizer = tokenizer
        self.spec = spec
        self.dataset = dataset

    def problem(self, row: Row) -> str | None:
        """Why `row` can never be a prompt, or None. Cheap (no tokenising): for `JsonlIndex.build`."""
        try:
            sizes = {
                "prompt": _encodable("prompt", self._input(row)),
                "label": _encodable("label", self._label(row)),
                "metadata": _encodable("metadata", self._metadata(row)),
            }
            _check_size(sum(sizes.values()), max(sizes, key=lambda name: sizes[name]))
        except LineError as error:
            return str(error)
        return None

    def build(self, row: Row) -> Prompt | None:
        """The prompt of `row`; None if it is longer than `rollout_max_prompt_len`. LineError: it has none."""
        value, metadata = self._input(row), self._metadata(row)
        if self.spec.apply_chat_template:
            messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
            text = self._render(messages, tools=metadata.get("tools"))
        else:
            text = value
        given = value if isinstance(value, list) else None
        return self._finish(text, messages=given, label=self._label(row), metadata=metadata)

    def build_from_hook(
        self, prompt: Any, *, label: Any, metadata: Any, tokens: list[int] | None = None
    ) -> Prompt | None:
        """The same for what a data source of the user's hands over: a string is the final text, as in slime.

        A list of messages is rendered with the chat template, whatever `apply_chat_template` says. `tokens`,
        where the source has them, are taken for a string as they are.
        """
        _check_input(prompt, "prompt")
        metadata = _check_metadata({} if metadata is None else metadata, "metadata")
        for name, value in (("prompt", prompt), ("label", label), ("metadata", metadata)):
            _encodable(name, value)
        if isinstance(prompt, str):
            return self._finish(prompt, messages=None, label=label, metadata=metadata, ids=tokens)
        text = self._render(prompt, tools=metadata.get("tools"))
        return self._finish(text, messages=prompt, label=label, metadata=metadata)

    def _finish(
        self,
        text: str,
        *,
        messages: list[dict[str, Any]] | None,
        label: Any,
        metadata: dict[str, Any],
        ids: list[int] | None = None,
    ) -> Prompt | None:
        ids = ids or self.tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise LineError("the prompt has no tokens")
        limit = self.spec.rollout_max_prompt_len
        if limit is not None and len(ids) > limit:
            return None
        prompt = Prompt(
            tokens=pack_tokens(ids),
            text=text,
            messages=messages,
            label=label,
            metadata=metadata,
            dataset=self.dataset,
        )
        _check_size(len(msgspec.msgpack.encode(prompt)), f"{len(ids)} tokens")
        return prompt

    def _render(self, messages: list[dict[str, Any]], *, tools: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, **{"tools": tools or None, **self.spec.apply_chat_template_kwargs}
            )
        except DataError as error:
            raise LineError(str(error)) from error

    def _input(self, row: Row) -> Any:
        key = self.spec.input_key
        if key not in row:
            raise LineError(f'no "{key}" (input_key); its keys are: {_keys(row)}')
        value = _check_input(row[key], f'"{key}"')
        if isinstance(value, list) and not self.spec.apply_chat_template:
            raise LineError(f'"{key}" is a list of messages, which needs apply_chat_template = true')
        return value

    def _label(self, row: Row) -> Any:
        key = self.spec.label_key
        if key is None:
            return None
        if row.get(key) is None:
            how = "null" if key in row else "missing"
            raise LineError(f'no label: "{key}" (label_key) is {how}; its keys are: {_keys(row)}')
        return row[key]

    def _metadata(self, row: Row) -> dict[str, Any]:
        value = row.get(self.spec.metadata_key)
        metadata = _check_metadata({} if value is None else value, f'"{self.spec.metadata_key}"')
        tools = row.get(self.spec.tool_key) if self.spec.tool_key is not None else None
        return metadata if tools is None else {**metadata, "tools": _tools(tools, self.spec.tool_key)}


def _check_input(value: Any, name: str) -> Any:
    if isinstance(value, str):
        if not value:
            raise LineError(f"{name} is an empty string")
        return value
    if not isinstance(value, list):
        raise LineError(f"{name} is {type(value).__name__}; allowed: a string or a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LineError(f'{name} is a list, so each entry must be a message with a "role"')
    if not value:
        raise LineError(f"{name} is an empty list of messages")
    return value


def _check_metadata(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LineError(f"{name} is {type(value).__name__}; metadata must be an object")
    return value


def _tools(value: Any, key: str | None) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise LineError(f'"{key}" is a string that is not JSON ({error})') from None
    if not isinstance(value, list):
        raise LineError(f'"{key}" is {type(value).__name__}; tools must be a list')
    return value


def _check_size(size: int, most: str) -> None:
    """Refuses a prompt that no message should carry; `most` is what takes the most of it."""
    if size > MAX_PROMPT_BYTES:
        raise LineError(
            f"the prompt has {size} bytes with its label and metadata (most in its {most}); at most "
            f"{MAX_PROMPT_BYTES} are allowed; put what is large into a file, and its name here"
        )


def _encodable(name: str, value: Any) -> int:
    """Its size on the wire. Refuses what cannot travel: lone surrogates, huge integers, foreign objects."""
    try:
        return len(msgspec.msgpack.encode(value))
    except UnicodeEncodeError:
        raise LineError(f"{name}: it holds half a surrogate pair, which is no character") from None
    except OverflowError:
        raise LineError(f"{name}: it holds an integer over 64 bits; write it as a string") from None
    except (TypeError, RecursionError) as error:
        raise LineError(f"{name}: {error}") from None


def _keys(row: Row) -> str:
    return ", ".join(sorted(row)[:8]) or "none"
