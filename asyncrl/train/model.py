"""Loading a transformers causal LM for training, and naming its weights.

Owns what is accepted as a model: a local directory, with the attention the trainer asks for, proven by
`check_model`. Never downloads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asyncrl.errors import DataError
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.attention import NAME, register
from asyncrl.train.forward import check_model


def load_model(directory: Path, *, trainer: TrainerConfig, option: str = "trainer.hf_checkpoint") -> Any:
    """The model of a Hugging Face directory, in trainer.dtype on trainer.device.

    Raises DataError, naming the `option` that gave the directory, when it cannot be loaded, ConfigError when
    the model does not fit the trainer.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (directory / "config.json").is_file():
        raise DataError(f"{option}: {directory} has no config.json; a Hugging Face model directory is needed")
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, trainer.dtype),
            attn_implementation=trainer.attn_implementation,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{option}: {directory} cannot be loaded: {error}") from error
    model = model.to(trainer.device)
    device = torch.device(trainer.device)
    model.eval()
    check_model(model, packed=trainer.attn_implementation == NAME, device=device)
    return model


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the cost of a sequence depends on."""

    num_parameters: int
    """Weights that multiply a token: of all experts only those it reaches, without the embedding table."""
    num_layers: int
    attention_size: int
    """Query heads x head dimension."""


def model_shape(model: Any) -> ModelShape:
    """The shape of a loaded model, by its configuration and its matrices."""
    config = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    active = getattr(config, "num_experts_per_tok", 1) / experts
    body = sum(
        parameter.numel() * (active if ".experts." in name else 1.0)
        for name, parameter in model.base_model.named_parameters()
        if parameter.ndim >= 2 and parameter is not model.get_input_embeddings().weight
    )
    heads = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        num_parameters=int(body) + model.get_output_embeddings().weight.numel(),
        num_layers=config.num_hidden_layers,
        attention_size=heads * head_dim,
    )


def has_dropout(model: Any) -> bool:
    """Whether a forward in training mode draws random numbers."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or any(
        isinstance(value, int | float) and value > 0
        for name, value in model.config.to_dict().items()
        if "dropout" in name or "pdrop" in name
    )


def unique_weights(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, without gradient, in the model's order.

    Live tensors. Of tied tensors only the first is listed, as in an exported checkpoint.
    """
    seen: set[tuple[int, torch.Size]] = set()
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen or tensor.numel() == 0:
            weights[name] = tensor
        seen.add(key)
    return weights
