"""Fleet health with real processes: what is noticed when, who is killed, who is spared, who is to blame."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from asyncrl.chaos import Order
from asyncrl.errors import ExitCode
from tests.support.books import assert_closed, one, reasons, rows
from tests.support.command import RUN_S, Run, asyncrl, launched
from tests.support.processes import kill, wait_until
from tests.support.recovery import catch, held
from tests.support.world import Options, write_prompts, write_topology

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

NOTICED_S = 5.0
"""Heartbeats that stay out are noticed within this time, with the default settings."""
LEASED_AGAIN_S = 10.0
"""What a silent worker holds is somebody else's within this time, with the default settings."""
DEFAULTS = {"run.heartbeat_s": 1.0, "run.dead_after_s": 5.0}
ENDLESS = {"run.num_rollout": 1000, "trainer.save_interval": 5}
LONG_ANSWERS = {
    # A second each: who has begun one holds its lease for a while.
    "generator.scripted": {
        "median": 100.0, "sigma": 0.0, "max_tokens": 100, "vocab_size": 90, "token_latency_s": 0.01
    }
}  # fmt: skip
BEGUN = (
    "select 1 from samples where worker = 'generator-0' and state = 'generating' and tokens between 1 and 20"
)
OPEN_LEASE = (
    "select incarnation from leases where worker = ? and kind = 'generate' and ended_at is null"
    " and granted_at > ?"
)


def member(run: Run, name: str) -> dict[str, Any]:
    """What the supervisor says of a member; empty while it does not answer."""
    return run.members().get(name, {})


def until_state(run: Run, name: str, state: str) -> dict[str, Any]:
    """Wait until a member stands like that; for states that last."""

    def reached() -> dict[str, Any]:
        found = member(run, name)
        return found if found.get("state") == state else {}

    return wait_until(reached, f"{name} to be {state}", deadline_s=RUN_S, show=lambda: member(run, name))


def noted(run: Run, since: float, **wanted: str) -> dict[str, Any]:
    """The supervisor's first record like this after a time, with its own time as `at`, once it is there."""
    path = run.path / "attempt-001" / "log" / "supervisor.jsonl"

    def line() -> dict[str, Any]:
        for text in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(text)
            found["at"] = datetime.fromisoformat(found["t"]).timestamp()
            if found["at"] > since and wanted.items() <= found.items():
                return found
        return {}

    return wait_until(line, str(wanted), deadline_s=RUN_S, show=lambda: run.text)


def drain(run: Run) -> None:
    """End an endless run; its books close."""
    run.interrupt()
    assert run.end() == ExitCode.DRAINED, run.text
    assert "Traceback" not in run.text
    assert_closed(run.path, finished=False)


