"""What the engines' contract needs of an engine kind, and how its tests ask and hold one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asyncrl.engines.base import Chunk, Engine, GenerateRequest, OnNewWeights, SamplingParams
from asyncrl.engines.text import decode_letters
from asyncrl.messages.sample import Span, logprobs_of, merge_spans, pack_tokens, tokens_of

DEADLINE_S = 20.0
VOCAB, LONG = 32, 40
PROMPT = pack_tokens([5, 6, 7, 8, 9])
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Random weights for CONFIG, by Hugging Face name; wide enough that tokens are not near ties."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * 0.4

    named = {"model.embed_tokens.weight": draw(VOCAB, 16), "model.norm.weight": torch.ones(16)}
    for layer in range(2):
        shapes = {
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
            "self_attn.q_proj": (32, 16),
            "self_attn.k_proj": (16, 16),
            "self_attn.v_proj": (16, 16),
            "self_attn.o_proj": (16, 32),
            "self_attn.q_norm": (8,),
            "self_attn.k_norm": (8,),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
        }
        for name, shape in shapes.items():
            named[f"model.layers.{layer}.{name}.weight"] = draw(*shape) + ("norm" in name)
    return named


class Gate:
    """A decode function that stops the compute thread after its first chunk until the test lets it go."""

    def __init__(self, *, free_calls: int) -> None:
        self.free_calls = free_calls
        self.opened = threading.Event()

    def __call__(self, ids: list[int]) -> str:
        self.free_calls -= 1
        if self.free_calls < 0:
            assert self.opened.wait(DEADLINE_S), "the test never opened the gate"
        return decode_letters(ids)


@dataclass
class Case:
    """An engine kind: how to make one, and what to push to it."""

    make: Callable[..., Engine]
    weights: Callable[[int], Any]
    computes_elsewhere: bool
    slowly: dict[str, Any] = field(default_factory=dict)
    """Options of an engine whose tokens take time."""

    @asynccontextmanager
    async def engine(
        self, *, decode: Any = decode_letters, max_concurrency: int = 8, **options: Any
    ) -> AsyncIterator[Engine]:
        engine = self.make(tokenizer_decode=decode, max_concurrency=max_concurrency, **options)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()

    def gate(self) -> Gate:
        """Holds an engine after its first chunk; the scripted one waits by itself for the next `anext`."""
        return Gate(free_calls=1 if self.computes_elsewhere else 10**9)


def ask(
    uid: str = "a", *, seed: int = 7, prefix: bytes = b"", every: int = 0, every_s: float = 0.0, **params: Any
) -> GenerateRequest:
    options = {"max_new_tokens": LONG, "ignore_eos": True} | params
    return GenerateRequest(
        uid=uid,
        prompt=PROMPT,
        prefix=prefix,
        params=SamplingParams(**options),
        seed=seed,
        prefix_key="group",
        progress_every_tokens=every,
        progress_every_s=every_s,
    )


@dataclass
class Answer:
    chunks: list[Chunk]

    @property
    def tokens(self) -> list[int]:
        return tokens_of(b"".join(c.tokens for c in self.chunks)).tolist()

    @property
    def logprobs(self) -> np.ndarray:
        return logprobs_of(b"".join(c.logprobs for c in self.chunks))

    @property
    def text(self) -> str:
        return "".join(c.text for c in self.chunks)

    @property
    def spans(self) -> list[Span]:
        return merge_spans([s for c in self.chunks for s in c.spans])

    @property
    def reason(self) -> str | None:
        return self.chunks[-1].finish_reason


async def collect(chunks: AsyncIterator[Chunk]) -> Answer:
    async with asyncio.timeout(DEADLINE_S):
        return Answer([chunk async for chunk in chunks])


async def answer(engine: Engine, *requests: GenerateRequest) -> list[Answer]:
    return list(await asyncio.gather(*(collect(engine.generate(r)) for r in requests)))


async def begin(engine: Engine, request: GenerateRequest) -> tuple[AsyncIterator[Chunk], Chunk]:
    iterator = engine.generate(request)
    async with asyncio.timeout(DEADLINE_S):
        return iterator, await anext(iterator)


async def turns() -> None:
    """Let every task of the loop reach its next wait."""
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def swapped_in_the_middle(
    case: Case, mode: OnNewWeights
) -> AsyncIterator[tuple[Engine, Answer, Any, Any]]:
    """A request with 4 tokens out when weights come: the engine, its answer, the report, a later answer."""
    gate = case.gate()
    async with case.engine(decode=gate) as engine:
        iterator, first = await begin(engine, ask(every=4))
        swap = asyncio.ensure_future(engine.load_weights(1, 2, case.weights(1), mode))
        await turns()
        later = asyncio.ensure_future(collect(engine.generate(ask("later"))))
        await turns()
        gate.opened.set()
        during = Answer([first, *(await collect(iterator)).chunks])
        async with asyncio.timeout(DEADLINE_S):
            yield engine, during, await swap, await later
