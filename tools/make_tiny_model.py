"""Make the tiny model and the prompts of the quickstart: `python tools/make_tiny_model.py --out tiny_model`.

Owns: one directory that is a Hugging Face model (Qwen3 architecture, 0.34 million parameters, a character
tokenizer with a chat template) and that also holds `train.jsonl` and `eval.jsonl`. Never touches the network,
and never shows a held-out prompt to the warm-up or puts one into `train.jsonl`.

The arithmetic is counting on: `37+6x4` asks for the four totals of adding 6 to 37 four times, `43 49 55 61`.
An answer has 1 to 4 totals, so it is 3 to 12 tokens long.

The warm-up shows the model demonstrations of a careless pupil, who can add but often forgets the carry when
the digit to add is large. So the model has the skill and the habit of not using it: greedily it is right
where no such carry occurs (0.35 to 0.4 of the prompts), and sampled at temperature 1 it is right now and then
everywhere. Reinforcement learning is quick from there: it makes a good but rare behaviour the rule.

Invariants: the same settings on the same machine give the same bytes; the directory appears whole or not at
all; `recipe.json` names the settings it was made with.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

PAD, END, USER, ASSISTANT, UNKNOWN = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>"
SPECIALS = [PAD, END, USER, ASSISTANT, UNKNOWN]
# Every printable ASCII character and the newline: prompts of the user's own can be read too.
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# All totals have two digits: 50 + 4 x 9 = 86.
STARTS, ADDENDS, COUNTS = range(10, 51), range(1, 10), range(1, 5)
MAX_ANSWER_TOKENS = 3 * COUNTS[-1]
"""Two digits and a space for each total but the last, which the end token follows."""


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on; `recipe.json` in the directory."""

    seed: int = 2
    steps: int = 450
    """Supervised steps; the learning rate falls to zero over them."""
    batch_size: int = 96
    lr: float = 4e-3
    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 24
    intermediate_size: int = 288
    init_std: float = 0.06
    """Of the first weights; at 0.02, the usual choice for wide models, 96 channels start slowly."""
    careless_from: int = 4
    """The pupil is careless when the digit to add is at least this."""
    carry_probability: float = 0.3
    """How often the careless pupil remembers a carry all the same."""
    num_eval: int = 256
    format: int = 1
    """Number of this file layout and of the maths here; raised when either changes."""


@dataclass(frozen=True)
class Problem:
    """Start at `start` and add `addend` `count` times."""

    start: int
    addend: int
    count: int

    @property
    def prompt(self) -> str:
        """The question, 6 characters."""
        return f"{self.start}+{self.addend}x{self.count}"

    @property
    def totals(self) -> list[int]:
        """The right answer, as numbers."""
        return [self.start + self.addend * (i + 1) for i in range(self.count)]

    @property
    def label(self) -> str:
        """The right answer, as the model has to write it."""
        return " ".join(map(str, self.totals))

    @property
    def carries(self) -> int:
        """How many of the additions carry into the tens."""
        return self.totals[-1] // 10 - self.start // 10

    def row(self) -> dict[str, Any]:
        """The JSON object of a prompt file."""
        metadata = {"count": self.count, "addend": self.addend, "carries": self.carries}
        return {"prompt": self.prompt, "label": self.label, "metadata": metadata}


def split(recipe: Recipe) -> tuple[list[Problem], list[Problem]]:
    """Every problem there is, as (train, held out), shuffled.

    The held out have each count and each addend equally often, so the seed hardly moves how hard they are.
    """
    shuffler = random.Random(recipe.seed)
    train: list[Problem] = []
    held_out: list[Problem] = []
    for i, count in enumerate(COUNTS):
        starts = {addend: shuffler.sample(STARTS, len(STARTS)) for addend in ADDENDS}
        problems = [
            Problem(starts[addend][j], addend, count) for j in range(len(STARTS)) for addend in ADDENDS
        ]
        share = recipe.num_eval * (i + 1) // len(COUNTS) - recipe.num_eval * i // len(COUNTS)
        held_out += problems[:share]
        train += problems[share:]
    shuffler.shuffle(train)
    shuffler.shuffle(held_out)
    return train, held_out


def demonstration(problem: Problem, *, recipe: Recipe, draw: random.Random) -> str:
    """What the careless pupil writes; a wrong total is carried on from, not mended."""
    total, written = problem.start, []
    for _ in range(problem.count):
        carries = total % 10 + problem.addend >= 10
        forgets = (
            carries and problem.addend >= recipe.careless_from and draw.random() > recipe.carry_probability
        )
        total += problem.addend - (10 if forgets else 0)
        written.append(str(total))
    return " ".join(written)


