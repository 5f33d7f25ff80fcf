"""The embedded engine hands in progress by time, on a clock that the test turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from asyncrl.engines.base import Chunk, GenerateRequest, SamplingParams
from asyncrl.engines.decoder import Decoder
from asyncrl.engines.model_config import read_config
from asyncrl.engines.scheduler import Scheduler
from asyncrl.engines.text import decode_letters
from asyncrl.messages.sample import pack_tokens

STEP_S = 0.5
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SHAPES = {
    "model.embed_tokens": (16, 8),
    "model.norm": (8,),
    **{f"model.layers.0.self_attn.{n}_proj": (8, 8) for n in "qkvo"},
    **{f"model.layers.0.mlp.{n}_proj": (8, 8) for n in ("gate", "up", "down")},
    **{f"model.layers.0.{n}_layernorm": (8,) for n in ("input", "post_attention")},
}


class Clock:
    """A decode step takes STEP_S: it tells when the last one ended."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(path: Path, clock: Clock) -> Scheduler:
    (path / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(read_config(path), device="cpu", dtype=torch.float32, max_positions=64)
    decoder.load({f"{n}.weight": torch.randn(*s, generator=generator) for n, s in SHAPES.items()})
    return Scheduler(
        decoder=decoder,
        max_concurrency=4,
        max_context_len=64,
        decode=decode_letters,
        version=(0, 1),
        clock=clock,
    )


def ask(uid: str, *, tokens: int = 10, every: int = 0, every_s: float = 0.0) -> GenerateRequest:
    return GenerateRequest(
        uid=uid,
        prompt=pack_tokens([1, 2, 3]),
        params=SamplingParams(max_new_tokens=tokens, ignore_eos=True),
        seed=1,
        progress_every_tokens=every,
        progress_every_s=every_s,
    )


def run(scheduler: Scheduler, clock: Clock) -> dict[int, list[tuple[float, int]]]:
    """By ticket: when each chunk came, and how many tokens it had."""
    came: dict[int, list[tuple[float, int]]] = {}
    with torch.inference_mode():
        while scheduler.busy:
            clock.now += STEP_S
            scheduler.step()
            events: list[tuple[int, Chunk]] = scheduler.events
            scheduler.events = []
            for ticket, chunk in events:
                came.setdefault(ticket, []).append((clock.now, len(chunk.tokens) // 4))
    return came


@pytest.mark.parametrize(
    ("every", "every_s", "chunks"),
    [
        (0, 0.0, [(5.0, 10)]),
        # A row joins with its first step at 0.5, so 1.5 s are over at 2.0, with four tokens.
        (0, 1.5, [(2.0, 4), (3.5, 3), (5.0, 3)]),
        (2, 1.5, [(1.0, 2), (2.0, 2), (3.0, 2), (4.0, 2), (5.0, 2)]),
        (8, 1.5, [(2.0, 4), (3.5, 3), (5.0, 3)]),
        (0, 60.0, [(5.0, 10)]),
    ],
)
def test_a_chunk_is_due_by_time_or_tokens_whichever_comes_first(
    tmp_path: Path, every: int, every_s: float, chunks: list[tuple[float, int]]
) -> None:
    clock = Clock()
    scheduler = make(tmp_path, clock)
    scheduler.submit(0, ask("a", every=every, every_s=every_s))
    assert run(scheduler, clock) == {0: chunks}


def test_a_row_that_moves_keeps_its_time(tmp_path: Path) -> None:
    """The short answer leaves its slot to the other one, which must not begin to wait anew or for ever."""
    clock = Clock()
    scheduler = make(tmp_path, clock)
    scheduler.submit(0, ask("short", tokens=2))
    scheduler.submit(1, ask("long", every_s=1.5))
    assert run(scheduler, clock)[1] == [(2.0, 4), (3.5, 3), (5.0, 3)]
