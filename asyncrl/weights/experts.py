"""Names of expert weights: fused in memory, one by one in checkpoints.

transformers 5 holds a layer's experts as two tensors and writes them to disk as three matrices per expert,
the names that every other program reads. Owns that translation; never copies.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of a Qwen3-MoE checkpoint; views, in the order of the tensors.

    `X.experts.gate_up_proj` [E, 2 I, C] becomes `X.experts.0.gate_proj.weight` [I, C], the first half, and
    `X.experts.0.up_proj.weight`; `X.experts.down_proj` [E, C, I] becomes `X.experts.0.down_proj.weight`; and
    so on for every expert. Everything else stays. Not for models that store experts transposed or interleaved
    (gpt-oss).
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(GATE_UP) and tensor.ndim == 3:
            prefix = name.removesuffix("gate_up_proj")
            for index, gate_up in enumerate(tensor.unbind()):
                gate, up = gate_up.chunk(2)
                split[f"{prefix}{index}.gate_proj.weight"] = gate
                split[f"{prefix}{index}.up_proj.weight"] = up
        elif name.endswith(DOWN) and tensor.ndim == 3:
            prefix = name.removesuffix("down_proj")
            for index, down in enumerate(tensor.unbind()):
                split[f"{prefix}{index}.down_proj.weight"] = down
        else:
            split[name] = tensor
    return split
