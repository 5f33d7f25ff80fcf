"""What the fault tests share: runs slow enough that a victim can be caught at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PATIENT_REWARD = '''"""A reward that takes its time."""
import hashlib
import time


def grade(sample):
    time.sleep(0.1)
    return float(hashlib.sha256(sample.response.encode()).digest()[0] % 2)
'''


@pytest.fixture
def slow(tmp_path: Path) -> dict[str, Any]:
    """Two generators whose answers take half a second, two reward workers that take 0.1 s a sample."""
    (tmp_path / "patient.py").write_text(PATIENT_REWARD, encoding="utf-8")
    return {
        "generator.replicas": 2,
        "generator.concurrency": 4,
        "generator.scripted": {
            "median": 50.0, "sigma": 0.4, "max_tokens": 100, "vocab_size": 90, "token_latency_s": 0.01
        },
        "rollout.rollout_max_response_len": 100,
        "rollout.max_staleness": 2,
        "reward.replicas": 2,
        "reward.batch": 4,
        "reward.use": "patient.py:grade",
        "run.heartbeat_s": 0.5,
        "run.dead_after_s": 20.0,
    }  # fmt: skip
