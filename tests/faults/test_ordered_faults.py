"""Runs under orders: link faults that cost nothing, and orders that cannot be carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl.chaos import ORDERS, Order, read_journal
from asyncrl.errors import ConfigError, ExitCode
from tests.support.books import assert_closed, reasons
from tests.support.command import launched
from tests.support.inside import run_inside

# 24 answers, at most 10 at once, each with progress and an end: six messages of reports at the very least.
LINK_FAULTS = [
    Order(actor="generator", at="send:Reports", action="duplicate", nth=2, count=2),
    Order(actor="generator", at="send:Reports", action="drop", nth=4),
    Order(actor="generator", at="send:Reports", action="cut", nth=4),
    Order(actor="reward", at="send:Scores", action="delay", seconds=0.05, count=2),
    Order(actor="reward", at="receive:Leases", action="duplicate", nth=2),
    Order(actor="buffer", at="send:Acks", peer="generator", action="duplicate", nth=3),
    Order(actor="trainer", at="received:BatchPart", action="cut", nth=2),
    Order(actor="buffer", at="receive:Trained", action="duplicate"),
]


def test_link_faults_in_one_process_cost_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "orders.json"
    file.write_bytes(msgspec.json.encode(LINK_FAULTS))
    monkeypatch.setenv(ORDERS, str(file))
    run = run_inside(tmp_path, model, {"run.heartbeat_s": 0.2})
    assert run.code == ExitCode.FINISHED, run.detail
    journal = read_journal(run.path)
    assert {line["order"] for line in journal if "order" in line} == set(range(len(LINK_FAULTS)))
    assert_closed(run.path)
    assert reasons(run.path)["trained"] == 3 * 4


def test_what_is_for_processes_is_refused_where_actors_share_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "orders.json"
    file.write_bytes(msgspec.json.encode([Order(actor="trainer", at="send:Trained", action="kill")]))
    monkeypatch.setenv(ORDERS, str(file))
    with pytest.raises(ConfigError, match='"kill" at "send" is for processes of their own'):
        run_inside(tmp_path, model)
    assert read_journal(tmp_path / "runs" / "run") == []


def test_an_order_that_cannot_happen_ends_a_launch_before_anything_starts(
    tmp_path: Path, model: Path
) -> None:
    wrong: dict[str, Any] = {"actor": "generator-7", "at": "send:Reports", "action": "kill"}
    with launched(tmp_path, model, orders=[Order(**wrong)]) as run:
        assert run.end() == ExitCode.CONFIG
    assert 'order 0 ("generator-7" at "send:Reports"): actor: nobody of this run is called that' in run.text
    assert "Traceback" not in run.text
    assert not (run.path / "buffer.db").exists()


def test_an_error_of_the_supervisor_itself_is_told_and_written_down(tmp_path: Path, model: Path) -> None:
    """Fails when the session leaves the status at "running", or lets a group of exceptions through."""
    order = Order(actor="supervisor", at="receive:Telemetry", nth=5, action="exit")
    with launched(tmp_path, model, orders=[order]) as run:
        assert run.end() == ExitCode.FAILED
    assert "Traceback" not in run.text
    status = msgspec.json.decode((run.path / "status.json").read_bytes())
    assert (status["phase"], status["exit_code"], status["pid"]) == ("failed", 1, 0)
    assert status["detail"] == "supervisor: ordered to fail at receive:Telemetry"
    assert status["detail"] in run.text
