"""What options a topology file may hold: every table and key with its type, default and documentation.

Read from the schema's structs, so it cannot disagree with them. The documentation is the string under each
field, found in the source text (Python keeps no such strings at run time). Never decides whether a value is
good: `decode` checks types, `checks` ranges and combinations.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import types
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import msgspec

from asyncrl.topology.schema import Topology

_PLURALS = {"an integer": "integers", "a number": "numbers", "a string": "strings"}
"""How list elements are called; whatever is not here keeps its singular."""


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One key of one table."""

    table: str
    name: str
    type: Any
    """The annotation, resolved."""
    required: bool
    default: Any
    """None for a required option, too."""
    doc: str
    """The string under the field, on one line."""

    @property
    def path(self) -> str:
        """`table.key`."""
        return f"{self.table}.{self.name}"


class TableInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One table of the file."""

    name: str
    is_array: bool
    """Written [[name]], any number of times."""
    struct: type[msgspec.Struct]
    doc: str
    options: dict[str, Option]


@cache
def tables() -> dict[str, TableInfo]:
    """Every table by name, in the order of `Topology`; the mapping is shared: read only."""
    return {field.name: _table(field) for field in msgspec.structs.fields(Topology)}


def options_named(name: str) -> list[Option]:
    """The options with that key, in whichever tables have one."""
    return [table.options[name] for table in tables().values() if name in table.options]


def type_in_words(kind: Any) -> str:
    """What a value of that annotation looks like in TOML: "an integer", 'one of "a", "b"', ..."""
    if is_optional(kind):
        return type_in_words(without_none(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{value}"' for value in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        element = type_in_words(typing.get_args(kind)[0])
        return f"a list of {_PLURALS.get(element, element)}"
    if typing.get_origin(kind) is dict:
        return "a table"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, str(kind))


def is_optional(kind: Any) -> bool:
    """Whether None (the option left out) is one of the annotation's values."""
    return isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)


def without_none(kind: Any) -> Any:
    """The annotation T of `T | None`; any other annotation as it is."""
    if not is_optional(kind):
        return kind
    (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
    return inner


def allowed_values(option: Option) -> list[str]:
    """The values of an option that takes one of a few; empty for all others."""
    kind = without_none(option.type)
    return [str(value) for value in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest of the known words, or nothing."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f'; did you mean "{close[0]}"?' if close else ""


def _table(field: msgspec.structs.FieldInfo) -> TableInfo:
    is_array = typing.get_origin(field.type) is list
    struct = typing.get_args(field.type)[0] if is_array else field.type
    docs = field_docs(struct)
    options = {
        inner.name: Option(
            table=field.name,
            name=inner.name,
            type=inner.type,
            required=inner.required,
            default=_default(inner),
            doc=docs.get(inner.name, ""),
        )
        for inner in msgspec.structs.fields(struct)
    }
    doc = " ".join(inspect.cleandoc(struct.__doc__ or "").split())
    return TableInfo(name=field.name, is_array=is_array, struct=struct, doc=doc, options=options)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.required:
        return None
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def field_docs(struct: type) -> dict[str, str]:
    """The string under each field of a class, on one line each; empty where there is no source text."""
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(struct)))
    except OSError:
        return {}
    (cls,) = tree.body
    assert isinstance(cls, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = _string(below)
            if text:
                docs[field.target.id] = " ".join(text.split())
    return docs


def _string(node: ast.stmt) -> str:
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return node.value.value
    return ""
