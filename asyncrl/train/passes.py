"""Forward passes of the torch backend: which model, with which routing, into which field of the batch.

Owns the trainer's options for running a model, and the passes that run before training. Computes no loss.

Shape letters: R response tokens, T tokens of a micro-batch, V vocabulary.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from asyncrl.algo.loss import TokenStatistics
from asyncrl.train.advantages import distils
from asyncrl.train.backend import TrainPlan
from asyncrl.train.forward import response_statistics, row_logits
from asyncrl.train.hooks import TrainHooks
from asyncrl.train.micro import MicroBatch
from asyncrl.train.phases import Phases
from asyncrl.train.ranks import Ranks
from asyncrl.train.routing import Router, find_routers, recording, replaying
from asyncrl.train.tokens import TokenData


class Passes:
    """See the module's docstring."""

    def __init__(self, plan: TrainPlan, *, hooks: TrainHooks, phases: Phases, ranks: Ranks) -> None:
        self._plan = plan
        self._hooks = hooks
        self._phases = phases
        self._ranks = ranks
        self._packed = plan.trainer.attn_implementation == "packed"
        trainer = plan.trainer
        self._replays = trainer.use_routing_replay or trainer.use_rollout_routing_replay
        self.records = trainer.use_routing_replay and not trainer.use_rollout_routing_replay
        self._routers: dict[int, list[Router]] = {}
        """By model; the search is not free, and there is a micro-batch every few milliseconds."""

    def statistics(self, model: Any, micro: MicroBatch) -> TokenStatistics:
        """Log-prob and entropy of a micro-batch's response tokens."""
        return response_statistics(
            model,
            micro,
            packed=self._packed,
            temperature=self._plan.rollout_temperature,
            chunk_size=self._plan.trainer.log_probs_chunk_size,
            entropy_gradient=self._plan.algorithm.entropy_coef != 0,
        )

    def logits(self, model: Any, micro: MicroBatch) -> Tensor:
        """Logits [T, V] of a whole row."""
        return row_logits(model, micro, packed=self._packed)

    def log_probs(
        self,
        field: str,
        model: Any,
        micros: Sequence[MicroBatch],
        data: TokenData,
        *,
        prefix: str,
        follows_actor: bool = False,
    ) -> None:
        """Fill `field` of the batch with a model's log-probs; `follows_actor` where routing is replayed."""
        self._hooks.log_probs_begin(model, store_prefix=prefix)
        model.eval()
        with self._phases(f"{prefix}log_probs"), torch.no_grad():
            self._fill(
                field, micros, data, lambda micro: self._routed(model, micro, data, follows=follows_actor)
            )
        if follows_actor and self.records and self._ranks.size > 1 and data.routing_NLK is not None:
            # Each rank recorded its own tokens; everywhere else it has -1.
            data.routing_NLK = self._ranks.sum_(data.routing_NLK.int() + 1).to(torch.int16) - 1

    def values(self, critic: Any, micros: Sequence[MicroBatch], data: TokenData) -> None:
        """Fill the batch's values."""
        critic.eval()
        with self._phases("values"), torch.no_grad():
            self._fill("value_R", micros, data, critic.values)

    def _fill(
        self, field: str, micros: Sequence[MicroBatch], data: TokenData, run: Callable[[MicroBatch], Tensor]
    ) -> None:
        setattr(data, field, torch.zeros_like(data.rollout_R))
        for micro in micros:
            data.put(field, run(micro), micro=micro)
        self._ranks.sum_(getattr(data, field))

    def _routed(self, model: Any, micro: MicroBatch, data: TokenData, *, follows: bool) -> Tensor:
        if follows and self.records:
            with recording(self._routers_of(model), lengths=self._lengths(micro)) as record:
                logprobs_R = self.statistics(model, micro).logprobs_R
            _keep(data, micro, record.indices_TLK)
            return logprobs_R
        with self.replayed(model, micro, data) if follows else nullcontext():
            return self.statistics(model, micro).logprobs_R

    @contextmanager
    def replayed(self, model: Any, micro: MicroBatch, data: TokenData) -> Iterator[None]:
        """The model's experts inside are those recorded for these tokens, if any are."""
        if not self._replays or data.routing_NLK is None:
            yield
            return
        indices_TLK = data.routing_NLK.index_select(0, micro.place_T)
        with replaying(self._routers_of(model), indices_TLK, lengths=self._lengths(micro)):
            yield

    def _lengths(self, micro: MicroBatch) -> list[int] | None:
        return None if self._packed else micro.lengths

    def check_model(self, model: Any) -> None:
        """Raise ConfigError where routing is to be replayed and the model's routers are not understood."""
        if self._replays:
            self._routers_of(model)

    def _routers_of(self, model: Any) -> list[Router]:
        if id(model) not in self._routers:
            self._routers[id(model)] = find_routers(model)
        return self._routers[id(model)]


def _keep(data: TokenData, micro: MicroBatch, indices_TLK: Tensor) -> None:
    """Store the experts of a micro-batch's tokens; the row after the last stays -1, for padding."""
    if data.routing_NLK is None:
        shape = (data.num_tokens + 1, *indices_TLK.shape[1:])
        data.routing_NLK = torch.full(shape, -1, dtype=indices_TLK.dtype, device=indices_TLK.device)
    data.routing_NLK[micro.place_T] = indices_TLK
    data.routing_NLK[-1] = -1


def needs_old_logprobs(plan: TrainPlan, *, num_steps: int, dropout: bool, hooks: TrainHooks) -> bool:
    """Whether the old policy's log-probs need a forward pass of their own (slime-miles.md 3).

    Not where nothing looks at them, nor where there is a single optimizer step without dropout, whose own
    log-probs they are.
    """
    algorithm, trainer = plan.algorithm, plan.trainer
    if algorithm.loss_type == "sft_loss":
        return False
    before_training = (
        algorithm.kl_coef != 0 and not algorithm.use_rollout_logprobs,
        distils(algorithm),
        algorithm.tis_batch_normalize,
        trainer.keep_old_actor,
        hooks.see_log_probs,
        # The pass that records the routing is this one; a single step replays its own anyway.
        trainer.use_routing_replay and not trainer.use_rollout_routing_replay and num_steps > 1,
    )
    if any(before_training):
        return True
    if algorithm.prox_logp_method == "loglinear":
        return False
    if (algorithm.use_rollout_logprobs or algorithm.use_dppo) and not algorithm.get_mismatch_metrics:
        return False
    return num_steps > 1 or dropout
