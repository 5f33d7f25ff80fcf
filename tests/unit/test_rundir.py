"""A run directory that the disk refuses is said by name, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncrl.errors import StorageError
from asyncrl.run.rundir import RunDir


def test_a_lock_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match=r"cannot be written: Is a directory; .*launch --resume"):
        RunDir.resume(tmp_path)


def test_an_attempt_that_cannot_be_made_is_an_error_in_words(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError, match=r"attempt-001: cannot be made: Not a directory"):
        run.new_attempt()
