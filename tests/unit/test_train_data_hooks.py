"""Training hooks that change samples and masks, and those around passes and steps, in slime's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from asyncrl.messages.sample import Sample, Span
from asyncrl.train.backend import train_plan
from asyncrl.train.loop import Trainer
from asyncrl.train.make import make_backend
from tests.hook_support import (
    BEFORE_LOG_PROB,
    BEFORE_STEP,
    CONVERT,
    POSTPROCESS,
    REWARD,
    TIS,
    Trained,
    difference,
    prepared,
    topology_of,
    trained,
    user_hook,
    write_hook,
)
from tests.train_support import make_groups, make_sample, write_model

TOLERANCE = 3e-7
"""Rounding of float32 after one update."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def plain(model: Path) -> Trained:
    """No hook, no correction."""
    return trained(model)


def config(directory: Path, **keys: Any) -> str:
    """A file for --custom-config-path."""
    path = directory / "custom.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()), encoding="utf-8")
    return str(path)


# Samples to training data.


def test_the_documented_conversion_is_the_built_in_one(model: Path, plain: Trained) -> None:
    custom = trained(model, {CONVERT: user_hook("convert_samples_to_train_data")})
    assert difference(custom, plain) < TOLERANCE
    assert custom.metrics["rollout/raw_reward"] == plain.metrics["rollout/raw_reward"]


