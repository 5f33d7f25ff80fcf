"""Accuracy of an exported checkpoint, by plain transformers `generate`, in a process of its own.

    python -m asyncrl.train.evaluate CHECKPOINT DATA.jsonl --label-key label --reward math

Owns a second opinion: nothing of asyncrl's engine, templates or trainer takes part, only the reward is the
same. Prompts are answered greedily, in batches padded on the left. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncrl.errors import AsyncrlError, ConfigError, DataError, RewardError
from asyncrl.messages.sample import Lane, Prompt, Sample, Status, pack_tokens


def arguments() -> argparse.ArgumentParser:
    """The command line; names are the topology's."""
    parser = argparse.ArgumentParser(prog="python -m asyncrl.train.evaluate", description=__doc__)
    add = parser.add_argument
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add("checkpoint", type=Path, help="Hugging Face model directory")
    add("data", help='JSONL file; "FILE@[0:100]" takes its first 100 rows')
    add("--input-key", default="input", help="key of the prompt: text, or a list of messages")
    add("--label-key", default="label", help="key of the ground truth")
    add("--metadata-key", default="metadata", help="key of the metadata object")
    add("--apply-chat-template", action="store_true", help="render prompts with the chat template")
    add("--apply-chat-template-kwargs", type=json.loads, default={}, metavar="JSON", help="its variables")
    add("--max-new-tokens", type=int, default=1024, help="longest answer in tokens")
    add("--stop", action="append", default=[], help="string that ends an answer; may be repeated")
    add("--stop-token-ids", type=int, nargs="*", default=[], help="tokens that end an answer")
    add("--keep-special-tokens", action="store_true", help="leave special tokens in the text rewards see")
    add("--reward", default="exact", help='"exact", another built-in reward, or "module:function"')
    add("--reward-key", default=None, help="key of the number when the reward is a dict")
    add("--batch-size", type=int, default=64, help="prompts per call of generate")
    add("--num-threads", type=int, default=1, help="threads torch may use")
    add("--device", default="cpu", help="torch device")
    return parser


def read_rows(data: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises DataError."""
    from asyncrl.data.jsonl import JsonlIndex

    index = JsonlIndex.build(data, option="DATA")
    return [index.row(i) for i in range(len(index))]


def render(tokenizer: Any, row: dict[str, Any], *, options: argparse.Namespace) -> str:
    """The prompt's text. Raises DataError for a row without one."""
    value = row.get(options.input_key)
    if value is None:
        raise DataError(
            f'DATA: a row has no "{options.input_key}"; its keys are {", ".join(row)} (--input-key)'
        )
    if not options.apply_chat_template:
        return str(value)
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options.apply_chat_template_kwargs
        )
    )


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, options: argparse.Namespace
) -> list[Sample]:
    """One greedy answer per prompt, without its end token."""
    import torch

    ends = _end_tokens(model, tokenizer, options.stop_token_ids)
    stops = {"stop_strings": options.stop, "tokenizer": tokenizer} if options.stop else {}
    samples: list[Sample] = []
    for start in range(0, len(prompts), options.batch_size):
        texts = list(prompts[start : start + options.batch_size])
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"].to(options.device),
                attention_mask=inputs["attention_mask"].to(options.device),
                do_sample=False,
                max_new_tokens=options.max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id,
                **stops,
            )
        for text, row in zip(texts, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((i for i, token in enumerate(row) if token in ends), len(row))
            decoded = tokenizer.decode(row[:length], skip_special_tokens=not options.keep_special_tokens)
            samples.append(
                Sample(
                    group_id=len(samples),
                    index=0,
                    prompt=Prompt(tokens=b"", text=text),
                    status=Status.COMPLETED if length < len(row) or length == 0 else Status.TRUNCATED,
                    tokens=pack_tokens(row[:length]),
                    loss_mask=b"\x01" * length,
                    text=_cut(decoded, options.stop),
                    lane=Lane.EVAL,
                )
            )
    return samples


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to its first stop string, that string included, as the engine leaves it."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _end_tokens(model: Any, tokenizer: Any, extra: Sequence[int]) -> list[int]:
    configured = model.generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*own, tokenizer.eos_token_id, *extra) if token is not None})


async def score(samples: Sequence[Sample], *, reward: str, reward_key: str | None) -> list[float]:
    """The reward of each sample. Raises RewardError, ConfigError."""
    from asyncrl.rewards.base import RewardSpec, normalise
    from asyncrl.rewards.judge import Judge

    spec = RewardSpec(use=reward, reward_key=reward_key, search_paths=["."])
    judge = Judge(spec)
    scores = []
    for sample, hook in zip(samples, spec.hook_samples(samples), strict=True):
        scores.append(normalise(await judge.score(hook), sample, hook, spec=spec).reward)
    return scores


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The result that `main` prints. Raises ConfigError, DataError, RewardError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(options.num_threads)
    rows = read_rows(options.data)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            options.checkpoint, padding_side="left", local_files_only=True
        )
        model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto", local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"CHECKPOINT: {options.checkpoint} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options.apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(f"--apply-chat-template: {options.checkpoint} has no chat template")
    prompts = [render(tokenizer, row, options=options) for row in rows]
    samples = answers(model.to(options.device).eval(), tokenizer, prompts, options=options)
    for sample, row in zip(samples, rows, strict=True):
        sample.metadata = dict(row.get(options.metadata_key) or {})
        sample.prompt = Prompt(tokens=b"", text=sample.prompt.text, label=row.get(options.label_key))
    rewards = asyncio.run(score(samples, reward=options.reward, reward_key=options.reward_key))
    truncated = sum(sample.status is Status.TRUNCATED for sample in samples)
    return {
        "accuracy": sum(rewards) / len(rewards),
        "num_prompts": len(rewards),
        "truncated_ratio": truncated / len(rewards),
        "checkpoint": str(options.checkpoint),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    options = arguments().parse_args(argv)
    try:
        result = evaluate(options)
    except AsyncrlError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    except ValueError as error:
        # A built-in reward raises ValueError for a sample without a label.
        sys.stderr.write(f"reward {options.reward}: {error}\n")
        return int(RewardError.exit_code)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
