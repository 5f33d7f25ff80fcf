"""The tokenizer and the chat template say what transformers says; broken directories are named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from asyncrl.data.tokenizer import CONTEXT_TOKENS, REBASE_TOKENS, Detokenizer, Tokenizer
from asyncrl.errors import DataError

TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'bad' %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- eos_token }}
    {% if not loop.last %}

    {% endif %}
{%- endfor %}
{%- if documents %}{{ documents }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- endif %}
{%- if strftime_now('%Y') | length != 4 %}bad year{% endif %}
"""
TEXTS = [
    "",
    "hello",
    "Hello,  World!\n\n",
    "a<|im_start|>b<|im_end|>",
    "é 漢字 👩‍👩‍👧 \u2028\ttab",
    "x" * 300,
]
TOOL = {"type": "function", "function": {"name": "é<b>", "parameters": {"type": "object"}}}


def byte_bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["hello hello world world assistant user tools"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return backend


def write_model(root: Path, *, template: Any = TEMPLATE, **config: Any) -> Path:
    root.mkdir(exist_ok=True)
    byte_bpe().save(str(root / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|endoftext|>",
        "image_token": "<|image|>",
        "clean_up_tokenization_spaces": True,
        "chat_template": template,
        **config,
    }
    (root / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ours(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


@pytest.fixture(scope="module")
def theirs(model_dir: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(model_dir))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [False, True])
def test_encodes_and_decodes_as_transformers(ours: Tokenizer, theirs: Any, text: str, special: bool) -> None:
    ids = ours.encode(text, add_special_tokens=special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_those_of_transformers(ours: Tokenizer, theirs: Any) -> None:
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    # Only declared in the configuration, so it is added behind the vocabulary.
    assert ours.token_id("<|image|>") == theirs.convert_tokens_to_ids("<|image|>") == ours.vocab_size - 1


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": " héllo <b> "}],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "stop", "content": "x"},
        ],
        [{"role": "assistant", "content": "a", "thinking": "because"}, {"role": "user", "content": "u"}],
    ],
)
@pytest.mark.parametrize("tools", [None, [], [TOOL]])
@pytest.mark.parametrize("kwargs", [{}, {"add_generation_prompt": False}, {"enable_thinking": False}])
def test_chat_template_renders_as_transformers(
    ours: Tokenizer, theirs: Any, messages: list[dict[str, str]], tools: Any, kwargs: dict[str, Any]
) -> None:
    kwargs = {"add_generation_prompt": True, **kwargs}
    text = ours.apply_chat_template(messages, tools=tools, **kwargs)
    assert text == theirs.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
    assert "assistant\n" in text or not kwargs["add_generation_prompt"]


@pytest.mark.parametrize("kind", ["list", "object", "jinja", "directory"])
def test_templates_are_found_where_transformers_finds_them(tmp_path: Path, kind: str) -> None:
    names = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    configured: Any = {
        "list": [{"name": name, "template": text} for name, text in names.items()],
        "object": names,
    }.get(kind, "unused")
    root = write_model(tmp_path / "m", template=configured)
    if kind in ("jinja", "directory"):
        (root / "chat_template.jinja").write_text(names["default"], encoding="utf-8")
    if kind == "directory":
        (root / "chat_templates").mkdir()
        (root / "chat_templates" / "tool_use.jinja").write_text(names["tool_use"], encoding="utf-8")
    tokenizer = Tokenizer.load(root)
    message = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(message) == "Dx"
    assert tokenizer.apply_chat_template(message, tools=[TOOL]) == ("Dx" if kind == "jinja" else "Tx")


def test_special_tokens_map_counts_where_the_config_lists_no_added_tokens(tmp_path: Path) -> None:
    root = write_model(tmp_path / "m")
    (root / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|endoftext|>"}}', encoding="utf-8"
    )
    assert Tokenizer.load(root).special["eos_token"] == "<|endoftext|>"  # noqa: S105
    write_model(root, added_tokens_decoder={"0": {"content": "<|endoftext|>", "special": True}})
    assert Tokenizer.load(root).special["eos_token"] == "<|im_end|>"  # noqa: S105


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    root = write_model(tmp_path / "m")
    backend = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(root / "tokenizer.json"))
    assert len(Tokenizer.load(root).encode("hello, this is long")) not in (3, 64)


