"""What each training option adds to a rollout step: the same batch, trained with and without it.

One process, one thread, the quickstart's model, random answers. Every option has its own backend; repeats go
round all of them, so that a slow minute of the machine meets all alike. A row's ratio is the median over
repeats of its time over that of the row it is compared with in the same repeat.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from typing import Any

from asyncrl.messages.sample import Prompt, Sample, Score, Span, Status, pack_logprobs, pack_mask, pack_tokens
from asyncrl.topology.algorithm import AlgorithmConfig
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.backend import Backend, TrainPlan
from asyncrl.train.make import make_backend
from tools.bench.report import Options, Section, Table, number

GROUPS, GROUP_SIZE = 16, 8
PROMPT, ANSWER = 16, (16, 96)
"""Tokens; answers are uniform in the range."""
KL = {"use_kl_loss": True, "kl_loss_coef": 0.01, "kl_loss_type": "low_var_kl"}
TEACHER = {"use_opd": True}

ONE, TWO = "one optimizer step", "two optimizer steps"
CASES: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    (ONE, "", {}, 1),
    ("tis", ONE, {"use_tis": True}, 1),
    ("icepop", ONE, {"use_tis": True, "tis_mode": "mask", "tis_clip_low": 0.5}, 1),
    ("opsm", ONE, {"use_opsm": True}, 1),
    ("geometric-mask + veto", ONE, {"use_rs": True, "rs_veto_threshold": 1e-4}, 1),
    ("gspo", ONE, {"advantage_estimator": "gspo"}, 1),
    ("dppo", ONE, {"use_dppo": True}, 1),
    ("entropy bonus", ONE, {"entropy_coef": 0.01}, 1),
    ("get_mismatch_metrics", ONE, {"get_mismatch_metrics": True}, 1),
    ("reference forward (use_kl_loss)", ONE, KL, 1),
    ("teacher forward (use_opd)", ONE, TEACHER, 1),
    ("critic (ppo)", ONE, {"advantage_estimator": "ppo"}, 1),
    (TWO, ONE, {}, 2),
    ("engine's log-probs (no old forward)", TWO, {"use_rollout_logprobs": True}, 2),
    ("decoupled, recomputed", TWO, {"use_decoupled_loss": True}, 2),
    ("decoupled, log-linear", TWO, {"use_decoupled_loss": True, "prox_logp_method": "loglinear"}, 2),
)
"""(name, the row it is compared with, options of [algorithm], optimizer steps)."""


def run(options: Options) -> Section:
    """Time every case."""
    repeats = options.choose(quick=2, normal=9, full=25)
    backends = {name: _backend(options, algorithm, steps) for name, _, algorithm, steps in CASES}
    vocab_size = next(iter(next(iter(backends.values())).weights().values())).shape[0]
    batch = _groups(vocab_size, seed=options.seed)
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for repeat in range(repeats + 1):
        for name, backend in backends.items():
            gc.collect()
            began = time.perf_counter()
            backend.train(backend.prepare(batch), rollout_step=repeat)
            seconds[name].append(time.perf_counter() - began)
    steady = {name: times[1:] for name, times in seconds.items()}
    num_tokens = sum(sample.num_tokens for group in batch for sample in group)
    return Section(
        name="options",
        title="what a training option adds to a rollout step",
        settings={
            "samples": GROUPS * GROUP_SIZE,
            "answer tokens": num_tokens,
            "threads": 1,
            "repeats": repeats,
        },
        tables=[Table(title="", columns=["option", "ms", "compared with", "ratio"], rows=_rows(steady))],
        notes=["the first step of each is not counted; ratios are medians within repeats"],
        data={"seconds": steady},
    )


def _rows(seconds: dict[str, list[float]]) -> list[list[str]]:
    rows = []
    for name, against, _, _ in CASES:
        ratio = ""
        if against:
            pairs = zip(seconds[name], seconds[against], strict=True)
            ratio = f"{statistics.median(own / other for own, other in pairs):.2f}x"
        rows.append([name, number(1000 * statistics.median(seconds[name])), against, ratio])
    return rows


def _backend(options: Options, algorithm: dict[str, Any], steps: int) -> Backend:
    distils = algorithm.get("use_opd", False)
    plan = TrainPlan(
        trainer=TrainerConfig(hf_checkpoint=str(options.model), lr=1e-6),
        algorithm=AlgorithmConfig(**algorithm, opd_teacher_load=str(options.model) if distils else None),
        num_steps_per_rollout=steps,
    )
    backend = make_backend(plan)
    backend.load()
    return backend


def _groups(vocab_size: int, *, seed: int) -> list[list[Sample]]:
    numbers = random.Random(seed)
    groups = []
    for group_id in range(GROUPS):
        prompt = Prompt(tokens=pack_tokens([numbers.randrange(vocab_size) for _ in range(PROMPT)]))
        groups.append([_sample(prompt, group_id, index, vocab_size, numbers) for index in range(GROUP_SIZE)])
    return groups


def _sample(prompt: Prompt, group_id: int, index: int, vocab_size: int, numbers: random.Random) -> Sample:
    length = numbers.randint(*ANSWER)
    return Sample(
        group_id=group_id,
        index=index,
        prompt=prompt,
        status=Status.COMPLETED,
        tokens=pack_tokens([numbers.randrange(vocab_size) for _ in range(length)]),
        logprobs=pack_logprobs([-3.0 - numbers.random() for _ in range(length)]),
        loss_mask=pack_mask([1] * length),
        spans=[Span(0, 1, length)],
        score=Score(reward=float(numbers.randrange(2))),
    )
