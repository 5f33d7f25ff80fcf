"""The source: hands in as many prompts as the buffer asks for, and the evaluation sets when one is due.

Failed groups that an operator wants tried again come before new prompts, as new groups; see `data.retries`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any

from asyncrl.actor.base import Context
from asyncrl.actor.client import DeskActor, Statement
from asyncrl.data.open import eval_sets, open_source
from asyncrl.data.retries import Retries
from asyncrl.data.source import EvalSet, PromptSource
from asyncrl.errors import DataError
from asyncrl.messages.codec import MiB, SizeLimits
from asyncrl.messages.control import Issue, Issued, Need, Welcome
from asyncrl.messages.parts import encode_body
from asyncrl.messages.sample import Lane, Prompt

CHUNK = 1024
"""Most groups in one message."""
FIRST_CHUNK = 4
"""And in the first one, while nobody knows how large the prompts are."""
MESSAGE_BYTES = 8 * MiB
"""Bodies of one message, unless its prompts are the largest so far."""
MAX_EVALUATION_BYTES = 256 * MiB
"""Prompts of all evaluation sets together: they are handed in at once."""


class SourceRole(DeskActor):
    """See the module's docstring.

    consumes: needs      waits for: the buffer to have room    unblocked by: groups that settle
    produces: prompts, with the cursor after them              (committed in one transaction)

    Prompts that a dead desk had not committed are lost with it: the data are opened again at its cursor.
    """

    role = "source"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._needs: asyncio.Queue[Need] = asyncio.Queue()
        self._source: PromptSource | None = None
        self._retries = Retries(context.run_dir)
        self._eval_sets: list[EvalSet] = []
        self._next_group = 0
        self._largest = 0
        """Bytes of the largest prompt so far; 0: nobody knows."""
        self._again: Welcome | None = None
        """A desk that knows less than we do: where to begin again, before anything else is handed in."""

    async def open(self) -> None:
        self._source = await self.compute(lambda: open_source(self.plan, self.context.run_dir))
        self._eval_sets = await self.compute(lambda: eval_sets(self.plan))

    async def on_welcome(self, welcome: Welcome) -> None:
        self._next_group = welcome.next_group
        source, cursor = self._source, self._retries.unwrap(welcome.cursor)
        if cursor and source is not None:
            await self.compute(lambda: source.restore(cursor))

    def restate(self, welcome: Welcome) -> list[Statement]:
        """Nothing: it asks anew for whatever it needs."""
        while not self._needs.empty():
            self._needs.get_nowait()
        self._again = welcome
        return []

    def work(self) -> Sequence[Coroutine[Any, Any, None]]:
        return [self._serve()]

    async def handle(self, message: Any, frames: list[bytes]) -> None:
        del frames
        if isinstance(message, Need):
            self._needs.put_nowait(message)

    async def _serve(self) -> None:
        """consumes: needs    waits for: the buffer    produces: prompts"""
        while True:
            with self.idle("need"):
                need = await self._needs.get()
            await self._catch_up()
            if need.lane is Lane.EVAL:
                await self._issue_evaluation(need.version)
            else:
                await self._issue(need.groups)

    async def _catch_up(self) -> None:
        while self._again is not None:
            welcome = self._again
            self._source = await self.compute(lambda: open_source(self.plan, self.context.run_dir))
            await self.on_welcome(welcome)
            if self._again is welcome:
                self._again = None

    async def _issue(self, groups: int) -> None:
        source = self._source
        assert source is not None
        groups = await self._issue_again(source, groups)
        while groups > 0 and self._again is None:
            fitting = MESSAGE_BYTES // self._largest if self._largest else FIRST_CHUNK
            count = min(groups, CHUNK, max(1, fitting))
            prompts = await self.compute(functools.partial(source.next, count))
            cursor = self._retries.wrap(await self.compute(source.cursor))
            ended = len(prompts) < count or source.exhausted
            await self._hand_in(Lane.TRAIN, self._fresh(prompts), cursor=cursor, ended=ended)
            groups = 0 if ended else groups - count

    def _fresh(self, prompts: Iterable[Prompt]) -> Iterator[tuple[Issued, bytes]]:
        return _bodies(prompts, samples=self.plan.topology.rollout.n_samples_per_prompt)

    async def _issue_again(self, source: PromptSource, groups: int) -> int:
        """Failed groups that are to be tried again; returns how many groups are still wanted."""
        again = await self.compute(functools.partial(self._retries.next, min(groups, CHUNK)))
        if not again:
            return groups
        samples = self.plan.topology.rollout.n_samples_per_prompt
        pairs = [(Issued(samples, r.num_tokens, r.dataset, r.group_id), r.prompt) for r in again]
        cursor = self._retries.wrap(await self.compute(source.cursor))
        self.log.info("issued again", groups=[r.group_id for r in again])
        await self._hand_in(Lane.TRAIN, pairs, cursor=cursor, ended=False)
        return groups - len(again)

    async def _issue_evaluation(self, version: int) -> None:
        prompts = await self.compute(self._evaluation_prompts)
        samples = self.plan.topology.eval.n_samples_per_eval_prompt
        await self._hand_in(Lane.EVAL, _bodies(prompts, samples=samples), ended=True, version=version)

    def _evaluation_prompts(self) -> list[Prompt]:
        """Raises DataError where they are more than one message takes."""
        prompts, size, most = [], 0, SizeLimits().max_frames
        for prompt in (p for s in self._eval_sets for p in s.prompts()):
            prompts.append(prompt)
            size += len(encode_body(prompt))
            if len(prompts) > most or size > MAX_EVALUATION_BYTES:
                raise DataError(
                    f"eval.eval_prompt_data: all sets together may have {most} prompts and "
                    f"{MAX_EVALUATION_BYTES} bytes; prompt {len(prompts)}, of {prompt.dataset}, is beyond "
                    "that; evaluate fewer, as in file.jsonl@[0:1000]"
                )
        return prompts

    async def _hand_in(
        self, lane: Lane, prompts: Iterable[tuple[Issued, bytes]], *, ended: bool, cursor: bytes = b"",
        version: int = 0,
    ) -> None:  # fmt: skip
        if self._again is not None:
            return  # what these prompts were asked for is asked for again
        issued, frames = [], []
        for prompt, frame in prompts:
            issued.append(prompt)
            frames.append(frame)
            self._largest = max(self._largest, len(frame))
        first = self._next_group
        self._next_group += len(issued)
        await self.send(
            Issue(lane=lane, first_group=first, prompts=issued, cursor=cursor, ended=ended, version=version),
            frames,
        )


def _bodies(prompts: Iterable[Prompt], *, samples: int) -> Iterator[tuple[Issued, bytes]]:
    """Prompts as they are handed in."""
    for prompt in prompts:
        yield Issued(samples, len(prompt.tokens) // 4, prompt.dataset), encode_body(prompt)
