"""The models beside the actor, what a run takes over from another one, and where old log-probs come from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from asyncrl.errors import ConfigError, DataError
from asyncrl.messages.sample import Score, pack_logprobs
from asyncrl.train.torch import TorchBackend
from tests.train_support import make_groups, make_sample, write_model
from tests.unit.train_world import (
    Groups,
    backend_of,
    loaded,
    logprobs_under,
    same_bits,
    sample_mean,
    sampled,
    samples_of,
    snapshot,
    train,
)

KL = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2"}
DISTILL: dict[str, Any] = {"advantage_estimator": "on_policy_distillation"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher") / "tiny", seed=1)


@pytest.fixture(scope="module")
def probe(model_dir: Path) -> TorchBackend:
    return loaded(model_dir)


# The reference.


def test_the_reference_follows_the_actor_every_so_many_steps(model_dir: Path) -> None:
    backend = loaded(model_dir, algorithm=KL, trainer={"ref_update_interval": 2})
    initial, kl = snapshot(backend.weights()), []
    for s in range(5):
        kl.append(train(backend, s).metrics["train/kl_loss"])
        reference = snapshot(backend._rollout.policies.state()["reference"])
        assert same_bits(reference, snapshot(backend.weights())) == (s % 2 == 1)
        assert same_bits(reference, initial) == (s == 0)
    assert [value == 0 for value in kl] == [True, False, True, False, True]


def test_a_reference_that_changed_comes_back_bit_for_bit(model_dir: Path, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"algorithm": KL, "trainer": {"ref_update_interval": 2}}
    backend = loaded(model_dir, **plan)
    for s in range(3):
        train(backend, s)
    stored = snapshot(backend._rollout.policies.state()["reference"])
    checkpoint = backend.save(tmp_path, rollout_step=3)
    other = backend_of(model_dir, **plan)
    other.restore(checkpoint)
    assert same_bits(stored, other._rollout.policies.state()["reference"])
    assert not same_bits(stored, snapshot(other.weights()))
    for s in (3, 4):
        assert train(backend, s).metrics == train(other, s).metrics
    assert backend.digest() == other.digest()


def test_a_reference_that_never_changes_is_not_stored(model_dir: Path, tmp_path: Path) -> None:
    checkpoint = loaded(model_dir, algorithm=KL).save(tmp_path, rollout_step=0)
    stored = {path.stem for path in (checkpoint / "trainer").glob("*.safetensors")}
    assert stored == {"optimizer", "random"}


# The old actor.


@pytest.mark.parametrize(
    ("interval", "versions"), [(1, [0, 0, 1, 2, 3]), (3, [0, 0, 0, 3, 3]), (2, [0, 0, 2, 2, 4])]
)
def test_old_log_probs_are_those_of_the_weights_the_engines_had(
    model_dir: Path, probe: TorchBackend, interval: int, versions: list[int]
) -> None:
    backend = loaded(model_dir, trainer={"keep_old_actor": True}, update_weights_interval=interval)
    weights = []
    for s, version in enumerate(versions):
        weights.append(snapshot(backend.weights()))
        groups = make_groups(seed=s)
        found = train(backend, s, groups).metrics["rollout/log_probs"]
        expected = [sample_mean(logprobs_under(probe, each, groups), groups) for each in weights]
        assert found == pytest.approx(expected[version], abs=1e-5)
        # The versions are far enough apart to tell.
        assert all(abs(expected[version] - other) > 1e-3 for v, other in enumerate(expected) if v != version)


@pytest.mark.parametrize("interval", [1, 2])
def test_old_actors_come_back_bit_for_bit(model_dir: Path, tmp_path: Path, interval: int) -> None:
    plan: dict[str, Any] = {"trainer": {"keep_old_actor": True}, "update_weights_interval": interval}
    backend = loaded(model_dir, **plan)
    for s in range(3):
        train(backend, s)
    checkpoint = backend.save(tmp_path, rollout_step=3)
    stored = {path.stem for path in (checkpoint / "trainer").glob("*.safetensors")}
    assert stored == {"optimizer", "old_actor", "random"}
    other = backend_of(model_dir, **plan)
    other.restore(checkpoint)
    for s in (3, 4, 5):
        assert train(backend, s).metrics == train(other, s).metrics
    assert backend.digest() == other.digest()


# Several optimizer steps.


@pytest.mark.parametrize("num_steps", [1, 2])
def test_old_log_probs_come_from_before_the_first_optimizer_step(
    model_dir: Path, probe: TorchBackend, num_steps: int
) -> None:
    backend = loaded(model_dir, num_steps_per_rollout=num_steps)
    before, groups = snapshot(backend.weights()), make_groups()
    report = train(backend, 0, groups)
    expected = sample_mean(logprobs_under(probe, before, groups), groups)
    after = sample_mean(logprobs_under(probe, backend.weights(), groups), groups)
    assert report.metrics["rollout/log_probs"] == pytest.approx(expected, abs=1e-5)
    assert abs(after - expected) > 1e-2
    # A single step is its own old policy and needs no pass for it; the second of two has moved.
    assert ("log_probs" in report.phase_s) == (num_steps == 2)
    assert (report.metrics["train/ppo_kl"] != 0) == (num_steps == 2)


def test_the_losses_without_a_ratio_are_the_plain_means(model_dir: Path, probe: TorchBackend) -> None:
    groups = make_groups()
    logprobs = logprobs_under(probe, loaded(model_dir).weights(), groups)
    masks = [sample.loss_mask for group in groups for sample in group]
    numbers = [x for xs, ms in zip(logprobs, masks, strict=True) for x, m in zip(xs, ms, strict=True) if m]
    per_sample = train(loaded(model_dir, algorithm={"loss_type": "sft_loss"}), 0, groups).metrics
    assert per_sample["train/loss"] == pytest.approx(-sample_mean(logprobs, groups), rel=1e-5)
    algorithm = {"loss_type": "sft_loss", "calculate_per_token_loss": True}
    per_token = train(loaded(model_dir, algorithm=algorithm), 0, groups).metrics
    assert per_token["train/loss"] == pytest.approx(-sum(numbers) / len(numbers), rel=1e-5)
    # Dr.GRPO: no standard deviation, and a constant instead of the answer's length.
    algorithm = {"grpo_std_normalization": False, "pg_loss_divisor": 50.0}
    found = train(loaded(model_dir, algorithm=algorithm), 0, groups).metrics
    expected = 0.0
    for group in groups:
        rewards = [sample.score.reward for sample in group if sample.score]
        for reward, sample in zip(rewards, group, strict=True):
            expected -= (reward - sum(rewards) / len(rewards)) * sum(sample.loss_mask) / 50.0 / 16
    assert found["train/pg_loss"] == pytest.approx(expected, abs=1e-6)


def test_supervised_training_makes_the_answers_likelier(model_dir: Path) -> None:
    backend = loaded(model_dir, algorithm={"loss_type": "sft_loss"})
    groups = make_groups(num_groups=2)
    losses = [train(backend, s, groups).metrics["train/loss"] for s in range(10)]
    assert losses[-1] < losses[0] - 1


# The teacher.


@pytest.mark.parametrize("algorithm", [DISTILL, {"use_opd": True, "opd_kl_coef": 1.0}])
def test_distillation_moves_the_policy_to_the_teacher(
    model_dir: Path, teacher_dir: Path, algorithm: dict[str, Any]
) -> None:
    algorithm = {**algorithm, "opd_teacher_load": str(teacher_dir), "rewards_normalization": False}
    backend = loaded(model_dir, algorithm=algorithm, trainer={"max_tokens_per_gpu": None})
    model = backend._rollout.policies.teacher
    assert model is not None
    teacher = snapshot(model.state_dict())
    kl = []
    for s in range(30):
        groups = sampled(backend, num_groups=8, seed=s)
        for sample in samples_of(groups):
            sample.score = Score()
        kl.append(train(backend, s, groups).metrics["train/opd_reverse_kl"])
    assert sum(kl[-5:]) < 0.65 * sum(kl[:5])
    assert same_bits(teacher, model.state_dict())


def other_vocabulary(model_dir: Path, directory: Path) -> str:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(model_dir)
    other.resize_token_embeddings(72)
    other.save_pretrained(directory)
    return str(directory)


def test_models_of_another_vocabulary_or_none_are_refused_by_name(model_dir: Path, tmp_path: Path) -> None:
    other = other_vocabulary(model_dir, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"algorithm\.opd_teacher_load: .* has 72 tokens .* 64;"):
        loaded(model_dir, algorithm={**DISTILL, "opd_teacher_load": other})
    with pytest.raises(ConfigError, match=r"trainer\.ref_load: .* has 72 tokens .* 64;"):
        loaded(model_dir, algorithm=KL, trainer={"ref_load": other})
    with pytest.raises(DataError, match=r"algorithm\.opd_teacher_load: .*none has no config\.json"):
        loaded(model_dir, algorithm={**DISTILL, "opd_teacher_load": str(tmp_path / "none")})
    with pytest.raises(DataError, match=r"trainer\.ref_load: .*none has no config\.json"):
        loaded(model_dir, algorithm=KL, trainer={"ref_load": str(tmp_path / "none")})


def test_a_reference_that_cannot_become_the_actor_is_refused_at_once(model_dir: Path, tmp_path: Path) -> None:
    narrow = {"ref_load": str(write_model(tmp_path / "narrow", hidden=16))}
    # Without an interval a smaller reference will do.
    train(loaded(model_dir, algorithm=KL, trainer=narrow), 0)
    with pytest.raises(
        ConfigError, match=r"trainer\.ref_update_interval: the model of trainer\.ref_load has other"
    ):
        loaded(model_dir, algorithm=KL, trainer={**narrow, "ref_update_interval": 2})


def told(groups: Groups) -> Groups:
    """The same samples with a teacher's log-probs from their reward."""
    for sample in samples_of(groups):
        numbers = [-3.5 - 0.1 * i for i in range(sample.num_tokens)]
        assert sample.score is not None
        sample.score = msgspec.structs.replace(sample.score, teacher_logprobs=pack_logprobs(numbers))
    return groups


