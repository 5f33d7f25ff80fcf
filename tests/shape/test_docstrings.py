"""Everything public is documented, and so is every option of a topology."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from asyncrl.topology import catalogue
from asyncrl.topology.schema import Topology

ROOT = Path(__file__).parents[2]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def trees() -> list[tuple[str, ast.Module]]:
    """(path, syntax tree) of every module of the package."""
    paths = sorted((ROOT / "asyncrl").rglob("*.py"))
    return [
        (str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        for path in paths
    ]


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes and functions, and the public methods of public classes."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


@cache
def documented_methods() -> frozenset[str]:
    """Names of methods that some class documents: an implementation of an interface need not repeat it."""
    return frozenset(
        name.partition(".")[2]
        for _, tree in trees()
        for name, node in public(tree.body)
        if "." in name and ast.get_docstring(node)
    )


def test_every_module_says_what_it_owns() -> None:
    assert [path for path, tree in trees() if not ast.get_docstring(tree)] == []


def test_everything_public_is_documented() -> None:
    missing = [
        f"{path}:{node.lineno}: {name}"
        for path, tree in trees()
        for name, node in public(tree.body)
        if not ast.get_docstring(node) and name.partition(".")[2] not in documented_methods()
    ]
    assert missing == []


def test_every_option_of_a_topology_is_documented() -> None:
    missing = [
        option.path
        for table in catalogue.tables().values()
        for option in table.options.values()
        if len(option.doc) < len("None: on.")
    ]
    assert missing == []
    assert all(table.doc.startswith(("[", "[[")) for table in catalogue.tables().values())
    assert set(catalogue.field_docs(Topology)) == set(catalogue.tables())
