"""Reading a topology file: TOML, overrides from the command line, and the structs they become.

Relative paths in the file are left as they are: they are relative to the working directory. Combinations of
values are not looked at here; `plan.compile_plan` does that.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.errors import ConfigError
from asyncrl.topology import catalogue, foreign, presets
from asyncrl.topology.catalogue import Option, TableInfo
from asyncrl.topology.decode import Decoder, Key, converts
from asyncrl.topology.schema import Topology


def load(path: str | Path, overrides: Sequence[str] = ()) -> Topology:
    """The topology of a file, with `table.key=value` overrides applied.

    Raises:
        ConfigError: the file cannot be read or is not TOML, or tables, keys, types or values are wrong; one
            line for every problem.
    """
    return parse(_read(Path(path)), overrides, source=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, source: str) -> Topology:
    """The same for the text of a file; `source` is what messages call it."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    return _decode(raw, overrides, source=source)


def override(topology: Topology, overrides: Sequence[str], *, source: str = "topology") -> Topology:
    """A topology that was loaded before, with overrides applied.

    A compiled plan's topology has its derived values filled in, so an override of one of them may need its
    companions, too (global_batch_size with num_steps_per_rollout). An override of algorithm.correction takes
    the place of all corrections that the topology had.
    """
    raw = {
        name: [_given(item) for item in value] if isinstance(value, list) else _given(value)
        for name, value in msgspec.to_builtins(topology).items()
    }
    presets.retract(raw)
    return _decode(raw, overrides, source=source, correction_replaces=True)


def _given(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `asyncrl init {path}` writes one to start from") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: not UTF-8 at byte {error.start}") from None


def _decode(
    raw: dict[str, Any], overrides: Sequence[str], *, source: str, correction_replaces: bool = False
) -> Topology:
    problems: list[str] = []
    overridden: set[Key] = set()
    for text in overrides:
        try:
            overridden.add(_apply(raw, text))
        except ConfigError as error:
            problems.extend(error.problems)
    given = {key for table, _, key in overridden if table == "algorithm"}
    replaces = correction_replaces and "correction" in given
    for problem in presets.expand(raw, replaces=replaces, given=given):
        key = problem.partition(":")[0].removeprefix("algorithm.")
        problems.append(f"{'--set' if key in given else source}: {problem}")
    decoder = Decoder(source, overridden=frozenset(overridden))
    topology = decoder.topology(raw)
    if problems or topology is None:
        raise ConfigError(*problems, *decoder.problems)
    return topology


def _apply(raw: dict[str, Any], text: str) -> Key:
    """Writes one override into the parsed file; returns which key it set."""
    path, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not path:
        raise ConfigError(f"--set {text}: given no value; write --set table.key=value")
    table, *rest = _full_path(path, text)
    info = catalogue.tables().get(table)
    if info is None:
        close = catalogue.did_you_mean(table, catalogue.tables())
        raise ConfigError(
            f"--set {text}: unknown table [{table}]{close}; known: {', '.join(catalogue.tables())}"
        )
    record, index, rest = _record(raw, info, rest, text)
    if not rest:
        raise ConfigError(f"--set {text}: given no key; write --set {table}.key=value")
    _assign(record, info, rest, value)
    return table, index, rest[0]


def _full_path(path: str, text: str) -> list[str]:
    """`lr` -> trainer, lr where one table only has that key; a dotted path is split."""
    if "." in path:
        return path.split(".")
    owners = catalogue.options_named(foreign.normalised(path))
    if len(owners) == 1:
        return owners[0].path.split(".")
    if owners:
        paths = ", ".join(option.path for option in owners)
        raise ConfigError(f"--set {text}: {path} stands in several tables; write one of {paths}")
    known = foreign.look_up(path)
    if known is not None:
        raise ConfigError(f"--set {text}: {known.ours or known.says}; `asyncrl explain {path}` says more")
    raise ConfigError(f"--set {text}: unknown option {path}; write --set table.key=value")


def _record(
    raw: dict[str, Any], info: TableInfo, rest: list[str], text: str
) -> tuple[dict[str, Any], int | None, list[str]]:
    """The table an override means, its position in an array, and what is left of the path."""
    if not info.is_array:
        table = raw.setdefault(info.name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text}: [{info.name}] is not a table in the file")
        return table, None, rest
    items = raw.setdefault(info.name, [{}])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ConfigError(f"--set {text}: [[{info.name}]] is not an array of tables in the file")
    names = [item.get("name", info.options["name"].default) for item in items]
    head = rest[0] if rest else ""
    if head in names:
        return items[names.index(head)], names.index(head), rest[1:]
    if head.isdecimal() and int(head) < len(items):
        return items[int(head)], int(head), rest[1:]
    if len(items) == 1 and (len(rest) == 1 or head in info.options):
        return items[0], 0, rest
    raise ConfigError(
        f"--set {text}: which [[{info.name}]] is meant? write {info.name}.NAME.key=value with one of: "
        f"{', '.join(names)} (or a position, 0 to {len(items) - 1})"
    )


def _assign(record: dict[str, Any], info: TableInfo, path: list[str], text: str) -> None:
    """Sets record[path] to the value; the word none takes the key away, so that its default holds."""
    for name in path[:-1]:
        inner = dict(record[name]) if isinstance(record.get(name), dict) else {}
        record[name] = inner
        record = inner
    if text == "none":
        record.pop(path[-1], None)
        return
    record[path[-1]] = _value(text, info.options.get(path[-1]) if len(path) == 1 else None)


def _value(text: str, option: Option | None) -> Any:
    """A TOML value, or the bare text where that is not TOML or where the option wants a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if set(parsed) != {"value"}:
        return text
    value = parsed["value"]
    bare_fits = option is not None and converts(option, text) and not converts(option, value)
    return text if bare_fits else value
