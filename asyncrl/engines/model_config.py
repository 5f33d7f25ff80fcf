"""What the embedded decoder needs to know of a Hugging Face model directory, and which ones it refuses.

Owns the reading of config.json and generation_config.json. Never guesses: an option that would change the
mathematics and that the decoder does not have is a ConfigError.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.errors import ConfigError, DataError

SUPPORTED = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder of the Llama family."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: dict[str, Any]
    """`rope_type`, `rope_theta` and the scaling's own parameters, as Hugging Face names them."""
    max_position: int
    """Longest context the checkpoint was made for."""
    tied: bool
    """The output matrix is the input embedding."""
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    eos_ids: tuple[int, ...]
    """Token ids that end a response."""
    moe_layers: tuple[int, ...] = ()
    """Layers whose MLP is a mixture of experts; none in a dense model."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    """Intermediate size of one expert."""
    normalize_experts: bool = False
    """Whether the weights of a token's experts sum to 1."""

    @property
    def routing_shape(self) -> tuple[int, int]:
        """Mixture-of-experts layers, and experts per token."""
        return len(self.moe_layers), self.experts_per_token


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError where it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as JSON: {error}. Point to a Hugging Face model directory."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, not an object.")
    return value


def read_config(model_dir: Path) -> ModelConfig:
    """The decoder's shape. Raises DataError (missing, malformed) and ConfigError (another architecture)."""
    path = model_dir / "config.json"
    raw = read_json(path)
    check_supported(path, raw)
    try:
        return _config(raw, eos_ids=_eos_ids(model_dir, raw))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: missing or malformed: {error!r}.") from error


def check_supported(path: Path, raw: dict[str, Any]) -> None:
    """Raise ConfigError naming everything in `raw` that the decoder does not implement."""
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        raise ConfigError(
            f"{path}: the embedded engine has no model type {kind!r}; supported: {', '.join(SUPPORTED)}. "
            "Use the sglang engine for other models."
        )
    unsupported = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(raw.get("mlp_bias")),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "rope_scaling": _rope(raw)["rope_type"] not in ROPE_TYPES,
        "quantization_config": bool(raw.get("quantization_config")),
    }
    problems = [
        f"{path}: {key} = {raw.get(key, _rope(raw))!r} is not supported by the embedded engine "
        "(it has silu, no MLP bias, full attention, no quantisation, rope " + ", ".join(ROPE_TYPES) + "). "
        "Use the sglang engine for this model."
        for key, wrong in unsupported.items()
        if wrong
    ]
    if problems:
        raise ConfigError(*problems)


def _config(raw: dict[str, Any], *, eos_ids: tuple[int, ...]) -> ModelConfig:
    kind, num_heads = raw["model_type"], int(raw["num_attention_heads"])
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        model_type=kind,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // num_heads),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw),
        max_position=int(raw.get("max_position_embeddings", 2048)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bias,
        out_bias=kind != "qwen2" and bias,
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        eos_ids=eos_ids,
        **(_experts(raw) if kind == "qwen3_moe" else {}),
    )


def _experts(raw: dict[str, Any]) -> dict[str, Any]:
    """The mixture of experts; transformers 5 writes `num_local_experts`, published files `num_experts`."""
    dense, step = set(raw.get("mlp_only_layers") or []), int(raw.get("decoder_sparse_step", 1))
    num_experts = int(raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"])
    layers = range(int(raw["num_hidden_layers"])) if num_experts else ()
    return {
        "moe_layers": tuple(i for i in layers if i not in dense and (i + 1) % step == 0),
        "num_experts": num_experts,
        "experts_per_token": int(raw["num_experts_per_tok"]),
        "expert_size": int(raw["moe_intermediate_size"]),
        "normalize_experts": bool(raw.get("norm_topk_prob", False)),
    }


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes `rope_parameters`; older versions `rope_theta` and `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    return rope


def _eos_ids(model_dir: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """End tokens of generation_config.json and of config.json together, as SGLang takes them."""
    path = model_dir / "generation_config.json"
    sources = [raw, read_json(path)] if path.exists() else [raw]
    found: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Rotary frequencies [head_dim / 2], scaled as the checkpoint asks (Su et al. 2021; Llama 3.1)."""
    dim, base = config.head_dim, float(config.rope["rope_theta"])
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    kind = config.rope["rope_type"]
    if kind == "linear":
        return [f / float(config.rope["factor"]) for f in plain]
    if kind == "llama3":
        return [_llama3(f, config.rope) for f in plain]
    return plain


def _llama3(frequency: float, rope: dict[str, Any]) -> float:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    slowed = frequency / float(rope["factor"])
    if turns < low:
        return slowed
    if turns > high:
        return frequency
    kept = (turns - low) / (high - low)
    return kept * frequency + (1 - kept) * slowed