def metric(run: Run, name: str) -> list[float]:
    """The supervisor's values of a metric, in order."""
    lines = (run.path / "metrics" / "supervisor.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def test_a_silent_generator_is_noticed_replaced_and_serves_only_what_it_verified(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    """Fails when the suspect is only named at its death, or when the desk leases to one without weights."""
    with launched(tmp_path, model, {**slow, **LONG_ANSWERS, **DEFAULTS, **ENDLESS}) as run:
        run.until(BEGUN)
        until_state(run, "generator-0", "healthy")
        catch(run.pid("generator-0"), lambda: bool(one(run.path, BEGUN)), "an answer in the making")
        at = time.time()
        incarnation = one(run.path, OPEN_LEASE, "generator-0", 0.0)
        noticed = noted(run, at, event="suspect", member="generator-0")
        assert noticed["at"] - at < NOTICED_S
        assert "nothing was heard of it for" in noticed["why"]
        noted(run, at, event="health", member="generator-0", before="suspect", now="dead")
        gone = "select left_at from members where incarnation = ? and left_at is not null"
        left = run.until(gone, incarnation)
        assert left - at < LEASED_AGAIN_S
        lost = rows(
            run.path,
            "select fence, group_id from leases where incarnation = ? and outcome like '%silent%'",
            incarnation,
        )
        assert lost, "the victim held no lease when it was stopped"
        for fence, group in lost:
            query = (
                "select min(granted_at) from leases where group_id = ? and fence > ? and kind = 'generate'"
            )
            assert run.until(query, group, fence) - at < LEASED_AGAIN_S
        noted(run, at, event="health", member="generator-0", before="stale", now="healthy")
        said = until_state(run, "generator-0", "healthy")
        assert (said["restarts"], said["deaths"]) == (1, {"silence": 1})
        assert said["report"]["digest"]
        first = run.until(
            "select min(granted_at) from leases where worker = ? and incarnation != ?",
            "generator-0",
            incarnation,
        )
        swapped = one(run.path, "select min(at) from swaps where name = ? and at > ?", "generator-0", left)
        assert first >= swapped, "it was given work before it had loaded and verified a version"
        run.says("generator-0 is suspect")
        said = asyncrl("status", run.path, cwd=tmp_path)
        assert "1 (1 silence)" in said.out, said.out
        drain(run)
        assert "generator-0 1 restarts (1 silence)" in run.text
    assert max(metric(run, "fleet/suspect")) >= 1
    assert metric(run, "fleet/deaths")[-1] == metric(run, "fleet/restarts")[-1] == 1


def flip_a_byte(path: Path) -> None:
    """In the middle of the file, where a tensor lies."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


def test_a_damaged_version_is_never_served_and_the_next_good_one_is(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    """The trainer stands still meanwhile, so that there is no newer version than the damaged one.

    Fails when a report without a verified version makes a member healthy, and when bytes that do not have
    their digest end the generator: its restarts would be spent before the next version comes.
    """
    options = {**slow, **ENDLESS, "run.dead_after_s": 250.0, "run.max_restarts": 1}
    order = Order(actor="trainer", at="send:Published", where={"manifest.version": 2}, action="stop")
    with launched(tmp_path, model, options, orders=[order]) as run:
        with held(run, 0):
            version = 1
            newest = "select max(version) from versions"
            run.until("select 1 from versions where version = ?", version)
            wait_until(
                lambda: (member(run, "generator-1").get("report") or {}).get("version") == version,
                "the newest version to be served",
                deadline_s=RUN_S,
            )
            until_state(run, "generator-0", "healthy")
            (manifest,) = rows(run.path, "select manifest from versions where version = ?", version)
            flip_a_byte(Path(json.loads(manifest[0])["path"]))
            died = kill(run.pid("generator-0"))
            run.says("generator-0 does not serve what it was sent: weights", deadline_s=RUN_S)
            said = until_state(run, "generator-0", "stale")
            assert "has digest" in said["report"]["problem"]
            assert one(run.path, OPEN_LEASE, "generator-0", died) is None
            assert one(run.path, newest) == version
            assert "has digest" in asyncrl("status", run.path, cwd=tmp_path).out
        said = until_state(run, "generator-0", "healthy")
        assert said["report"]["version"] > version
        assert said["restarts"] == 1
        assert said["report"]["problem"] == ""
        drain(run)
    swaps = "select count(*) from swaps where name = 'generator-0' and version = ? and at > ?"
    assert one(run.path, swaps, version, died) == 0


def two_speeds(place: Path, model: Path, options: Options, *, fast: int, slow: int) -> Path:
    """A topology with so many generators that take 10 ms a token, and so many that take 400 ms."""
    path = write_topology(place, model, {**options, "generator.replicas": fast, "generator.name": "fast"})
    scripted = "{median = 50.0, sigma = 0.4, max_tokens = 100, vocab_size = 90, token_latency_s = 0.4}"
    table = f'name = "slow"\nreplicas = {slow}\nengine = "scripted"\nconcurrency = 4\nscripted = {scripted}'
    path.write_text(f"{path.read_text(encoding='utf-8')}\n[[generator]]\n{table}\n", encoding="utf-8")
    return path


@contextmanager
def launched_from(topology: Path) -> Iterator[Run]:
    """A new run, live."""
    place = topology.parent
    with Run("launch", "--topology", topology, "--plain", cwd=place, output=place / "run.out") as run:
        run.path = place / "runs" / "run"
        yield run


SLOW_OPTIONS = {
    **ENDLESS,
    "rollout.max_staleness": 200,
    "run.slow_after_s": 2.0,
    "reward.use": "random",
}
"""Nobody waits for the slow ones for long, so that the fast ones always have work to be compared by."""


def test_a_slow_generator_is_killed_once_and_blames_no_sample(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    """Its next life is as slow: within `restart_window_s` it is left alone, and the run says why.

    Fails when the cap forgets whom it killed, and when our own kills count as attempts or as restarts.
    """
    options = {**slow, **SLOW_OPTIONS, "run.max_restarts": 0, "rollout.max_attempts": 1}
    with launched_from(two_speeds(tmp_path, model, options, fast=1, slow=1)) as run:
        said = until_state(run, "slow", "suspect")
        assert "tokens/s where others have" in said["why"]
        died = "select left_at from members where name = 'slow' and left_at is not null"
        left = run.until(died)
        lost = rows(run.path, "select group_id from leases where worker = 'slow' and ended_at = ?", left)
        assert lost, "it held nothing when it was killed"
        run.says("nobody is killed for it, as at most 1 may be at a time", deadline_s=RUN_S)
        said = until_state(run, "slow", "suspect")
        assert (said["restarts"], said["deaths"]) == (1, {"slowness": 1})
        drain(run)
        assert "slow: " in run.text
        assert "(run.slow_after_s = 2)" in run.text
    assert one(run.path, "select count(*) from members where name = 'slow'") == 2
    assert "failed" not in reasons(run.path)
    assert one(run.path, "select max(attempts) from samples") == 0


def test_when_many_are_slow_at_once_nobody_is_killed(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    """Three of four: the cap is one. Fails when those are killed one by one whose time is up."""
    with launched_from(two_speeds(tmp_path, model, {**slow, **SLOW_OPTIONS}, fast=3, slow=2)) as run:
        run.says("nobody is killed for it, as at most 1 may be at a time", deadline_s=RUN_S)
        for name in ("slow-0", "slow-1"):
            until_state(run, name, "suspect")
        trained = one(run.path, "select max(batch) from trained")
        run.until("select 1 from trained where batch > ?", trained)
        told = wait_until(run.members, "the supervisor to answer")
        assert all(said["deaths"] == {} for said in told.values())
        drain(run)
    assert one(run.path, "select count(*) from members where role = 'generator'") == 5


POISON = """import os
from plugins.generate import generate as usual

WORDS = {words!r}


async def generate(args, sample, sampling_params):
    if any(words in str(sample.prompt) for words in WORDS):
        os._exit(7)
    return await usual(args, sample, sampling_params)
"""


def test_poisoned_prompts_cost_their_groups_and_not_the_run(
    tmp_path: Path, model: Path, slow: dict[str, Any]
) -> None:
    """Two prompts end whatever generator works on them, six deaths with five restarts between two.

    Each is leased alone in the end and fails with its group; its deaths are given back to the generators.
    Fails (the restarts run out) when the desk proves nothing or the supervisor acquits nobody.
    """
    prompts = write_prompts(tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    words = [json.loads(prompts[number])["prompt"] for number in (1, 9)]
    (tmp_path / "poison.py").write_text(POISON.format(words=words), encoding="utf-8")
    options = {
        **slow,
        "run.num_rollout": 4,
        "run.max_restarts": 3,
        "run.stall_s": 250.0,
        "generator.replicas": 1,
        "rollout.custom_generate_function_path": f"{tmp_path / 'poison.py'}:generate",
    }
    with launched(tmp_path, model, options) as run:
        assert run.end() == ExitCode.FINISHED, run.text
        assert run.text.count("the last one alone with it, and its group has failed") >= 2
        assert "deaths of generator that do not count (run.max_restarts)" in run.text
    assert_closed(run.path)
    settled = reasons(run.path)
    assert settled["trained"] == 4 * 4
    assert settled["failed"] == 2
    notes = [note for (note,) in rows(run.path, "select note from groups where reason = 'failed'")]
    assert all(
        "3 attempts at generate failed; the last: generator ended with exit code 7" in n for n in notes
    )
    assert one(run.path, "select count(*) from members where name = 'generator'") > 1 + 3
