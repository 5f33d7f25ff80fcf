"""Checkpoints that are whole, torn, old and pruned; accuracy of an export."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncrl.errors import ConfigError, ExitCode, StorageError
from asyncrl.train import checkpoint, evaluate
from asyncrl.train.backend import Backend
from asyncrl.train.make import make_backend
from tests.train_support import make_groups, make_plan, write_model


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    backend = make_backend(make_plan(write_model(tmp_path_factory.mktemp("model") / "tiny")))
    backend.load()
    backend.train(backend.prepare(make_groups()), rollout_step=0)
    return backend


def test_the_newest_whole_checkpoint_is_found(backend: Backend, tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (2, 10, 9):
        backend.save(tmp_path, rollout_step=step)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000010"
    (tmp_path / "step-000010" / "trainer" / "optimizer.safetensors").unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000009"
    (tmp_path / "step-000009" / "files.json").write_bytes(b"{")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"


def test_one_changed_byte_is_noticed(backend: Backend, tmp_path: Path) -> None:
    path = backend.save(tmp_path, rollout_step=1)
    assert checkpoint.defect(path) is None
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint.defect(path) == "model.safetensors does not have its digest"


def test_pruning_keeps_the_newest(backend: Backend, tmp_path: Path) -> None:
    for step in range(4):
        backend.save(tmp_path, rollout_step=step)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    checkpoint.prune(tmp_path, keep=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003"]


def test_saving_again_replaces_and_leaves_nothing_behind(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / ".step-000001.tmp").mkdir()
    first = backend.save(tmp_path, rollout_step=1)
    (first / "model.safetensors").write_bytes(b"torn")
    assert backend.save(tmp_path, rollout_step=1) == first
    assert checkpoint.defect(first) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_place_that_cannot_be_written_is_named(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/step-000001: cannot be written"):
        backend.save(tmp_path / "file", rollout_step=1)


def test_another_format_is_refused(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = backend.save(tmp_path, rollout_step=1)
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    with pytest.raises(ConfigError, match="format 2; this version reads 3"):
        checkpoint.read(path)


def test_the_random_state_comes_back(backend: Backend, tmp_path: Path) -> None:
    path = backend.save(tmp_path, rollout_step=1)

    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(np.random.rand())  # noqa: NPY002

    drawn = draw()
    assert draw() != drawn
    checkpoint.set_random_state(checkpoint.read(path).random)
    assert draw() == drawn


def rows(path: Path, labels: list[str]) -> str:
    lines = [json.dumps({"input": f"w{i + 3} w{i + 4}", "label": label}) for i, label in enumerate(labels)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def greedy(directory: Path, prompt: list[int], *, num_tokens: int) -> str:
    """What the checkpoint answers, one forward at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    tokens = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == 1:
            break
        tokens.append(token)
    return " ".join(f"w{token}" for token in tokens[len(prompt) :])


def test_an_export_is_judged_by_its_greedy_answers(
    backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = backend.save(tmp_path, rollout_step=1)
    right = [greedy(path, [i + 3, i + 4], num_tokens=5) for i in range(5)]
    data = rows(tmp_path / "data.jsonl", [*right[:3], "w2", "w2"])
    code = evaluate.main([str(path), data, "--max-new-tokens", "5", "--batch-size", "2"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (result["accuracy"], result["num_prompts"]) == (0.6, 5)
    assert evaluate.main([str(path), f"{data}@[0:3]", "--max-new-tokens", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0


def test_evaluation_says_what_is_wrong(
    backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(backend.save(tmp_path, rollout_step=1))
    data = rows(tmp_path / "data.jsonl", ["w2"])
    for arguments, code, message in (
        ([path, str(tmp_path / "none.jsonl")], ExitCode.FAILED, "none.jsonl"),
        ([str(tmp_path), data], ExitCode.FAILED, "cannot be loaded"),
        ([path, data, "--input-key", "q"], ExitCode.FAILED, 'no "q"'),
        ([path, data, "--apply-chat-template"], ExitCode.CONFIG, "no chat template"),
        ([path, data, "--reward", "nonsense"], ExitCode.CONFIG, "nonsense"),
        ([path, data, "--label-key", "answer", "--max-new-tokens", "2"], ExitCode.FAILED, "label"),
    ):
        assert evaluate.main(arguments) == code
        assert message in capsys.readouterr().err
