"""A death costs one interval, because an answer is handed in at half of it; what engines are asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.engines import session
from asyncrl.messages.sample import Lane, Prompt, Sample, pack_tokens
from asyncrl.topology.progress import UNDER_WAY, hand_ins
from asyncrl.topology.ranges import RANGES
from asyncrl.topology.schema import RolloutConfig
from tests.support.topologies import compiled

SAMPLE = Sample(group_id=3, index=1, prompt=Prompt(tokens=pack_tokens([1, 2])), lane=Lane.TRAIN)


@given(
    tokens=st.integers(int(RANGES["rollout.progress_every_tokens"].low), 1 << 20),
    seconds=st.floats(0, 1e6, allow_subnormal=False),
)
def test_the_hand_ins_under_way_are_never_more_than_the_interval_and_never_off(
    tokens: int, seconds: float
) -> None:
    every = hand_ins(
        RolloutConfig(
            rollout_batch_size=1,
            n_samples_per_prompt=1,
            progress_every_tokens=tokens,
            progress_every_s=seconds,
        )
    )
    assert 1 <= every.tokens <= tokens / UNDER_WAY < every.tokens + 1
    assert every.seconds * UNDER_WAY == seconds


@pytest.mark.parametrize(
    ("tokens", "seconds", "asked"),
    [(256, "10.0", (128, 5.0)), (7, "0", (3, 0.0)), (2, "0.5", (1, 0.25))],
)
def test_an_engine_is_asked_for_hand_ins_at_half_the_interval(
    tokens: int, seconds: str, asked: tuple[int, float]
) -> None:
    """Fails where the interval itself is asked for: the two hand-ins under way would cost two of them."""
    options = compiled(f"progress_every_tokens={tokens}", f"progress_every_s={seconds}")
    request = session.request_for(options, SAMPLE, uid="1.1")
    assert (request.progress_every_tokens, request.progress_every_s) == asked
