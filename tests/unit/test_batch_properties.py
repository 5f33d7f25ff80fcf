"""What an optimizer step does must not depend on how its samples are packed, dealt, ordered or padded.

Every comparison runs whole rollout steps of TorchBackend with plain SGD: two optimizer steps, so gradients,
old log-probs, values and advantages all have to agree. Updates are compared with the largest one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncrl.algo.batch import split_steps
from tests.batch_support import (
    ALGORITHMS,
    FLOAT32,
    FLOAT64,
    GROUPS,
    TRAINER,
    Drawn,
    World,
    assert_same,
    build,
    differs,
    examples,
    in_order,
)
from tests.train_support import make_groups, make_plan, make_sample, write_model

Worlds = Callable[..., World]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", hidden=16)


@pytest.fixture(scope="module")
def worlds(model_dir: Path) -> Worlds:
    @cache
    def world(name: str, *, attention: str = "packed", double: bool = True) -> World:
        trainer = {"attn_implementation": attention, "optimizer": "sgd", "lr": 0.3}
        algorithm = ALGORITHMS[name]
        plan = make_plan(
            model_dir, trainer=trainer, algorithm=algorithm, num_steps_per_rollout=2, rollout_temperature=0.8
        )
        return World(plan, double=double)

    return world


# One optimizer step is one number, however it was computed.


HARD = [
    [Drawn(1, 1.0, 0, False, 5), Drawn(14, 0.0, 1, False, 1), Drawn(3, 0.0, 0, True, 2)],
    [Drawn(1, 0.0, 0, True, 4)],
    [Drawn(9, 0.5, 2, False, 3), Drawn(5, 1.0, 0, False, 5)],
]
"""One-token answers, a removed sample, one that is a group of its own, masked tokens, mixed versions."""


@pytest.mark.parametrize("name", ALGORITHMS)
@examples(3)
@given(
    groups=GROUPS,
    seed=st.integers(0, 2**16),
    trainer=TRAINER,
    num_ranks=st.sampled_from([1, 1, 2]),
    attention=st.sampled_from(["packed", "packed", "sdpa", "eager"]),
)
@example(
    groups=HARD,
    seed=0,
    trainer={"max_tokens_per_gpu": 20, "log_probs_max_tokens_per_gpu": 33, "data_pad_size_multiplier": 8},
    num_ranks=2,
    attention="packed",
)
def test_packing_padding_ranks_and_attention_change_nothing(
    worlds: Worlds,
    name: str,
    groups: list[list[Drawn]],
    seed: int,
    trainer: dict[str, Any],
    num_ranks: int,
    attention: str,
) -> None:
    samples = build(groups, seed=seed)
    whole = worlds(name).run(samples)
    other = worlds(name, attention=attention).run(samples, num_ranks=num_ranks, **trainer)
    # transformers' eager attention takes its softmax in float32, whatever the model's type.
    assert_same(whole, other, tolerance=FLOAT32 if attention == "eager" else FLOAT64)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_float32_agrees_within_its_rounding(worlds: Worlds, name: str) -> None:
    samples = make_groups(seed=3, num_groups=3, version=2)
    world = worlds(name, double=False)
    cut = world.run(
        samples,
        num_ranks=2,
        max_tokens_per_gpu=50,
        log_probs_max_tokens_per_gpu=70,
        data_pad_size_multiplier=8,
    )
    assert_same(world.run(samples), cut, tolerance=FLOAT32)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_moves_the_weights(worlds: Worlds, name: str) -> None:
    outcome = worlds(name).run(build(HARD, seed=0))
    for learner in {parameter.split(".")[0] for parameter in outcome.updates}:
        assert any(
            float(update.abs().max()) > 1e-4 for n, update in outcome.updates.items() if n.startswith(learner)
        )


# Order.


@pytest.mark.parametrize("name", ["grpo", "ppo", "reinforce_plus_plus", "rejection", "per_token", "gspo"])
@examples(3)
@given(groups=GROUPS, seed=st.integers(0, 2**16), data=st.data())
def test_the_order_inside_an_optimizer_step_changes_nothing(
    worlds: Worlds, name: str, groups: list[list[Drawn]], seed: int, data: st.DataObject
) -> None:
    samples = build(groups, seed=seed)
    steps = split_steps(sum(map(len, samples)), num_steps=2)
    order = [i for step in steps for i in data.draw(st.permutations(list(step)))]
    assert_same(
        worlds(name).run(samples),
        worlds(name).run(in_order(samples, order), max_tokens_per_gpu=30),
        tolerance=FLOAT64,
    )


def test_the_order_across_optimizer_steps_is_part_of_the_result(worlds: Worlds) -> None:
    samples = make_groups(num_groups=2)
    swapped = in_order(samples, [*range(4, 8), *range(4)])
    assert differs(worlds("grpo").run(samples), worlds("grpo").run(swapped))


def test_a_removed_sample_counts_but_does_not_train(worlds: Worlds) -> None:
    kept = build(HARD, seed=0)
    removed = kept[0][2]
    other = [*removed.tokens[4:], *removed.tokens[:4]]
    changed = [[*kept[0][:2], msgspec.structs.replace(removed, tokens=bytes(other))], *kept[1:]]
    assert_same(worlds("grpo").run(kept), worlds("grpo").run(changed), tolerance=FLOAT64)


# Samples without an answer: aborted before their first token.


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_samples_without_tokens_train_nothing(worlds: Worlds, name: str, one_by_one: bool) -> None:
    groups = make_groups(seed=1, num_groups=2, version=3)
    empty = make_sample(group_id=0, index=4, prompt=[3, 4], response=[], logprobs=[], reward=0.0)
    outcome = worlds(name).run([[*groups[0], empty], groups[1]], use_dynamic_batch_size=not one_by_one)
    assert all(np.isfinite(value) for value in outcome.metrics.values())
