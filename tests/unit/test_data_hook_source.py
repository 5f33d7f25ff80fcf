"""A slime data source class works unchanged, and what it gets wrong is named."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from asyncrl.data.hook_source import MAX_FRUITLESS_CALLS, HookSource
from asyncrl.data.prompts import PromptBuilder, PromptSpec
from asyncrl.data.template import ChatTemplates
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.errors import DataError, PluginError
from asyncrl.messages.sample import Prompt, tokens_of

CODE = '''
import json, os

class Sample:
    def __init__(self, prompt, label):
        self.prompt, self.label, self.metadata = prompt, label, {"k": label}

class Numbers:
    """Counts up to args.last; keeps its place as slime's own class does."""

    def __init__(self, args):
        self.args, self.at = args, 0

    def get_samples(self, num_samples):
        first, self.at = self.at, min(self.at + num_samples, self.args.last)
        return [[Sample(f"w{i}", i) for _ in range(2)] for i in range(first, self.at)]

    def add_samples(self, samples):
        raise AssertionError("unfinished work stays in the buffer")

    def _path(self, folder, rollout_id):
        return os.path.join(folder, f"rollout/state_{rollout_id}.json")

    def save(self, rollout_id):
        os.makedirs(os.path.join(self.args.save, "rollout"), exist_ok=True)
        with open(self._path(self.args.save, rollout_id), "w") as file:
            json.dump(self.at, file)

    def load(self, rollout_id=None):
        if os.path.exists(self._path(self.args.load, rollout_id)):
            with open(self._path(self.args.load, rollout_id)) as file:
                self.at = json.load(file)

    def __len__(self):
        return self.args.last

NOT_A_CLASS = 3

class Broken:
    def __init__(self, args):
        raise KeyError("no such file")
