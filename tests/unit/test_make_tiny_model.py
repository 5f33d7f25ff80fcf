"""The tiny model's directory is what the quickstart and transformers expect, and its split is honest."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
import tokenizers
import torch

TOOL = Path(__file__).parents[2] / "tools" / "make_tiny_model.py"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("make_tiny_model", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    num_threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(num_threads)
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def made(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny"
    assert tool.main(["--out", str(out), "--steps", "2"]) == 0
    return out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_held_out_prompt_is_in_train(made: Path) -> None:
    train = [row["prompt"] for row in rows(made / "train.jsonl")]
    held_out = [row["prompt"] for row in rows(made / "eval.jsonl")]
    assert len(held_out) == len(set(held_out)) == 256
    assert len(train) == len(set(train)) > 1000
    assert not set(train) & set(held_out)


def test_labels_are_the_right_answers(made: Path) -> None:
    for row in rows(made / "train.jsonl") + rows(made / "eval.jsonl"):
        start, rest = row["prompt"].split("+")
        addend, count = map(int, rest.split("x"))
        want = [int(start) + addend * (i + 1) for i in range(count)]
        assert row["label"] == " ".join(map(str, want))
        assert row["metadata"]["count"] == count
        assert row["metadata"]["carries"] == sum((total % 10) < addend for total in want)


def test_the_warm_up_draws_training_prompts_only(tool: ModuleType) -> None:
    recipe = tool.Recipe()
    train, held_out = tool.split(recipe)
    tokenizer = tool.make_tokenizer()
    model = torch.nn.Linear(1, 1)  # the batch does not look at it
    warm_up = tool.WarmUp(model, tokenizer=tokenizer, problems=train, recipe=recipe)
    forbidden = {tuple(tool.encode_prompt(tokenizer, p)) for p in held_out}
    seen = {tuple(prompt) for _ in range(20) for prompt in warm_up._batch()[0].tolist()}
    assert len(seen) > 500
    assert not seen & forbidden


def test_the_pupil_is_right_exactly_where_no_carry_is_forgotten(tool: ModuleType) -> None:
    never, always = (replace(tool.Recipe(), carry_probability=p) for p in (-1.0, 1.0))
    draw = random.Random(0)
    for problem in tool.split(never)[0]:
        assert tool.demonstration(problem, recipe=always, draw=draw) == problem.label
        slips = problem.carries > 0 and problem.addend >= never.careless_from
        assert (tool.demonstration(problem, recipe=never, draw=draw) != problem.label) == slips


def test_answer_lengths_differ_threefold(made: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    lengths = [len(tokenizer.encode(row["label"] + "<|end|>").ids) for row in rows(made / "eval.jsonl")]
    assert max(lengths) >= 3 * min(lengths)


@pytest.mark.parametrize(
    "text", ["43 49 55", "37+6x4", "", " \n two  spaces ", "".join(map(chr, range(32, 127)))]
)
def test_the_tokenizer_gives_the_text_back(made: Path, text: str) -> None:
    from transformers import AutoTokenizer

    bare = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(made)
    assert len(bare.encode(text).ids) == len(text)
    assert bare.decode(bare.encode(text).ids) == text
    assert auto(text)["input_ids"] == bare.encode(text).ids
    assert auto.decode(auto(text)["input_ids"]) == text


def test_special_tokens_are_single_tokens(made: Path) -> None:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(made)
    assert (auto.pad_token, auto.eos_token) == ("<|pad|>", "<|end|>")
    for token in ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"):
        assert len(auto(token)["input_ids"]) == 1


def test_the_chat_template_renders_alike_everywhere(tool: ModuleType, made: Path) -> None:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(made)
    template = json.loads((made / "tokenizer_config.json").read_text())["chat_template"]
    messages = [
        {"role": "user", "content": "1+2x1"},
        {"role": "assistant", "content": "03"},
        {"role": "user", "content": "37+6x4"},
    ]
    want = "<|user|>1+2x1<|assistant|>03<|end|><|user|>37+6x4<|assistant|>"
    ours = jinja2.Environment(autoescape=False).from_string(template)  # noqa: S701 - a prompt is not HTML
    assert ours.render(messages=messages, add_generation_prompt=True) == want
    assert auto.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == want
    ids = auto.apply_chat_template(messages[2:], add_generation_prompt=True, return_dict=False)
    assert ids == tool.encode_prompt(tool.make_tokenizer(), tool.Problem(37, 6, 4))


def test_plain_transformers_loads_and_generates(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made)
    auto = AutoTokenizer.from_pretrained(made)
    assert model.config.model_type == "qwen3"
    assert 300_000 <= sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert model.generation_config.eos_token_id == auto.eos_token_id
    assert model.generation_config.pad_token_id == auto.pad_token_id
    prompt = torch.tensor([auto("<|user|>37+6x4<|assistant|>")["input_ids"]])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    assert prompt.shape[1] < out.shape[1] <= prompt.shape[1] + 13


def test_the_same_settings_are_not_made_twice(
    tool: ModuleType, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert tool.main(["--out", str(made), "--steps", "2"]) == 0
    assert "already" in capsys.readouterr().out
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_force_makes_the_same_bytes_again(tool: ModuleType, made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    arguments = ["--out", str(again), "--steps", "2"]
    assert tool.main(arguments) == 0
    first_inode = (again / "model.safetensors").stat().st_ino
    assert tool.main([*arguments, "--force"]) == 0
    assert (again / "model.safetensors").stat().st_ino != first_inode
    for name in ("model.safetensors", "tokenizer.json", "train.jsonl", "eval.jsonl"):
        assert (again / name).read_bytes() == (made / name).read_bytes()


def test_a_directory_with_other_things_is_left_alone(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds something else"):
        tool.main(["--out", str(tmp_path), "--steps", "2"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_loss_falls(tool: ModuleType) -> None:
    recipe = tool.Recipe()
    tokenizer = tool.make_tokenizer()
    model = tool.make_model(recipe, tokenizer)
    warm_up = tool.WarmUp(model, tokenizer=tokenizer, problems=tool.split(recipe)[0], recipe=recipe)
    losses = [warm_up.step(lr=1e-3) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
