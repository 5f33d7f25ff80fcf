"""How much faster is the embedded engine than `transformers` `generate` on the same model?

256 answers to 32 prompts, 8 each, at temperature 1 with log-probabilities; the model is random, so lengths
are drawn beforehand and imposed on both. `generate` runs each batch to its longest answer, at batch 32, 64
and 256, and its best median counts; only useful tokens count. The sides take turns, so that noise hits both.

A part of `python -m tools.bench`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncrl.engines.base import GenerateRequest, SamplingParams
from asyncrl.engines.embedded import Embedded
from asyncrl.engines.text import decode_letters
from asyncrl.messages.sample import logprobs_of, pack_tokens, tokens_of
from tools.bench.report import Options, Section, Table, Target, spread

NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS = 32, 8, 12
NUM_ANSWERS = NUM_PROMPTS * GROUP_SIZE
BATCHES = (32, 64, 256)
VOCAB = 64
# The figures: median 25, range 4-128; sigma makes the longest of 256 about five times the median.
MEDIAN, SIGMA, SHORTEST, LONGEST = 25, 0.6, 4, 128
UNIFORM_TOKENS = 32
TARGET = 3.0
HIDDEN, LAYERS = 96, 3
THREADS = 1
"""torch threads of both sides."""

Answers = list[tuple[np.ndarray, np.ndarray]]
"""Per answer: tokens [R], log-probabilities [R]."""


def make_model(path: Path, *, seed: int, hidden: int, layers: int) -> Any:
    """A random Qwen3 of the quickstart's size, saved and returned."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


def draw_lengths(kind: str, *, seed: int) -> np.ndarray:
    """Target lengths int64 [256]."""
    if kind == "uniform":
        return np.full(NUM_ANSWERS, UNIFORM_TOKENS)
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA, NUM_ANSWERS)
    return np.clip(np.round(drawn), SHORTEST, LONGEST).astype(np.int64)


