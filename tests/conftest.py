"""Fixtures of every suite: the tiny model, and the checks that a test leaves nothing running."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import children, wait_until
from tests.support.world import make_model

LEAVE_S = 5.0
"""How long processes may take to go after the test that started them."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with tokenizer, chat template and prompts. Read only."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _no_leaked_processes() -> Iterator[None]:
    """A test ends with the child processes it began with."""
    before = children(os.getpid())
    yield
    wait_until(
        lambda: children(os.getpid()) <= before,
        "child processes of the test to end",
        deadline_s=LEAVE_S,
        show=lambda: children(os.getpid()) - before,
    )
