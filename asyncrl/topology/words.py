"""What a plan means, in sentences: the schedule it runs by, its price, and what looks like a mistake.

A warning never stops a run; what must stop one is in `checks`.
"""

from __future__ import annotations

from collections.abc import Iterator

from asyncrl.topology import words_algorithm
from asyncrl.topology.plan import Plan

TAILS = (1, 2, 4, 8)
"""Longest answer over step time, for which `tail_table` shows the price of the bound."""


def schedule_in_words(plan: Plan) -> list[str]:
    """How stale, how often, how many, and at what price."""
    samples = plan.tickets * plan.topology.rollout.n_samples_per_prompt
    return [
        _staleness(plan),
        _pushes(plan),
        f"up to {plan.tickets} groups ({samples} samples) are outstanding",
        _batches(plan),
        _length(plan),
        *_price(plan),
    ]


def tail_table(plan: Plan) -> list[tuple[int, float]]:
    """(longest answer over training time of a step, share of the unbounded rate that is left).

    A batch cannot close before the longest answer issued max_staleness steps earlier has ended, so a rollout
    step takes at least (longest answer + training) / (max_staleness + 1). An upper bound of the rate.
    """
    steps = plan.topology.rollout.max_staleness + 1
    return [(tail, min(1.0, steps / (tail + 1))) for tail in TAILS]


def warnings(plan: Plan) -> list[str]:
    """What is allowed, and probably not meant."""
    return [
        *_schedule_warnings(plan),
        *_worker_warnings(plan),
        *words_algorithm.warnings(plan),
        *_training_warnings(plan),
    ]


def plural(number: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _staleness(plan: Plan) -> str:
    eta, steps = plan.topology.rollout.max_staleness, plan.num_steps_per_rollout
    if eta == 0:
        return "every sample is trained by the weights that sampled it: generation and training take turns"
    oldest = plural(eta * steps + steps - 1, "optimizer step")
    return f"a sample may be up to {plural(eta, 'rollout step')} ({oldest}) old when it is trained"


def _pushes(plan: Plan) -> str:
    every = plan.topology.rollout.update_weights_interval
    when = "every rollout step" if every == 1 else f"every {every} rollout steps"
    modes = sorted({table.on_new_weights for table in plan.topology.generator})
    return f"weights are pushed {when}; running answers: {', '.join(modes) or 'none'}"


def _batches(plan: Plan) -> str:
    trainer = plan.topology.trainer
    return (
        f"a rollout step trains {plural(plan.topology.rollout.rollout_batch_size, 'group')} "
        f"({plan.samples_per_rollout} samples) in {plural(plan.num_steps_per_rollout, 'optimizer step')} of "
        f"{trainer.global_batch_size} samples"
    )


def _length(plan: Plan) -> str:
    if plan.num_rollout is None:
        return f"the run lasts {plural(plan.topology.source.num_epoch or 0, 'epoch')} of the prompts"
    total = plan.num_rollout * plan.num_steps_per_rollout
    return f"the run lasts {plural(plan.num_rollout, 'rollout step')} ({plural(total, 'optimizer step')})"


def _price(plan: Plan) -> Iterator[str]:
    rollout = plan.topology.rollout
    if rollout.on_straggler == "wait":
        shares = ", ".join(f"{tail}x: {share:.2f}" for tail, share in tail_table(plan))
        yield (
            f"the price: a rollout step takes at least (longest answer + training) / "
            f"{rollout.max_staleness + 1}; with a longest answer of so many training steps, the share of the "
            f"unbounded rate that can be reached is {shares}"
        )
    elif rollout.on_straggler == "drop":
        yield "the price: a group that is late is dropped, which biases training against long answers"
    else:
        yield "the price: a group that is late is trained late, so the staleness bound does not hold for it"


def _schedule_warnings(plan: Plan) -> Iterator[str]:
    rollout = plan.topology.rollout
    if rollout.max_staleness + 1 == rollout.update_weights_interval:
        yield (
            f"rollout.max_staleness: (max_staleness + 1) = update_weights_interval = "
            f"{rollout.update_weights_interval}: every ticket waits for the next push, so generation idles "
            f"while the trainer works; max_staleness = {rollout.max_staleness + 1} lets them overlap"
        )
    outstanding = plan.tickets * rollout.n_samples_per_prompt
    if plan.max_concurrency > outstanding:
        yield (
            f"generator.concurrency: {plan.max_concurrency} samples may be in work, but only {outstanding} "
            f"outstanding; {plan.max_concurrency - outstanding} slots stay empty"
        )
    if rollout.on_straggler == "train" and rollout.max_staleness == 0:
        yield 'rollout.on_straggler: "train" lets late groups through, so max_staleness = 0 is not on-policy'


def _worker_warnings(plan: Plan) -> Iterator[str]:
    topology = plan.topology
    if not topology.generator:
        yield "generator: there is none; nothing is sampled until `asyncrl attach generator` adds one"
    if not topology.reward:
        yield "reward: there is none; nothing is trained until `asyncrl attach reward` adds one"
    temperature = topology.rollout.rollout_temperature
    if temperature != 1 and any(table.teacher_url for table in topology.reward):
        yield (
            f"reward.teacher_url: SGLang gives the teacher's log-probs at temperature 1, the trainer's at "
            f"rollout_temperature = {temperature:g}; distillation then pulls the one towards the other"
        )
    prompt, answer = topology.source.rollout_max_prompt_len or 0, topology.rollout.rollout_max_response_len
    budget = topology.trainer.max_tokens_per_gpu or 0
    if topology.trainer.use_dynamic_batch_size and prompt + answer > budget:
        yield (
            f"trainer.max_tokens_per_gpu: {budget} is less than the longest sample ({prompt + answer} "
            f"tokens), which then makes a micro-batch of its own, of more tokens than that"
        )


def _training_warnings(plan: Plan) -> Iterator[str]:
    topology = plan.topology
    trainer = topology.trainer
    if plan.num_rollout and trainer.save_interval and trainer.save_interval > plan.num_rollout:
        yield "trainer.save_interval: longer than the run; the only checkpoint is the last one"
    if plan.topology.eval.eval_prompt_data and plan.topology.eval.eval_label_key is None:
        yield "eval.eval_label_key: no label is read (nor source.label_key); most rewards need one"
