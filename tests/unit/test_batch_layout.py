"""How a batch is cut and laid out: every token has one place, every optimizer step its samples."""

# ruff: noqa: N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.errors import DataError
from asyncrl.messages.sample import Sample
from asyncrl.topology.training import AlgorithmConfig, TrainerConfig
from asyncrl.train.backend import TrainPlan
from asyncrl.train.data import PreparedBatch, prepare_batch
from asyncrl.train.micro import Layout, MicroBatch
from asyncrl.train.ranks import Ranks
from asyncrl.train.rows import decode
from asyncrl.train.torch import TorchBackend
from tests.batch_support import GROUPS, TRAINER, Drawn, all_ranks, build, examples, in_order
from tests.train_support import make_groups, make_sample

# Layout.


def micro_batches(prepared: PreparedBatch) -> list[MicroBatch]:
    return [*prepared.forwards, *(micro for step in prepared.steps for micro in step.micros)]


@examples(60)
@given(groups=GROUPS, seed=st.integers(0, 2**16), trainer=TRAINER, num_ranks=st.integers(1, 2))
def test_every_token_has_its_place(
    groups: list[list[Drawn]], seed: int, trainer: dict[str, Any], num_ranks: int
) -> None:
    samples = build(groups, seed=seed)
    plan = TrainPlan(trainer=TrainerConfig(hf_checkpoint="none", **trainer), num_steps_per_rollout=2)
    prepared = all_ranks(samples, plan=plan, num_ranks=num_ranks)
    flat = [sample for group in samples for sample in group]
    rows = [decode(sample) for sample in flat]
    tokens_N = torch.from_numpy(np.concatenate([part for row in rows for part in (row.prompt, row.response)]))
    targets = torch.from_numpy(np.concatenate([row.response for row in rows]))
    multiple, num_tokens = plan.trainer.data_pad_size_multiplier, len(tokens_N)
    for micro in micro_batches(prepared):
        real = micro.num_tokens
        assert len(micro.input_T) == sum(micro.lengths) == len(micro.place_T) == len(micro.position_T)
        assert len(micro.input_T) % multiple == 0
        assert len(micro.input_T) - real < multiple
        # Padding is nowhere in the batch; every other token is where the batch has it.
        assert (micro.place_T[real:] == num_tokens).all()
        assert torch.equal(tokens_N[micro.place_T[:real]].long(), micro.input_T[:real])
        assert torch.equal(targets[micro.token_R].long(), micro.target_R)
        # A response token follows the position that predicts it, in its own sequence, never in padding.
        assert torch.equal(micro.input_T[micro.predict_R + 1], micro.target_R)
        assert torch.equal(micro.position_T[micro.predict_R + 1], micro.position_T[micro.predict_R] + 1)
        assert torch.equal(micro.place_T[micro.predict_R] + 1, micro.place_T[micro.predict_R + 1])
        members_R = torch.tensor(micro.members)[micro.sample_R]
        assert torch.equal(prepared.data.sample_R[micro.token_R], members_R)
        starts = torch.tensor([0, *np.cumsum(micro.lengths)[:-1]])
        assert (micro.position_T[starts] == 0).all()
    for micros in (prepared.forwards, [m for step in prepared.steps for m in step.micros]):
        seen = torch.cat([micro.token_R for micro in micros])
        assert torch.equal(seen.sort().values, torch.arange(len(targets)))
        places = torch.cat([micro.place_T for micro in micros])
        assert torch.equal(places[places < num_tokens].sort().values, torch.arange(num_tokens))


