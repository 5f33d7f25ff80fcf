"""Whole runs in this process: the command's own way, on the memory link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from asyncrl.cli.run import launch
from tests.support.world import Options, write_topology


class Finished(NamedTuple):
    """A run that has ended."""

    code: int
    path: Path

    def metrics(self, member: str) -> list[dict[str, Any]]:
        """Rows that a member wrote, in order."""
        text = (self.path / "metrics" / f"{member}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def detail(self) -> str:
        """What status.json says about how it ended."""
        return str(json.loads((self.path / "status.json").read_bytes())["detail"])


def run_inside(place: Path, model: Path, options: Options | None = None, *, name: str = "run") -> Finished:
    """Launch, see it through, return how it ended."""
    topology = write_topology(place, model, options)
    code = launch(topology, overrides=[], resume=None, in_process=True, name=name, plain=True)
    return Finished(code, place / "runs" / name)
