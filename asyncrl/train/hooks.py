"""The user's functions on the training side, called as slime and Miles call them.

Owns their loading and the shape of every call and answer. A hook sees dictionaries, lists and its own
`HookSample`s; what it leaves there reaches the batch only through `hook_data`'s checks.

Shape letters: R response tokens of a micro-batch or of the batch, S its samples, T tokens, V vocabulary.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncrl.algo.segment import weighted_sum
from asyncrl.errors import PluginError
from asyncrl.messages.hooks import Args, HookSample, hook_sample
from asyncrl.messages.sample import Sample
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.topology.hook_kinds import ALGORITHM_HOOKS
from asyncrl.train import hook_data
from asyncrl.train.hook_call import UserHook
from asyncrl.train.hook_convert import converted_rows
from asyncrl.train.hook_data import described
from asyncrl.train.micro import MicroBatch
from asyncrl.train.rows import Row
from asyncrl.train.tokens import TokenData

OWN = "custom/"
"""What the names of a hook's metrics begin with: none can be taken for one of ours."""


class SchedulePosition(NamedTuple):
    """What stands in for Megatron's opt_param_scheduler: the learning rate is a function of the step."""

    num_steps: int
    """Optimizer steps before this one."""
    lr: float
    """The learning rate of this one."""


class Corrected(NamedTuple):
    """A policy loss after corrections."""

    loss_R: Tensor
    """Weighted, and 0 where a token was taken out."""
    keep_R: Tensor
    """1.0 where the token is still in the policy loss, by the corrections alone."""
    metrics: dict[str, Tensor]
    """Scalars: this micro-batch's share of the optimizer step's."""


