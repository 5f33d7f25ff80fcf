"""A decoder for checkpoints of the Llama, Qwen2, Qwen3 and Qwen3-MoE families, for small batches of tokens.

Owns the weights, fused where that saves a kernel (q, k and v; gate and up). Works on packed tokens: which
row a token belongs to is known only to the KV cache's places and to the attention that the caller passes
in. Never samples, never knows requests. No gradients: the trainer has its own model.

Letters: N packed tokens, C hidden size, H query heads, K key and value heads, D head dimension, V vocabulary;
of recorded experts, L mixture-of-experts layers and K experts per token.
"""
# ruff: noqa: N803, N806 -- tensors carry shape suffixes

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from asyncrl.engines.cache import KVCache
from asyncrl.engines.mlp import Dense, Experts
from asyncrl.engines.model_config import ModelConfig, inverse_frequencies, read_json
from asyncrl.errors import DataError, WeightsError
from asyncrl.weights.experts import split_experts

Attend = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, queries [N, H, D]) -> attention output [N, H * D]."""

HEAD = "lm_head.weight"


@dataclass(kw_only=True)
class Layer:
    """One block's weights."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    """[(H + K) * D, C]: queries, then keys, then values."""
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """[H + K / 2, D]: the query norm once per query head, then the key norm once per key head."""
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    mlp: Dense | Experts


