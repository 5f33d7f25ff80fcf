"""Random batches, and worlds that train them from the same weights: for what must not depend on packing."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncrl.messages.sample import Sample, Span
from asyncrl.train.backend import TrainPlan
from asyncrl.train.data import PreparedBatch, Step, prepare_batch
from asyncrl.train.ranks import Ranks
from asyncrl.train.torch import TorchBackend
from tests.train_support import VOCAB, make_sample

FLOAT64, FLOAT32 = 1e-6, 1e-5
"""How far results may be apart, relative to the largest number of their kind."""
KL: dict[str, Any] = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl"}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {**KL, "use_tis": True, "use_opsm": True, "entropy_coef": 0.01, "get_mismatch_metrics": True},
    "per_token": {**KL, "use_tis": True, "use_opsm": True, "calculate_per_token_loss": True},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 1e-3, "eps_clip_c": 3.0},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": 0.3},
    "ppo": {"advantage_estimator": "ppo", "gamma": 0.98, "lambd": 0.9, "normalize_advantages": True},
    "ppo_over_masked": {"advantage_estimator": "ppo", "gae_over_masked_tokens": True},
    "reinforce_plus_plus": {
        "advantage_estimator": "reinforce_plus_plus",
        "normalize_advantages": True,
        "kl_coef": 0.05,
        "kl_loss_type": "k2",
        "gamma": 0.95,
    },
    "rloo_opd": {"advantage_estimator": "rloo", "use_opd": True, "opd_kl_coef": 0.3},
    "decoupled": {"use_decoupled_loss": True, "behave_imp_weight_cap": 2.0},
    "loglinear": {"use_decoupled_loss": True, "prox_logp_method": "loglinear"},
    "rejection": {
        "use_tis": True,
        "tis_batch_normalize": True,
        "use_rs": True,
        "rs_level": "geometric",
        "rs_upper_bound": 1.6,
        "rs_lower_bound": 0.6,
        "rs_veto_threshold": 1e-4,
        "get_mismatch_metrics": True,
    },
    "sequence_tis": {
        "use_tis": True,
        "tis_level": "sequence",
        "tis_mode": "mask",
        "tis_batch_normalize": True,
    },
    "dppo": {"use_dppo": True, "dppo_mask_low": 0.01, "dppo_mask_high": 0.01},
    "stale": {"stale": "drop", "stale_after": 8, "mask_offpolicy_in_partial_rollout": True},
    "divisor": {"pg_loss_divisor": 9.0, "use_kl_loss": True, "kl_loss_coef": 0.01},
    "sft": {"loss_type": "sft_loss"},
}
PER_RANK = ("train/num_micro_batches",)
"""Metrics that say how the work was cut."""
ROLLOUT_STEP = 5


# Batches.


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What hypothesis draws of a sample; the tokens follow from a seed."""

    length: int
    reward: float
    masked: int
    """0 none, 1 some tokens, 2 all but the last."""
    removed: bool
    version: int


DRAWN = st.builds(
    Drawn,
    length=st.integers(1, 14),
    reward=st.sampled_from([0.0, 0.5, 1.0]),
    masked=st.sampled_from([0, 0, 1, 2]),
    removed=st.sampled_from([False, False, False, True]),
    version=st.integers(0, ROLLOUT_STEP),
)
GROUPS = st.lists(st.lists(DRAWN, min_size=1, max_size=5), min_size=2, max_size=4).filter(
    lambda groups: sum(map(len, groups)) >= 4
)
TRAINER = st.fixed_dictionaries(
    {},
    optional={
        "use_dynamic_batch_size": st.booleans(),
        "max_tokens_per_gpu": st.integers(1, 120),
        "micro_batch_size": st.integers(1, 5),
        "data_pad_size_multiplier": st.sampled_from([1, 8, 128]),
        "log_probs_max_tokens_per_gpu": st.integers(1, 120),
        "balance_data": st.booleans(),
        "balance_by_flops": st.booleans(),
    },
)


def build(groups: list[list[Drawn]], *, seed: int) -> list[list[Sample]]:
    """Samples of these shapes; engine log-probs lie around those of a random model."""
    numbers = random.Random(seed)
    return [
        [
            _sample(drawn, numbers=numbers, group_id=group_id, index=index, prompt=prompt)
            for index, drawn in enumerate(group)
        ]
        for group_id, group in enumerate(groups)
        for prompt in [[numbers.randrange(VOCAB) for _ in range(numbers.randrange(1, 6))]]
    ]


