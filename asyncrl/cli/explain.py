"""`asyncrl explain`: what an option means, by our name or by the name another trainer gave it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import typer

from asyncrl.errors import ConfigError
from asyncrl.topology import catalogue, foreign, presets
from asyncrl.topology.catalogue import Option, TableInfo
from asyncrl.topology.ranges import RANGES
from asyncrl.topology.template import literal

WIDTH = 96
"""Columns of wrapped text."""


def explain(name: str | None) -> None:
    """Prints it.

    Raises:
        ConfigError: nobody we know has an option of that name.
    """
    for line in explanation(name):
        typer.echo(line)


def explanation(name: str | None) -> list[str]:
    """The lines for a table, a `table.key`, a bare key, a foreign flag, or None for the list of tables."""
    if name is None:
        return list(_all_tables())
    tables = catalogue.tables()
    table, _, key = name.strip("[]").partition(".")
    if table in tables and not key:
        return list(_table(tables[table]))
    key = foreign.normalised(key or table)
    if table in tables and key in tables[table].options:
        return list(_option(tables[table].options[key]))
    same = [] if table in tables else catalogue.options_named(key)
    if same:
        return [line for option in same for line in [*_option(option), ""]][:-1]
    return _foreign(name, key)


def _foreign(name: str, key: str) -> list[str]:
    known = foreign.look_up(key)
    if known is None:
        everything = [
            option.name for table in catalogue.tables().values() for option in table.options.values()
        ]
        close = catalogue.did_you_mean(key, [*everything, *foreign.RENAMED])
        raise ConfigError(f'explain: unknown option "{name}"{close}; `asyncrl explain` lists the tables')
    if not known.ours:
        return [f"{key}: {known.says}"]
    table, _, ours = known.ours.partition(".")
    head = f"{key}: asyncrl's name is {known.ours}" + (f" ({known.says})" if known.says else "")
    return [head, "", *_option(catalogue.tables()[table].options[ours])]


def _all_tables() -> Iterator[str]:
    yield "The tables of a topology file; `asyncrl explain TABLE` lists a table's options."
    yield ""
    for table in catalogue.tables().values():
        yield from _entry(_heading(table), f"{_title(table)} {len(table.options)} options.", indent=14)


def _table(table: TableInfo) -> Iterator[str]:
    yield f"{_heading(table)}  {_title(table)}"
    yield ""
    for option in table.options.values():
        first, _, _ = option.doc.partition(". ")
        yield from _entry(
            f"{option.name} = {_default(option)}", first.rstrip(".") + ".", indent=4, below=True
        )


def _option(option: Option) -> Iterator[str]:
    yield option.path
    yield from textwrap.wrap(option.doc, WIDTH, initial_indent="  ", subsequent_indent="  ")
    yield ""
    for label, text in _facts(option):
        if text:
            yield f"  {label + ':':<14}{text}"
    if option.path == "algorithm.correction":
        yield from _presets()


def _presets() -> Iterator[str]:
    yield ""
    yield "  presets:"
    for name, flags, says in presets.listing():
        yield from _entry(name, f"{flags or 'nothing'}: {says}.", indent=4, below=True)


def _facts(option: Option) -> Iterator[tuple[str, str]]:
    yield "type", catalogue.type_in_words(option.type)
    yield "default", _default(option)
    yield "allowed", str(RANGES.get(option.path, ""))
    yield "slime, Miles", foreign.counterpart(option) or "no counterpart"
    yield "override", f"--set {option.path}=VALUE"


def _default(option: Option) -> str:
    if option.required:
        return "(required)"
    return "(none)" if option.default is None else literal(option.default)


def _heading(table: TableInfo) -> str:
    return f"[[{table.name}]]" if table.is_array else f"[{table.name}]"


def _title(table: TableInfo) -> str:
    _, _, title = table.doc.partition(": ")
    return title


def _entry(head: str, text: str, *, indent: int, below: bool = False) -> Iterator[str]:
    lines = textwrap.wrap(text, WIDTH - indent)
    if below:
        yield f"  {head}"
    else:
        yield f"{head:<{indent}}{lines[0]}"
        lines = lines[1:]
    yield from (f"{'':<{indent}}{line}" for line in lines)
