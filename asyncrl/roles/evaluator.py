"""The evaluator: turns finished evaluations into numbers, and shows three answers with label and reward."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple

from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor
from asyncrl.actor.pieces import Pieces
from asyncrl.messages.codec import num_bytes
from asyncrl.messages.control import Evaluated, EvaluationSeen, Kind, Want
from asyncrl.messages.parts import GroupParts, unpack
from asyncrl.messages.sample import Sample, Status
from asyncrl.obs.view import EvalUpdate

NUM_EXAMPLES = 3
"""Answers that are shown of each evaluation."""
MAX_SHOWN = 80
"""Characters shown of a prompt and of an answer."""


class Answer(NamedTuple):
    """What an evaluation needs to know of an answer; bodies are let go of piece by piece."""

    dataset: str
    reward: float
    num_tokens: int
    truncated: bool


class EvaluatorRole(DeskActor):
    """See the module's docstring.

    consumes: finished evaluations    waits for: versions that are due    unblocked by: generators, rewards
    produces: eval/* metrics, and the word that they were seen
    """

    role = "evaluator"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._parts: asyncio.Queue[tuple[Evaluated, list[bytes]]] = asyncio.Queue()
        """Bounded by the window of this hop (`buffer.window_bytes`)."""
        self._answers: list[Answer] = []
        self._examples: list[str] = []
        self._seen = (-1, 0)
        """(version, incarnation) of the evaluation that was logged last."""

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._evaluate()]

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, Evaluated):
            self._parts.put_nowait((message, frames))

    async def _evaluate(self) -> None:
        """consumes: pieces of evaluations    waits for: "evaluation"    produces: metrics"""
        pieces, rest = Pieces(), ""
        while True:
            message, frames = await self.take_piece(self._parts, "evaluation", rest=rest)
            await self.send(Want(kind=Kind.EVALUATE, samples=0, num_bytes=num_bytes(*frames)))
            key = (message.version, message.incarnation)
            if not pieces.follows(key, message.part):
                continue  # the piece before was lost with a connection: all of them come again
            rest = pieces.rest(f"the evaluation of version {message.version}", message.num_parts)
            if message.part == 0:
                self._answers, self._examples = [], []
            self._take(message.groups, frames)
            if message.part + 1 == message.num_parts:
                if key != self._seen:  # else the desk died before it knew that we have seen it
                    await self._finish(*key)
                self._answers, self._seen = [], key
                await self.send(EvaluationSeen(version=key[0], incarnation=key[1]))

    def _take(self, groups: list[GroupParts], frames: list[bytes]) -> None:
        """Of each answer its numbers; tokens and texts are needed for the examples alone."""
        for group in unpack(groups, frames):
            for sample in group:
                self._answers.append(
                    Answer(
                        sample.prompt.dataset,
                        reward_of(sample),
                        sample.num_tokens,
                        sample.status is Status.TRUNCATED,
                    )
                )
                if len(self._examples) < NUM_EXAMPLES:
                    self._examples.append(example_text(sample))

    async def _finish(self, version: int, incarnation: int) -> None:
        values: dict[str, float] = {}
        rows: dict[str, float] = {}
        for name in dict.fromkeys(answer.dataset for answer in self._answers):
            answers = [answer for answer in self._answers if answer.dataset == name]
            values[name] = statistics.fmean(answer.reward for answer in answers)
            rows |= eval_metrics(name, answers, version=version)
        self.metrics.write(rows, step=version)
        self.log.info("eval", version=version, incarnation=incarnation, **values)
        self.log.info("examples", version=version, examples=self._examples)
        update = EvalUpdate(
            version=version, values=values, num_samples=len(self._answers), examples=self._examples
        )
        await self.tell(update)


def example_text(sample: Sample) -> str:
    """One answer for people: the end of the prompt, the answer, what it should be, the reward."""
    prompt = sample.prompt.text[-MAX_SHOWN:]
    answer = sample.text if len(sample.text) <= MAX_SHOWN else sample.text[:MAX_SHOWN] + "..."
    return f"{prompt!r} -> {answer!r}  label {sample.prompt.label!r}  reward {reward_of(sample):g}"


def reward_of(sample: Sample) -> float:
    """The number a reward gave."""
    return sample.score.reward if sample.score is not None else 0.0


def eval_metrics(name: str, answers: list[Answer], *, version: int) -> dict[str, float]:
    """The eval/* numbers of one set, named as in slime."""
    lengths = [answer.num_tokens for answer in answers]
    return {
        f"eval/{name}": statistics.fmean(answer.reward for answer in answers),
        f"eval/{name}-truncated_ratio": sum(answer.truncated for answer in answers) / len(answers),
        f"eval/{name}/response_len/mean": statistics.fmean(lengths),
        f"eval/{name}/response_len/median": statistics.median(lengths),
        f"eval/{name}/response_len/max": max(lengths),
        f"eval/{name}/response_len/min": min(lengths),
        f"eval/{name}/num_samples": len(answers),
        f"eval/{name}/version": version,
    }
