"""The commands that need no run: check, explain, init; errors, exit codes, and the cost of --help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from asyncrl.cli.explain import explanation
from asyncrl.cli.main import Commands
from asyncrl.errors import ConfigError, RunError
from asyncrl.topology import catalogue, foreign

LAUNCHERS = Path(__file__).parents[2] / "launchers"


def asyncrl(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COLUMNS": "120", "PYTHONPATH": str(LAUNCHERS.parent)}
    command = [sys.executable, "-m", "asyncrl.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env=env)


def test_check_prints_the_plan() -> None:
    done = asyncrl("check", str(LAUNCHERS / "full.toml"), "--set", "generator.replicas=3")
    assert done.returncode == 0, done.stderr
    for text in (
        "generator-2",
        "96 tickets",
        "up to 96 groups (768 samples)",
        "tcp://127.0.0.1:0",
        "buffer -> trainer",
    ):
        assert text in done.stdout, text


def test_check_of_a_bad_file_is_one_message_and_exit_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[rollout]\nrollout_batch_sise = 4\n", encoding="ascii")
    done = asyncrl("check", str(bad))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert 'did you mean "rollout_batch_size"?' in done.stderr
    assert "trainer.hf_checkpoint: required" in done.stderr


def test_init_writes_a_topology_that_checks_and_never_overwrites(tmp_path: Path) -> None:
    assert asyncrl("init", "t.toml", cwd=tmp_path).returncode == 0
    assert asyncrl("check", "t.toml", cwd=tmp_path).returncode == 0
    (tmp_path / "t.toml").write_text("mine", encoding="ascii")
    again = asyncrl("init", "t.toml", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert (tmp_path / "t.toml").read_text(encoding="ascii") == "mine"


def test_help_shows_commands_and_exit_codes() -> None:
    done = asyncrl("--help")
    assert done.returncode == 0
    assert "Exit codes: 0 finished, 1 failed, 2 configuration" in done.stdout
    assert asyncrl("explain", "warp_factor").returncode == 2


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a", "b"), 2, "asyncrl: a\nb\n"),
        (RunError("the disk is full"), 1, "asyncrl: the disk is full\n"),
        (KeyboardInterrupt(), 130, "asyncrl: interrupted\n"),
    ],
)
def test_an_error_is_one_message_and_its_exit_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(cls=Commands)

    @app.command()
    def fails() -> None:
        raise error

    app.command("other")(fails)  # with a single command typer makes no group
    with pytest.raises(SystemExit) as caught:
        app(["fails"])
    assert caught.value.code == code
    assert capsys.readouterr().err == text


def test_explain_prints_an_option() -> None:
    done = asyncrl("explain", "trainer.lr")
    assert done.returncode == 0
    assert "Learning rate of the actor." in done.stdout
    assert "1e-06" in done.stdout


def test_every_option_can_be_explained() -> None:
    for table in catalogue.tables().values():
        assert len(explanation(table.name)) > len(table.options)
        for option in table.options.values():
            assert explanation(option.path)[0] == option.path


@pytest.mark.parametrize("name", [*foreign.RENAMED, *foreign.NOT_YET])
def test_every_foreign_flag_is_answered(name: str) -> None:
    assert explanation(name)[0].startswith(f"{name}: ")


def test_a_key_of_several_tables_is_explained_for_each() -> None:
    lines = explanation("num_threads")
    assert "trainer.num_threads" in lines
    assert "generator.num_threads" in lines


def test_explain_gives_the_counterpart_and_where_defaults_differ() -> None:
    assert "--pause-generation-mode" in "\n".join(explanation("generator.on_new_weights"))
    assert "off by default in slime and Miles" in "\n".join(explanation("rollout.partial_rollout"))
    assert "no counterpart" in "\n".join(explanation("rollout.on_straggler"))


def test_an_unknown_name_suggests_a_close_one() -> None:
    with pytest.raises(ConfigError, match='did you mean "eps_clip"'):
        explanation("eps_clpi")
