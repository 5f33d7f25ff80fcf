"""A tiny random model and scored samples for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from asyncrl.messages.sample import (
    Prompt,
    Sample,
    Score,
    Span,
    Status,
    pack_logprobs,
    pack_mask,
    pack_tokens,
)
from asyncrl.topology.training import AlgorithmConfig, TrainerConfig
from asyncrl.train.backend import TrainPlan

VOCAB = 64


def write_model(directory: Path, *, hidden: int = 32, seed: int = 0) -> Path:
    """A random two-layer Qwen3 with a word-level tokenizer: token i is "w<i>"."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))  # noqa: S106 -- a word of the vocabulary
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")  # noqa: S106
    tokenizer.save_pretrained(directory)
    return directory


def make_sample(
    *,
    group_id: int,
    index: int,
    prompt: list[int],
    response: list[int],
    logprobs: list[float],
    reward: float,
    version: int = 0,
    mask: list[int] | None = None,
    remove: bool = False,
) -> Sample:
    return Sample(
        group_id=group_id,
        index=index,
        prompt=Prompt(tokens=pack_tokens(prompt)),
        status=Status.COMPLETED,
        tokens=pack_tokens(response),
        logprobs=pack_logprobs(logprobs),
        loss_mask=pack_mask(mask if mask is not None else [1] * len(response)),
        spans=[Span(version, 1, len(response))] if response else [],
        score=Score(reward=reward, remove_sample=remove),
    )


def make_groups(
    *, seed: int = 0, num_groups: int = 4, num_samples: int = 4, max_len: int = 20, version: int = 0
) -> list[list[Sample]]:
    """Groups of random samples with rewards 0 and 1 and log-probs somewhat off the model's."""
    numbers = random.Random(seed)
    groups = []
    for group_id in range(num_groups):
        prompt = [numbers.randrange(VOCAB) for _ in range(numbers.randrange(1, 8))]
        group = []
        for index in range(num_samples):
            response = [numbers.randrange(VOCAB) for _ in range(numbers.randrange(1, max_len))]
            group.append(
                make_sample(
                    group_id=group_id,
                    index=index,
                    prompt=prompt,
                    response=response,
                    logprobs=[-4.2 + numbers.random() * 0.2 for _ in response],
                    reward=float((index + numbers.randrange(2)) % 2),
                    version=version,
                    mask=[1] + [int(numbers.random() < 0.9) for _ in response[1:]],
                )
            )
        groups.append(group)
    return groups


def make_plan(
    model: Path,
    *,
    trainer: dict[str, Any] | None = None,
    algorithm: dict[str, Any] | None = None,
    **others: Any,
) -> TrainPlan:
    return TrainPlan(
        trainer=TrainerConfig(**{"hf_checkpoint": str(model), "lr": 1e-2, **(trainer or {})}),
        algorithm=AlgorithmConfig(**(algorithm or {})),
        **others,
    )


def plan_to_json(plan: TrainPlan) -> str:
    import msgspec

    return json.dumps(msgspec.to_builtins(plan))
