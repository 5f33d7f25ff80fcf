"""A reward that hangs or crashes is a named failure of its group, never a zero and never a stalled run."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncrl.errors import ExitCode
from tests.support.books import assert_closed, reasons, rows
from tests.support.inside import run_inside

TIMEOUT_S = 3.0
"""Nobody but the one that hangs takes as long, however busy the machine is."""
FAULTS = {
    "hang": ("time.sleep(60)", f"took over {TIMEOUT_S:g} s and was killed"),
    "crash": ("os._exit(3)", "exit status 3"),
    "wrong type": ("return 'good'", "str"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_reward_is_named(tmp_path: Path, model: Path, fault: str) -> None:
    line, words = FAULTS[fault]
    (tmp_path / "mine.py").write_text(
        "import os\nimport time\n\n\ndef grade(sample):\n"
        f"    if sample.group_index == 1 and sample.index == 2:\n        {line}\n"
        "    return float(sample.index % 2)\n",
        encoding="utf-8",
    )
    options = {
        "reward.use": f"{tmp_path / 'mine.py'}:grade",
        "reward.timeout_s": TIMEOUT_S,
        "rollout.max_attempts": 2,
    }
    run = run_inside(tmp_path, model, options)
    assert run.code == ExitCode.FINISHED
    assert_closed(run.path)
    assert reasons(run.path)["trained"] == 12
    settled = rows(run.path, "select group_id, note from groups where reason = 'failed'")
    assert [group for group, _ in settled] == [1]
    assert "sample 0: 2 attempts at score failed" in settled[0][1]
    assert words in settled[0][1]
    assert rows(run.path, "select 1 from batch_groups where group_id = 1") == []
