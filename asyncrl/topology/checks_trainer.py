"""Whether the options of [trainer] go together, with each other and with [algorithm].

Pure, and part of `checks`: each problem is one line that starts with the option it is about and says what was
given, why it cannot be, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from asyncrl.topology.schema import Topology
from asyncrl.topology.training import TrainerConfig

_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
_CRITIC = ("critic_load", "critic_lr", "critic_lr_warmup_iters", "num_critic_only_steps")
"""Options of the critic, which only ppo has."""


def problems(topology: Topology) -> Iterator[str]:
    """Every reason why the options of [trainer] cannot be used together."""
    trainer = topology.trainer
    yield from _schedule(trainer)
    yield from _checkpoint(trainer)
    yield from _batches(trainer)
    yield from _models(topology)
    yield from _routing(topology)
    if not _DEVICE.fullmatch(trainer.device):
        yield f'trainer.device: given "{trainer.device}"; allowed: cpu, cuda, cuda:N, mps'
    if trainer.main_params_dtype == "bfloat16" and trainer.dtype != "bfloat16":
        yield (
            f'trainer.main_params_dtype: given "bfloat16" with dtype = "{trainer.dtype}"; the optimizer '
            f'never keeps less than the weights have; set dtype = "bfloat16", or leave it out'
        )


def _schedule(trainer: TrainerConfig) -> Iterator[str]:
    if trainer.min_lr > trainer.lr:
        yield f"trainer.min_lr: given {trainer.min_lr:g}; allowed: at most lr = {trainer.lr:g}"
    if trainer.lr_warmup_fraction is not None and trainer.lr_warmup_iters:
        yield (
            f"trainer.lr_warmup_fraction: exclusive with lr_warmup_iters = {trainer.lr_warmup_iters} (each "
            f"says how long the warm-up is); leave one of them out"
        )
    decay = trainer.lr_wsd_decay_iters
    if trainer.lr_decay_style == "WSD":
        if decay is None:
            yield (
                'trainer.lr_wsd_decay_iters: required by lr_decay_style = "WSD", and not given; set it to '
                "the optimizer steps of the decay at the end"
            )
        elif trainer.lr_decay_iters is not None and decay > trainer.lr_decay_iters:
            yield (
                f"trainer.lr_wsd_decay_iters: given {decay}; allowed: at most lr_decay_iters = "
                f"{trainer.lr_decay_iters}"
            )
    elif decay is not None:
        yield (
            f"trainer.lr_wsd_decay_iters: given {decay}, which has no effect with lr_decay_style = "
            f'"{trainer.lr_decay_style}"; set that to "WSD", or leave it out'
        )


def _checkpoint(trainer: TrainerConfig) -> Iterator[str]:
    if trainer.use_checkpoint_opt_param_scheduler and trainer.override_opt_param_scheduler:
        yield (
            "trainer.use_checkpoint_opt_param_scheduler: exclusive with override_opt_param_scheduler (the "
            "schedule is the checkpoint's or this file's); set one of them to false"
        )
    if trainer.no_load_optim and trainer.load is None:
        yield "trainer.no_load_optim: has no effect without load; set that, or leave no_load_optim out"


def _batches(trainer: TrainerConfig) -> Iterator[str]:
    if trainer.balance_by_flops and not trainer.balance_data:
        yield "trainer.balance_by_flops: has no effect without balance_data = true; set that, or leave it out"
    if trainer.log_probs_max_tokens_per_gpu is not None and not trainer.use_dynamic_batch_size:
        yield (
            f"trainer.log_probs_max_tokens_per_gpu: given {trainer.log_probs_max_tokens_per_gpu}, which "
            f"has no effect with use_dynamic_batch_size = false; set that to true, or leave it out"
        )


def _models(topology: Topology) -> Iterator[str]:
    """Options of a critic, a reference or an old actor that the run does not have."""
    trainer, algorithm = topology.trainer, topology.algorithm
    if algorithm.advantage_estimator != "ppo":
        for option in _CRITIC:
            value = getattr(trainer, option)
            if value is not None and value != 0:
                yield (
                    f"trainer.{option}: given {value}, but advantage_estimator = "
                    f'"{algorithm.advantage_estimator}" has no critic; leave it out, or set that to "ppo"'
                )
    if trainer.ref_update_interval is not None and not (algorithm.use_kl_loss or algorithm.kl_coef):
        yield (
            f"trainer.ref_update_interval: given {trainer.ref_update_interval}, but no reference model is "
            f"used; set algorithm.use_kl_loss = true (or kl_coef), or leave it out"
        )
    if trainer.keep_old_actor and (cause := _without_old_pass(topology)):
        yield (
            f"trainer.keep_old_actor: exclusive with {cause} (no pass for old log-probs is made, so no old "
            f"actor is asked); leave one of them out"
        )


def _routing(topology: Topology) -> Iterator[str]:
    trainer = topology.trainer
    if trainer.use_rollout_routing_replay:
        for generator in topology.generator:
            if generator.engine != "embedded":
                yield (
                    "trainer.use_rollout_routing_replay: needs engines that report their routing "
                    f'(embedded), but generator "{generator.name}" has engine = "{generator.engine}"; set '
                    "it to false"
                )
    elif trainer.use_routing_replay and (cause := _without_old_pass(topology)):
        yield (
            f"trainer.use_routing_replay: records the experts in the pass for old log-probs, which {cause} "
            f"leaves out; use use_rollout_routing_replay, or leave one of them out"
        )


def _without_old_pass(topology: Topology) -> str:
    """The option because of which no forward pass for old log-probs is made; "" when one is."""
    algorithm = topology.algorithm
    if algorithm.get_mismatch_metrics:
        return ""
    if algorithm.use_rollout_logprobs:
        return "algorithm.use_rollout_logprobs = true"
    if algorithm.use_decoupled_loss and algorithm.prox_logp_method == "loglinear":
        return 'algorithm.prox_logp_method = "loglinear"'
    return ""