class Decoder:
    """The model. One thread uses it."""

    def __init__(self, config: ModelConfig, *, device: str, dtype: torch.dtype, max_positions: int) -> None:
        self.config = config
        self._like = torch.empty(0, device=device, dtype=dtype)
        self.embedding = self._empty(config.vocab_size, config.hidden_size)
        self.head = self.embedding if config.tied else self._empty(config.vocab_size, config.hidden_size)
        self.final_norm = self._empty(config.hidden_size)
        self.layers = [self._layer(index) for index in range(config.num_layers)]
        self._destinations = self._by_name()
        self._rope = rope_table(config, num_positions=max_positions, device=device, dtype=dtype)

    def _empty(self, *shape: int) -> torch.Tensor:
        return self._like.new_zeros(shape)

    def _layer(self, index: int) -> Layer:
        c = self.config
        q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return Layer(
            attention_norm=self._empty(c.hidden_size),
            qkv=self._empty(q_rows + 2 * kv_rows, c.hidden_size),
            qkv_bias=self._empty(q_rows + 2 * kv_rows) if c.qkv_bias else None,
            qk_norm=self._empty(c.num_heads + c.num_kv_heads, c.head_dim) if c.qk_norm else None,
            out=self._empty(c.hidden_size, q_rows),
            out_bias=self._empty(c.hidden_size) if c.out_bias else None,
            mlp_norm=self._empty(c.hidden_size),
            mlp=self._experts() if index in c.moe_layers else self._dense(),
        )

    def _dense(self) -> Dense:
        c = self.config
        return Dense(
            gate_up=self._empty(2 * c.intermediate_size, c.hidden_size),
            down=self._empty(c.hidden_size, c.intermediate_size),
        )

    def _experts(self) -> Experts:
        c = self.config
        return Experts(
            router=self._empty(c.num_experts, c.hidden_size),
            gate_up=self._empty(c.num_experts, 2 * c.expert_size, c.hidden_size),
            down=self._empty(c.num_experts, c.hidden_size, c.expert_size),
            top_k=c.experts_per_token,
            normalize=c.normalize_experts,
        )

    def _by_name(self) -> dict[str, torch.Tensor]:
        """Where each Hugging Face parameter is copied to: views of the fused weights."""
        named = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.final_norm}
        if not self.config.tied:
            named[HEAD] = self.head
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            named.update({prefix + name: view for name, view in self._layer_names(layer).items()})
        return named

    def _layer_names(self, layer: Layer) -> dict[str, torch.Tensor]:
        c = self.config
        rows = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        projections = ("q_proj", "k_proj", "v_proj")
        named = {
            "input_layernorm.weight": layer.attention_norm,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "self_attn.o_proj.weight": layer.out,
            **layer.mlp.names(),
        }
        for name, view in zip(projections, layer.qkv.split(rows), strict=True):
            named[f"self_attn.{name}.weight"] = view
        if layer.qkv_bias is not None:
            for name, view in zip(projections, layer.qkv_bias.split(rows), strict=True):
                named[f"self_attn.{name}.bias"] = view
        if layer.out_bias is not None:
            named["self_attn.o_proj.bias"] = layer.out_bias
        if layer.qk_norm is not None:
            named["self_attn.q_norm.weight"] = layer.qk_norm[: c.num_heads]
            named["self_attn.k_norm.weight"] = layer.qk_norm[c.num_heads :]
        return named

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise WeightsError naming the first tensor that is missing, unknown, misshapen or not a float.

        Experts may come one by one, as checkpoints have them, or fused, as transformers 5 holds them.
        """
        tensors = split_experts(tensors)
        for name in self._destinations:
            if name not in tensors:
                raise WeightsError(
                    f"embedded engine: the weights lack {name}; a push must hold every parameter."
                )
        for name, tensor in tensors.items():
            # A trainer may name the tied output matrix as well; it is the embedding under another name.
            view = self.embedding if name == HEAD else self._destinations.get(name)
            if view is None:
                raise WeightsError(
                    f"embedded engine: the weights hold {name}, which the model does not have."
                )
            shape = view.shape[1:] if name.endswith(("q_norm.weight", "k_norm.weight")) else view.shape
            if tensor.shape != shape or not tensor.is_floating_point():
                raise WeightsError(
                    f"embedded engine: {name} is {tensor.dtype} {list(tensor.shape)}; "
                    f"the model has a floating-point tensor of shape {list(shape)}."
                )

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy every parameter in, after checking all of them. Raises WeightsError and changes nothing."""
        self.check(tensors)
        tensors = split_experts(tensors)
        for name, view in self._destinations.items():
            view.copy_(tensors[name])

    def hidden(
        self,
        tokens_N: torch.Tensor,
        *,
        positions_N: torch.Tensor,
        cache: KVCache,
        places_N: torch.Tensor,
        attend: Attend,
        routed_NLK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [N, C] before the last norm; stores the tokens' keys and values at `places_N`.

        The experts that the tokens went to are written to `routed_NLK`, where it is given.
        """
        routed = (
            None
            if routed_NLK is None
            else dict(zip(self.config.moe_layers, routed_NLK.unbind(1), strict=True))
        )
        x_NC = functional.embedding(tokens_N, self.embedding)
        cos_sin = self._rope[positions_N]
        cos_ND, sin_ND = cos_sin[:, 0:1], cos_sin[:, 1:2]
        for index, layer in enumerate(self.layers):
            q_NHD, kv_NKD = self._qkv(layer, x_NC, cos_ND, sin_ND)
            cache.write(index, places=places_N, kv_NKD=kv_NKD)
            routed_NK = None if routed is None else routed.get(index)
            x_NC = self._finish(layer, x_NC, attend(index, q_NHD), routed_NK)
        return x_NC

    def _qkv(
        self, layer: Layer, x_NC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [N, H, D], and rotated keys with values [N, K, D]."""
        c = self.config
        h_NC = functional.rms_norm(x_NC, (c.hidden_size,), layer.attention_norm, c.norm_eps)
        qkv = functional.linear(h_NC, layer.qkv, layer.qkv_bias).view(len(x_NC), -1, c.head_dim)
        num_rotated = c.num_heads + c.num_kv_heads
        qk = qkv[:, :num_rotated]
        normed = qk
        if layer.qk_norm is not None:
            normed = functional.rms_norm(qk, (c.head_dim,), None, c.norm_eps) * layer.qk_norm
        # rotate_half(x) * sin, with the sign moved into the table. Written back beside the values, so that
        # one copy stores keys and values together.
        qk.copy_(torch.addcmul(normed * cos, torch.roll(normed, c.head_dim // 2, -1), sin))
        return qkv[:, : c.num_heads], qkv[:, c.num_heads :]

    def new_routing(self, num_tokens: int) -> torch.Tensor:
        """Room for the experts of so many tokens, int16 [N, L, K]."""
        shape = (num_tokens, *self.config.routing_shape)
        return torch.empty(shape, dtype=torch.int16, device=self._like.device)

    def _finish(
        self, layer: Layer, x_NC: torch.Tensor, attention: torch.Tensor, routed_NK: torch.Tensor | None
    ) -> torch.Tensor:
        """Output projection and MLP, with the residual additions inside the matrix products."""
        c = self.config
        x_NC = torch.addmm(x_NC, attention, layer.out.t())
        if layer.out_bias is not None:
            x_NC += layer.out_bias
        h_NC = functional.rms_norm(x_NC, (c.hidden_size,), layer.mlp_norm, c.norm_eps)
        if isinstance(layer.mlp, Experts):
            return layer.mlp.add(x_NC, h_NC, routed_NK=routed_NK)
        return layer.mlp.add(x_NC, h_NC)

    def logits(self, x_NC: torch.Tensor) -> torch.Tensor:
        """float32 logits [N, V] of hidden states."""
        h_NC = functional.rms_norm(x_NC, (self.config.hidden_size,), self.final_norm, self.config.norm_eps)
        return functional.linear(h_NC, self.head).float()


def rope_table(config: ModelConfig, *, num_positions: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """[positions, 2, D]: cosines, and sines with the first half negated."""
    frequencies = torch.tensor(inverse_frequencies(config), dtype=torch.float32)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)
    return table.to(device=device, dtype=dtype)


def read_checkpoint(model_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the directory's safetensors files. Raises DataError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [single.name]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors.update(load_file(model_dir / name))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{model_dir / name}: cannot be read as safetensors: {error}.") from error
    return tensors
