"""Writing a topology file: the commented one that `asyncrl init` makes, and the one with every option.

The comments are the schema's documentation, so they cannot go stale.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from asyncrl.topology import catalogue
from asyncrl.topology.catalogue import Option, TableInfo

ORDER = (
    "run",
    "source",
    "rollout",
    "generator",
    "reward",
    "buffer",
    "trainer",
    "algorithm",
    "eval",
    "weights",
)
"""How the tables follow each other in a file: the way a prompt goes."""

STARTER: Mapping[str, Mapping[str, Any]] = {
    "run": {"name": "my-run-%", "num_rollout": 200},
    "source": {
        "prompt_data": "data/train.jsonl",
        "input_key": "prompt",
        "label_key": "label",
        "apply_chat_template": True,
        "rollout_shuffle": True,
    },
    "rollout": {
        "rollout_batch_size": 32,
        "n_samples_per_prompt": 8,
        "rollout_max_response_len": 1024,
        "max_staleness": 2,
    },
    "generator": {"name": "generator", "replicas": 2},
    "reward": {"name": "reward", "use": "math"},
    "trainer": {"hf_checkpoint": "models/my-model", "lr": 1e-6, "save_interval": 20},
    "algorithm": {"correction": "tis"},
    "eval": {"eval_prompt_data": ["held-out", "data/eval.jsonl"], "eval_interval": 20},
}
"""The options that `asyncrl init` writes uncommented."""


def starter() -> str:
    """A topology to start from: a few options set, all others as comments with their defaults."""
    head = (
        "# A topology of asyncrl. `asyncrl check FILE` says what it compiles to, `asyncrl explain OPTION`\n"
        "# what an option means, `asyncrl launch --topology FILE` runs it. Options that are commented out\n"
        "# have the default shown.\n"
    )
    return head + render(STARTER, everything=False)


def render(values: Mapping[str, Mapping[str, Any]], *, everything: bool) -> str:
    """The file with these values; with `everything` the other options stand there with their defaults, too.

    An option without a default (None) that has no value here is always a comment: TOML has no null.
    """
    return "".join(
        "\n" + "\n".join(_table(catalogue.tables()[name], values.get(name, {}), everything=everything)) + "\n"
        for name in ORDER
    )


def literal(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def _table(table: TableInfo, values: Mapping[str, Any], *, everything: bool) -> Iterator[str]:
    _, _, title = table.doc.partition(": ")
    yield f"[[{table.name}]]" if table.is_array else f"[{table.name}]"
    yield f"# {title[:1].upper()}{title[1:]}"
    for option in table.options.values():
        yield from _option(option, values, everything=everything)


def _option(option: Option, values: Mapping[str, Any], *, everything: bool) -> Iterator[str]:
    yield ""
    yield from textwrap.wrap(
        option.doc, width=100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    if option.name in values:
        yield f"{option.name} = {literal(values[option.name])}"
    elif option.default is None:
        yield f"# {option.name} = ({catalogue.type_in_words(option.type)})"
    else:
        yield f"{'' if everything else '# '}{option.name} = {literal(option.default)}"
