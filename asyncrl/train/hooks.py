"""The user's functions on the training side, called as slime and Miles call them.

Owns their loading and the shape of every call and answer. A hook sees dictionaries, lists and its own
`HookSample`s; what it leaves there reaches the batch only through `hook_data`'s checks.

Shape letters: R response tokens of a micro-batch or of the batch, S its samples, T tokens, V vocabulary.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
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
from asyncrl.topology.plugins import check_signature, load
from asyncrl.train import hook_data
from asyncrl.train.corrections import Corrected
from asyncrl.train.micro import MicroBatch
from asyncrl.train.rows import Row
from asyncrl.train.tokens import TokenData

KINDS = {
    "custom_loss_function_path": "custom_loss",
    "custom_tis_function_path": "custom_tis",
    "custom_pg_loss_reducer_function_path": "pg_loss_reducer",
    "custom_advantage_function_path": "advantage",
    "custom_reward_post_process_path": "reward_post_process",
    "custom_convert_samples_to_train_data_path": "convert_samples",
    "rollout_data_postprocess_path": "rollout_data_postprocess",
    "custom_before_log_prob_hook_path": "before_log_prob",
    "custom_before_train_step_hook_path": "before_train_step",
}
"""Option of [algorithm] -> kind of hook."""
OWN = "custom/"
"""What the names of a hook's metrics begin with: none can be taken for one of ours."""


class SchedulePosition(NamedTuple):
    """What stands in for Megatron's opt_param_scheduler: the learning rate is a function of the step."""

    num_steps: int
    """Optimizer steps before this one."""
    lr: float
    """The learning rate of this one."""


