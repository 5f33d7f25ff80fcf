"""The decoder computes what transformers computes, through the cache as the engine fills it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncrl.engines.base import Chunk, GenerateRequest, OnNewWeights, SamplingParams
from asyncrl.engines.decoder import Decoder, read_checkpoint
from asyncrl.engines.model_config import read_config
from asyncrl.engines.noise import uniforms
from asyncrl.engines.sampling import invert_cdf
from asyncrl.engines.scheduler import Scheduler, Swap
from asyncrl.errors import ConfigError, DataError, WeightsError
from asyncrl.messages.sample import logprobs_of, pack_tokens, tokens_of

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "attention_bias": True, "rope_parameters": LLAMA3},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}


def reference_model(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = SIZES | FAMILIES[family]
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        # Biases and norms start as zeros and ones, which would hide where they are used.
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def write_checkpoint(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, path / "model.safetensors")


def make_scheduler(path: Path, *, max_concurrency: int = 8) -> Scheduler:
    decoder = Decoder(read_config(path), device="cpu", dtype=torch.float32, max_positions=1024)
    decoder.load(read_checkpoint(path))
    return Scheduler(
        decoder=decoder,
        max_concurrency=max_concurrency,
        max_context_len=1024,
        decode=lambda ids: "".join(chr(65 + i) for i in ids),
        version=(0, 1),
    )


def ask(uid: str, *, prompt: list[int], seed: int = 1, prefix: bytes = b"", **params: Any) -> GenerateRequest:
    options = {"max_new_tokens": 30, "ignore_eos": True} | params
    return GenerateRequest(
        uid=uid,
        prompt=pack_tokens(prompt),
        prefix=prefix,
        params=SamplingParams(**options),
        seed=seed,
        prefix_key=str(prompt),
    )


@torch.inference_mode()
def run(scheduler: Scheduler, requests: list[GenerateRequest], *, joins_per_step: int = 100) -> list[Chunk]:
    """All requests to their end, some joining at each step; their last chunks in order."""
    queue, last = list(enumerate(requests)), {}
    while queue or scheduler.busy:
        for ticket, request in queue[:joins_per_step]:
            scheduler.submit(ticket, request)
        queue = queue[joins_per_step:]
        scheduler.step()
        last.update(dict(scheduler.events))
        scheduler.events.clear()
    return [last[ticket] for ticket in range(len(requests))]


def reference_logprobs(
    model: Any, prompt: list[int], response: list[int], temperature: float = 1.0
) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Rows of all lengths join and leave at different steps, long prompts and resumed answers among them."""
    model = reference_model(family)
    write_checkpoint(model, tmp_path)
    scheduler = make_scheduler(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 64, n).tolist() for n in (1, 2, 7, 30, 600)]
    requests = [
        ask(
            f"{i}.{j}",
            prompt=p,
            seed=10 * i + j,
            max_new_tokens=3 + 9 * j + i,
            temperature=0.7 if j == 2 else 1.0,
            prefix=pack_tokens(rng.integers(2, 64, 2 * j)),
        )
        for i, p in enumerate(prompts)
        for j in range(3)
    ]
    for request, chunk in zip(requests, run(scheduler, requests, joins_per_step=2), strict=True):
        prompt = tokens_of(request.prompt + request.prefix).tolist()
        response = tokens_of(chunk.tokens).tolist()
        expected = reference_logprobs(model, prompt, response, request.params.temperature)
        np.testing.assert_allclose(logprobs_of(chunk.logprobs), expected, atol=1e-4)
        assert len(response) + len(request.prefix) // 4 == request.params.max_new_tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, path = reference_model("qwen3"), tmp_path_factory.mktemp("qwen3")
    write_checkpoint(model, path)
    return model, path


def test_greedy_is_the_greedy_of_transformers(checkpoint: tuple[Any, Path]) -> None:
    model, path = checkpoint
    prompt = [5, 6, 7]
    (chunk,) = run(make_scheduler(path), [ask("a", prompt=prompt, temperature=0.0)])
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert tokens_of(chunk.tokens).tolist() == expected[0, 3:].tolist()


def test_token_t_is_the_inverse_cdf_at_the_number_of_seed_and_t(checkpoint: tuple[Any, Path]) -> None:
    model, path = checkpoint
    for prompt in ([5, 6, 7], [9] * 11):
        (chunk,) = run(make_scheduler(path), [ask("a", prompt=prompt, seed=77)])
        response = tokens_of(chunk.tokens).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        numbers = uniforms(np.array([77], dtype=np.uint64), np.arange(len(response)))
        assert invert_cdf(logits.softmax(-1), torch.from_numpy(numbers)).tolist() == response


def test_the_model_s_end_token_ends_an_answer(checkpoint: tuple[Any, Path]) -> None:
    scheduler = make_scheduler(checkpoint[1])
    requests = [
        (ask(str(s), prompt=[5], seed=s), ask(f"{s}.", prompt=[5], seed=s, ignore_eos=False))
        for s in range(20)
    ]
    wholes = run(scheduler, [whole for whole, _ in requests])
    num_stopped = 0
    for whole, cut in zip(wholes, run(scheduler, [cut for _, cut in requests]), strict=True):
        tokens = tokens_of(whole.tokens).tolist()
        end = tokens.index(1) + 1 if 1 in tokens else len(tokens)
        assert tokens_of(cut.tokens).tolist() == tokens[:end]
        assert cut.finish_reason == ("stop" if 1 in tokens else "length")
        num_stopped += 1 in tokens
    assert 0 < num_stopped < 20


