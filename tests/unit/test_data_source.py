"""Sources yield every prompt once an epoch, and a restored cursor continues exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from asyncrl.data.prompts import PromptSpec
from asyncrl.data.source import EvalSet, JsonlSource, epoch_order, parse_eval_prompt_data
from asyncrl.data.template import ChatTemplates
from asyncrl.data.tokenizer import Tokenizer
from asyncrl.errors import ConfigError, DataError
from asyncrl.messages.sample import Prompt


def words() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(vocab={"?": 0}, unk_token="?"))  # noqa: S106 - a word
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    refuse = "{% if 'bad' in messages[0].content %}{{ raise_exception('bad') }}{% endif %}"
    template = refuse + "{{ messages[0].content }}"
    return Tokenizer(backend, special={}, templates=ChatTemplates({"default": template}, where="test"))


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"input": text, "label": i}) + "\n" for i, text in enumerate(texts)))
    return path


def source(path: Path, *, limit: int | None = None, template: bool = False, **kwargs: Any) -> JsonlSource:
    spec = PromptSpec(label_key="label", rollout_max_prompt_len=limit, apply_chat_template=template)
    return JsonlSource.open(path, tokenizer=words(), spec=spec, **kwargs)


def labels(prompts: list[Prompt]) -> list[int]:
    return [prompt.label for prompt in prompts]


def drain(data: JsonlSource, n: int = 3) -> list[int]:
    found: list[int] = []
    while prompts := data.next(n):
        found += labels(prompts)
    assert data.exhausted
    return found


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    return write(tmp_path / "ten.jsonl", [f"w{i}" for i in range(10)])


def test_epochs_follow_each_other_in_file_order_and_end(ten: Path) -> None:
    data = source(ten, num_epoch=2)
    assert data.num_prompts == 10
    assert labels(data.next(7)) == list(range(7))
    assert labels(data.next(7)) == [7, 8, 9, 0, 1, 2, 3]
    assert not data.exhausted
    assert labels(data.next(7)) == [4, 5, 6, 7, 8, 9]
    assert data.exhausted
    assert data.next(7) == []
    assert data.statistics().yielded == 20


def test_without_num_epoch_it_never_ends(ten: Path) -> None:
    data = source(ten)
    assert len(data.next(95)) == 95
    assert not data.exhausted
    assert data.statistics().epoch == 9


def test_each_epoch_is_another_permutation_and_the_same_for_the_same_seed(ten: Path) -> None:
    def orders(seed: int) -> list[list[int]]:
        data = source(ten, rollout_shuffle=True, rollout_seed=seed, num_epoch=3)
        return [labels(data.next(10)) for _ in range(3)]

    first = orders(1)
    assert all(sorted(order) == list(range(10)) for order in first)
    assert first == orders(1)
    assert len({tuple(order) for order in first + orders(2)}) == 6


def test_the_order_of_an_epoch_never_changes_between_releases() -> None:
    assert epoch_order(8, seed=42, epoch=0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]
    assert epoch_order(8, seed=-1, epoch=3).tolist() != epoch_order(8, seed=1, epoch=3).tolist()
    assert epoch_order(3, seed=None, epoch=5).tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12).filter(lambda ls: min(ls) <= 2),
    sizes=st.lists(st.integers(0, 5), max_size=25),
    restarts=st.sets(st.integers(0, 25)),
    shuffle=st.booleans(),
    num_epoch=st.none() | st.integers(1, 3),
)
def test_saving_and_restoring_anywhere_yields_the_same_sequence(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    sizes: list[int],
    restarts: set[int],
    shuffle: bool,
    num_epoch: int | None,
) -> None:
    texts = [" ".join(["w"] * length) for length in lengths]
    path = write(tmp_path_factory.mktemp("cursor") / "p.jsonl", texts)

    def fresh() -> JsonlSource:
        return source(path, limit=2, rollout_shuffle=shuffle, num_epoch=num_epoch)

    straight, broken = fresh(), fresh()
    whole = straight.next(sum(sizes))
    parts: list[Prompt] = []
    for i, size in enumerate(sizes):
        if i in restarts:
            cursor, broken = broken.cursor(), fresh()
            broken.restore(cursor)
        parts += broken.next(size)
    assert parts == whole
    assert broken.cursor() == straight.cursor()
    assert broken.statistics() == straight.statistics()


def test_long_prompts_are_left_out_and_counted_once(tmp_path: Path) -> None:
    path = write(tmp_path / "p", ["a", "a a a", "a a", "a a a a"])
    data = source(path, limit=2, num_epoch=3)
    assert drain(data) == [0, 2] * 3
    assert data.statistics().filtered == 2


def test_a_data_set_without_any_prompt_is_an_error_not_an_end(tmp_path: Path) -> None:
    data = source(write(tmp_path / "p", ["a a a"] * 4), limit=2)
    for _ in range(2):
        with pytest.raises(
            DataError, match="none of its 4 rows gives a prompt: 4 have more than rollout_max"
        ):
            data.next(1)


def test_a_row_that_the_template_refuses_fails_by_line_or_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "p", ["a", "bad", "c"])
    failing = source(path, template=True)
    assert labels(failing.next(1)) == [0]
    for _ in range(2):
        with pytest.raises(DataError, match=r"p, line 2: .*refused the messages: bad"):
            failing.next(1)
    skipping = source(path, template=True, on_bad_line="skip", num_epoch=2)
    assert drain(skipping) == [0, 2, 0, 2]
    assert skipping.statistics().bad == 1


def test_bad_lines_of_the_file_are_in_the_statistics(tmp_path: Path) -> None:
    path = write(tmp_path / "p", ["a", "b"])
    path.write_text(path.read_text() + '{"input": "no label"}\n{\n')
    with pytest.raises(DataError, match=r"2 bad lines(.|\n)*line 3: no label(.|\n)*line 4: not JSON"):
        source(path)
    assert source(path, on_bad_line="skip").statistics().bad == 2


def test_a_cursor_of_another_file_seed_or_source_is_refused(ten: Path, tmp_path: Path) -> None:
    cursor = source(ten, rollout_shuffle=True, rollout_seed=1).cursor()
    with pytest.raises(DataError, match=r"began with .*rollout_seed = 1, now .*rollout_seed = 2 is given"):
        source(ten, rollout_shuffle=True, rollout_seed=2).restore(cursor)
    with pytest.raises(DataError, match="now rollout_shuffle = false is given"):
        source(ten).restore(cursor)
    with pytest.raises(DataError, match="rows are not the ones"):
        source(write(tmp_path / "other", ["x"]), rollout_shuffle=True, rollout_seed=1).restore(cursor)
    with pytest.raises(DataError, match="not of a JSONL source"):
        source(ten).restore(b"{}")


def test_more_epochs_may_be_asked_for_later(ten: Path) -> None:
    short = source(ten, num_epoch=1)
    drain(short)
    longer = source(ten, num_epoch=2)
    longer.restore(short.cursor())
    assert drain(longer) == list(range(10))


def test_an_evaluation_set_gives_every_prompt_at_every_evaluation(ten: Path) -> None:
    evaluation = EvalSet("aime", path=ten, tokenizer=words(), spec=PromptSpec(label_key="label"))
    for _ in range(2):
        prompts = list(evaluation.prompts())
        assert labels(prompts) == list(range(10))
        assert {prompt.dataset for prompt in prompts} == {"aime"}
    assert evaluation.num_prompts == 10
    with pytest.raises(DataError, match=r"eval_prompt_data \(aime\): .* cannot be read"):
        EvalSet("aime", path=ten / "absent", tokenizer=words(), spec=PromptSpec())


def test_eval_prompt_data_is_pairs_or_one_path() -> None:
    assert parse_eval_prompt_data([]) == []
    assert parse_eval_prompt_data(["a", "x.jsonl", "b", "y.jsonl"]) == [("a", "x.jsonl"), ("b", "y.jsonl")]
    assert parse_eval_prompt_data(["/d/held_out.jsonl@[0:5]"]) == [("held_out", "/d/held_out.jsonl@[0:5]")]
    with pytest.raises(ConfigError, match="3 values, but names and paths come in pairs"):
        parse_eval_prompt_data(["a", "x", "b"])
    with pytest.raises(ConfigError, match='the name "a" is given 2 times'):
        parse_eval_prompt_data(["a", "x", "a", "y"])