class TrainHooks:
    """The hooks of a run; None where an option is not set."""

    def __init__(self, algorithm: AlgorithmConfig, *, args: Args) -> None:
        """Load and check all of them. Raises PluginError."""
        self.args = args
        self.per_token = algorithm.calculate_per_token_loss
        found: dict[str, UserHook] = {
            kind: UserHook(path, kind=kind, option=f"algorithm.{option}")
            for option, kind in ALGORITHM_HOOKS.items()
            if (path := getattr(algorithm, option)) is not None
        }
        self.custom_loss = found.get("custom_loss")
        self.custom_tis = found.get("custom_tis")
        self.pg_loss_reducer = found.get("pg_loss_reducer")
        self.advantage = found.get("advantage")
        self.reward_post_process = found.get("reward_post_process")
        self.convert_samples = found.get("convert_samples")
        self.rollout_data_postprocess = found.get("rollout_data_postprocess")
        self.before_log_prob = found.get("before_log_prob")
        self.before_train_step = found.get("before_train_step")
        self._metric_names: dict[str, list[str]] = {}
        """Of the optimizer step's first micro-batch, by option."""
        post = self.rollout_data_postprocess
        if post is not None and post.form == ("args", "samples") and self.convert_samples is not None:
            raise PluginError(
                f"{post.option}: (args, samples) sees samples as they were generated, but "
                f"{self.convert_samples.option} makes others of them; write it as (args, rollout_id, "
                "rollout_data)"
            )

    @property
    def see_log_probs(self) -> bool:
        """Whether a hook is promised the trainer's log-probs before training."""
        return any((self.custom_loss, self.advantage, self.rollout_data_postprocess))

    @property
    def want_samples(self) -> bool:
        """Whether a hook looks at samples."""
        return any((self.reward_post_process, self.convert_samples, self.rollout_data_postprocess))

    def samples(self, groups: Sequence[Sequence[Sample]]) -> list[list[HookSample]]:
        """The hooks' own copies of a batch."""
        size = getattr(self.args, "n_samples_per_prompt", 0) or max(map(len, groups), default=0)
        return [[hook_sample(sample, group_size=size) for sample in group] for group in groups]

    # Before any forward pass.

    def converted(
        self, samples: Sequence[HookSample], rows: Sequence[Row]
    ) -> tuple[list[Row], list[float]] | None:
        """Rows and rewards as the convert-samples hook makes them."""
        hook = self.convert_samples
        if hook is None:
            return None
        # Before the call: a hook may give its own copies other indices.
        known = {int(sample.index or 0): row for sample, row in zip(samples, rows, strict=True)}
        return converted_rows(hook(self.args, list(samples)), known, what=hook.option)

    def post_processed(self, samples: Sequence[HookSample]) -> tuple[list[float], list[float]] | None:
        """(raw rewards, rewards to train on), one each per sample."""
        hook = self.reward_post_process
        if hook is None:
            return None
        names = [str(sample.session_id).replace("-", ".") for sample in samples]
        found = hook(self.args, list(samples))
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise PluginError(
                f"{hook.option}: returned {described(found)}; expected the pair (raw_rewards, rewards)"
            )
        raw, rewards = (
            hook_data.numbers(values, names, what=f"{hook.option}: {name}")
            for values, name in zip(found, ("raw_rewards", "rewards"), strict=True)
        )
        return raw, rewards

    # Around the forward passes.

    def log_probs_begin(self, model: Any, *, store_prefix: str) -> None:
        """A forward pass of "", "ref_" or "teacher_" log-probs begins."""
        if self.before_log_prob is not None:
            self.before_log_prob(self.args, model, store_prefix)

    def set_advantages(self, data: TokenData, rows: Sequence[Row]) -> None:
        """Let the advantage function set advantages and returns."""
        hook = self.advantage
        assert hook is not None, "asked only where it is set"
        batch = hook_data.rollout_data(data, rows)
        _check_in_place(hook(self.args, batch), batch, what=hook.option)
        hook_data.read_back(data, batch, what=hook.option, required=("advantages", "returns"))

    def post_process(
        self, data: TokenData, rows: Sequence[Row], samples: list[list[HookSample]], *, rollout_step: int
    ) -> None:
        """Run the rollout-data hook in the form it has, and take over what it changed."""
        hook = self.rollout_data_postprocess
        if hook is None:
            return
        if hook.form == ("args",):
            hook(self.args)
        elif hook.form == ("args", "samples"):
            self._post_process_samples(hook, data, samples)
        else:
            batch = hook_data.rollout_data(data, rows)
            _check_in_place(hook(self.args, rollout_step, batch), batch, what=hook.option)
            hook_data.read_back(data, batch, what=hook.option)

    def _post_process_samples(self, hook: UserHook, data: TokenData, samples: list[list[HookSample]]) -> None:
        flat = [sample for group in samples for sample in group]
        if data.old_R is not None:
            for sample, logprobs in zip(flat, data.split(data.old_R), strict=True):
                sample.log_probs = logprobs.tolist()  # type: ignore[attr-defined]
        hook(self.args, samples)
        masks = [
            [0] * sample.response_length if sample.remove_sample else _mask_of(sample) for sample in flat
        ]
        what = f"{hook.option}: sample.loss_mask"
        data.mask_R = hook_data.joined(masks, data, what=what)
        hook_data.check_binary(data.mask_R, data, what=what)

    # Per micro-batch and per optimizer step.

    def train_step_begins(
        self, *, rollout_step: int, step_index: int, model: Any, optimizer: Any, scheduler: Any
    ) -> None:
        """Gradients are zero, the optimizer step begins; `step_index` counts within the rollout step."""
        self._metric_names.clear()
        if self.before_train_step is not None:
            self.before_train_step(self.args, rollout_step, step_index, model, optimizer, scheduler)

    def loss(
        self, logits_TV: Tensor, tokens: TokenData, micro: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The custom loss as this micro-batch's share of the step's, and its metrics."""
        hook = self.custom_loss
        assert hook is not None, "asked only where it is set"
        batch = hook_data.loss_batch(tokens, micro)
        found = hook(self.args, batch, logits_TV[None], self._reducer(tokens))
        if not isinstance(found, tuple) or len(found) != 2:
            raise PluginError(f"{hook.option}: returned {described(found)}; expected (loss, dict of metrics)")
        loss, metrics = found
        _check_scalar(loss, what=hook.option)
        _check_gradient(loss, logits_TV, of="the loss", source="logits", what=hook.option)
        self._check_metrics(metrics, what=hook.option)
        shares = {}
        for name, value in metrics.items():
            what = f'{hook.option}: metric "{name}"'
            number = hook_data.tensor_of(value, what=what).to(tokens.weight_R)
            if number.numel() != 1:
                raise PluginError(f"{what} came as {described(value)}; expected one number")
            shares[_own(name)] = number.reshape(()) / tokens.step_divisor
        return loss.reshape(()) / tokens.step_divisor, shares

    def _reducer(self, tokens: TokenData) -> Callable[[Tensor], Tensor]:
        """Slime's sum_of_sample_mean (or sum_of_token)."""
        weight_R = tokens.weight_R * tokens.keep_R * tokens.step_divisor
        return lambda values_R: weighted_sum(values_R, weights_R=weight_R)

    def correct(self, loss_R: Tensor, tokens: TokenData, *, trainer_R: Tensor) -> Corrected:
        """The custom TIS function's loss, masks and metrics."""
        hook = self.custom_tis
        assert hook is not None, "asked only where it is set"
        masks = hook_data.masks_of(tokens, tokens.mask_R)
        found = hook(
            self.args,
            pg_loss=loss_R,
            train_log_probs=hook_data.copies(tokens, trainer_R),
            rollout_log_probs=hook_data.copies(tokens, tokens.rollout_R),
            loss_masks=masks,
            total_lengths=list(tokens.lengths),
            response_lengths=[len(mask_R) for mask_R in masks],
        )
        if not isinstance(found, tuple) or len(found) != 3:
            raise PluginError(
                f"{hook.option}: returned {described(found)}; expected (pg_loss, masks, dict of metrics)"
            )
        pg_loss_R, masks, metrics = found
        if not isinstance(pg_loss_R, Tensor) or pg_loss_R.shape != loss_R.shape:
            raise PluginError(
                f"{hook.option}: pg_loss came as {described(pg_loss_R)}; expected "
                f"{described(loss_R)}, one value per response token"
            )
        _check_gradient(pg_loss_R, loss_R, of="pg_loss", source="the pg_loss it was given", what=hook.option)
        self._check_metrics(metrics, what=hook.option)
        masks_R = hook_data.joined(masks, tokens, what=f"{hook.option}: masks")
        keep_R = torch.where(tokens.mask_R > 0, masks_R, 1.0)
        hook_data.check_binary(keep_R, tokens, what=f"{hook.option}: masks")
        what = f"{hook.option}: metric"
        reduced = {
            _own(name): self._metric(value, tokens, what=f'{what} "{name}"')
            for name, value in metrics.items()
        }
        return Corrected(pg_loss_R, keep_R, reduced)

    def _metric(self, value: Any, tokens: TokenData, *, what: str) -> Tensor:
        """A metric per token (a tensor or a list per sample), or a number for the micro-batch."""
        if isinstance(value, list | tuple):
            value_R = hook_data.joined(value, tokens, what=what)
        else:
            value_R = hook_data.tensor_of(value, what=what).to(tokens.weight_R)
        if value_R.shape == tokens.weight_R.shape:
            return weighted_sum(value_R, weights_R=tokens.weight_R)
        if value_R.numel() == 1:
            return value_R.reshape(()) * tokens.num_samples / tokens.num_step_samples
        raise PluginError(
            f"{what} came as {described(value)}; expected one number, one per response token "
            f"[{len(tokens.weight_R)}], or a list of {tokens.num_samples} tensors, one per sample"
        )

    def _check_metrics(self, metrics: Any, *, what: str) -> None:
        """Metrics are summed over the micro-batches of a step, so each of them must have the same ones."""
        if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
            raise PluginError(f"{what}: the metrics came as {described(metrics)}; expected a dict by name")
        names = sorted(metrics)
        first = self._metric_names.setdefault(what, names)
        if names != first:
            raise PluginError(
                f"{what}: metrics {', '.join(names) or 'none'} came for one micro-batch and "
                f"{', '.join(first) or 'none'} for another of the same optimizer step; expected the same"
            )

    def reduce(self, loss_R: Tensor, tokens: TokenData, *, keep_R: Tensor) -> Tensor:
        """The policy loss by the custom reducer, as this micro-batch's share of the step's."""
        hook = self.pg_loss_reducer
        assert hook is not None, "asked only where it is set"
        mask_R = tokens.mask_R * keep_R
        masks = hook_data.masks_of(tokens, mask_R)
        reducer = hook(list(tokens.lengths), [len(mask) for mask in masks], masks, self.per_token)
        if not callable(reducer):
            raise PluginError(
                f"{hook.option}: returned {described(reducer)}; expected a function of the loss per token"
            )
        # A masked token's loss may be anything, and a reducer that multiplies by the mask keeps a NaN.
        loss = hook.run(reducer, torch.where(mask_R > 0, loss_R, 0.0))
        _check_scalar(loss, what=hook.option)
        _check_gradient(loss, loss_R, of="the loss", source="the loss per token", what=hook.option)
        reduced: Tensor = loss.reshape(()) / tokens.step_divisor
        return reduced


def _own(name: str) -> str:
    """The public name of a hook's metric; a slash in it would make a family of its own."""
    return f"{OWN}{name.replace('/', '.')}"


def _mask_of(sample: HookSample) -> list[int]:
    return [1] * sample.response_length if sample.loss_mask is None else list(sample.loss_mask)


def _check_in_place(returned: Any, batch: dict[str, Any], *, what: str) -> None:
    """A hook that returns another dictionary expects it to be used; nobody would."""
    if isinstance(returned, Mapping) and returned is not batch:
        raise PluginError(
            f"{what}: returned {described(returned)}; expected None, with rollout_data changed in place"
        )


def _check_scalar(value: Any, *, what: str) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise PluginError(f"{what}: the loss came as {described(value)}; expected a tensor of one number")


def _check_gradient(value: Tensor, given: Tensor, *, of: str, source: str, what: str) -> None:
    if given.requires_grad and not value.requires_grad:
        raise PluginError(
            f"{what}: {of} has no gradient; compute it from {source}, without detach(), item() or no_grad()"
        )
