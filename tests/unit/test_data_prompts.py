"""A row becomes a prompt by slime's rules, or says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from asyncrl.data.jsonl import LineError
from asyncrl.data.prompts import PromptBuilder, PromptSpec
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.errors import DataError
from asyncrl.messages.sample import Prompt, tokens_of

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}{% if tools %}tools{% endif %}{{ extra }}"
)


def load(root: Path, *, template: str | None = TEMPLATE) -> Tokenizer:
    vocab = {word: i for i, word in enumerate(["?", "user", "tools", "plus", "one", "two"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="?"))  # noqa: S106 - a word
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    return Tokenizer.load(root)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load(tmp_path)


def build(tokenizer: Tokenizer, row: dict[str, Any], **spec: Any) -> Prompt:
    builder = PromptBuilder(tokenizer, spec=PromptSpec(**spec), dataset="d")
    assert builder.problem(row) is None
    prompt = builder.build(row)
    assert prompt is not None
    return prompt


def test_a_plain_string_is_tokenised_as_it_is(tokenizer: Tokenizer) -> None:
    prompt = build(
        tokenizer, {"q": "one plus two", "a": 3, "metadata": {"k": [1]}}, input_key="q", label_key="a"
    )
    assert tokens_of(prompt.tokens).tolist() == [4, 3, 5]
    assert (prompt.text, prompt.messages, prompt.label) == ("one plus two", None, 3)
    assert (prompt.metadata, prompt.dataset) == ({"k": [1]}, "d")


def test_a_string_becomes_one_user_message_under_the_template(tokenizer: Tokenizer) -> None:
    prompt = build(
        tokenizer, {"input": "one"}, apply_chat_template=True, apply_chat_template_kwargs={"extra": "plus"}
    )
    assert prompt.text == "user one plus"
    assert tokens_of(prompt.tokens).tolist() == [1, 4, 3]
    assert prompt.label is None


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_messages_and_tools_reach_the_template_and_the_reward(tokenizer: Tokenizer, tools: Any) -> None:
    messages = [{"role": "user", "content": "one"}]
    row = {"input": messages, "tools": tools, "metadata": None}
    prompt = build(tokenizer, row, apply_chat_template=True)
    assert prompt.text == "user one tools"
    assert prompt.messages == messages
    assert prompt.metadata == {"tools": [{"name": "f"}]}


BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'no "input" (input_key); its keys are: b, c': ({"c": 1, "b": 2}, {}),
    '"input" is int; allowed': ({"input": 1}, {}),
    '"input" is an empty string': ({"input": ""}, {}),
    '"input" is an empty list': ({"input": []}, {"apply_chat_template": True}),
    'must be a message with a "role"': ({"input": ["x"]}, {"apply_chat_template": True}),
    "needs apply_chat_template = true": ({"input": [{"role": "user", "content": "x"}]}, {}),
    'no label: "y" (label_key) is missing; its keys are: input': ({"input": "x"}, {"label_key": "y"}),
    'no label: "y" (label_key) is null': ({"input": "x", "y": None}, {"label_key": "y"}),
    '"metadata" is str; metadata must be an object': ({"input": "x", "metadata": "m"}, {}),
    '"tools" is dict; tools must be a list': ({"input": "x", "tools": {}}, {}),
    '"tools" is a string that is not JSON': ({"input": "x", "tools": "{"}, {}),
    "label: it holds an integer over 64 bits": ({"input": "x", "y": 2**70}, {"label_key": "y"}),
    "prompt: it holds half a surrogate pair": ({"input": "\ud800"}, {}),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_says_what_is_wrong(tokenizer: Tokenizer, reason: str) -> None:
    row, spec = BAD_ROWS[reason]
    problem = PromptBuilder(tokenizer, spec=PromptSpec(**spec)).problem(row)
    assert problem is not None
    assert reason in problem


def test_a_label_may_be_anything_but_null(tokenizer: Tokenizer) -> None:
    for label in ("", 0, False, [1, {"a": None}], {"x": 1.5}):
        assert build(tokenizer, {"input": "one", "y": label}, label_key="y").label == label


def test_the_limit_counts_tokens_after_the_template(tokenizer: Tokenizer) -> None:
    for limit, kept in ((2, False), (3, True)):
        spec = PromptSpec(apply_chat_template=True, rollout_max_prompt_len=limit)
        prompt = PromptBuilder(tokenizer, spec=spec).build({"input": "one two"})
        assert (prompt is not None) == kept


def test_what_the_template_refuses_and_what_has_no_tokens_is_a_line_error(tokenizer: Tokenizer) -> None:
    templated = PromptBuilder(tokenizer, spec=PromptSpec(apply_chat_template=True))
    with pytest.raises(LineError, match="refused the messages: no"):
        templated.build({"input": [{"role": "bad", "content": "x"}]})
    with pytest.raises(LineError, match="no tokens"):
        PromptBuilder(tokenizer, spec=PromptSpec()).build({"input": "   "})


def test_a_template_that_is_asked_for_must_exist(tmp_path: Path) -> None:
    bare = load(tmp_path, template=None)
    with pytest.raises(DataError, match="prompt_data: apply_chat_template is true, but the tokenizer has no"):
        PromptBuilder(bare, spec=PromptSpec(apply_chat_template=True))
    assert build(bare, {"input": "one"}).text == "one"
