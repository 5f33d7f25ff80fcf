"""TOML values -> frozen structs, with every problem found and none only the first.

msgspec stops at the first wrong value of a struct, so the tables are walked here key by key and msgspec
converts single values. Combinations of values are the business of `checks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from asyncrl.topology import catalogue, foreign
from asyncrl.topology.catalogue import Option, TableInfo
from asyncrl.topology.schema import Topology

Key = tuple[str, int | None, str]
"""(table, position in an array of tables, key)."""


class Decoder:
    """Collects problems while it walks a parsed file; `topology` is None as soon as there is one."""

    def __init__(self, source: str, *, overridden: frozenset[Key] = frozenset()) -> None:
        self.source = source
        self.overridden = overridden
        self.problems: list[str] = []

    def topology(self, raw: Mapping[str, Any]) -> Topology | None:
        """The file as structs; look at `problems` when it is None."""
        for name, value in raw.items():
            if name not in catalogue.tables():
                self.problems.append(f"{self.source}: {_unknown_table(name, value)}")
        decoded: dict[str, Any] = {}
        for table in catalogue.tables().values():
            if table.name in raw:
                decoded[table.name] = self._table(table, raw[table.name])
            elif any(option.required for option in table.options.values()):
                self._record(table, {}, index=None)
        return None if self.problems else Topology(**decoded)

    def _table(self, table: TableInfo, value: Any) -> Any:
        if not table.is_array:
            if isinstance(value, dict):
                return self._record(table, value, index=None)
            self.problems.append(f"{self.source}: {_wrong_brackets(table, value)}")
            return None
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return [self._record(table, item, index=i, alone=len(value) == 1) for i, item in enumerate(value)]
        self.problems.append(f"{self.source}: {_wrong_brackets(table, value)}")
        return None

    def _record(
        self, table: TableInfo, value: dict[str, Any], *, index: int | None, alone: bool = False
    ) -> Any:
        where = location(table, value, index=index, alone=alone)
        found = list(self._fields(table, value, index=index, where=where))
        for option in table.options.values():
            if option.required and option.name not in value:
                self.problems.append(
                    f"{self.source}: {where}.{option.name}: required, and not given; add it to "
                    f"[{table.name}] ({catalogue.type_in_words(option.type)}): {option.doc}"
                )
        names = {name for name, _ in found}
        if any(option.required and option.name not in names for option in table.options.values()):
            return None
        return table.struct(**dict(found))

    def _fields(
        self, table: TableInfo, value: dict[str, Any], *, index: int | None, where: str
    ) -> Iterator[tuple[str, Any]]:
        for name, given in value.items():
            option = table.options.get(name)
            source = "--set" if (table.name, index, name) in self.overridden else self.source
            problem = _unknown_key(table, name, given) if option is None else _wrong_value(option, given)
            if problem:
                self.problems.append(f"{source}: {where}.{name}: {problem}")
            elif option is not None:
                yield name, msgspec.convert(given, option.type)


def location(table: TableInfo, value: Mapping[str, Any], *, index: int | None, alone: bool) -> str:
    """How a table is called in a message: `trainer`, `generator "gen-a"`, `generator[1]`."""
    if index is None:
        return table.name
    name = value.get("name")
    if isinstance(name, str):
        return f'{table.name} "{name}"'
    return table.name if alone else f"{table.name}[{index}]"


def converts(option: Option, given: Any) -> bool:
    """Whether the value has the option's type."""
    return not _wrong_value(option, given)


def _wrong_value(option: Option, given: Any) -> str:
    try:
        value = msgspec.convert(given, option.type)
    except msgspec.ValidationError:
        allowed = catalogue.allowed_values(option)
        if allowed and isinstance(given, str):
            ours = foreign.our_value(option.path, given)
            close = f'; write "{ours}"' if ours else catalogue.did_you_mean(given, allowed)
            return f'unknown value "{given}"; allowed: {", ".join(allowed)}{close}'
        words = catalogue.type_in_words(option.type)
        return f"given {in_words(given)}; allowed: {words}{_hint(option, given)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"given {value}; allowed: a finite number"
    return ""


def _hint(option: Option, given: Any) -> str:
    kind = catalogue.without_none(option.type)
    if isinstance(given, str) and kind in {int, float, bool}:
        return "; write it without quotes"
    if kind is str and isinstance(given, int | float) and not isinstance(given, bool):
        return "; write it in quotes"
    if kind is int and isinstance(given, float):
        return "; write it without a decimal point or exponent"
    if kind == list[str] and isinstance(given, str):
        return "; write it in brackets"
    return ""


def in_words(value: Any) -> str:
    """A TOML value as people wrote it, with its type: `"32" (a string)`."""
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    if isinstance(value, str):
        return f'"{value}" (a string)'
    if isinstance(value, int | float):
        return f"{value} ({'an integer' if isinstance(value, int) else 'a number'})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "a table" if isinstance(value, dict) else f"{value} (a {type(value).__name__})"


def _unknown_key(table: TableInfo, name: str, given: Any) -> str:
    plain = foreign.normalised(name)
    if plain in table.options:
        return f"unknown option; write it {plain}"
    owners = sorted({f"[{option.table}]" for option in catalogue.options_named(plain)})
    known = foreign.look_up(plain)
    if owners and not (known and known.ours.startswith(f"{table.name}.")):
        return f"belongs to {' or '.join(owners)}; move it there"
    if known is not None:
        return _translated(known, given)
    close = catalogue.did_you_mean(name, table.options)
    return f"unknown option{close}; `asyncrl explain {table.name}` lists what is allowed here"


def _translated(known: foreign.Foreign, given: Any) -> str:
    if not known.ours:
        return known.says
    text = f"asyncrl's name is {known.ours}"
    value = known.values.get(str(given).lower() if isinstance(given, bool) else str(given))
    if value is not None:
        quoted = value if value in {"true", "false"} else f'"{value}"'
        text += f"; write {known.ours} = {quoted}"
    return f"{text} ({known.says})" if known.says else text


def _unknown_table(name: str, value: Any) -> str:
    if not isinstance(value, dict | list):
        plain = foreign.normalised(name)
        owners = sorted({f"[{option.table}]" for option in catalogue.options_named(plain)})
        if owners:
            return f"{name}: belongs to {' or '.join(owners)}; every option stands in a table"
        known = foreign.look_up(plain)
        if known is not None:
            return f"{name}: {_translated(known, value)}"
    tables = catalogue.tables()
    close = catalogue.did_you_mean(name.rstrip("s"), tables)
    return f"[{name}]: unknown table{close}; known: {', '.join(tables)}"


def _wrong_brackets(table: TableInfo, value: Any) -> str:
    if table.is_array and isinstance(value, dict):
        return f"{table.name}: given [{table.name}]; there may be several: write [[{table.name}]]"
    if not table.is_array and isinstance(value, list):
        return f"{table.name}: given [[{table.name}]]; there is exactly one: write [{table.name}]"
    return f"{table.name}: given {in_words(value)}; allowed: a table, [{table.name}]"