'''


def builder(**spec: Any) -> PromptBuilder:
    backend = tokenizers.Tokenizer(models.WordLevel(vocab={"?": 0}, unk_token="?"))  # noqa: S106 - a word
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    templates = ChatTemplates({"default": "<{{ messages[0].content }}>"}, where="test")
    return PromptBuilder(Tokenizer(backend, special={}, templates=templates), spec=PromptSpec(**spec))


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    (tmp_path / "numbers_source.py").write_text(CODE)
    return f"{tmp_path}/numbers_source.py"


def opened(plugin: str, directory: Path, last: int = 10) -> HookSource:
    args = argparse.Namespace(last=last, save="elsewhere", load=None)
    made = HookSource.open(f"{plugin}:Numbers", args=args, directory=directory, builder=builder())
    assert args.save == "elsewhere"
    return made


def labels(prompts: list[Prompt]) -> list[Any]:
    return [prompt.label for prompt in prompts]


def test_each_group_gives_one_prompt_until_the_class_has_no_more(plugin: str, tmp_path: Path) -> None:
    data = opened(plugin, tmp_path / "state")
    assert data.num_prompts == 10
    prompts = data.next(6)
    assert labels(prompts) == list(range(6))
    assert (prompts[1].text, prompts[1].metadata) == ("w1", {"k": 1})
    assert not data.exhausted
    assert labels(data.next(6)) == [6, 7, 8, 9]
    assert data.exhausted
    assert data.next(6) == []


@pytest.mark.parametrize("split", range(0, 11, 2))
def test_a_restored_cursor_continues_where_it_was_taken(plugin: str, tmp_path: Path, split: int) -> None:
    first = opened(plugin, tmp_path / "state")
    head = first.next(split)
    cursor = first.cursor()
    first.next(3)
    first.cursor()  # a later save, whose commit never came
    second = opened(plugin, tmp_path / "state")
    second.restore(cursor)
    assert labels(head + second.next(100)) == list(range(10))
    assert second.statistics().yielded == 10


def test_the_class_saves_only_when_something_changed(plugin: str, tmp_path: Path) -> None:
    data = opened(plugin, tmp_path / "state")
    data.cursor()
    data.next(1)
    assert data.cursor() == data.cursor()
    assert json.loads(data.cursor())["files"] == ["rollout/state_0.json"]
    data.next(1)
    data.cursor()
    assert sorted(path.name for path in (tmp_path / "state/rollout").iterdir()) == [
        "state_0.json",
        "state_1.json",
    ]


def test_lost_files_are_an_error_and_not_a_new_beginning(plugin: str, tmp_path: Path) -> None:
    data = opened(plugin, tmp_path / "state")
    data.next(1)
    cursor = data.cursor()
    (tmp_path / "state/rollout/state_0.json").unlink()
    with pytest.raises(DataError, match=r"has lost rollout/state_0.json, which save\(0\) wrote"):
        data.restore(cursor)
    with pytest.raises(DataError, match="not of a data source class"):
        data.restore(b"[]")


@dataclass
class Fresh:
    """A hook's sample."""

    prompt: Any = "w"
    label: Any = None
    metadata: Any = None
    response_length: int = 0
    tokens: list[int] = field(default_factory=list)


class Scripted:
    """A data source whose get_samples returns, or raises, what it was told."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def get_samples(self, _n: int) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def save(self, rollout_id: int) -> None:
        raise OSError("disk full")

    def load(self, rollout_id: int) -> None: ...


def scripted(result: Any, tmp_path: Path, **spec: Any) -> HookSource:
    return HookSource(
        Scripted(result), where="data_source_path: m:C", directory=tmp_path, builder=builder(**spec)
    )


WRONG = {
    "a tuple, not a list of groups": (),
    "3 groups, more than it was asked for": [[Fresh()]] * 3,
    "a Fresh as group 0; a group is a list of samples": [Fresh()],
    "an empty list as group 0": [[]],
    "a sample without prompt in group 0": [[object()]],
    "a sample with a response in group 1": [[Fresh()], [Fresh(response_length=2)]],
    "samples of different prompts in group 0": [[Fresh("a"), Fresh("b")]],
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_return_is_named(tmp_path: Path, said: str) -> None:
    with pytest.raises(DataError) as caught:
        scripted(WRONG[said], tmp_path).next(2)
    assert f"data_source_path: m:C: get_samples(2) returned {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (Fresh(3), "prompt is int; allowed"),
        (Fresh(metadata="m"), "metadata is str; metadata must be an object"),
        (Fresh(label=object()), "label: "),
    ],
)
def test_a_sample_that_is_no_prompt_is_named(tmp_path: Path, sample: Fresh, said: str) -> None:
    with pytest.raises(DataError, match=f"a sample that is no prompt: {said}"):
        scripted([[sample]], tmp_path).next(1)


def test_what_the_class_raises_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m:C: get_samples\(2\) raised ValueError: nothing left"):
        scripted(ValueError("nothing left"), tmp_path).next(2)
    data = scripted([[Fresh()]], tmp_path)
    data.next(1)
    with pytest.raises(DataError, match=r"m:C: save\(0\) raised OSError: disk full"):
        data.cursor()


def test_text_is_final_and_messages_are_rendered(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert scripted([[Fresh("hi")]], tmp_path, apply_chat_template=True).next(1)[0].text == "hi"
    rendered = scripted([[Fresh(messages)]], tmp_path).next(1)[0]
    assert (rendered.text, rendered.messages) == ("<hi>", messages)
    given = scripted([[Fresh("hi", tokens=[7, 8])]], tmp_path).next(1)[0]
    assert tokens_of(given.tokens).tolist() == [7, 8]


def test_a_class_that_only_gives_long_prompts_is_an_error(tmp_path: Path) -> None:
    data = scripted([[Fresh("a b c")]], tmp_path, rollout_max_prompt_len=2)
    with pytest.raises(
        DataError, match=f"{MAX_FRUITLESS_CALLS} calls of get_samples in a row gave only prompts"
    ):
        data.next(1)
    assert data.num_prompts is None


def test_a_class_that_cannot_be_used_is_named(plugin: str, tmp_path: Path) -> None:
    def open_(name: str) -> None:
        HookSource.open(f"{plugin}:{name}", args=argparse.Namespace(), directory=tmp_path, builder=builder())

    with pytest.raises(PluginError, match="lacks get_samples, save, load"):
        open_("Sample.__class__")
    with pytest.raises(PluginError, match="is of type int, not a class"):
        open_("NOT_A_CLASS")
    with pytest.raises(PluginError, match=r"Broken\(args\) raised KeyError"):
        open_("Broken")
    with pytest.raises(PluginError, match='no "Absent"'):
        open_("Absent")
