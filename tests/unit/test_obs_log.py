"""Logs: every road leads to the file, the line names its actor, and nothing can stop the caller."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from asyncrl.messages.sample import Lane, Settled
from asyncrl.obs import log
from asyncrl.obs.jsonl import JsonlFile


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Path]:
    setup = log.configure(actor="buffer", run_dir=tmp_path, console="none", run="demo")
    yield tmp_path / "log" / "buffer.jsonl"
    setup.close()
    structlog.reset_defaults()


def records(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_structlog_and_stdlib_reach_the_file(journal: Path) -> None:
    structlog.get_logger().info("hello", peer="generator-0")
    logging.getLogger("third.party").warning("slow %s", "disk")
    first, second = records(journal)
    assert (first["event"], first["peer"], first["level"]) == ("hello", "generator-0", "info")
    assert (second["event"], second["level"]) == ("slow disk", "warning")
    assert all((row["actor"], row["run"]) == ("buffer", "demo") for row in (first, second))


def test_warnings_reach_the_file(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        setup = log.configure(actor="trainer", run_dir=tmp_path, console="none")
        warnings.warn("old option", DeprecationWarning, stacklevel=1)
        setup.close()
    (row,) = records(tmp_path / "log" / "trainer.jsonl")
    assert "DeprecationWarning: old option" in row["event"]
    assert row["level"] == "warning"


def test_a_thread_names_the_same_actor_and_rows_stay_whole(journal: Path) -> None:
    def work(number: int) -> None:
        for i in range(50):
            structlog.get_logger().info("tick", number=number, i=i)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    rows = records(journal)
    assert {(row["number"], row["i"]) for row in rows} == {(n, i) for n in range(4) for i in range(50)}
    assert {row["actor"] for row in rows} == {"buffer"}


def test_a_bound_actor_wins_over_the_process_default(journal: Path) -> None:
    with structlog.contextvars.bound_contextvars(actor="reward-1"):
        structlog.get_logger().info("inside")
    structlog.get_logger().info("outside")
    assert [row["actor"] for row in records(journal)] == ["reward-1", "buffer"]


def test_debug_is_off_by_default_and_exceptions_are_recorded(journal: Path) -> None:
    logger = structlog.get_logger()
    logger.debug("hidden")
    try:
        int("lost")
    except ValueError:
        logger.exception("failed")
    (row,) = records(journal)
    assert row["event"] == "failed"
    assert "ValueError: invalid literal" in row["exception"]


def test_values_of_any_type_are_written(journal: Path) -> None:
    structlog.get_logger().info("odd", path=Path("x"), key={1: object()}, bad=float("nan"))
    (row,) = records(journal)
    assert row["bad"] is None
    assert "object" in row["key"]["1"]


def test_a_broken_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where the directory should be")
    setup = log.configure(actor="trainer", run_dir=tmp_path, console="none")
    structlog.get_logger().info("lost")
    assert setup.num_failed == 1
    setup.close()


def test_a_forwarded_record_is_shown_as_its_sender_wrote_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[bytes] = []
    worker = log.configure(actor="generator-1", run_dir=None, console="none", forward=lines.append)
    structlog.get_logger().warning("engine slow", seconds=1.5)
    worker.close()
    supervisor = log.configure(actor="supervisor", run_dir=None, console="plain")
    supervisor.show(lines[0])
    supervisor.close()
    assert capsys.readouterr().err.rstrip().endswith("warning generator-1 engine slow seconds=1.5")


def test_text_keeps_control_characters_away_from_the_terminal() -> None:
    line = orjson.dumps({"event": "said \x1b[2J", "actor": "a", "text": "b\x07", "level": "info"})
    assert "\x1b" not in log.text_of(line)
    assert "\x07" not in log.text_of(line)


def test_canonical_lines_carry_their_numbers(journal: Path) -> None:
    logger = structlog.get_logger()
    log.version_line(
        logger, version=3, incarnation=1, step=6, digest="ab", num_bytes=10, seconds=0.1, pause_s=0.01
    )
    log.group_line(
        logger,
        group_id=7,
        settled=Settled.TRAINED,
        lane=Lane.TRAIN,
        issue_version=2,
        num_samples=8,
        num_tokens=99,
        step=4,
    )
    version, group = records(journal)
    assert (version["event"], version["version"], version["pause_s"]) == ("version", 3, 0.01)
    assert (group["event"], group["settled"], group["num_tokens"]) == ("group", "trained", 99)


def test_a_torn_row_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"whole": 1}\n{"torn": ')
    file = JsonlFile(path)
    assert file.append(b'{"next": 2}')
    file.close()
    assert path.read_bytes().splitlines()[2] == b'{"next": 2}'
    assert not file.append(b"{}")
    assert file.num_failed == 1


def test_a_full_disk_is_counted() -> None:
    file = JsonlFile(Path("/dev/full"))
    assert not file.append(b"{}")
    assert file.num_failed == 1
    file.close()