def test_an_engines_teacher_comes_with_the_samples(model_dir: Path, probe: TorchBackend) -> None:
    backend = loaded(model_dir, algorithm={**DISTILL, "opd_type": "engine"})
    assert backend._rollout.policies.teacher is None
    groups = told(make_groups())
    logprobs = logprobs_under(probe, backend.weights(), groups)
    empty = make_sample(group_id=9, index=0, prompt=[5], response=[], logprobs=[], reward=1)
    report = train(backend, 0, [*groups, [empty]])
    kept = [
        x - (-3.5 - 0.1 * i)
        for xs, sample in zip(logprobs, samples_of(groups), strict=True)
        for i, (x, m) in enumerate(zip(xs, sample.loss_mask, strict=True))
        if m
    ]
    assert report.metrics["train/opd_reverse_kl"] == pytest.approx(sum(kept) / len(kept), rel=1e-4)
    assert report.metrics["rollout/advantages"] == pytest.approx(-sum(kept) / len(kept), rel=1e-4)


@pytest.mark.parametrize("algorithm", [DISTILL, {"use_opd": True}])
def test_an_engines_teacher_that_is_silent_is_noticed(model_dir: Path, algorithm: dict[str, Any]) -> None:
    backend = loaded(model_dir, algorithm={**algorithm, "opd_type": "engine"})
    with pytest.raises(DataError, match=r"sample 0\.0: has no teacher log-probs"):
        train(backend, 0)


