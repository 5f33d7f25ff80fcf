"""Fixtures of every suite: the tiny model, and the checks that a test leaves nothing running."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.nursery import close_nursery, own_processes
from tests.support.processes import is_pythons_own, wait_until
from tests.support.world import make_model

# A property is no measurement: how long an example takes says only how busy the machine is. And the same
# examples every time: a failure is repeated by running the test again.
settings.register_profile("asyncrl", deadline=None, derandomize=True)
settings.load_profile("asyncrl")

LEAVE_S = 5.0
"""How long processes and tasks may take to go after the test that started them."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with tokenizer, chat template and prompts. Read only."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session", autouse=True)
def _nursery() -> Iterator[None]:
    """What forks the jobs of tests ends with them."""
    yield
    close_nursery()


@pytest.fixture(autouse=True)
def _no_leaked_processes() -> Iterator[None]:
    """A test ends with the child processes, and the jobs, it began with."""
    before = own_processes()
    yield

    def left() -> set[int]:
        return {pid for pid in own_processes() - before if not is_pythons_own(pid)}

    wait_until(lambda: not left(), "child processes of the test to end", deadline_s=LEAVE_S, show=left)


@pytest.fixture(autouse=True)
def _no_leaked_tasks(request: pytest.FixtureRequest) -> None:
    """A coroutine test, and its fixtures, end with the tasks they began with."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_task_watch")


@pytest.fixture
async def _task_watch() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    pending = (await asyncio.wait(left, timeout=LEAVE_S))[1] if left else set()
    assert not pending, f"the test left tasks running: {pending}"
