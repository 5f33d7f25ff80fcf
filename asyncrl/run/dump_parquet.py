"""A dump as a Parquet file, a column for each field of a line, for analysis elsewhere.

Columns of numbers are numbers and lists of numbers; messages, label, metadata, spans and details, whose form
is the user's, are JSON text. Needs pyarrow, which asyncrl does not require. Import reads JSON lines only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.errors import ConfigError
from asyncrl.run.dump_format import Line

COLUMNS = {
    "group_id": "int64",
    "index": "int32",
    "batch": "int64",
    "lane": "string",
    "dataset": "string",
    "settled": "string",
    "issue_version": "int64",
    "status": "string",
    "prompt": "string",
    "prompt_tokens": "list int32",
    "messages": "json",
    "label": "json",
    "metadata": "json",
    "response": "string",
    "tokens": "list int32",
    "logprobs": "list float32",
    "loss_mask": "list uint8",
    "spans": "json",
    "response_metadata": "json",
    "reward": "float64",
    "reward_detail": "json",
    "reward_metadata": "json",
    "remove_sample": "bool_",
    "teacher_logprobs": "list float32",
    "routed_experts": "list int16",
    "routed_top_k": "int32",
}
"""Field of a line -> pyarrow's name of its type; "list T" for lists, "json" for text that holds JSON."""
ROWS = 1024
"""Samples of one row group."""


def require() -> Any:
    """Pyarrow. Raises ConfigError that says how to get it."""
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(
            "--format parquet: pyarrow is not installed; install asyncrl with its extra, "
            "asyncrl[parquet], or write JSON lines (--format jsonl)"
        ) from error


def write(file: Path, lines: Iterator[Line]) -> None:
    """Write lines as rows. Raises OSError."""
    arrow = require()
    parquet = importlib.import_module("pyarrow.parquet")
    schema = arrow.schema([(name, _type(arrow, kind)) for name, kind in COLUMNS.items()])
    with parquet.ParquetWriter(file, schema) as out:
        while chunk := list(islice(lines, ROWS)):
            out.write_table(arrow.Table.from_pylist([row(line) for line in chunk], schema=schema))


def row(line: Line) -> dict[str, Any]:
    """A line as the values of its columns."""
    values = {}
    for name, kind in COLUMNS.items():
        value = getattr(line, name)
        if kind == "json":
            value = msgspec.json.encode(value).decode()
        elif kind == "list float32" and value is not None:
            value = [float(number) for number in value]
        elif kind == "string" and value is not None:
            value = str(value)
        values[name] = value
    return values


def _type(arrow: Any, kind: str) -> Any:
    if kind == "json":
        return arrow.string()
    outer, _, inner = kind.rpartition(" ")
    made = getattr(arrow, inner)()
    return arrow.list_(made) if outer else made
