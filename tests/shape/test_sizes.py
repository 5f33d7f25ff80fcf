"""Files stay under 400 lines and functions under 60, so that each can be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def files() -> Iterator[Path]:
    """Every Python file that ships."""
    for folder in ("asyncrl", "plugins", "tools"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_there_are_files() -> None:
    assert len(list(files())) > 20


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    too_long = {str(path.relative_to(ROOT)): size for path, size in lengths.items() if size > MAX_FILE_LINES}
    assert too_long == {}


def test_no_function_is_too_long() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_the_code_is_ascii() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in files() if not path.read_bytes().isascii()]
    assert wrong == []
