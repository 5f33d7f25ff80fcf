"""Roles that nobody runs: what they decide, without links."""

from __future__ import annotations

from pathlib import Path

from asyncrl.actor.base import Context
from asyncrl.roles.generator import GeneratorRole
from tests.desk import make_plan


def idle_generator(place: Path) -> GeneratorRole:
    """A generator of the smallest plan, whose files go to `place`."""
    (place / "metrics").mkdir()
    return GeneratorRole(
        Context(
            name="generator", role="generator", incarnation="life", plan=make_plan(), run_dir=place,
            attempt_dir=place, control_address="memory://control", index=0,
        )
    )  # fmt: skip