def _sample(drawn: Drawn, *, numbers: random.Random, group_id: int, index: int, prompt: list[int]) -> Sample:
    length = drawn.length
    masks = {
        0: [1] * length,
        1: [int(numbers.random() < 0.6) for _ in range(length)],
        2: [0] * (length - 1) + [1],
    }
    sample = make_sample(
        group_id=group_id,
        index=index,
        prompt=prompt,
        response=[numbers.randrange(VOCAB) for _ in range(length)],
        logprobs=[numbers.uniform(-6.0, -3.0) for _ in range(length)],
        reward=drawn.reward,
        mask=masks[drawn.masked],
        remove=drawn.removed,
        version=drawn.version,
    )
    half = length // 2
    if half and drawn.version:
        spans = [Span(drawn.version - 1, 1, half), Span(drawn.version, 1, length - half)]
        sample = msgspec.structs.replace(sample, spans=spans)
    return sample


def all_ranks(
    groups: list[list[Sample]], *, plan: TrainPlan, num_ranks: int = 1, shape: Any = None
) -> PreparedBatch:
    """The work of every rank in one batch: what the sum over ranks sees."""
    parts = [
        prepare_batch(groups, plan=plan, ranks=Ranks(rank, num_ranks), shape=shape)
        for rank in range(num_ranks)
    ]
    steps = [
        Step(samples=step.samples, micros=[m for part in parts for m in part.steps[index].micros])
        for index, step in enumerate(parts[0].steps)
    ]
    return dataclasses.replace(parts[0], steps=steps, forwards=[m for part in parts for m in part.forwards])


# Worlds.


@dataclasses.dataclass(frozen=True)
class Outcome:
    metrics: dict[str, float]
    updates: dict[str, Tensor]


class World:
    """A loaded backend that every run finds as it was."""

    def __init__(self, plan: TrainPlan, *, double: bool) -> None:
        self.plan, self.double = plan, double
        self.backend = TorchBackend(plan)
        self.backend.load()
        rollout = self.backend._rollout
        critic = [] if rollout.critic is None else [rollout.critic._model, rollout.critic._head]
        if critic:
            generator = torch.Generator().manual_seed(1)
            torch.nn.init.normal_(critic[1].weight, std=0.1, generator=generator)
        frozen = [rollout.policies.reference, rollout.policies.teacher]
        if double:
            for module in (rollout.model, *critic, *(model for model in frozen if model is not None)):
                module.double()
        for model in frozen:
            # Not the actor's weights, or every KL would be 0.
            if model is not None:
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        learners = [rollout.actor] + ([] if rollout.critic is None else [rollout.critic.learner])
        self.parameters = {
            f"{number}.{name}": parameter
            for number, learner in enumerate(learners)
            for name, parameter in learner._parameters.items()
        }
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}

    def run(self, groups: list[list[Sample]], *, num_ranks: int = 1, **trainer: Any) -> Outcome:
        """One rollout step from the initial weights with other packing options."""
        plan = msgspec.structs.replace(
            self.plan, trainer=msgspec.structs.replace(self.plan.trainer, **trainer)
        )
        prepared = all_ranks(groups, plan=plan, num_ranks=num_ranks, shape=self.backend._shape)
        if self.double:
            floats = {k: v.double() for k, v in vars(prepared.data).items() if _is_float(v)}
            prepared = dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, **floats))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.initial[name])
        report = self.backend.train(prepared, rollout_step=ROLLOUT_STEP)
        metrics = {name: value for name, value in report.metrics.items() if name not in PER_RANK}
        del metrics["train/step"]
        updates = {name: p.detach() - self.initial[name] for name, p in self.parameters.items()}
        return Outcome(metrics, updates)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def assert_same(first: Outcome, second: Outcome, *, tolerance: float) -> None:
    assert first.metrics == pytest.approx(second.metrics, rel=tolerance, abs=tolerance)
    for learner in ("0.", "1."):
        pairs = [
            (name, update, second.updates[name])
            for name, update in first.updates.items()
            if name.startswith(learner)
        ]
        largest = max((float(update.abs().max()) for _, update, _ in pairs), default=0.0)
        for name, ours, theirs in pairs:
            difference = float((ours - theirs).abs().max())
            assert difference <= tolerance * largest + 1e-12, (name, difference, largest)


def differs(first: Outcome, second: Outcome) -> bool:
    return any(
        float((update - second.updates[name]).abs().max()) > 1e-4 for name, update in first.updates.items()
    )


def examples(count: int) -> settings:
    """The same few every time, and no search for a smaller one: a training run per example is not cheap."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )


def in_order(groups: list[list[Sample]], order: list[int]) -> list[list[Sample]]:
    """One sample a list, in another order: groups are known by their ids."""
    samples = [sample for group in groups for sample in group]
    return [[samples[i]] for i in order]