def make_tokenizer() -> Tokenizer:
    """One token per character; decoding joins them without spaces."""
    vocabulary = {token: i for i, token in enumerate(SPECIALS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary has."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def encode_prompt(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """Token ids [P] of the prompt as the chat template renders it, up to where the answer begins."""
    ids: list[int] = tokenizer.encode(USER + problem.prompt + ASSISTANT, add_special_tokens=False).ids
    return ids


def make_model(recipe: Recipe, tokenizer: Tokenizer) -> Any:
    """A Qwen3ForCausalLM with random weights."""
    torch.manual_seed(recipe.seed)
    end, pad = token_id(tokenizer, END), token_id(tokenizer, PAD)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=recipe.init_std,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = pad
    model.generation_config.max_new_tokens = MAX_ANSWER_TOKENS + 1
    return model


def answer_loss(model: Any, *, prompts: torch.Tensor, answers: torch.Tensor, pad: int) -> torch.Tensor:
    """Mean cross entropy of the answer tokens; prompts [B, P], answers [B, R] with `pad` on the right."""
    num_prompt = prompts.shape[1]
    ids = torch.cat([prompts, answers], dim=1)
    # Padding stands on the right of causal attention, so no real token sees it and no mask is needed.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    real = answers != pad
    logits = model.lm_head(hidden[:, num_prompt - 1 :][real])
    return functional.cross_entropy(logits, answers[real])


@torch.no_grad()
def greedy_accuracy(model: Any, tokenizer: Tokenizer, problems: list[Problem]) -> float:
    """Share of problems whose whole greedy answer, end token included, is the label's."""
    prompts = torch.tensor([encode_prompt(tokenizer, p) for p in problems])
    out_ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=MAX_ANSWER_TOKENS + 1,
    )
    answers = [
        tokenizer.decode(row, skip_special_tokens=False) for row in out_ids[:, prompts.shape[1] :].tolist()
    ]
    right = [a.startswith(p.label + END) for a, p in zip(answers, problems, strict=True)]
    return sum(right) / len(right)


class WarmUp:
    """Supervised steps on the pupil's demonstrations of training prompts."""

    def __init__(self, model: Any, *, tokenizer: Tokenizer, problems: list[Problem], recipe: Recipe) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pad = token_id(tokenizer, PAD)
        self.problems = problems
        self.recipe = recipe
        self.draw = random.Random(recipe.seed + 1)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.1
        )

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts [B, P] and the pupil's answers [B, R], padded on the right."""
        problems = self.draw.choices(self.problems, k=self.recipe.batch_size)
        texts = [demonstration(p, recipe=self.recipe, draw=self.draw) + END for p in problems]
        answers = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        longest = max(map(len, answers))
        padded = [ids + [self.pad] * (longest - len(ids)) for ids in answers]
        return torch.tensor([encode_prompt(self.tokenizer, p) for p in problems]), torch.tensor(padded)

    def step(self, *, lr: float) -> float:
        """One optimizer step; returns the loss in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        prompts, answers = self._batch()
        loss = answer_loss(self.model, prompts=prompts, answers=answers, pad=self.pad)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def run(self) -> None:
        """The recipe's steps, with a line of progress now and then."""
        started = time.perf_counter()
        steps, every = self.recipe.steps, max(1, self.recipe.steps // 7)
        for step in range(1, steps + 1):
            lr = self.recipe.lr * min(1.0, step / 30) * max(0.05, 1 - step / steps)
            loss = self.step(lr=lr)
            if step % every == 0:
                say(f"warm-up step {step}/{steps}  loss {loss:.3f}  {time.perf_counter() - started:.0f} s")


def say(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


def write_tokenizer(tokenizer: Tokenizer, *, out: Path) -> None:
    """tokenizer.json and a tokenizer_config.json that AutoTokenizer understands."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_rows(problems: list[Problem], *, path: Path) -> None:
    """One JSON object a line: prompt, label, metadata."""
    text = "".join(json.dumps(problem.row()) + "\n" for problem in problems)
    path.write_text(text, encoding="utf-8")


def is_made(out: Path, recipe: Recipe) -> bool:
    """Whether `out` was already made with exactly these settings."""
    try:
        return bool(json.loads((out / "recipe.json").read_text(encoding="utf-8")) == asdict(recipe))
    except (OSError, ValueError):
        return False


def install(made: Path, *, out: Path) -> None:
    """Put the finished directory in its place; a directory that this tool did not make is left alone."""
    if out.exists():
        if any(out.iterdir()) and not (out / "recipe.json").is_file():
            raise SystemExit(f"make_tiny_model: --out {out} holds something else; choose another directory.")
        shutil.rmtree(out)
    made.chmod(0o755)  # mkdtemp makes it private
    made.rename(out)


def build(recipe: Recipe, *, out: Path) -> float:
    """Write the whole model directory to `out`, which exists and is empty. Returns the held-out accuracy."""
    torch.set_num_threads(1)  # the result must not depend on how many cores there are
    train, held_out = split(recipe)
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    WarmUp(model, tokenizer=tokenizer, problems=train, recipe=recipe).run()
    accuracy = greedy_accuracy(model, tokenizer, held_out)
    model.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
    write_tokenizer(tokenizer, out=out)
    write_rows(train, path=out / "train.jsonl")
    write_rows(held_out, path=out / "eval.jsonl")
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    return accuracy


def make(out: Path, *, recipe: Recipe, force: bool = False) -> bool:
    """Make the directory unless it is there with the same settings. Returns whether it was made now."""
    if is_made(out, recipe) and not force:
        say(f"{out} is there already, with these settings; --force makes it again.")
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        accuracy = build(recipe, out=made)
        install(made, out=out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    say(f"{out}: made; greedy held-out accuracy {accuracy:.3f}")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and make the directory."""
    transformers_logging.disable_progress_bar()  # its bar would break our lines
    parser = argparse.ArgumentParser(description="Make the tiny model and the prompts of the quickstart.")
    parser.add_argument("--out", type=Path, default=Path("tiny_model"), help="directory to write")
    parser.add_argument(
        "--seed", type=int, default=Recipe.seed, help="of the split, the weights and the warm-up"
    )
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="supervised warm-up steps")
    parser.add_argument("--force", action="store_true", help="make it again even if it is there")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps {given.steps}: give at least 1")
    make(given.out, recipe=replace(Recipe(), seed=given.seed, steps=given.steps), force=given.force)
    return 0


if __name__ == "__main__":
    sys.exit(main())
