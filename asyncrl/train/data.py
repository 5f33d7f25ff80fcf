"""From groups of samples to a batch ready to train: the part that needs neither weights nor a device.

Owns normalised rewards, optimizer-step boundaries and packing. Pure but for the user's hooks: the same groups
and plan give the same micro-batches, in any process and on any thread.

Shape letters: S samples of the batch.

Invariant: which samples an optimizer step trains depends on their recorded order alone, never on packing or
on the number of ranks.
"""

# ruff: noqa: N806 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asyncrl.algo.batch import schedule, split_steps
from asyncrl.algo.partition import flops
from asyncrl.errors import DataError
from asyncrl.messages.hooks import HookSample
from asyncrl.messages.sample import Sample
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.advantages import distils, normalized_rewards
from asyncrl.train.backend import TrainPlan
from asyncrl.train.hooks import TrainHooks
from asyncrl.train.micro import Layout, MicroBatch
from asyncrl.train.model import ModelShape
from asyncrl.train.ranks import Ranks
from asyncrl.train.rows import Row, data_metrics, decode, require_teacher
from asyncrl.train.tokens import TokenData, token_data

DEFAULT_MAX_TOKENS = 8192
"""Tokens per micro-batch where max_tokens_per_gpu is left out."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step."""

    samples: range
    """Positions in the batch."""
    micros: list[MicroBatch]
    """This rank's."""


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """A rollout batch ready to train."""

    steps: list[Step]
    forwards: list[MicroBatch]
    """This rank's micro-batches for passes without a gradient, under log_probs_max_tokens_per_gpu."""
    data: TokenData
    rows: list[Row]
    """The samples in recorded order."""
    samples: list[list[HookSample]]
    """What hooks see of the groups; empty where no hook looks."""
    metrics: dict[str, float]
    """What is known of the data before any forward (rollout/...)."""
    num_tokens: int
    """Response tokens in the loss."""
    layout: Layout
    prepare_s: float = 0.0

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.rows)


def prepare_batch(
    groups: Sequence[Sequence[Sample]],
    *,
    plan: TrainPlan,
    hooks: TrainHooks | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 -- an immutable value
    shape: ModelShape | None = None,
) -> PreparedBatch:
    """Rewards over each group, optimizer steps in recorded order, micro-batches within each.

    Raises DataError for an empty batch, a malformed sample or an optimizer step with fewer samples than
    ranks, PluginError for a hook's malformed answer.
    """
    rows = [decode(sample, group_size=plan.n_samples_per_prompt) for group in groups for sample in group]
    if not rows:
        raise DataError("training batch: no samples in it; at least one is needed")
    samples = hooks.samples(groups) if hooks is not None and hooks.want_samples else []
    rows, rewards = _rewards(rows, [sample for group in samples for sample in group], plan, hooks)
    _check_count(len(rows), plan, converted=hooks is not None and hooks.convert_samples is not None)
    if distils(plan.algorithm) and plan.algorithm.opd_type == "engine":
        require_teacher(rows)
    layout = Layout(rows, pad_multiple=plan.trainer.data_pad_size_multiplier)
    lengths = [row.num_tokens for row in rows]
    step_ranges = split_steps(len(rows), num_steps=plan.num_steps_per_rollout)
    _check_ranks(step_ranges, ranks)
    steps = [
        Step(samples=samples_of, micros=[layout.micro_batch(members) for members in ranked[ranks.rank]])
        for samples_of, ranked in zip(
            step_ranges,
            pack(
                lengths, trainer=plan.trainer, num_steps=plan.num_steps_per_rollout, ranks=ranks, shape=shape
            ),
            strict=True,
        )
    ]
    data = token_data(rows, reward_S=torch.tensor(rewards, dtype=torch.float64))
    return PreparedBatch(
        steps=steps,
        forwards=_forwards(steps, lengths, layout, plan, ranks),
        data=data,
        rows=rows,
        samples=samples,
        metrics=data_metrics(rows, rewards),
        num_tokens=int(torch.count_nonzero(data.mask_R)),
        layout=layout,
    )