def test_the_prompt_of_a_group_is_computed_once(checkpoint: tuple[Any, Path]) -> None:
    scheduler = make_scheduler(checkpoint[1], max_concurrency=3)
    group = [ask(str(i), prompt=[4] * 21, seed=i, max_new_tokens=5) for i in range(8)]
    run(scheduler, group)
    assert scheduler.counters.prefilled_tokens == 20
    assert scheduler.counters.generated_tokens == 40


@torch.inference_mode()
def swap_after(
    scheduler: Scheduler, request: GenerateRequest, *, mode: OnNewWeights, weights: Any, num_steps: int
) -> Chunk:
    scheduler.submit(0, request)
    for _ in range(num_steps):
        scheduler.step()
    scheduler.swap(
        Swap(
            version=1, incarnation=1, tensors=weights, mode=mode, done=lambda _: None, cancelled=lambda: False
        )
    )
    while scheduler.busy:
        scheduler.step()
    return scheduler.events[-1][1]


def test_recompute_forgets_the_old_weights_and_keep_does_not(
    checkpoint: tuple[Any, Path], tmp_path: Path
) -> None:
    model, path = checkpoint
    torch.manual_seed(5)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights = {n: p + 0.05 * torch.randn_like(p) for n, p in old.items()}
    prompt, gaps = [5, 6, 7, 8], {}
    for mode in (OnNewWeights.RECOMPUTE, OnNewWeights.KEEP):
        chunk = swap_after(
            make_scheduler(path), ask("a", prompt=prompt), mode=mode, weights=weights, num_steps=10
        )
        response, got = tokens_of(chunk.tokens).tolist(), logprobs_of(chunk.logprobs)
        before = reference_logprobs(model, prompt, response)
        model.load_state_dict(weights, strict=False)
        after = reference_logprobs(model, prompt, response)
        model.load_state_dict(old, strict=False)
        np.testing.assert_allclose(got[:10], before[:10], atol=1e-4)
        gaps[mode] = np.abs(got[10:] - after[10:]).max()
        assert [(s.version, s.num_tokens) for s in chunk.spans] == [(0, 10), (1, 20)]
    assert gaps[OnNewWeights.RECOMPUTE] < 1e-4
    assert gaps[OnNewWeights.KEEP] > 1e-3


@pytest.mark.parametrize("size", [1, 3])
def test_stop_strings_end_the_answer_across_chunks_and_resumptions(
    checkpoint: tuple[Any, Path], size: int
) -> None:
    scheduler = make_scheduler(checkpoint[1])
    (whole,) = run(scheduler, [ask("a", prompt=[9, 9], seed=3)])
    stop = whole.text[12 : 12 + size]
    end = whole.text.index(stop) + size
    (cut,) = run(scheduler, [ask("a", prompt=[9, 9], seed=3, stop=["never", stop])])
    assert (cut.text, cut.finish_reason) == (whole.text[:end], "stop")
    assert len(cut.tokens) // 4 == end
    prefix = whole.tokens[: 4 * (end - 1)]
    (rest,) = run(scheduler, [ask("a", prompt=[9, 9], seed=3, stop=[stop], prefix=prefix)])
    assert (rest.text, rest.finish_reason) == (whole.text[end - 1 : end], "stop")
    (late,) = run(scheduler, [ask("a", prompt=[9, 9], seed=3, stop=[stop], min_new_tokens=end + 1)])
    assert len(late.tokens) // 4 > end


def test_the_context_bound_ends_an_answer_by_length(checkpoint: tuple[Any, Path]) -> None:
    (chunk,) = run(make_scheduler(checkpoint[1]), [ask("a", prompt=[3] * 1000, max_new_tokens=500)])
    assert (len(chunk.tokens) // 4, chunk.finish_reason) == (24, "length")


def test_wrong_weights_are_refused_by_name_and_change_nothing(checkpoint: tuple[Any, Path]) -> None:
    path = checkpoint[1]
    decoder = make_scheduler(path).decoder
    good = read_checkpoint(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    embedding = decoder.embedding.clone()
    moved = {n: t + 1 for n, t in good.items()}
    wrong = {
        "lack model.layers.1.self_attn.k_proj": {n: t for n, t in moved.items() if n != name},
        "hold model.extra": moved | {"model.extra": torch.zeros(1)},
        r"k_proj.weight is torch.float32 \[3\]": moved | {name: torch.zeros(3)},
        "k_proj.weight is torch.int32": moved | {name: good[name].int()},
    }
    for match, tensors in wrong.items():
        with pytest.raises(WeightsError, match=match):
            decoder.load(tensors)
    assert torch.equal(decoder.embedding, embedding)
    decoder.load(good | {"lm_head.weight": good["model.embed_tokens.weight"]})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "'gpt2'; supported: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_models_with_other_mathematics_are_refused(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "qwen2"} | changes))
    with pytest.raises(ConfigError, match=match):
        read_config(tmp_path)


def test_a_broken_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match="num_attention_heads"):
        read_config(tmp_path)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match="safetensors"):
        read_checkpoint(tmp_path)


def test_end_tokens_come_from_both_configurations(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "qwen2", "eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert read_config(tmp_path).eos_ids == (5, 7)
