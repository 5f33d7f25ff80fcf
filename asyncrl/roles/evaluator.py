"""The evaluator: turns finished evaluations into numbers, and shows three answers with label and reward."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Coroutine, Sequence
from typing import Any

from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor
from asyncrl.actor.pieces import Pieces
from asyncrl.messages.control import Evaluated, EvaluationSeen
from asyncrl.messages.parts import GroupParts, unpack
from asyncrl.messages.sample import Sample, Status
from asyncrl.obs.view import EvalUpdate

NUM_EXAMPLES = 3
"""Answers that are shown of each evaluation."""
MAX_SHOWN = 80
"""Characters shown of a prompt and of an answer."""


class EvaluatorRole(DeskActor):
    """See the module's docstring.

    consumes: finished evaluations    waits for: versions that are due    unblocked by: generators, rewards
    produces: eval/* metrics, and the word that they were seen
    """

    role = "evaluator"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._parts: asyncio.Queue[tuple[Evaluated, list[bytes]]] = asyncio.Queue()
        self._samples: list[Sample] = []
        self._seen = (-1, 0)
        """(version, incarnation) of the evaluation that was logged last."""

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._evaluate()]

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, Evaluated):
            self._parts.put_nowait((message, frames))

    async def _evaluate(self) -> None:
        """consumes: pieces of evaluations    waits for: "evaluation"    produces: metrics"""
        pieces = Pieces()
        while True:
            with self.waits("evaluation"):
                message, frames = await self._parts.get()
            if not pieces.follows((message.version, message.incarnation), message.part):
                continue
            if message.part == 0:
                self._samples = []
            self._samples += _flat(message.groups, frames)
            if message.part + 1 == message.num_parts:
                key = (message.version, message.incarnation)
                if key != self._seen:  # else the desk died before it knew that we have seen it
                    await self._finish(*key)
                self._samples, self._seen = [], key
                await self.send(EvaluationSeen(version=key[0], incarnation=key[1]))

    async def _finish(self, version: int, incarnation: int) -> None:
        values: dict[str, float] = {}
        rows: dict[str, float] = {}
        for name in dict.fromkeys(sample.prompt.dataset for sample in self._samples):
            samples = [sample for sample in self._samples if sample.prompt.dataset == name]
            values[name] = statistics.fmean(reward_of(sample) for sample in samples)
            rows |= eval_metrics(name, samples, version=version)
        self.metrics.write(rows, step=version)
        self.log.info("eval", version=version, incarnation=incarnation, **values)
        examples = [example_text(sample) for sample in self._samples[:NUM_EXAMPLES]]
        self.log.info("examples", version=version, examples=examples)
        update = EvalUpdate(version=version, values=values, num_samples=len(self._samples), examples=examples)
        await self.tell(update)


def _flat(groups: list[GroupParts], frames: list[bytes]) -> list[Sample]:
    return [sample for group in unpack(groups, frames) for sample in group]


def example_text(sample: Sample) -> str:
    """One answer for people: the end of the prompt, the answer, what it should be, the reward."""
    prompt = sample.prompt.text[-MAX_SHOWN:]
    answer = sample.text if len(sample.text) <= MAX_SHOWN else sample.text[:MAX_SHOWN] + "..."
    return f"{prompt!r} -> {answer!r}  label {sample.prompt.label!r}  reward {reward_of(sample):g}"


def reward_of(sample: Sample) -> float:
    """The number a reward gave."""
    return sample.score.reward if sample.score is not None else 0.0


def eval_metrics(name: str, samples: list[Sample], *, version: int) -> dict[str, float]:
    """The eval/* numbers of one set, named as in slime."""
    lengths = [sample.num_tokens for sample in samples]
    truncated = sum(sample.status is Status.TRUNCATED for sample in samples)
    return {
        f"eval/{name}": statistics.fmean(reward_of(sample) for sample in samples),
        f"eval/{name}-truncated_ratio": truncated / len(samples),
        f"eval/{name}/response_len/mean": statistics.fmean(lengths),
        f"eval/{name}/response_len/median": statistics.median(lengths),
        f"eval/{name}/response_len/max": max(lengths),
        f"eval/{name}/response_len/min": min(lengths),
        f"eval/{name}/num_samples": len(samples),
        f"eval/{name}/version": version,
    }