def _rewards(
    rows: list[Row], samples: list[HookSample], plan: TrainPlan, hooks: TrainHooks | None
) -> tuple[list[Row], list[float]]:
    """The rows to train and the normalised reward of each, by hook or by option."""
    if hooks is not None:
        processed = hooks.post_processed(samples)
        if processed is not None:
            raw, rewards = processed
            rows = [row.with_reward(reward) for row, reward in zip(rows, raw, strict=True)]
            for sample, reward in zip(samples, rewards, strict=True):
                sample.reward = reward
        converted = hooks.converted(samples, rows)
        if converted is not None:
            return converted
        if processed is not None:
            return rows, rewards
    normalized_S = normalized_rewards(
        torch.tensor([row.reward for row in rows], dtype=torch.float64),
        group_S=torch.tensor([row.group_id for row in rows]),
        rollout_S=None,
        algorithm=plan.algorithm,
    )
    return rows, normalized_S.tolist()


def _check_count(count: int, plan: TrainPlan, *, converted: bool) -> None:
    """A hook that makes more or fewer samples changes every optimizer step; that has to be wanted."""
    if not converted or plan.num_samples is None or plan.trainer.use_dynamic_global_batch_size:
        return
    if count != plan.num_samples:
        raise DataError(
            f"algorithm.custom_convert_samples_to_train_data_path: made {count} samples; expected "
            f"{plan.num_samples} = global_batch_size x num_steps_per_rollout, or set "
            "trainer.use_dynamic_global_batch_size = true to split whatever comes into as many steps"
        )


def _check_ranks(step_ranges: Sequence[range], ranks: Ranks) -> None:
    """Every rank sees the same batch, so all of them refuse it, and none waits for another."""
    for number, samples in enumerate(step_ranges):
        if len(samples) < ranks.size:
            raise DataError(
                f"training batch: optimizer step {number} of {len(step_ranges)} has {len(samples)} samples "
                f"for {ranks.size} ranks; every rank needs one: raise trainer.global_batch_size, lower "
                "trainer.num_steps_per_rollout, start fewer trainer processes, or, for a smaller last batch, "
                "set trainer.allow_partial_train_step = false"
            )


def pack(
    lengths: Sequence[int],
    *,
    trainer: TrainerConfig,
    num_steps: int = 1,
    ranks: Ranks = Ranks(),  # noqa: B008 -- an immutable value
    shape: ModelShape | None = None,
    max_tokens: int | None = None,
) -> list[list[list[list[int]]]]:
    """[step][rank][micro-batch] -> positions of samples, by the trainer's options."""
    by_tokens = max_tokens is not None or trainer.use_dynamic_batch_size
    sizes = None
    if trainer.balance_by_flops and shape is not None:
        sizes = flops(
            lengths,
            num_parameters=shape.num_parameters,
            num_layers=shape.num_layers,
            attention_size=shape.attention_size,
        )
    return schedule(
        lengths,
        num_steps=num_steps,
        num_ranks=ranks.size,
        max_tokens=(max_tokens or trainer.max_tokens_per_gpu or DEFAULT_MAX_TOKENS) if by_tokens else None,
        micro_batch_size=None if by_tokens else trainer.micro_batch_size,
        sizes=sizes,
        balance=trainer.balance_data,
    )


def _forwards(
    steps: list[Step], lengths: list[int], layout: Layout, plan: TrainPlan, ranks: Ranks
) -> list[MicroBatch]:
    """Training's micro-batches, or larger ones where passes without a gradient may be larger."""
    limit = plan.trainer.log_probs_max_tokens_per_gpu
    if limit is None:
        return [micro for step in steps for micro in step.micros]
    packed = pack(lengths, trainer=plan.trainer, ranks=ranks, max_tokens=limit)
    return [layout.micro_batch(members) for members in packed[0][ranks.rank]]
