"""The MLPs of the decoder: one for every token, or a few out of many experts.

Owns their weights, fused, and the names that checkpoints give them. No gradients.

Letters: N packed tokens, C hidden size, I intermediate size, E experts, K experts per token.
"""
# ruff: noqa: N803, N806 -- tensors carry shape suffixes

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from asyncrl.algo.routing import top_experts


@dataclass(kw_only=True)
class Dense:
    """A gated MLP."""

    gate_up: torch.Tensor
    """[2 I, C]."""
    down: torch.Tensor
    """[C, I]."""

    def names(self) -> dict[str, torch.Tensor]:
        """Views by the name below the layer."""
        gate, up = self.gate_up.chunk(2)
        return {
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": self.down,
        }

    def add(self, x_NC: torch.Tensor, h_NC: torch.Tensor) -> torch.Tensor:
        """Returns x + MLP(h), the addition inside the matrix product."""
        return torch.addmm(x_NC, _gated(h_NC, self.gate_up), self.down.t())


@dataclass(kw_only=True)
class Experts:
    """A router and its experts (Qwen3-MoE)."""

    router: torch.Tensor
    """[E, C]."""
    gate_up: torch.Tensor
    """[E, 2 I, C]."""
    down: torch.Tensor
    """[E, C, I]."""
    top_k: int
    normalize: bool

    def names(self) -> dict[str, torch.Tensor]:
        """Views by the name below the layer."""
        named = {"mlp.gate.weight": self.router}
        for index, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            gate, up = gate_up.chunk(2)
            prefix = f"mlp.experts.{index}."
            named[f"{prefix}gate_proj.weight"] = gate
            named[f"{prefix}up_proj.weight"] = up
            named[f"{prefix}down_proj.weight"] = down
        return named

    def add(
        self, x_NC: torch.Tensor, h_NC: torch.Tensor, *, routed_NK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns x + the token's experts of h by their scores; their indices are written to `routed_NK`."""
        scores_NK, indices_NK = top_experts(
            functional.linear(h_NC, self.router), top_k=self.top_k, normalize=self.normalize
        )
        if routed_NK is not None:
            routed_NK.copy_(indices_NK)
        # Tokens sorted by expert, so that every expert is one matrix product over its own.
        expert_M = indices_NK.flatten()
        order_M = expert_M.argsort(stable=True)
        counts = expert_M.bincount(minlength=len(self.router)).tolist()
        parts = h_NC[order_M // self.top_k].split(counts)
        done = [
            functional.linear(_gated(part, self.gate_up[index]), self.down[index])
            for index, part in enumerate(parts)
            if len(part)
        ]
        out_MC = torch.empty((len(expert_M), h_NC.shape[1]), dtype=h_NC.dtype, device=h_NC.device)
        out_MC[order_M] = torch.cat(done)
        return x_NC + (out_MC.unflatten(0, (-1, self.top_k)) * scores_NK.unsqueeze(-1)).sum(1)


def _gated(h_NC: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [N, I]."""
    gate, up = functional.linear(h_NC, gate_up).chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
