"""A tiny random Qwen3-MoE, and answers that the embedded engine sampled from one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from asyncrl.engines.base import GenerateRequest, SamplingParams
from asyncrl.engines.embedded import Embedded
from asyncrl.engines.session import generate
from asyncrl.engines.text import decode_letters
from asyncrl.messages.sample import Prompt, Sample, Score, Segment, Status, assemble, pack_tokens

VOCAB, NUM_EXPERTS, TOP_K, NUM_LAYERS = 64, 8, 2, 3


def make_moe(*, normalize: bool = True, seed: int = 0, **options: Any) -> Any:
    """Three layers of 8 experts, 2 per token, hidden size 32."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": normalize,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | options))).eval()


def write_moe(directory: Path, **options: Any) -> Path:
    """A model directory as transformers writes it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    make_moe(**options).save_pretrained(directory)
    return directory


def make_engine(directory: Path, **options: Any) -> Embedded:
    settings = {"max_concurrency": 8, "max_context_len": 256, "tokenizer_decode": decode_letters}
    return Embedded(directory, **(settings | {"capture_routing": True} | options))


def ask(
    prompt: list[int], *, seed: int, uid: str = "", prefix: bytes = b"", **options: Any
) -> GenerateRequest:
    params = {"max_new_tokens": 24, "ignore_eos": True} | options.pop("params", {})
    return GenerateRequest(
        uid=uid or f"{prompt}.{seed}",
        prompt=pack_tokens(prompt),
        prefix=prefix,
        params=SamplingParams(**params),
        seed=seed,
        prefix_key=str(prompt),
        **{"return_routed_experts": True, **options},
    )


async def segments_of(engine: Embedded, request: GenerateRequest) -> list[Segment]:
    async with asyncio.timeout(30):
        return [piece.segment async for piece in generate(engine, request)]


def sample_of(
    request: GenerateRequest, segments: list[Segment], *, group_id: int = 0, index: int = 0
) -> Sample:
    return assemble(
        group_id=group_id,
        index=index,
        prompt=Prompt(tokens=request.prompt),
        segments=segments,
        score=Score(reward=1.0),
        status=Status.COMPLETED,
    )
