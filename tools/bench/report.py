"""How a benchmark says what it found: tables, targets and verdicts, the machine, a JSON file.

It measures nothing. A verdict compares a measured figure with the figure that was asked for and, where it
falls short, says by how much.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sqlite3
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

PACKAGES = ("torch", "transformers", "pyzmq", "msgspec", "numpy")
"""Whose versions a result depends on."""
MIB = 1 << 20


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to measure; the same for every benchmark."""

    quick: bool = False
    """Shorter runs, one repeat: to see that it works, not to quote."""
    full: bool = False
    """More repeats of the long ones."""
    seed: int = 0
    profile: bool = False
    """Also say where the time of the measured process goes (where a benchmark can)."""
    work: Path = Path()
    """A directory for runs, emptied by whoever made it."""
    model: Path = Path("tiny_model")
    """The quickstart's model directory."""

    def choose(self, *, quick: int, normal: int, full: int | None = None) -> int:
        """The number that goes with the length of this measurement."""
        if self.quick:
            return quick
        return full if self.full and full is not None else normal


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that was asked for, and the one measured."""

    what: str
    value: float
    bound: float
    unit: str = ""
    at_least: bool = True
    """False: at most."""

    @property
    def met(self) -> bool:
        """Whether the measured figure is good enough."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def verdict(self) -> str:
        """The word met, or by how much it was missed."""
        if self.met:
            return "met"
        gap = abs(self.value - self.bound)
        share = f" ({100 * gap / abs(self.bound):.0f}%)" if self.bound else ""
        return f"missed by {number(gap)}{self.unit}{share}"

    def line(self) -> str:
        """One line for people."""
        sign = ">=" if self.at_least else "<="
        asked = f"{sign} {number(self.bound)}{self.unit}"
        return f"target: {self.what} {asked}: measured {number(self.value)}{self.unit}, {self.verdict}"


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Columns and rows, already in words."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def lines(self) -> list[str]:
        """The table as text: the first column to the left, the others to the right."""
        cells = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [self.title] if self.title else []
        for row in cells:
            padded = [
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  " + "  ".join(padded).rstrip())
        return lines


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """What one benchmark found."""

    name: str
    title: str
    settings: dict[str, Any] = {}
    tables: list[Table] = []
    targets: list[Target] = []
    notes: list[str] = []
    data: dict[str, Any] = {}
    """Raw figures, for the JSON file only."""

    def lines(self) -> list[str]:
        """The section as text."""
        lines = [f"== {self.name}: {self.title}"]
        if self.settings:
            lines.append("   " + "  ".join(f"{key} {value}" for key, value in self.settings.items()))
        for table in self.tables:
            lines += table.lines()
        lines += [f"  {note}" for note in self.notes]
        return lines + [f"  {target.line()}" for target in self.targets]


def number(value: float) -> str:
    """A figure with about three digits that mean something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    """Median and range of repeats."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and the versions that matter. Imports none of them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory": f"{memory / (1 << 30):.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **versions(PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name; "missing" where there is none."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def write(directory: Path, section: Section, *, machine: dict[str, Any], options: Options) -> Path:
    """Keep a section as JSON; returns the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{section.name}.json"
    verdicts = {target.what: target.verdict for target in section.targets}
    report = {"machine": machine, "quick": options.quick, "seed": options.seed, "verdicts": verdicts}
    report["section"] = msgspec.to_builtins(section)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return path
