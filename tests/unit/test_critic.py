"""PPO with a critic: it learns values, the actor learns by them, and both come back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncrl.errors import ConfigError, DataError
from asyncrl.train.critic import STATE
from asyncrl.train.torch import TorchBackend
from tests.train_support import make_groups, write_model
from tests.unit.train_world import backend_of, loaded, same_bits, sampled, samples_of, snapshot, train

PPO = {"advantage_estimator": "ppo"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def critic_weights(backend: TorchBackend) -> dict[str, Tensor]:
    critic = backend._rollout.critic
    assert critic is not None
    return snapshot(critic.state()["critic"])


def critic_rates(backend: TorchBackend) -> list[float]:
    critic = backend._rollout.critic
    assert critic is not None
    return critic.learner.optimizer.learning_rates


def test_the_first_values_are_zero_and_their_loss_is_the_square_of_the_return(model_dir: Path) -> None:
    groups = make_groups()
    metrics = train(loaded(model_dir, algorithm=PPO), 0, groups).metrics
    # gamma = lambda = 1 and V = 0: every trained token's return is its sample's reward.
    rewards = [s.score.reward if any(s.loss_mask) else 0.0 for group in groups for s in group if s.score]
    assert metrics["rollout/values"] == 0
    assert metrics["train/value_loss"] == pytest.approx(sum(r**2 for r in rewards) / 16, rel=1e-5)
    tokens = [r for r, s in zip(rewards, samples_of(groups), strict=True) for m in s.loss_mask if m]
    for name in ("rollout/returns", "rollout/advantages"):
        assert metrics[name] == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)


def test_values_learn_and_the_actor_rests_while_only_the_critic_is_trained(model_dir: Path) -> None:
    backend = loaded(
        model_dir, algorithm=PPO, trainer={"critic_lr": 1e-2, "num_critic_only_steps": 12, "lr": 1e-2}
    )
    actor, critic = snapshot(backend.weights()), critic_weights(backend)
    groups = make_groups()
    losses = [train(backend, s, groups).metrics["train/value_loss"] for s in range(12)]
    assert losses[-1] < 0.3 * losses[0]
    assert same_bits(actor, snapshot(backend.weights()))
    after = critic_weights(backend)
    assert all(not torch.equal(critic[name], after[name]) for name in critic if "embed" not in name)
    assert backend._rollout.actor.updates == 0
    report = train(backend, 12, groups)
    assert not same_bits(actor, snapshot(backend.weights()))
    assert "train/pg_loss" in report.metrics


def test_the_policy_learns_by_the_critic(model_dir: Path) -> None:
    trainer = {"max_tokens_per_gpu": None, "critic_lr": 5e-3}
    backend = loaded(model_dir, trainer=trainer, algorithm=PPO, num_steps_per_rollout=2)
    reports = [train(backend, s, sampled(backend, num_groups=8, seed=s)) for s in range(25)]
    rewards = [report.metrics["rollout/raw_reward"] for report in reports]
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.7
    assert reports[-1].phase_s.keys() >= {"values", "train_critic", "train"}


def test_the_critic_has_a_learning_rate_and_a_warm_up_of_its_own(model_dir: Path) -> None:
    trainer = {"lr": 1e-2, "critic_lr": 4e-3, "critic_lr_warmup_iters": 2, "lr_warmup_iters": 4}
    backend = loaded(model_dir, trainer=trainer, algorithm=PPO)
    critic_lr, lr = [], []
    for s in range(4):
        train(backend, s)
        critic_lr.append(critic_rates(backend)[0])
        lr.append(backend._rollout.actor.optimizer.learning_rates[0])
    assert critic_lr == pytest.approx([0, 2e-3, 4e-3, 4e-3])
    assert lr == pytest.approx([0, 2.5e-3, 5e-3, 7.5e-3])
    still = loaded(model_dir, trainer={"critic_lr": 0.0}, algorithm=PPO)
    critic, actor = critic_weights(still), snapshot(still.weights())
    train(still, 0)
    assert same_bits(critic, critic_weights(still))
    assert not same_bits(actor, snapshot(still.weights()))


def test_the_value_clip_holds_back_the_steps_after_the_first(model_dir: Path) -> None:
    found: dict[tuple[float, int], dict[str, Tensor]] = {}
    fractions = []
    for clip in (1e-6, 1e6):
        for num_steps in (1, 2):
            algorithm = {**PPO, "value_clip": clip}
            trainer = {"num_critic_only_steps": 9, "optimizer": "sgd"}
            backend = loaded(model_dir, trainer=trainer, algorithm=algorithm, num_steps_per_rollout=num_steps)
            fractions.append(train(backend, 0).metrics["train/value_clipfrac"])
            found[clip, num_steps] = critic_weights(backend)
    # At a first step values are what they were; at the second all have moved by more than 1e-6.
    assert fractions == pytest.approx([0, 0.5, 0, 0], abs=0.05)
    assert same_bits(found[1e-6, 1], found[1e6, 1])
    assert not same_bits(found[1e-6, 2], found[1e6, 2])


def test_restoring_goes_on_with_the_same_bits_as_never_stopping(model_dir: Path, tmp_path: Path) -> None:
    plan: dict[str, Any] = {
        "algorithm": {**PPO, "lambd": 0.9, "use_tis": True, "normalize_advantages": True},
        "trainer": {
            "critic_lr": 3e-3,
            "critic_lr_warmup_iters": 5,
            "lr_warmup_iters": 3,
            "lr_decay_style": "cosine",
            "num_critic_only_steps": 1,
        },
        "num_steps_per_rollout": 2,
        "num_rollout": 5,
    }
    backend = loaded(model_dir, **plan)
    for s in range(2):
        train(backend, s)
    checkpoint = backend.save(tmp_path, rollout_step=2)
    stored = critic_weights(backend)
    reports = [train(backend, s) for s in (2, 3)]
    other = backend_of(model_dir, **plan)
    assert other.restore(checkpoint) == 2
    assert same_bits(stored, critic_weights(other))
    critic = other._rollout.critic
    assert critic is not None
    # The actor waited through the first rollout step.
    assert (other._rollout.actor.updates, critic.learner.updates) == (2, 4)
    assert [r.metrics for r in reports] == [train(other, s).metrics for s in (2, 3)]
    assert same_bits(critic_weights(backend), critic_weights(other))
    assert backend.digest() == other.digest()


@pytest.fixture(scope="module")
def trained(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run with a critic."""
    backend = loaded(model_dir, algorithm=PPO, trainer={"critic_lr": 1e-2})
    for s in range(3):
        train(backend, s)
    return backend.save(tmp_path_factory.mktemp("other"), rollout_step=3)