def test_a_short_answer_is_laid_out_as_by_hand() -> None:
    groups = [
        [
            make_sample(group_id=0, index=0, prompt=[3, 4], response=[5], logprobs=[-1.0], reward=1.0),
            make_sample(group_id=0, index=1, prompt=[6], response=[7, 8], logprobs=[-1.0] * 2, reward=0.0),
        ]
    ]
    layout = Layout([decode(sample) for sample in groups[0]], pad_multiple=8)
    micro = layout.micro_batch([1, 0])
    assert micro.lengths == [3, 3, 2]
    assert micro.num_tokens == 6
    assert micro.input_T.tolist() == [6, 7, 8, 3, 4, 5, 0, 0]
    assert micro.position_T.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert micro.place_T.tolist() == [3, 4, 5, 0, 1, 2, 6, 6]
    assert micro.predict_R.tolist() == [0, 1, 4]
    assert micro.target_R.tolist() == [7, 8, 5]
    assert micro.token_R.tolist() == [1, 2, 0]
    assert micro.sample_R.tolist() == [0, 0, 1]


# How many samples a batch may have.


def double_samples(args: Any, samples: list[Any]) -> dict[str, Any]:
    """A convert-samples hook that trains every sample twice."""
    twice = [*samples, *samples]
    return {
        "tokens": [sample.tokens for sample in twice],
        "response_lengths": [sample.response_length for sample in twice],
        "rewards": [1.0 + number for number, _ in enumerate(twice)],
        "raw_reward": [0.0 for _ in twice],
        "truncated": [0 for _ in twice],
        "sample_indices": [sample.index for sample in twice],
        "loss_masks": [[1] * sample.response_length for sample in twice],
        "rollout_log_probs": [sample.rollout_log_probs for sample in twice],
    }


def prepared_with(groups: list[list[Sample]], *, hook: bool, **options: Any) -> PreparedBatch:
    path = f"{__name__}:double_samples" if hook else None
    plan = TrainPlan(
        trainer=TrainerConfig(hf_checkpoint="none", **options),
        algorithm=AlgorithmConfig(custom_convert_samples_to_train_data_path=path),
        num_steps_per_rollout=2,
        num_samples=16,
        n_samples_per_prompt=4,
    )
    return TorchBackend(plan).prepare(groups)


def test_a_hook_that_changes_the_number_of_samples_needs_a_dynamic_global_batch() -> None:
    groups = make_groups()
    with pytest.raises(DataError, match=r"made 32 samples; expected 16 .*use_dynamic_global_batch_size"):
        prepared_with(groups, hook=True)
    prepared = prepared_with(groups, hook=True, use_dynamic_global_batch_size=True)
    assert [step.samples for step in prepared.steps] == [range(16), range(16, 32)]
    # Half the groups doubled are as many as the plan wants.
    assert prepared_with(groups[:2], hook=True).num_samples == 16


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(16, [range(8), range(8, 16)]), (7, [range(4), range(4, 7)]), (1, [range(1)])],
)
def test_a_smaller_last_batch_gets_as_many_steps(num_samples: int, expected: list[range]) -> None:
    groups = in_order(make_groups(), list(range(num_samples)))
    prepared = prepared_with(groups, hook=False)
    assert [step.samples for step in prepared.steps] == expected
    assert [sorted(i for m in step.micros for i in m.members) for step in prepared.steps] == [
        list(step) for step in expected
    ]


def test_a_smaller_last_batch_is_weighted_by_its_own_size() -> None:
    """A step's loss is the mean over the samples it has, not over the global batch size."""
    samples = in_order(make_groups(seed=2), list(range(7)))
    prepared = prepare_batch(
        samples, plan=TrainPlan(trainer=TrainerConfig(hf_checkpoint="none"), num_steps_per_rollout=2)
    )
    for step in prepared.steps:
        prepared.data.weigh(samples=step.samples, per_token=False)
        inside_R = torch.isin(prepared.data.sample_R, torch.tensor(step.samples))
        assert float(prepared.data.weight_R[inside_R].sum()) == pytest.approx(1.0, abs=1e-6)


def test_a_step_with_fewer_samples_than_ranks_is_refused_by_every_rank() -> None:
    plan = TrainPlan(trainer=TrainerConfig(hf_checkpoint="none"), num_steps_per_rollout=2)
    groups = in_order(make_groups(), list(range(5)))
    for rank in range(3):
        with pytest.raises(DataError, match=r"optimizer step 1 of 2 has 2 samples for 3 ranks"):
            prepare_batch(groups, plan=plan, ranks=Ranks(rank, 3))
