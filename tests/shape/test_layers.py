"""Who may import whom: lower layers never higher ones, roles never each other, and torch stays put."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "asyncrl"
LAYERS = (
    {"errors"},
    {"messages"},
    {"topology", "link", "obs"},
    {"actor"},
    {"algo", "rewards", "buffer", "weights", "data"},
    {"engines", "train", "sim"},
    {"roles"},
    {"run"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TORCH_PACKAGES = {"algo", "weights", "engines", "train"}
TYPES_ONLY = "asyncrl.engines.base"
LIGHT = ("source", "buffer", "reward")
HEAVY = ("torch", "transformers", "sglang", "megatron")


def modules() -> Iterator[tuple[str, Path]]:
    """(package of the layer list, file) for every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


def imports(path: Path, *, runtime_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; `from a import b` counts as a.b, which may be a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    skipped = set(_type_checking(tree)) if runtime_only else set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def _type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.body:
                yield from ast.walk(statement)


def test_every_package_has_a_layer() -> None:
    assert {name for name, _ in modules()} - set(RANK) == set()


def test_lower_layers_never_import_higher_ones() -> None:
    wrong = []
    for name, path in modules():
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] != "asyncrl" or len(parts) < 2 or module.startswith(TYPES_ONLY):
                continue
            if parts[1] in RANK and RANK[parts[1]] > RANK[name]:
                ranks = f"layer {RANK[name]} imports layer {RANK[parts[1]]}"
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {ranks}: {module}")
    assert wrong == []


def test_a_role_never_imports_a_role() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for path in sorted((PACKAGE / "roles").glob("*.py"))
        if path.stem != "__init__"
        for line, module in imports(path)
        if module.startswith("asyncrl.roles.")
    ]
    assert wrong == []


def test_torch_is_imported_only_where_tensors_live() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name} imports {module}"
        for name, path in modules()
        if name not in TORCH_PACKAGES
        for line, module in imports(path)
        if module.split(".")[0] == "torch"
    ]
    assert wrong == []


def test_the_engine_interface_is_types_only() -> None:
    allowed = ("__future__", "collections.abc", "enum", "typing", "msgspec", "asyncrl.messages")
    runtime = [module for _, module in imports(PACKAGE / "engines" / "base.py", runtime_only=True)]
    assert [module for module in runtime if not module.startswith(allowed)] == []


def test_algorithms_do_not_wait() -> None:
    waits = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((PACKAGE / "algo").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        if isinstance(node, waits)
    ]
    assert wrong == []


def loaded_by(module: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after importing a module."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_console_script_loads_nothing_heavy() -> None:
    assert loaded_by("asyncrl.cli.main") == set()


@pytest.mark.parametrize("module", [f"asyncrl.roles.{name}" for name in LIGHT] + ["asyncrl.actor.supervisor"])
def test_light_processes_load_nothing_heavy(module: str) -> None:
    parent = PACKAGE.joinpath(*module.split(".")[1:-1], "__init__.py")
    if not parent.exists() or importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    assert loaded_by(module) == set()