def first_values(model_dir: Path, **trainer: Any) -> tuple[dict[str, Tensor], TorchBackend]:
    backend = loaded(model_dir, algorithm=PPO, trainer={"critic_lr": 1e-2, **trainer})
    return critic_weights(backend), backend


def test_a_critic_starts_from_a_checkpoint_a_model_or_the_loaded_run(model_dir: Path, trained: Path) -> None:
    from safetensors.torch import load_file

    theirs = load_file(trained / STATE)
    named, backend = first_values(model_dir, critic_load=str(trained))
    assert same_bits(theirs, named)
    # critic_load alone brings no actor.
    assert same_bits(snapshot(backend.weights()), load_file(model_dir / "model.safetensors"))
    assert train(backend, 0).metrics["rollout/values"] != 0
    assert same_bits(theirs, first_values(model_dir, load=str(trained))[0])
    assert same_bits(theirs, first_values(model_dir, load=str(trained), no_load_optim=True)[0])
    fresh = first_values(model_dir)[0]
    assert not fresh["head.weight"].any()
    # A critic that is named beside `load` is the one that is taken, and none of the other's moments.
    own, backend = first_values(model_dir, load=str(trained), critic_load=str(model_dir))
    assert same_bits(own, fresh)
    critic = backend._rollout.critic
    assert critic is not None
    assert critic.learner.updates == 0
    assert not critic.learner.optimizer.state()
    assert backend._rollout.actor.updates == 3


def test_the_master_weights_of_a_loaded_critic_are_its_own(model_dir: Path, tmp_path: Path) -> None:
    half = {"dtype": "bfloat16", "main_params_dtype": "float32", "critic_lr": 1e-2}
    backend = loaded(model_dir, algorithm=PPO, trainer=half)
    train(backend, 0)
    checkpoint = str(backend.save(tmp_path, rollout_step=1))
    still = {**half, "load": checkpoint, "no_load_optim": True, "critic_lr": 0.0}
    other = loaded(model_dir, algorithm=PPO, trainer=still)
    before = critic_weights(other)
    assert same_bits(before, critic_weights(backend))
    train(other, 0)
    assert same_bits(before, critic_weights(other))


def test_resetting_the_optimizer_resets_the_critics_too(model_dir: Path, tmp_path: Path) -> None:
    reset = {"reset_optimizer_states": True, "critic_lr": 1e-2}
    backend = loaded(model_dir, algorithm=PPO, trainer=reset)
    train(backend, 0)
    checkpoint = str(backend.save(tmp_path, rollout_step=1))
    fresh = loaded(model_dir, algorithm=PPO, trainer={**reset, "load": checkpoint, "no_load_optim": True})
    for each in (backend, fresh):
        train(each, 1)
    assert same_bits(critic_weights(backend), critic_weights(fresh))
    assert same_bits(snapshot(backend.weights()), snapshot(fresh.weights()))


def test_another_models_critic_and_a_missing_one_are_refused(
    model_dir: Path, trained: Path, tmp_path: Path
) -> None:
    narrow = write_model(tmp_path / "narrow", hidden=16)
    with pytest.raises(
        ConfigError, match=r"trainer\.critic_load: the critic in the checkpoint is of another"
    ):
        backend_of(narrow, algorithm=PPO).restore(trained)
    with pytest.raises(DataError, match=r"trainer\.critic_load: .*nowhere has no config\.json"):
        loaded(model_dir, algorithm=PPO, trainer={"critic_load": str(tmp_path / "nowhere")})


def test_the_same_batches_give_the_same_bits_with_every_model_there_is(model_dir: Path) -> None:
    algorithm = {
        **PPO,
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "kl_loss_type": "low_var_kl",
        "use_decoupled_loss": True,
        "entropy_coef": 0.01,
    }
    trainer = {"ref_update_interval": 2, "keep_old_actor": True, "deterministic": True}
    digests = []
    for _ in range(2):
        backend = loaded(model_dir, algorithm=algorithm, trainer=trainer, num_steps_per_rollout=2)
        metrics = [train(backend, s).metrics for s in range(3)]
        digests.append((backend.digest(), metrics, critic_weights(backend)["head.weight"].tolist()))
    assert digests[0] == digests[1]
