"""Which of the announced versions a generator serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncrl.messages.version import Manifest
from tests.support.roles import idle_generator


def manifest(version: int, incarnation: int) -> Manifest:
    """A version's manifest without bytes."""
    return Manifest(
        run_id="run",
        version=version,
        incarnation=incarnation,
        step=version,
        digest="",
        num_bytes=0,
        tensors=[],
    )


@pytest.mark.parametrize(
    ("first", "then", "served"),
    [
        ((3, 1), (2, 1), (3, 1)),
        ((3, 2), (3, 1), (3, 2)),
        ((2, 1), (3, 1), (3, 1)),
        ((3, 1), (3, 2), (3, 2)),
    ],
)
async def test_an_announcement_that_was_overtaken_takes_nobody_back(
    tmp_path: Path, first: tuple[int, int], then: tuple[int, int], served: tuple[int, int]
) -> None:
    """Fails when the last announcement to arrive counts: leases come for the newer version.

    Its tokens would be older than their group says, and older than `max_staleness` allows.
    """
    role = idle_generator(tmp_path)
    for version in (first, then):
        role.serving.announce(manifest(*version))
    missing = role.serving.missing
    assert missing is not None
    assert (missing.version, missing.incarnation) == served
    role.metrics.close()
