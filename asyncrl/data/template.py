"""Chat templates: renders messages to text exactly as transformers does, without importing it.

Owns the template environment (names and filters a template may use). A template comes with the model and is
not trusted: it runs in jinja2's immutable sandbox, and rendering is all that it can do. Equality with
`AutoTokenizer.apply_chat_template` is held by tests/unit/test_data_tokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from asyncrl.errors import DataError

# The names under which data passes a message's reasoning; templates read the first, gpt-oss's the second.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text in some templates: a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The statements between the two tags."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - templates mean the local day, as in transformers


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which models never saw in training.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    # Autoescape stays off: the result is a prompt, not HTML.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _with_reasoning_aliases(message: Mapping[str, Any]) -> dict[str, Any]:
    values = (message.get(key) for key in REASONING_KEYS)
    reasoning = next((value for value in values if value is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class ChatTemplates:
    """The named templates of one model; most models have only `default`. Compiled on first use."""

    def __init__(self, templates: Mapping[str, str], *, where: str) -> None:
        """`templates` maps names to jinja2 source; `where` names the model in errors."""
        self._sources = dict(templates)
        self._compiled: dict[str, jinja2.Template] = {}
        self._where = where

    def __len__(self) -> int:
        return len(self._sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt text. DataError: no template, it does not compile, or it refuses the messages."""
        template = self._template(with_tools=tools is not None)
        known: dict[str, Any] = {
            "messages": [_with_reasoning_aliases(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render({**known, **variables})
        except Exception as error:  # a template is code of the model's: it fails with whatever it runs into
            raise DataError(
                f"{self._where}: the chat template refused the messages: {_cause(error)}"
            ) from error

    def _template(self, *, with_tools: bool) -> jinja2.Template:
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            known = ", ".join(sorted(self._sources)) or "none"
            raise DataError(
                f"{self._where}: the tokenizer has no default chat template (templates: {known}), but one "
                "is asked for; set apply_chat_template = false, or add chat_template.jinja to the directory."
            )
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._sources[name])
            except jinja2.TemplateSyntaxError as error:
                raise DataError(
                    f"{self._where}: chat template, line {error.lineno}: {error.message}"
                ) from error
        return self._compiled[name]


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
