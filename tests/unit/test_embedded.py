"""What only the embedded engine does: it reads a directory, refuses weights, and lives on its own thread."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from asyncrl.engines.base import Chunk, GenerateRequest, OnNewWeights, SamplingParams
from asyncrl.engines.embedded import Embedded
from asyncrl.engines.text import decode_letters
from asyncrl.errors import ConfigError, DataError, RunError, WeightsError
from asyncrl.messages.sample import pack_tokens

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


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path


def make(path: Path, **options: Any) -> Embedded:
    settings = {"max_concurrency": 4, "max_context_len": 64, "tokenizer_decode": decode_letters} | options
    return Embedded(path, **settings)


async def collect(engine: Embedded, uid: str = "a") -> list[Chunk]:
    request = GenerateRequest(
        uid=uid, prompt=pack_tokens([1, 2, 3]), params=SamplingParams(max_new_tokens=12), seed=1
    )
    async with asyncio.timeout(20):
        return [chunk async for chunk in engine.generate(request)]


async def test_refused_weights_change_nothing_and_stop_nothing(model_dir: Path) -> None:
    engine = make(model_dir)
    await engine.start()
    before = await collect(engine)
    wrong = {name: tensor + 1 for name, tensor in weights().items()}
    del wrong["model.norm.weight"]
    for mode in OnNewWeights:
        with pytest.raises(WeightsError, match=r"lack model\.norm\.weight"):
            await engine.load_weights(1, 1, wrong, mode)
    assert await collect(engine) == before
    assert engine.version == (0, 1)
    await engine.close()


async def test_the_weights_are_copied_before_load_returns(model_dir: Path) -> None:
    engine = make(model_dir)
    await engine.start()
    before = await collect(engine)
    lent = weights()
    await engine.load_weights(1, 1, lent, OnNewWeights.KEEP)
    for tensor in lent.values():
        tensor.zero_()
    after = await collect(engine)
    assert [c.tokens for c in after] == [c.tokens for c in before]
    await engine.close()


async def test_nan_weights_end_the_engine_with_a_name(model_dir: Path) -> None:
    engine = make(model_dir)
    await engine.start()
    broken = weights() | {"model.norm.weight": torch.full((8,), torch.nan)}
    await engine.load_weights(3, 2, broken, OnNewWeights.KEEP)
    with pytest.raises(RunError, match=r"NaN or Inf in the logits of 'a' under version v3\.2"):
        await collect(engine)
    await engine.close()


async def test_ids_that_the_model_lacks_are_refused_and_harm_nobody(model_dir: Path) -> None:
    engine = make(model_dir)
    await engine.start()
    params = SamplingParams(max_new_tokens=3, min_new_tokens=1, stop_token_ids=[99])
    for prompt, match in (([1, 16], "token ids 1 to 16"), ([-1], "token ids -1")):
        request = GenerateRequest(uid="b", prompt=pack_tokens(prompt), params=params, seed=1)
        with pytest.raises(ValueError, match=match):
            await anext(engine.generate(request))
    with pytest.raises(ValueError, match="multiples of 4"):
        await anext(engine.generate(GenerateRequest(uid="b", prompt=b"12345", params=params, seed=1)))
    request = GenerateRequest(uid="b", prompt=pack_tokens([1]), params=params, seed=1)
    assert len((await anext(engine.generate(request))).tokens) == 12
    await engine.close()


async def test_a_cancelled_push_is_dropped(model_dir: Path) -> None:
    entered, opened = threading.Event(), threading.Event()

    def gate(ids: list[int]) -> str:
        entered.set()
        assert opened.wait(20)
        return decode_letters(ids)

    engine = make(model_dir, tokenizer_decode=gate)
    await engine.start()
    running = asyncio.ensure_future(collect(engine))
    assert await asyncio.to_thread(entered.wait, 20)
    push = asyncio.ensure_future(engine.load_weights(1, 1, weights(), OnNewWeights.KEEP))
    await asyncio.sleep(0)
    push.cancel()
    with pytest.raises(asyncio.CancelledError):
        await push
    opened.set()
    await running
    await collect(engine, "b")
    assert engine.version == (0, 1)
    await engine.close()


async def test_errors_of_the_directory_come_from_start(model_dir: Path, tmp_path: Path) -> None:
    config = model_dir / "config.json"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model_type": "mamba"}, ConfigError, "supported: llama, qwen2, qwen3"),
        ({"hidden_size": 16}, DataError, "does not fit"),
        ({"max_position_embeddings": 32}, ConfigError, "max_context_len = 64"),
    ]
    for changes, error, match in cases:
        config.write_text(json.dumps(CONFIG | changes))
        engine = make(model_dir)
        with pytest.raises(error, match=match):
            await engine.start()
        await engine.close()
    with pytest.raises(DataError, match="nowhere"):
        await make(tmp_path / "nowhere").start()


async def test_an_engine_that_was_not_started_says_so(model_dir: Path) -> None:
    engine = make(model_dir)
    with pytest.raises(RunError, match="not started"):
        await collect(engine)
    await engine.close()
    with pytest.raises(ConfigError, match="max_concurrency = 0"):
        make(model_dir, max_concurrency=0)


async def test_no_thread_outlives_close(model_dir: Path) -> None:
    engine = make(model_dir)
    await engine.start()
    assert any(thread.name == "engine" for thread in threading.enumerate())
    await engine.close()
    assert not any(thread.name == "engine" for thread in threading.enumerate())