class TrainHooks:
    """The hooks of a run; None where an option is not set."""

    def __init__(self, algorithm: AlgorithmConfig, *, args: Args) -> None:
        """Load and check all of them. Raises PluginError."""
        self.args = args
        self.per_token = algorithm.calculate_per_token_loss
        found: dict[str, Callable[..., Any] | None] = dict.fromkeys(KINDS.values())
        self._forms: dict[str, tuple[str, ...]] = {}
        for option, kind in KINDS.items():
            path = getattr(algorithm, option)
            if path is not None:
                what = f"algorithm.{option}"
                hook: Any = load(path, what=what)
                self._forms[kind] = check_signature(hook, kind=kind, option=what)
                found[kind] = hook
        self.custom_loss = found["custom_loss"]
        self.custom_tis = found["custom_tis"]
        self.pg_loss_reducer = found["pg_loss_reducer"]
        self.advantage = found["advantage"]
        self.reward_post_process = found["reward_post_process"]
        self.convert_samples = found["convert_samples"]
        self.rollout_data_postprocess = found["rollout_data_postprocess"]
        self.before_log_prob = found["before_log_prob"]
        self.before_train_step = found["before_train_step"]

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
        if self.convert_samples is None:
            return None
        what = "algorithm.custom_convert_samples_to_train_data_path"
        found = self.convert_samples(self.args, list(samples))
        return hook_data.converted_rows(found, rows, samples, what=what)

    def post_processed(self, samples: Sequence[HookSample]) -> tuple[list[float], list[float]] | None:
        """(raw rewards, rewards to train on), one each per sample."""
        if self.reward_post_process is None:
            return None
        what = "algorithm.custom_reward_post_process_path"
        found = self.reward_post_process(self.args, list(samples))
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise PluginError(
                f"{what}: returned {type(found).__name__}; expected the pair (raw_rewards, rewards)"
            )
        for values, name in zip(found, ("raw_rewards", "rewards"), strict=True):
            hook_data.check_length(values, len(samples), what=f"{what}: {name}", unit="samples")
        raw, rewards = ([float(value) for value in values] for values in found)
        return raw, rewards

    # Around the forward passes.

    def log_probs_begin(self, model: Any, *, store_prefix: str) -> None:
        """A forward pass of "", "ref_" or "teacher_" log-probs begins."""
        if self.before_log_prob is not None:
            self.before_log_prob(self.args, model, store_prefix)

    def set_advantages(self, data: TokenData, rows: Sequence[Row]) -> None:
        """Let the advantage function set advantages and returns."""
        assert self.advantage is not None, "asked only where it is set"
        batch = hook_data.rollout_data(data, rows)
        self.advantage(self.args, batch)
        what = "algorithm.custom_advantage_function_path"
        hook_data.read_back(data, batch, what=what, required=("advantages", "returns"))

    def post_process(
        self, data: TokenData, rows: Sequence[Row], samples: list[list[HookSample]], *, rollout_step: int
    ) -> None:
        """Run the rollout-data hook in the form it has, and take over what it changed."""
        if self.rollout_data_postprocess is None:
            return
        form = self._forms["rollout_data_postprocess"]
        if form == ("args",):
            self.rollout_data_postprocess(self.args)
        elif form == ("args", "samples"):
            self._post_process_samples(data, samples)
        else:
            batch = hook_data.rollout_data(data, rows)
            self.rollout_data_postprocess(self.args, rollout_step, batch)
            hook_data.read_back(data, batch, what="algorithm.rollout_data_postprocess_path")

    def _post_process_samples(self, data: TokenData, samples: list[list[HookSample]]) -> None:
        flat = [sample for group in samples for sample in group]
        what = "algorithm.rollout_data_postprocess_path"
        hook_data.check_length(flat, data.num_samples, what=what, unit="samples")
        if data.old_R is not None:
            for sample, logprobs in zip(flat, data.split(data.old_R), strict=True):
                sample.log_probs = logprobs.tolist()  # type: ignore[attr-defined]
        assert self.rollout_data_postprocess is not None
        self.rollout_data_postprocess(self.args, samples)
        masks = [
            [0] * sample.response_length if sample.remove_sample else _mask_of(sample) for sample in flat
        ]
        data.mask_R = hook_data.joined(masks, data, what=f"{what}: loss_mask")

    # Per micro-batch and per optimizer step.

    def train_step_begins(
        self, *, rollout_step: int, step_index: int, model: Any, optimizer: Any, scheduler: Any
    ) -> None:
        """Gradients are zero, the optimizer step begins; `step_index` counts within the rollout step."""
        if self.before_train_step is not None:
            self.before_train_step(self.args, rollout_step, step_index, model, optimizer, scheduler)

    def loss(
        self, logits_TV: Tensor, tokens: TokenData, micro: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The custom loss as this micro-batch's share of the step's, and its metrics."""
        assert self.custom_loss is not None, "asked only where it is set"
        what = "algorithm.custom_loss_function_path"
        batch = hook_data.loss_batch(tokens, micro)
        found = self.custom_loss(self.args, batch, logits_TV[None], self._reducer(tokens))
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
            raise PluginError(f"{what}: returned {_shape(found)}; expected (loss, dict of metrics)")
        loss, metrics = found
        _check_scalar(loss, what=what)
        shares = {name: torch.as_tensor(value) / tokens.step_divisor for name, value in metrics.items()}
        return loss / tokens.step_divisor, {f"{OWN}{name}": value.detach() for name, value in shares.items()}

    def _reducer(self, tokens: TokenData) -> Callable[[Tensor], Tensor]:
        """Slime's sum_of_sample_mean (or sum_of_token)."""
        weight_R = tokens.weight_R * tokens.keep_R * tokens.step_divisor
        return lambda values_R: weighted_sum(values_R, weights_R=weight_R)

    def correct(self, loss_R: Tensor, tokens: TokenData, *, trainer_R: Tensor) -> Corrected:
        """The custom TIS function's loss, masks and metrics."""
        assert self.custom_tis is not None, "asked only where it is set"
        what = "algorithm.custom_tis_function_path"
        lengths = [len(part) for part in tokens.split(tokens.mask_R)]
        found = self.custom_tis(
            self.args,
            pg_loss=loss_R,
            train_log_probs=tokens.split(trainer_R),
            rollout_log_probs=tokens.split(tokens.rollout_R),
            loss_masks=tokens.split(tokens.mask_R),
            total_lengths=tokens.lengths,
            response_lengths=lengths,
        )
        if not isinstance(found, tuple) or len(found) != 3:
            raise PluginError(f"{what}: returned {_shape(found)}; expected (pg_loss, masks, dict of metrics)")
        pg_loss_R, masks, metrics = found
        if _shape(pg_loss_R) != _shape(loss_R):
            raise PluginError(f"{what}: pg_loss came as {_shape(pg_loss_R)}; expected {_shape(loss_R)}")
        masks_R = hook_data.joined(masks, tokens, what=f"{what}: masks")
        keep_R = torch.where(tokens.mask_R > 0, masks_R, 1.0)
        reduced = {f"{OWN}{name}": self._metric(value, tokens, what=what) for name, value in metrics.items()}
        return Corrected(pg_loss_R, keep_R, reduced)

    def _metric(self, value: Any, tokens: TokenData, *, what: str) -> Tensor:
        """A metric per token (a tensor or a list per sample), or a number for the micro-batch."""
        if isinstance(value, list | tuple):
            value = hook_data.joined(value, tokens, what=what)
        value = torch.as_tensor(value).detach().to(tokens.weight_R)
        if value.shape == tokens.weight_R.shape:
            return weighted_sum(value, weights_R=tokens.weight_R)
        return value.mean() * tokens.num_samples / tokens.num_step_samples

    def reduce(self, loss_R: Tensor, tokens: TokenData, *, keep_R: Tensor) -> Tensor:
        """The policy loss by the custom reducer, as this micro-batch's share of the step's."""
        assert self.pg_loss_reducer is not None, "asked only where it is set"
        what = "algorithm.custom_pg_loss_reducer_function_path"
        masks = tokens.split(tokens.mask_R * keep_R)
        lengths = [len(mask_R) for mask_R in masks]
        reducer = self.pg_loss_reducer(tokens.lengths, lengths, masks, self.per_token)
        if not callable(reducer):
            raise PluginError(
                f"{what}: returned {_shape(reducer)}; expected a function of the loss per token"
            )
        loss: Tensor = reducer(loss_R)
        _check_scalar(loss, what=what)
        return loss / tokens.step_divisor


def _mask_of(sample: HookSample) -> list[int]:
    return [1] * sample.response_length if sample.loss_mask is None else list(sample.loss_mask)


def _check_scalar(value: Any, *, what: str) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise PluginError(f"{what}: the loss came as {_shape(value)}; expected a tensor of one number")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return type(value).__name__