def test_a_teacher_nobody_asked_changes_nothing(model_dir: Path) -> None:
    plain, other = loaded(model_dir), loaded(model_dir)
    train(plain, 0)
    report = train(other, 0, told(make_groups(seed=0)))
    assert plain.digest() == other.digest()
    assert "train/opd_reverse_kl" not in report.metrics


# What a run takes over from another one.


def test_the_first_step_after_a_reset_is_that_of_a_fresh_optimizer(model_dir: Path, tmp_path: Path) -> None:
    finals = []
    for reset in (True, False):
        trainer: dict[str, Any] = {"reset_optimizer_states": reset}
        backend = loaded(model_dir, trainer=trainer, num_steps_per_rollout=2)
        train(backend, 0)
        checkpoint = str(backend.save(tmp_path / str(reset), rollout_step=1))
        again = {**trainer, "load": checkpoint, "no_load_optim": True}
        fresh = loaded(model_dir, trainer=again, num_steps_per_rollout=2)
        for each in (backend, fresh):
            train(each, 1)
        finals.append(same_bits(snapshot(backend.weights()), snapshot(fresh.weights())))
    assert finals == [True, False]


COSINE = {"lr_decay_style": "cosine", "lr_decay_iters": 10, "lr_warmup_iters": 2}


@pytest.fixture(scope="module")
def finished(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchBackend, Path]:
    """Another run after three of its steps, with its checkpoint."""
    backend = loaded(model_dir, trainer=COSINE)
    for s in range(3):
        train(backend, s)
    return backend, backend.save(tmp_path_factory.mktemp("other"), rollout_step=3)


