"""Every shipped topology compiles, the full one names every option, and every console command has help."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import typer

from asyncrl.cli.main import app
from asyncrl.topology import catalogue, load, plan, template

LAUNCHERS = Path(__file__).parents[2] / "launchers"
COMMANDS = {command.callback.__name__: command for command in app.registered_commands if command.callback}
IMPLEMENTATIONS = {
    "run": ["launch"],
    "live": ["attach", "detach", "status", "keys"],
    "records": ["replay", "audit", "story"],
    "doctor": ["doctor"],
}


@pytest.mark.parametrize("path", sorted(LAUNCHERS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_topology_compiles(path: Path) -> None:
    compiled = plan.compile_plan(load.load(path), source=str(path))
    assert compiled.processes
    assert path.read_bytes().isascii()


def test_the_starter_compiles_and_changes_only_what_it_sets() -> None:
    topology = load.parse(template.starter(), source="starter")
    assert plan.compile_plan(topology).tickets == 96
    assert tomllib.loads(template.starter()) == {
        name: [dict(values)] if catalogue.tables()[name].is_array else dict(values)
        for name, values in {"buffer": {}, "weights": {}, **template.STARTER}.items()
    }


def test_the_full_topology_names_every_option_once() -> None:
    sections: dict[str, list[str]] = {}
    for line in (LAUNCHERS / "full.toml").read_text(encoding="ascii").splitlines():
        if header := re.fullmatch(r"\[\[?(\w+)\]?\]", line):
            keys = sections.setdefault(header[1], [])
        elif key := re.match(r"(?:(\w+) = |# (\w+) = \()", line):
            keys.append(key[1] or key[2])
    assert {name: sorted(keys) for name, keys in sections.items()} == {
        name: sorted(table.options) for name, table in catalogue.tables().items()
    }


def test_the_full_topology_leaves_out_only_options_without_a_default() -> None:
    raw = tomllib.loads((LAUNCHERS / "full.toml").read_text(encoding="ascii"))
    for table in catalogue.tables().values():
        given = raw[table.name][0] if table.is_array else raw[table.name]
        assert all(option.default is None for name, option in table.options.items() if name not in given)


def test_the_synchronous_topology_is_on_policy() -> None:
    assert load.load(LAUNCHERS / "sync.toml").rollout.max_staleness == 0


def test_every_command_and_parameter_has_help() -> None:
    group = typer.main.get_command(app)
    for name in COMMANDS:
        command = group.commands[name]  # type: ignore[attr-defined]
        assert command.help, name
        assert all(getattr(parameter, "help", None) for parameter in command.params), name
    assert group.epilog
    assert "Exit codes" in group.epilog


@pytest.mark.parametrize("module", IMPLEMENTATIONS)
def test_a_command_has_an_implementation_with_its_arguments(module: str) -> None:
    if importlib.util.find_spec(f"asyncrl.cli.{module}") is None:
        pytest.skip(f"asyncrl.cli.{module} is not written yet")
    implementation = importlib.import_module(f"asyncrl.cli.{module}")
    for name in IMPLEMENTATIONS[module]:
        callback = COMMANDS[name].callback
        assert callback is not None
        given = inspect.signature(callback).parameters
        assert set(given) <= set(inspect.signature(getattr(implementation, name)).parameters), name