def test_an_answer_split_in_two_keeps_log_probs_versions_and_experts_of_its_tokens(model: Path) -> None:
    numbers = np.random.default_rng(0)
    groups: list[list[Sample]] = []
    for group in make_groups(num_groups=4, num_samples=4):
        groups.append([])
        for sample in group:
            num_rows = (len(sample.prompt.tokens) + len(sample.tokens)) // 4 - 1
            routing = np.argsort(numbers.random((num_rows, 2, 4)), axis=-1)[..., :2].astype(np.int16)
            recorded: dict[str, Any] = {"routed_experts": routing.astype("<i2").tobytes(), "routed_top_k": 2}
            recorded["spans"] = [Span(version, 1, 1) for version in range(sample.num_tokens)]
            groups[-1].append(msgspec.structs.replace(sample, **recorded))
    options = {CONVERT: user_hook("convert_turns"), "trainer.use_dynamic_global_batch_size": True}
    whole, split = prepared(model, {}, groups), prepared(model, options, groups)
    by_index: dict[int, list[Any]] = {}
    for row in split.rows:
        by_index.setdefault(row.sample_index, []).append(row)
    assert max(len(rows) for rows in by_index.values()) == 2
    for row in whole.rows:
        parts = by_index[row.sample_index]
        for field in ("response", "logprobs", "mask", "versions"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            assert np.array_equal(joined, getattr(row, field)), field
        assert np.array_equal(
            parts[-1].prompt, np.concatenate([row.prompt, *[p.response for p in parts[:-1]]])
        )
        assert row.routed_experts is not None
        for part in parts:
            assert np.array_equal(part.routed_experts, row.routed_experts[: part.num_tokens - 1])
        names = [part.name for part in parts]
        assert names == ([row.name] if len(parts) == 1 else [f"{row.name}/0", f"{row.name}/1"])


def test_a_batch_that_conversion_made_larger_trains_in_as_many_steps(model: Path, plain: Trained) -> None:
    options = {CONVERT: user_hook("convert_turns"), "trainer.use_dynamic_global_batch_size": True}
    custom = trained(model, options)
    assert custom.metrics["train/global_batch_size"] > plain.metrics["train/global_batch_size"]
    assert difference(custom, plain) > 100 * TOLERANCE


def test_tokens_that_were_not_generated_count_as_the_oldest_version(model: Path, tmp_path: Path) -> None:
    path = write_hook(
        tmp_path,
        "def hook(args, samples):\n"
        "    keys = ('tokens', 'response_length', 'reward', 'loss_mask', 'index', 'rollout_log_probs')\n"
        "    names = ('tokens', 'response_lengths', 'rewards', 'loss_masks', 'sample_indices',\n"
        "             'rollout_log_probs')\n"
        "    data = {name: [getattr(s, key) for s in samples] for name, key in zip(names, keys)}\n"
        "    data['tokens'] = [[*tokens[:-1], 9] for tokens in data['tokens']]\n"
        "    data['teacher_log_probs'] = [[-1.0] * n for n in data['response_lengths']]\n"
        "    return data\n",
    )
    spans = [Span(5, 1, 1), Span(4, 1, 2)]
    sample = make_sample(group_id=0, index=0, prompt=[3], response=[4, 5, 6], logprobs=[-4.0] * 3, reward=1.0)
    groups = [[msgspec.structs.replace(sample, spans=spans, index=index) for index in range(4)]] * 4
    groups = [[msgspec.structs.replace(s, group_id=g) for s in group] for g, group in enumerate(groups)]
    batch = prepared(model, {CONVERT: path}, groups)
    assert [row.versions.tolist() for row in batch.rows] == [[4, 4, 4]] * 16
    assert batch.rows[0].response.tolist() == [4, 5, 9]
    assert batch.data.teacher_R is not None
    assert batch.data.teacher_R.tolist() == [-1.0] * 48


# After log-probs.


def masked_by_hand(custom: Trained, limit: float) -> list[list[Sample]]:
    """The batch with the masks that the hook should have set, from the same old log-probs."""
    backend = custom.backend
    fresh = trained(Path(backend.plan.trainer.hf_checkpoint), {POSTPROCESS: user_hook("keep_log_probs")})
    found = fresh.backend._hooks.args.kept
    groups = make_groups()
    flat = [sample for group in groups for sample in group]
    changed = []
    for sample, mask, logprobs, rollout in zip(flat, *found, strict=True):
        keep = ((logprobs - rollout).abs() <= limit).int() * mask
        changed.append(msgspec.structs.replace(sample, loss_mask=bytes(keep.tolist())))
    return [changed[i : i + 4] for i in range(0, len(changed), 4)]


@pytest.mark.parametrize("form", ["mask_by_log_probs", "mask_samples"])
@pytest.mark.parametrize("per_token", [False, True])
def test_masking_after_log_probs_is_training_on_those_masks(
    model: Path, plain: Trained, tmp_path: Path, form: str, per_token: bool
) -> None:
    shared = {"algorithm.calculate_per_token_loss": per_token}
    own = {POSTPROCESS: user_hook(form), "run.custom_config_path": config(tmp_path, max_log_prob_diff=0.4)}
    custom = trained(model, {**shared, **own})
    by_hand = trained(model, shared, groups=masked_by_hand(custom, 0.4))
    assert difference(custom, by_hand) < TOLERANCE
    assert difference(custom, plain) > 100 * TOLERANCE


def test_the_same_batch_can_be_trained_again(model: Path, tmp_path: Path) -> None:
    """What hooks change in place is their own copy."""
    path = write_hook(
        tmp_path,
        "def hook(args, rollout_id, rollout_data):\n"
        "    for mask, rollout in zip(rollout_data['loss_masks'], rollout_data['rollout_log_probs']):\n"
        "        mask[0] = 0\n"
        "        rollout -= 1.0\n",
    )
    backend = trained(model, {POSTPROCESS: path, "algorithm.use_tis": True}).backend
    batch = backend.prepare(make_groups())
    before = {name: value.clone() for name, value in vars(batch.data).items() if hasattr(value, "clone")}
    report = backend.train(batch, rollout_step=1)
    assert report.metrics["rollout/rollout_log_probs"] < -4.5
    for name, value in before.items():
        assert torch.equal(value, getattr(batch.data, name)), name


def test_miles_form_is_called_once_a_rollout_step(model: Path, plain: Trained) -> None:
    custom = trained(model, {POSTPROCESS: user_hook("remember_args"), "trainer.num_steps_per_rollout": 2})
    assert custom.backend._hooks.args.seen_postprocess == 1


# Around passes and steps.


def test_the_log_prob_hook_comes_before_each_pass_in_order(model: Path) -> None:
    custom = trained(
        model,
        {
            BEFORE_LOG_PROB: user_hook("before_log_prob"),
            "trainer.num_steps_per_rollout": 2,
            "algorithm.use_kl_loss": True,
            "algorithm.kl_loss_coef": 0.1,
            "algorithm.use_opd": True,
            "algorithm.opd_teacher_load": str(model),
        },
    )
    calls = custom.backend._hooks.args.log_prob_calls
    assert [prefix for prefix, _ in calls] == ["ref_", "teacher_", ""]
    assert {count for _, count in calls} == {sum(each.numel() for each in custom.weights.values())}


def test_the_train_step_hook_clips_live_weights_of_a_clean_optimizer(model: Path, tmp_path: Path) -> None:
    options = {
        BEFORE_STEP: user_hook("before_train_step"),
        "run.custom_config_path": config(tmp_path, weight_clip=0.1),
        "trainer.num_steps_per_rollout": 2,
        "trainer.lr": 1e-6,
        "trainer.lr_warmup_iters": 4,
    }
    custom = trained(model, options, rollout_step=7)
    calls = custom.backend._hooks.args.train_step_calls
    assert [call[:3] for call in calls] == [(7, 0, 0), (7, 1, 0)]
    assert [call[5] for call in calls] == [0, 1]
    for *_, in_optimizer, scheduled, _ in calls:
        assert in_optimizer == scheduled
    assert calls[0][3] != calls[1][3]
    assert max(float(each.abs().max()) for each in custom.weights.values()) < 0.1 + 1e-4


# In a run.


def test_hooks_of_a_users_file_train_and_replay_to_the_same_bits(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(Path(user_hook("x").partition(":")[0]).read_text(encoding="utf-8"), encoding="utf-8")
    options = {
        "algorithm.use_tis": True,
        TIS: f"{own}:compute_mis_weights_with_cp",
        REWARD: f"{own}:group_normalise",
    }

    def digests() -> list[str]:
        trainer = Trainer(make_backend(train_plan(topology_of(model, options))))
        trainer.start()
        return [trainer.train_batch(step, make_groups(seed=step))[1] for step in range(3)]

    first = digests()
    assert len(set(first)) == 3
    assert digests() == first


def test_a_fresh_batch_with_one_sample_per_group_is_no_matter(model: Path, tmp_path: Path) -> None:
    """A hook sees run-wide indices whatever the size of the groups that come."""
    path = write_hook(
        tmp_path,
        "def hook(args, samples):\n"
        "    assert [s.index for s in samples] == [s.group_index * 4 for s in samples]\n"
        "    return [s.reward for s in samples], [s.reward for s in samples]\n",
    )
    groups = [
        [make_sample(group_id=g, index=0, prompt=[3], response=[4, 5], logprobs=[-4.0] * 2, reward=1.0)]
        for g in range(3)
    ]
    assert prepared(model, {REWARD: path}, groups).data.reward_S.tolist() == [1.0] * 3
