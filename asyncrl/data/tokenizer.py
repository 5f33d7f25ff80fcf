"""The tokenizer of a Hugging Face model directory, without transformers (which would import torch).

Owns the `tokenizers` object, the special tokens and the chat template of one directory; reads tokenizer.json,
tokenizer_config.json, special_tokens_map.json, chat_template.jinja and chat_templates/*.jinja. Never touches
the network. A `Tokenizer` is not changed after it is loaded and may be shared by threads; a `Detokenizer`
belongs to one response.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from asyncrl.data.template import ChatTemplates
from asyncrl.errors import DataError

# What a decoder writes for bytes that are no character (yet).
REPLACEMENT = "\ufffd"
# Tokens that a Detokenizer keeps as context: enough for decoders that treat the first token specially.
CONTEXT_TOKENS = 8
# A Detokenizer shortens what it decodes again once that many tokens are settled.
REBASE_TOKENS = 64
# Keys that end in "_token" in tokenizer_config.json but are switches.
_SWITCHES = ("add_bos_token", "add_eos_token")


class Tokenizer:
    """Text to token ids and back, and messages to text. Made by `load`."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, special: Mapping[str, str], templates: ChatTemplates
    ) -> None:
        """`special` maps names such as "eos_token" to their text; templates see them as variables."""
        self.backend = backend
        """The `tokenizers.Tokenizer`."""
        self.special = dict(special)
        """Names of special tokens ("bos_token", "eos_token", ...) to their text."""
        self._templates = templates

    @classmethod
    def load(cls, model_dir: str | Path, *, option: str = "hf_checkpoint") -> Tokenizer:
        """The tokenizer in `model_dir`. DataError (naming `option`): files missing or malformed."""
        root = Path(model_dir)
        backend = _load_backend(root, option=option)
        config = _read_object(root / "tokenizer_config.json", option=option)
        special_map = _read_object(root / "special_tokens_map.json", option=option)
        # As transformers: the older file only counts where the newer one does not list the added tokens.
        named = config if "added_tokens_decoder" in config else {**config, **special_map}
        special = _special_tokens(named)
        _add_missing_tokens(backend, config=config, special=special)
        templates = ChatTemplates(_templates(root, config, option=option), where=f"{option}: {root}")
        return cls(backend, special=special, templates=templates)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this, added tokens included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end token; None where the directory names none."""
        return self.token_id(self.special["eos_token"]) if "eos_token" in self.special else None

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token; None where the directory names none."""
        return self.token_id(self.special["pad_token"]) if "pad_token" in self.special else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work at all."""
        return len(self._templates) > 0

    def token_id(self, token: str) -> int | None:
        """Id of one token given by its text, None if the vocabulary has no such token."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens written in it become themselves; none are added unless asked.

        Prompts are encoded without added tokens, as slime does: a template writes its own.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no character come out as U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt text of OpenAI messages, as transformers renders it.

        `kwargs` are variables of the template. DataError: the directory has no template, or the
        template refuses the messages.
        """
        return self._templates.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special, **kwargs},
        )


class Detokenizer:
    """Text of one response while it grows: `push` returns what is certain, a cut character waits.

    Invariant: the texts returned so far, with `flush()`, are `decode` of all tokens pushed so far, however
    they were split (for tokens that spell valid UTF-8). A trailing run of U+FFFD is what waits.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False, prefix: Sequence[int] = ()
    ) -> None:
        """`prefix`: tokens whose text was handed out before, when a response is taken up again."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._returned = 0
        self.push(prefix)

    def push(self, ids: Sequence[int]) -> str:
        """Takes tokens in and returns the text they make certain, possibly empty."""
        self._window.extend(ids)
        text = self._decode(self._window)
        certain = text.rstrip(REPLACEMENT)
        new = certain[self._returned :]
        self._returned = max(self._returned, len(certain))
        if len(self._window) > REBASE_TOKENS:
            self._rebase()
        return new

    def flush(self) -> str:
        """What is still waiting, as U+FFFD: for the end of a response only."""
        text = self._decode(self._window)
        new = text[self._returned :]
        self._returned = len(text)
        return new

    def _rebase(self) -> None:
        # Decoding all tokens at each push would be quadratic. A short context gives the same continuation, as
        # long as it begins and ends on a character and is not skipped altogether.
        context = self._window[-CONTEXT_TOKENS:]
        text = self._decode(context)
        if text.strip() and REPLACEMENT not in text:
            self._window = context
            self._returned = len(text)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _load_backend(root: Path, *, option: str) -> tokenizers.Tokenizer:
    path = root / "tokenizer.json"
    if not root.is_dir():
        raise DataError(
            f'{option}: "{root}" is no directory; give the path of a Hugging Face model directory.'
        )
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{option}: {root} has no tokenizer.json (found: {found}); save the model's tokenizer there in "
            "the fast format: AutoTokenizer.from_pretrained(...).save_pretrained(directory) writes it."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise DataError(f"{option}: {path} cannot be read as a tokenizer: {error}") from error
    # Some files were saved with them on; a prompt is never cut or padded in silence.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_object(path: Path, *, option: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{option}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{option}: {path} must hold a JSON object, found {type(value).__name__}.")
    return value


def _special_tokens(named: Mapping[str, Any]) -> dict[str, str]:
    special = {}
    for name, value in named.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and name not in _SWITCHES and isinstance(content, str):
            special[name] = content
    extra = named.get("extra_special_tokens")
    if isinstance(extra, dict):
        special.update(_special_tokens(extra))
    return special


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, *, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Adds what the configuration declares and tokenizer.json lacks, with the ids that transformers gives."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder", {})
    missing = []
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if entry["content"] not in added:
            fields = {key: value for key, value in entry.items() if not key.startswith("__")}
            missing.append(tokenizers.AddedToken(**fields))
    known = added | {token.content for token in missing}
    named = (content for content in dict.fromkeys(special.values()) if content not in known)
    missing += [tokenizers.AddedToken(content, special=True, normalized=False) for content in named]
    if missing:
        backend.add_tokens(missing)


def _templates(root: Path, config: Mapping[str, Any], *, option: str) -> dict[str, str]:
    """Names to template sources; files win over tokenizer_config.json, as in transformers."""
    found = {path.stem: path for path in sorted((root / "chat_templates").glob("*.jinja"))}
    if (root / "chat_template.jinja").is_file():
        found["default"] = root / "chat_template.jinja"
    try:
        files = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    except (OSError, ValueError) as error:
        raise DataError(f"{option}: a chat template of {root} cannot be read: {error}") from error
    return files or _configured_templates(config.get("chat_template"), where=f"{option}: {root}")


def _configured_templates(value: Any, *, where: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        pairs = [(e.get("name"), e.get("template")) for e in value if isinstance(e, dict)]
        value = dict(pairs)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise DataError(
            f"{where}: chat_template in tokenizer_config.json is a {type(value).__name__} of something else "
            "than templates; allowed: a string, a list of {name, template}, an object of name to template."
        )
    return value
