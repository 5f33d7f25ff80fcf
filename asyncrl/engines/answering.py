"""How a generator answers: by its engine, or by the user's generate function where there is one.

It owns the engine. Which samples are answered, and what becomes of the answers, is the role's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncrl.actor.base import Actor
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.engines import session
from asyncrl.engines.base import Engine, GenerateRequest
from asyncrl.engines.make import make_engine
from asyncrl.messages.hooks import Args
from asyncrl.messages.sample import Sample
from asyncrl.topology.flat import flat_options
from asyncrl.topology.plugins import load_checked


class Answering:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._custom: Callable[..., Any] | None = None
        self._args: Args | None = None

    @property
    def engine(self) -> Engine:
        """The engine, once `open` has made it."""
        assert self._engine is not None
        return self._engine

    @property
    def generated_tokens(self) -> int:
        """Sampled so far."""
        return self._engine.statistics().generated_tokens if self._engine is not None else 0

    @property
    def runs_user_code(self) -> bool:
        """Whether samples are answered by the user's function."""
        return self._custom is not None

    async def open(self, actor: Actor, *, index: int) -> None:
        """Start the engine of the actor's table, [[generator]] number `index`."""
        topology = actor.plan.topology
        tokenizer = await actor.compute(lambda: Tokenizer.load(topology.trainer.hf_checkpoint))
        skip = topology.rollout.rollout_skip_special_tokens
        self._engine = make_engine(
            actor.plan, index, decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=skip)
        )
        path = topology.rollout.custom_generate_function_path
        if path is not None:
            option = "rollout.custom_generate_function_path"
            self._custom, _ = load_checked(path, kind="generate", option=option)
            options = flat_options(topology, generator=index)
            self._args = Args(options, custom_config_path=topology.run.custom_config_path)
        await self._engine.start()

    async def by_user(self, request: GenerateRequest, sample: Sample) -> session.Piece:
        """One answer by the user's function. Raises as `session.generate_custom` does."""
        assert self._custom is not None, "there is a user's function"
        assert self._args is not None, "a user's function has arguments"
        return await session.generate_custom(self._custom, self.engine, request, sample, self._args)

    async def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            await self._engine.close()