async def run_engine(engine: Embedded, prompts: np.ndarray, lengths: np.ndarray, *, seed: int) -> Answers:
    """All answers at once, as a generator asks for them."""

    async def one(index: int) -> tuple[np.ndarray, np.ndarray]:
        request = GenerateRequest(
            uid=str(index),
            prompt=pack_tokens(prompts[index // GROUP_SIZE]),
            params=SamplingParams(max_new_tokens=int(lengths[index]), ignore_eos=True),
            seed=seed * NUM_ANSWERS + index,
            prefix_key=str(index // GROUP_SIZE),
        )
        chunks = [chunk async for chunk in engine.generate(request)]
        tokens, logprobs = b"".join(c.tokens for c in chunks), b"".join(c.logprobs for c in chunks)
        return tokens_of(tokens), logprobs_of(logprobs)

    return list(await asyncio.gather(*(one(i) for i in range(NUM_ANSWERS))))


@torch.inference_mode()
def run_generate(model: Any, prompts: np.ndarray, lengths: np.ndarray, *, batch: int) -> Answers:
    """Batch after batch, each to its longest answer; what is longer than its target is thrown away."""
    answers: Answers = []
    ids = torch.from_numpy(np.repeat(prompts, GROUP_SIZE, axis=0))
    for start in range(0, NUM_ANSWERS, batch):
        rows = ids[start : start + batch]
        longest = int(lengths[start : start + batch].max())
        out = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=longest,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[:, PROMPT_TOKENS:]
        logprobs = torch.stack(out.logits, 1).log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
        for row, length in enumerate(lengths[start : start + batch]):
            answers.append((tokens[row, :length].numpy(), logprobs[row, :length].numpy()))
    return answers


@torch.inference_mode()
def worst_difference(model: Any, prompts: np.ndarray, answers: Answers) -> float:
    """Largest gap between an engine's log-probability and the model's forward, over every 16th answer."""
    worst = 0.0
    for index in range(0, NUM_ANSWERS, 16):
        tokens, logprobs = answers[index]
        whole = torch.from_numpy(np.concatenate([prompts[index // GROUP_SIZE], tokens]).astype(np.int64))
        reference = model(whole[None]).logits[0, PROMPT_TOKENS - 1 : -1].log_softmax(-1)
        expected = reference.gather(1, whole[PROMPT_TOKENS:, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(expected - logprobs).max()))
    return worst


async def measure(model: Any, path: Path, *, repeats: int, threads: int, seed: int) -> dict[str, Any]:
    """Rates by distribution and side, in the order measured; and the agreement of the log-probabilities."""
    torch.set_num_threads(threads)
    engine = Embedded(
        path,
        max_concurrency=NUM_ANSWERS,
        max_context_len=PROMPT_TOKENS + LONGEST,
        tokenizer_decode=decode_letters,
        num_threads=threads,
    )
    await engine.start()
    prompts = np.random.default_rng(seed).integers(2, VOCAB, (NUM_PROMPTS, PROMPT_TOKENS))
    rates = {}
    for kind in ("lognormal", "uniform"):
        lengths = draw_lengths(kind, seed=seed)
        warm = await run_engine(engine, prompts, lengths, seed=seed)
        run_generate(model, prompts, np.minimum(lengths, SHORTEST), batch=NUM_ANSWERS)
        rates[kind] = {
            "tokens": int(lengths.sum()),
            "longest": int(lengths.max()),
            "tokens_per_s": await take_turns(engine, model, prompts, lengths, repeats=repeats),
            "worst_logprob_difference": worst_difference(model, prompts, warm),
        }
    await engine.close()
    return rates


async def take_turns(
    engine: Embedded, model: Any, prompts: np.ndarray, lengths: np.ndarray, *, repeats: int
) -> dict[str, list[float]]:
    """Useful tokens per second of every side, one figure per turn."""
    sides: dict[str, list[float]] = {"engine": [], **{f"generate {b}": [] for b in BATCHES}}
    for repeat in range(repeats):
        started = time.perf_counter()
        sides["engine"].append(rate(await run_engine(engine, prompts, lengths, seed=1 + repeat), started))
        for batch in BATCHES:
            started = time.perf_counter()
            answers = run_generate(model, prompts, lengths, batch=batch)
            sides[f"generate {batch}"].append(rate(answers, started))
            assert [len(tokens) for tokens, _ in answers] == lengths.tolist()
    return sides


def rate(answers: Answers, started: float) -> float:
    """Useful tokens per second since `started`."""
    return sum(len(tokens) for tokens, _ in answers) / (time.perf_counter() - started)


def summarise(rates: dict[str, Any]) -> dict[str, Any]:
    """Medians, the best of `generate`, and the ratio: of the medians, and the range of the paired ones."""
    summary = {}
    for kind, result in rates.items():
        sides = result["tokens_per_s"]
        medians = {side: statistics.median(values) for side, values in sides.items()}
        best = max((side for side in medians if side != "engine"), key=lambda side: medians[side])
        paired = [ours / theirs for ours, theirs in zip(sides["engine"], sides[best], strict=True)]
        summary[kind] = {
            "medians": medians,
            "best_generate": best,
            "ratio": medians["engine"] / medians[best],
            "paired": [min(paired), statistics.median(paired), max(paired)],
        }
    return summary


def run(options: Options) -> Section:
    """Measure both distributions; see the module's docstring."""
    repeats = options.choose(quick=1, normal=5, full=9)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = options.work / "model"
    model = make_model(path, seed=options.seed, hidden=HIDDEN, layers=LAYERS)
    rates = asyncio.run(measure(model, path, repeats=repeats, threads=THREADS, seed=options.seed))
    summary = summarise(rates)
    ratio = summary["lognormal"]["ratio"]
    settings = {"seed": options.seed, "repeats": repeats, "threads": THREADS}
    return Section(
        name="engine",
        title="the embedded engine against transformers generate, useful tokens only",
        settings=settings | {"hidden": HIDDEN, "layers": LAYERS, "parameters": model.num_parameters()},
        tables=[_table(kind, summary[kind], rates[kind]) for kind in summary],
        targets=[
            Target(what="lognormal lengths, over generate's best", value=ratio, bound=TARGET, unit="x")
        ],
        data={"rates": rates, "summary": summary},
    )  # fmt: skip


def _table(kind: str, summary: dict[str, Any], result: dict[str, Any]) -> Table:
    engine = summary["medians"]["engine"]
    rows = [
        [side, spread(result["tokens_per_s"][side]), "" if side == "engine" else f"{engine / median:.2f}x"]
        for side, median in summary["medians"].items()
    ]
    low, middle, high = summary["paired"]
    title = (
        f"{kind}: {result['tokens']} tokens, longest answer {result['longest']}; over "
        f"{summary['best_generate']} {summary['ratio']:.2f}x, paired {middle:.2f}x ({low:.2f}-{high:.2f}); "
        f"log-probabilities agree with the forward to {result['worst_logprob_difference']:.1e}"
    )
    return Table(title=title, columns=["side", "tokens/s, median (range)", "engine is faster by"], rows=rows)
