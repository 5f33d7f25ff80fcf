"""The rewards that need nothing: `exact`, `random`, `deterministic_random`, `none`."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from asyncrl.messages.hooks import HookSample


def exact(args: Any, sample: HookSample) -> float:  # noqa: ARG001
    """1.0 when the response, stripped, is the label as text. Raises ValueError without a label."""
    if sample.label is None:
        raise ValueError("the sample has no label; set source.label_key")
    return float(sample.response.strip() == str(sample.label).strip())


def random_reward(args: Any, sample: HookSample) -> float:
    """0 or 1 by a coin that is the same when a sample is judged again (seed, group, sample)."""
    seed = f"{getattr(args, 'rollout_seed', 0)}/{sample.group_index}/{sample.index}"
    return float(random.Random(seed).randint(0, 1))


def deterministic_random(args: Any, sample: HookSample) -> float:  # noqa: ARG001
    """Miles' coin: first byte of sha256(str(tokens) + response), modulo 2."""
    data = str(sample.tokens) + sample.response
    return float(hashlib.sha256(data.encode()).digest()[0] % 2)


def no_reward(args: Any, sample: HookSample) -> float:  # noqa: ARG001
    """0.0 for every sample: what distillation alone trains on (slime's reward under --opd-type sglang)."""
    return 0.0
