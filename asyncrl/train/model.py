"""Loading a transformers causal LM for training, and naming its weights.

Owns what is accepted as a model: a local directory, with the attention the trainer asks for, proven by
`check_model`. Never downloads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asyncrl.errors import DataError
from asyncrl.topology.training import TrainerConfig
from asyncrl.train.attention import NAME, register
from asyncrl.train.forward import check_model


def load_model(directory: Path, *, trainer: TrainerConfig) -> Any:
    """The model of a Hugging Face directory, in trainer.dtype on trainer.device.

    Raises DataError when the directory cannot be loaded, ConfigError when the model does not fit the trainer.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (directory / "config.json").is_file():
        raise DataError(
            f"trainer.hf_checkpoint: {directory} has no config.json; a Hugging Face model directory is needed"
        )
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, trainer.dtype),
            attn_implementation=trainer.attn_implementation,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"trainer.hf_checkpoint: {directory} cannot be loaded: {error}") from error
    model = model.to(trainer.device)
    device = torch.device(trainer.device)
    model.eval()
    check_model(model, packed=trainer.attn_implementation == NAME, device=device)
    return model


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
