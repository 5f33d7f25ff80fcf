"""One arm of the staleness study: sample, score and train in turn, with weights that are exactly `lag` old.

    python -m tools.bench.study_arm SPEC        (JSON; staleness_study starts these)

The quickstart's source, the embedded engine's scheduler, the built-in reward and the torch backend, called
one after the other on one thread: nothing depends on timing, so a seed gives the same curve on the same
machine. No actors, no records: what is studied is the loss under old data, not the pipeline.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from asyncrl.data.open import eval_sets, open_source
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.engines import session
from asyncrl.engines.base import Chunk, OnNewWeights
from asyncrl.engines.decoder import Decoder, read_checkpoint
from asyncrl.engines.make import context_len
from asyncrl.engines.model_config import read_config
from asyncrl.engines.scheduler import Scheduler, Swap
from asyncrl.errors import NumericsError
from asyncrl.messages.sample import Lane, Prompt, Sample, Score, Segment, assemble
from asyncrl.topology.plan import Plan
from asyncrl.train.backend import train_plan
from asyncrl.train.evaluate import score
from asyncrl.train.make import make_backend
from tools.bench.report import PACKAGES, versions
from tools.bench.study_plan import (
    Arm,
    ArmResult,
    Point,
    Settings,
    behaviour_version,
    make_plan,
    write_result,
)

INCARNATION = 1


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told."""

    arm: Arm
    settings: Settings
    model: str
    """The model directory."""
    out: str
    """Where the result goes."""