def test_the_template_is_sandboxed(tmp_path: Path) -> None:
    root = write_model(tmp_path / "m", template="{{ messages.append(1) }}{{ ''.__class__.__mro__ }}")
    with pytest.raises(
        DataError, match=r"chat template refused the messages: access to attribute|not safely"
    ):
        Tokenizer.load(root).apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_that_raises_says_what_it_said(ours: Tokenizer) -> None:
    with pytest.raises(DataError, match="refused the messages: unknown role bad"):
        ours.apply_chat_template([{"role": "bad", "content": ""}])


def test_broken_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'hf_checkpoint: ".*absent" is no directory'):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(DataError, match=r"has no tokenizer.json \(found: vocab.txt\)"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", "\xff"])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    root = write_model(tmp_path / "m")
    (root / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"tokenizer_config.json"):
        Tokenizer.load(root)


def test_a_missing_or_broken_template_matters_only_when_it_is_asked_for(tmp_path: Path) -> None:
    without = Tokenizer.load(write_model(tmp_path / "a", template=None))
    assert not without.has_chat_template
    with pytest.raises(DataError, match="no default chat template"):
        without.apply_chat_template([{"role": "user", "content": "x"}])
    broken = Tokenizer.load(write_model(tmp_path / "b", template="{% if %}"))
    with pytest.raises(DataError, match="chat template, line 1"):
        broken.apply_chat_template([{"role": "user", "content": "x"}])


def test_no_heavy_library_is_imported(model_dir: Path) -> None:
    code = f"""import sys
import asyncrl.data.source, asyncrl.data.hook_source
from asyncrl.data.tokenizer import Tokenizer
Tokenizer.load({str(model_dir)!r}).apply_chat_template([{{"role": "user", "content": "x"}}])
assert not {{"torch", "transformers"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def metaspace() -> Tokenizer:
    """SentencePiece style with byte fallback: the first word loses its blank, rare characters are bytes."""
    words = {"<unk>": 0, "</s>": 1, "\u2581hi": 2, "\u2581": 3, "a": 4}
    vocab = words | {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))  # noqa: S106
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, special={}, templates=None)  # type: ignore[arg-type]


def spelled(tokenizer: Tokenizer, text: str, words: bool) -> list[int]:
    if words:
        return tokenizer.encode(text)
    return [5 + byte for byte in text.encode()]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(max_size=200)
    | st.lists(st.sampled_from("aé漢👩 \n"), min_size=90, max_size=150).map("".join),
    cuts=st.lists(st.integers(1, 40), max_size=300),
    byte_fallback=st.booleans(),
)
def test_detokenizer_gives_the_whole_text_however_it_is_cut(
    ours: Tokenizer, text: str, cuts: list[int], byte_fallback: bool
) -> None:
    tokenizer = metaspace() if byte_fallback else ours
    ids = [2, 1, 3, *spelled(tokenizer, text, words=False)] if byte_fallback else ours.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = []
    rest = ids
    for cut in [*cuts, len(ids)]:
        pieces.append(detokenizer.push(rest[:cut]))
        rest = rest[cut:]
    # A character of the text itself may be U+FFFD; otherwise nothing half is ever handed out.
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


def test_detokenizer_leaves_a_cut_character_to_the_next_chunk(ours: Tokenizer) -> None:
    ids = ours.encode("ok 漢")
    detokenizer = Detokenizer(ours)
    assert detokenizer.push(ids[:-1]) == "ok "
    resumed = Detokenizer(ours, prefix=ids[:-1])
    assert detokenizer.push(ids[-1:]) == resumed.push(ids[-1:]) == "漢"
    assert detokenizer.push(ids[-3:-1]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_detokenizer_does_not_decode_everything_at_each_push(ours: Tokenizer) -> None:
    detokenizer = Detokenizer(ours)
    for _ in range(1000):
        detokenizer.push([ours.encode("a")[0]])
        assert len(detokenizer._window) <= REBASE_TOKENS + CONTEXT_TOKENS


def test_a_directory_may_be_copied(tmp_path: Path, model_dir: Path, ours: Tokenizer) -> None:
    copied = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    assert Tokenizer.load(copied).encode("hello") == ours.encode("hello")
