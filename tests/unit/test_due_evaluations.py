"""Which versions are evaluated: the first announced at or after each multiple, and the last."""

from __future__ import annotations

import pytest

from asyncrl.buffer.versions import Versions
from asyncrl.messages.version import Manifest


def manifest(version: int) -> Manifest:
    return Manifest(
        run_id="run", version=version, incarnation=1, step=version, digest=f"{version:x}", num_bytes=0,
        tensors=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bundles", "evaluated"),
    [
        ([[0], [1], [2], [3], [4], [5], [6], [7], [8]], [0, 2, 4, 6, 8]),
        # What is published while nobody announces is announced as one.
        ([[0], [1], [2], [3, 4, 5], [6, 7], [8]], [0, 2, 5, 7, 8]),
        ([[0], [1], [2, 3, 4, 5, 6, 7], [8]], [0, 7, 8]),
        ([[0], [1], [2, 3], [4, 5], [6, 7, 8]], [0, 3, 5, 8]),
    ],
    ids=["each announced", "some at once", "multiples passed over", "the last with others"],
)
def test_a_multiple_is_evaluated_with_the_version_announced_for_it(
    bundles: list[list[int]], evaluated: list[int]
) -> None:
    """Fails when a version has to be a multiple itself, and when one is evaluated for two multiples."""
    versions = Versions(evaluates=True, eval_interval=2, skip_before_train=False)
    found = []
    for bundle in bundles:
        for version in bundle:
            versions.publish(manifest(version))
        assert versions.announce() == manifest(bundle[-1])
        evaluation = versions.start_evaluation(8)
        if evaluation is not None:
            found.append(evaluation.version)
            evaluation.done = evaluation.seen = True
        assert versions.start_evaluation(8) is None
    assert found == evaluated
    assert versions.finished(8)
