"""Bad input through the real command line: the right exit code, one clear message, no traceback.

What is wrong before anything starts is said within seconds, and no run directory is left behind.
"""

from __future__ import annotations

import json
import resource
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from asyncrl.errors import ExitCode
from tests.support.books import assert_closed, pairs
from tests.support.command import Said, asyncrl, launched, resumed
from tests.support.processes import wait_until
from tests.support.recovery import gated, let_go
from tests.support.world import write_prompts, write_topology

PREFLIGHT_S = 3.0
"""Processor time (which a busy machine does not stretch) that a launch may need to say what is wrong."""


def refused(said: Said, *words: str, code: ExitCode = ExitCode.CONFIG) -> None:
    """It ended with this code and one message, which has these words."""
    assert said.code == code, said.text
    assert "Traceback" not in said.text
    assert said.err.count("asyncrl: ") == 1, said.text
    for word in words:
        assert word in said.err, said.err


def processor_s() -> float:
    """Seconds that ended children of this process have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def launch(place: Path, model: Path, options: dict[str, Any] | None = None) -> Said:
    """A launch that is refused; within seconds, and leaving no run directory."""
    topology = write_topology(place, model, options)
    began = processor_s()
    said = asyncrl("launch", "--topology", topology, cwd=place)
    assert processor_s() - began < PREFLIGHT_S
    assert not (place / "runs" / "run" / "plan.json").exists()
    return said


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "missing model": (
        {"trainer.hf_checkpoint": "nowhere/model"},
        ("trainer.hf_checkpoint", "nowhere/model is not a directory"),
    ),
    "missing prompt file": ({"source.prompt_data": "nowhere.jsonl"}, ("source.prompt_data", "nowhere.jsonl")),
    "missing label": ({"source.label_key": "answer"}, ("line 1", '"answer" (label_key) is missing')),
    "unknown reward": ({"reward.use": "maths"}, ('reward "reward".use', 'unknown reward "maths"', "math")),
    "planned reward": ({"reward.use": "dapo"}, ("known but not built in yet",)),
    "unknown key": (
        {"rollout.rollout_batchsize": 3},
        ("topology.toml", "rollout", "rollout_batchsize", "rollout_batch_size"),
    ),
    "wrong type": ({"trainer.lr": "fast"}, ("topology.toml", "trainer.lr", "fast")),
    "wrong value": ({"rollout.on_straggler": "hope"}, ("rollout.on_straggler", "hope", "wait")),
    "tickets": (
        {"rollout.update_weights_interval": 3},
        ("tickets cannot feed the trainer", "(1 + 1) x 4 = 8 < update_weights_interval x B = 3 x 4 = 12"),
    ),
    "four knobs": (
        {"trainer.global_batch_size": 5, "trainer.num_steps_per_rollout": 2},
        ("rollout_batch_size x n_samples_per_prompt = 4 x 2 = 8", "5 x 2 = 10"),
    ),
    "context of the model": (
        {"rollout.rollout_max_response_len": 300},
        ("rollout.rollout_max_response_len: 300 tokens leave no room", "256"),
    ),
    "context of the run": (
        {"rollout.rollout_max_context_len": 16},
        ("cannot fit rollout_max_context_len = 16",),
    ),
    "public address without a key": ({"run.address": "tcp://0.0.0.0:0"}, ("run.address", "asyncrl keys")),
    "several at once": (
        {"rollout.rollout_batch_size": 0, "trainer.lr": -1.0, "reward.timeout_s": 0.0},
        ("rollout.rollout_batch_size", "trainer.lr", 'reward "reward".timeout_s'),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_topology_is_named(tmp_path: Path, model: Path, case: str) -> None:
    options, words = CASES[case]
    refused(launch(tmp_path, model, options), *words)


def test_an_unreadable_model_is_named(tmp_path: Path, model: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "config.json").write_text("{ not json", encoding="utf-8")
    refused(launch(tmp_path, broken), "trainer.hf_checkpoint", "config.json cannot be read")


def test_a_model_without_weights_is_named(tmp_path: Path, model: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    refused(launch(tmp_path, broken), "trainer.hf_checkpoint", "has no *.safetensors file")


def test_a_chat_template_that_is_missing_is_named(tmp_path: Path, model: Path) -> None:
    plain = shutil.copytree(model, tmp_path / "plain")
    config = json.loads((plain / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    said = launch(tmp_path, plain, {"source.apply_chat_template": True})
    refused(said, "source.apply_chat_template", "no chat template", "apply_chat_template = false")


def test_an_empty_prompt_file_is_named(tmp_path: Path, model: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("", encoding="utf-8")
    refused(launch(tmp_path, model), "source.prompt_data", "prompts.jsonl")


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, model: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl", count=6)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3] = '{"prompt": "1+1", "label'
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    refused(launch(tmp_path, model), "source.prompt_data", "line 4")


def test_bad_evaluation_data_are_named(tmp_path: Path, model: Path) -> None:
    said = launch(tmp_path, model, {"eval.eval_prompt_data": ["held-out", "nowhere.jsonl"]})
    refused(said, "eval", "nowhere.jsonl")


def test_a_plug_in_of_the_wrong_form_shows_both_signatures(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.py").write_text("def grade(one, two, three):\n    return 0.0\n", encoding="utf-8")
    said = launch(tmp_path, model, {"reward.use": "mine.py:grade"})
    refused(said, 'reward "reward".use', "(one, two, three)", "(sample)", "(args, sample)")


def test_a_plug_in_that_is_not_there_is_named(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.py").write_text("def grade(sample):\n    return 0.0\n", encoding="utf-8")
    said = launch(tmp_path, model, {"reward.use": "mine.py:grades"})
    refused(said, 'reward "reward".use', "grades", "grade")


def test_a_port_in_use_is_named(tmp_path: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        topology = write_topology(tmp_path, model, {"run.address": address})
        said = asyncrl("launch", "--topology", topology, cwd=tmp_path)
    refused(said, address, "in use")


def test_a_key_that_is_missing_is_named(tmp_path: Path, model: Path) -> None:
    topology = write_topology(tmp_path, model, {"run.key": "nowhere.key"})
    refused(asyncrl("launch", "--topology", topology, cwd=tmp_path), "nowhere.key")


def test_a_run_directory_that_exists_is_not_touched(tmp_path: Path, model: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    refused(launch(tmp_path, model), "run.name", "is in use", "--resume")
    assert sorted(p.name for p in (tmp_path / "runs" / "run").iterdir()) == ["notes.txt"]


def test_launch_needs_to_know_what(tmp_path: Path) -> None:
    refused(asyncrl("launch", cwd=tmp_path), "--topology FILE", "--resume RUN")


def test_a_topology_that_is_not_there_is_named(tmp_path: Path) -> None:
    said = asyncrl("launch", "--topology", "nowhere.toml", cwd=tmp_path)
    refused(said, "nowhere.toml")


@pytest.mark.parametrize("command", [("launch", "--resume"), ("status",), ("audit",)], ids=" ".join)
def test_what_is_no_run_is_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "empty").mkdir()
    said = asyncrl(*command, "empty", cwd=tmp_path)
    assert said.code in {ExitCode.FAILED, ExitCode.CONFIG}
    refused(said, "empty", code=ExitCode(said.code))
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_run_directory_of_a_live_run_is_refused(tmp_path: Path, model: Path) -> None:
    slow = {
        "generator.scripted": {"median": 16.0, "max_tokens": 16, "vocab_size": 90, "token_latency_s": 60.0}
    }
    with launched(tmp_path, model, slow) as run:
        wait_until(lambda: run.status.get("pid"), "the run to hold its directory", show=lambda: run.text)
        topology = tmp_path / "topology.toml"
        again = asyncrl("launch", "--topology", topology, cwd=tmp_path)
        refused(again, "run.name", "in use by a live run")
        refused(asyncrl("launch", "--resume", run.path, cwd=tmp_path), "in use by a live run")


def test_refusing_every_group_ends_the_run_in_words(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def never(args, samples, **kwargs):\n    return False\n", encoding="utf-8"
    )
    options = {"rollout.dynamic_sampling_filter_path": "mine.py:never", "rollout.max_refused_per_step": 12}
    with launched(tmp_path, model, options) as run:
        assert run.end() == ExitCode.FAILED
        assert "Traceback" not in run.text
        assert "13 groups in a row were refused" in run.text
        assert "without a batch being cut (rollout.max_refused_per_step = 12)" in run.text
        assert run.status["exit_code"] == ExitCode.FAILED
        assert "13 groups in a row were refused" in run.status["detail"]


@pytest.mark.timeout(300)  # two launches, which a busy machine stretches
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path, model: Path) -> None:
    """The buffer may write no more: a limit on its files stands for a full disk (a restart would lift it)."""
    options = {**gated(tmp_path, 16, seconds=0.0), "run.num_rollout": 12, "run.max_restarts": 0}
    with launched(tmp_path, model, options) as run:
        buffer = run.pid("buffer")
        run.until("select count(*) from trained")
        size = (run.path / "buffer.db-wal").stat().st_size
        resource.prlimit(buffer, resource.RLIMIT_FSIZE, (size, size))
        let_go(tmp_path)
        assert run.end() == ExitCode.FAILED
        assert "Traceback" not in run.text
        assert "a commit failed" in run.text
        assert "everything acknowledged before is safe" in run.text
        assert "asyncrl launch --resume" in run.text
    known = pairs(run.path, "select group_id || '.' || idx, tokens from samples")
    assert sum(known.values()) > 0
    assert_closed(run.path, finished=False)
    with resumed(run.path) as again:
        assert again.end() == ExitCode.FINISHED, again.text
    assert_closed(run.path)
    now = pairs(run.path, "select group_id || '.' || idx, tokens from samples")
    assert all(now[sample] >= tokens for sample, tokens in known.items())