class WeightRing:
    """Copies of the newest `lag` + 1 versions; the oldest of them is what samples."""

    def __init__(self, lag: int) -> None:
        """`lag`: rollout steps, 0 or more."""
        self.lag = lag
        self._kept: deque[tuple[int, dict[str, torch.Tensor]]] = deque(maxlen=lag + 1)

    def push(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the live weights, which are `version`. Raises ValueError for one out of turn."""
        expected = self._kept[-1][0] + 1 if self._kept else 0
        if version != expected:
            raise ValueError(f"version: {version}; {expected} is next")
        self._kept.append((version, {name: tensor.detach().clone() for name, tensor in tensors.items()}))

    def behaviour(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(version, tensors) that is `lag` behind the newest; version 0 until there are so many."""
        return self._kept[0]

    def newest(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(version, tensors) pushed last."""
        return self._kept[-1]


class Sampler:
    """The embedded engine's scheduler on this thread: a whole batch in flight, no event loop."""

    def __init__(self, plan: Plan, *, max_rows: int) -> None:
        """Loads the model; `max_rows` answers run at once."""
        self._plan = plan
        model = Path(plan.topology.trainer.hf_checkpoint)
        tokenizer, skip = Tokenizer.load(model), plan.topology.rollout.rollout_skip_special_tokens
        length = context_len(plan)
        decoder = Decoder(read_config(model), device="cpu", dtype=torch.float32, max_positions=length)
        decoder.load(read_checkpoint(model))
        self._scheduler = Scheduler(
            decoder=decoder,
            max_concurrency=max_rows,
            max_context_len=length,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=skip),
            version=(0, INCARNATION),
        )

    def use(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Swap to these weights; nothing is running."""
        refused: list[Exception] = []
        swap = Swap(
            version=version,
            incarnation=INCARNATION,
            tensors=tensors,
            mode=OnNewWeights.FINISH,
            done=lambda found: refused.append(found) if isinstance(found, Exception) else None,
            cancelled=lambda: False,
        )
        self._scheduler.swap(swap)
        self._run()
        if refused:
            raise refused[0]

    def answer(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their answers, in the same order. Raises NumericsError."""
        for ticket, sample in enumerate(samples):
            request = session.request_for(self._plan, sample, uid=f"{sample.group_id}.{sample.index}")
            self._scheduler.submit(ticket, request)
        chunks: list[list[Chunk]] = [[] for _ in samples]
        for ticket, chunk in self._run():
            chunks[ticket].append(chunk)
        return [_assembled(sample, found) for sample, found in zip(samples, chunks, strict=True)]

    def _run(self) -> list[tuple[int, Chunk]]:
        with torch.inference_mode():
            while self._scheduler.busy:
                self._scheduler.step()
        events, self._scheduler.events = self._scheduler.events, []
        return events


def _assembled(sample: Sample, chunks: list[Chunk]) -> Sample:
    segments = [Segment(tokens=c.tokens, logprobs=c.logprobs, spans=c.spans, text=c.text) for c in chunks]
    status = session.FINISH[chunks[-1].finish_reason or "abort"]
    return assemble(
        group_id=sample.group_id,
        index=sample.index,
        prompt=sample.prompt,
        segments=segments,
        status=status,
        lane=sample.lane,
    )


class AgeCount:
    """Mean age of trained tokens, in rollout steps."""

    def __init__(self) -> None:
        self._age = 0
        self._tokens = 0

    def add(self, samples: Iterable[Sample], *, step: int) -> None:
        """Samples that rollout step `step`, which starts from version `step`, trains on."""
        for sample in samples:
            for span in sample.spans:
                self._age += (step - span.version) * span.num_tokens
                self._tokens += span.num_tokens

    @property
    def mean(self) -> float:
        """Over all tokens; 0 before the first."""
        return self._age / self._tokens if self._tokens else 0.0


class ArmRun:
    """Everything one arm holds while it runs."""

    def __init__(self, arm: Arm, *, settings: Settings, model: Path) -> None:
        self.arm, self.settings = arm, settings
        self.plan = make_plan(arm, settings=settings, model=model)
        self.backend = make_backend(train_plan(self.plan.topology))
        self.backend.load()
        self.source = open_source(self.plan, Path())
        self.held_out = [prompt for known in eval_sets(self.plan) for prompt in known.prompts()]
        rows = max(self.plan.samples_per_rollout, len(self.held_out))
        self.sampler = Sampler(self.plan, max_rows=rows)
        self.ring = WeightRing(arm.lag)
        self.ring.push(0, self.backend.weights())
        self.ages = AgeCount()
        self.curve: list[Point] = []
        self.rewards: list[float] = []
        self.sums: dict[str, tuple[float, int]] = {}
        self._next_group = 0

    def run(self) -> str | None:
        """All rollout steps with their evaluations; why it ended early, where numbers broke."""
        try:
            for step in range(self.settings.steps):
                if step % self.settings.eval_every == 0:
                    self.evaluate(step)
                self.step(step)
            self.evaluate(self.settings.steps)
        except NumericsError as error:
            return str(error)
        return None

    def step(self, step: int) -> None:
        """Sample under the old weights, train the newest."""
        version, tensors = self.ring.behaviour()
        assert version == behaviour_version(step, lag=self.arm.lag), (version, step)
        self.sampler.use(version, tensors)
        prompts = self.source.next(self.settings.prompts)
        groups = self._answers(prompts, per_prompt=self.settings.answers, lane=Lane.TRAIN)
        samples = [sample for group in groups for sample in group]
        self.ages.add(samples, step=step)
        self.rewards.append(sum(_reward(sample) for sample in samples) / len(samples))
        report = self.backend.train(self.backend.prepare(groups), rollout_step=step)
        for name, value in report.metrics.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)
        self.ring.push(step + 1, self.backend.weights())

    def evaluate(self, step: int) -> None:
        """Greedy accuracy of the newest weights on every held-out prompt."""
        version, tensors = self.ring.newest()
        assert version == step, (version, step)
        self.sampler.use(version, tensors)
        groups = self._answers(self.held_out, per_prompt=1, lane=Lane.EVAL)
        accuracy = sum(_reward(sample) for group in groups for sample in group) / len(groups)
        self.curve.append(Point(step, accuracy))

    def _answers(self, prompts: Sequence[Prompt], *, per_prompt: int, lane: Lane) -> list[list[Sample]]:
        """Scored groups."""
        first, self._next_group = self._next_group, self._next_group + len(prompts)
        asked = [
            Sample(group_id=first + position, index=index, prompt=prompt, lane=lane)
            for position, prompt in enumerate(prompts)
            for index in range(per_prompt)
        ]
        done = self.sampler.answer(asked)
        table = self.plan.topology.reward[0]
        for sample, reward in zip(
            done, asyncio.run(score(done, reward=table.use, reward_key=table.reward_key)), strict=True
        ):
            sample.score = Score(reward=reward)
        return [done[i : i + per_prompt] for i in range(0, len(done), per_prompt)]


def _reward(sample: Sample) -> float:
    assert sample.score is not None
    return sample.score.reward


def run_arm(arm: Arm, *, settings: Settings, model: Path) -> ArmResult:
    """Run one arm in this process. Raises ConfigError, DataError."""
    began = time.perf_counter()
    run = ArmRun(arm, settings=settings, model=model)
    failure = run.run()
    return ArmResult(
        arm=arm,
        settings=settings,
        curve=run.curve,
        rewards=run.rewards,
        lag=run.ages.mean,
        metrics={name: total / count for name, (total, count) in sorted(run.sums.items())},
        algorithm=msgspec.to_builtins(run.plan.topology.algorithm),
        cpu_s=time.process_time(),
        wall_s=time.perf_counter() - began,
        commit=commit(),
        versions=versions(PACKAGES),
        failure=failure,
    )


def commit() -> str:
    """Of the code that ran, "-dirty" with changes that are not committed; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Run the arm of the specification and keep its result."""
    spec = msgspec.json.decode(sys.argv[1], type=Spec)
    result = run_arm(spec.arm, settings=spec.settings, model=Path(spec.model))
    write_result(result, Path(spec.out))


if __name__ == "__main__":
    main()
