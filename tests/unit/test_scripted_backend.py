"""The scripted backend keeps the promises of a backend, and takes the time it is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from asyncrl.errors import DataError, StorageError
from asyncrl.messages.sample import Sample
from asyncrl.train.backend import Backend
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend
from tests.train_support import make_groups, make_plan


def loaded(**trainer: Any) -> Backend:
    backend = make_backend(make_plan(Path("unused"), trainer={"backend": "scripted", **trainer}))
    backend.load()
    return backend


def digests(backend: Backend, seeds: list[int]) -> list[str]:
    found = []
    for step, seed in enumerate(seeds):
        backend.train(backend.prepare(make_groups(seed=seed)), rollout_step=step)
        found.append(backend.digest())
    return found


def test_equal_batches_give_equal_weights_and_others_do_not() -> None:
    first, again, other = digests(loaded(), [1, 2]), digests(loaded(), [1, 2]), digests(loaded(), [1, 3])
    assert first == again
    assert first[0] == other[0]
    assert first[1] != other[1]
    assert len({loaded().digest(), *first}) == 3


def test_a_step_takes_the_time_it_is_told() -> None:
    backend = loaded(scripted_step_s=0.05)
    prepared = backend.prepare(make_groups())
    began = time.perf_counter()
    report = backend.train(prepared, rollout_step=0)
    assert time.perf_counter() - began >= 0.05
    assert report.step == 1
    assert report.metrics["rollout/raw_reward"] == pytest.approx(0.5, abs=0.5)


def test_a_restored_trainer_goes_on_with_the_same_weights(tmp_path: Path) -> None:
    whole = digests(loaded(), [1, 2, 3])
    backend = loaded()
    digests(backend, [1, 2])
    path = backend.save(tmp_path, rollout_step=2)
    trainer = Trainer(make_backend(make_plan(Path("unused"), trainer={"backend": "scripted"})))
    assert trainer.start(checkpoint=path) == 2
    assert trainer.train_batch(2, make_groups(seed=3))[1] == whole[2]


def test_a_directory_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none of the scripted backend"):
        loaded().restore(tmp_path)


def test_a_sample_without_a_score_is_refused() -> None:
    groups: list[list[Sample]] = make_groups()
    groups[0][0].score = None
    with pytest.raises(DataError, match="no score"):
        loaded().prepare(groups)