def lr_of(backend: TorchBackend) -> float:
    return backend._rollout.actor.optimizer.learning_rates[0]


def test_another_runs_weights_moments_and_schedule_are_taken_over(
    model_dir: Path, finished: tuple[TorchBackend, Path], tmp_path: Path
) -> None:
    theirs, checkpoint = finished
    copied = tmp_path / "copied"
    shutil.copytree(checkpoint, copied)
    trainer = {**COSINE, "load": str(copied)}
    backend = loaded(model_dir, trainer=trainer)
    assert same_bits(snapshot(theirs.weights()), snapshot(backend.weights()))
    assert same_bits(theirs._rollout.actor.optimizer.state(), backend._rollout.actor.optimizer.state())
    # Its steps are counted anew, its place in the schedule is not.
    assert (backend.step, backend._rollout.actor.updates) == (0, 3)
    reference = backend_of(model_dir, trainer=COSINE)
    reference.restore(checkpoint)
    train(reference, 3)
    train(backend, 0, make_groups(seed=3))
    assert lr_of(backend) == lr_of(reference)
    assert backend.digest() == reference.digest()
    # Its own checkpoints do not need the other run's any more.
    own = backend.save(tmp_path, rollout_step=1)
    shutil.rmtree(copied)
    other = backend_of(model_dir, trainer=trainer)
    assert other.restore(own) == 1
    for each in (backend, other):
        train(each, 1)
    assert other._rollout.actor.updates == 5
    assert backend.digest() == other.digest()


def test_without_its_optimizer_only_the_weights_come(
    model_dir: Path, finished: tuple[TorchBackend, Path]
) -> None:
    theirs, checkpoint = finished
    # Another schedule is no matter then: nothing goes on.
    backend = loaded(model_dir, trainer={"load": str(checkpoint), "no_load_optim": True})
    assert same_bits(snapshot(theirs.weights()), snapshot(backend.weights()))
    assert not backend._rollout.actor.optimizer.state()
    assert backend._rollout.actor.updates == 0
    train(backend, 0)
    assert lr_of(backend) == 1e-2


def test_another_schedule_is_refused_unless_one_of_the_two_is_named(
    model_dir: Path, finished: tuple[TorchBackend, Path], tmp_path: Path
) -> None:
    _, checkpoint = finished
    own = {**COSINE, "load": str(checkpoint), "lr": 0.5, "lr_warmup_iters": 0}
    message = (
        r"trainer\.load: .*another schedule: lr 0\.5 \(there 0\.01\), lr_warmup_iters 0 \(there 2\); set "
        r"override_opt_param_scheduler = true .* use_checkpoint_opt_param_scheduler"
    )
    with pytest.raises(ConfigError, match=message):
        loaded(model_dir, trainer=own)
    rates = []
    for option in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"):
        trainer = {**own, option: True}
        backend = loaded(model_dir, trainer=trainer)
        train(backend, 0)
        rates.append(lr_of(backend))
        # A restored run follows the same schedule.
        other = backend_of(model_dir, trainer=trainer)
        other.restore(backend.save(tmp_path / option, rollout_step=1))
        for each in (backend, other):
            train(each, 1)
        assert backend.digest() == other.digest()
    # Step 3 of 10: a cosine over all of it, or over the eight after warm-up.
    assert rates[0] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(torch.pi * 0.3)).item()) / 2)
    assert rates[1] == pytest.approx(0.01 * (1 + torch.cos(torch.tensor(torch.pi / 8)).item()) / 2)
