"""A generator's death costs no more tokens than its row says, measured by the clock; the rest is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncrl.buffer.records import Records
from asyncrl.chaos import Order
from asyncrl.errors import ExitCode
from tests.support.books import assert_closed, rows
from tests.support.command import asyncrl, launched
from tests.support.recovery import carried_out

pytestmark = pytest.mark.timeout(300)  # starts many processes, which a busy machine stretches

LATENCY_S = 0.02
"""A token of the scripted engine takes as long, whatever else the machine does."""
EVERY = 40
"""Handed in at half of it, 0.4 s apart: a busy disk acknowledges one before the next is due."""
LONGEST = 200
DIES = Order(actor="generator-0", at="send:Reports", where={"offset": EVERY}, action="kill", life=1)
"""Where a death costs most: the third hand-in of an answer is complete, and nobody else has it yet."""
FATE = """
with held as (
  select l.fence, l.group_id, s.idx, l.granted_at from leases l join samples s on s.group_id = l.group_id
    and instr(',' || l.indices || ',', ',' || s.idx || ',')
  where l.incarnation = ? and l.outcome like '%signal 9%' and l.kind = 'generate')
select h.group_id, h.idx, h.granted_at,
  (select coalesce(sum(b.num_tokens), 0) from bodies b where b.group_id = h.group_id and b.idx = h.idx
     and b.kind = 'segment' and b.fence = h.fence),
  (select coalesce(sum(b.num_tokens), 0) from bodies b where b.group_id = h.group_id and b.idx = h.idx
     and b.kind = 'segment' and b.fence <= h.fence),
  (select min(n.fence) from leases n where n.group_id = h.group_id and n.kind = 'generate'
     and n.fence > h.fence and instr(',' || n.indices || ',', ',' || h.idx || ','))
from held h
"""
"""Of each answer the victim held: tokens it committed, tokens committed in all, and who got it next."""


def test_a_death_loses_no_more_than_its_bound(tmp_path: Path, model: Path, slow: dict[str, Any]) -> None:
    """Fails where answers are handed in at the whole interval: all of one is lost, and what comes after."""
    options = {
        **slow,
        "run.num_rollout": 2,
        "generator.concurrency": 2,  # no lease waits for a slot, so the clock tells what was sampled under it
        "generator.scripted": {
            "median": 100.0, "sigma": 0.0, "max_tokens": 100, "vocab_size": 90, "token_latency_s": LATENCY_S
        },
        "rollout.rollout_max_response_len": LONGEST,
        "rollout.progress_every_tokens": EVERY,
    }  # fmt: skip
    with launched(tmp_path, model, options, orders=[DIES]) as run:
        fired = carried_out(run, 0)
        victim, killed = fired["incarnation"], fired["time"]
        run.until("select 1 from deaths where incarnation = ?", victim)
        assert run.end() == ExitCode.FINISHED, run.text
    assert_closed(run.path)

    with Records(run.path) as records:
        (death,) = records.deaths()
    held = rows(run.path, FATE, victim)
    # Answers that were finished in the same lease are not among those in the making.
    interrupted = [row for row in held if row[5] is not None]
    assert death.incarnation == victim
    assert death.samples == len(interrupted) > 0
    assert death.kept == sum(committed for *_, committed, _ in interrupted) > 0, (
        "others begin where it stopped"
    )
    lost = [
        # It began no sooner than it was leased, and no token takes less than its time.
        max(0.0, (killed - granted) / LATENCY_S - own)
        for _, _, granted, own, _, _ in interrupted
    ]
    bounds = [min(EVERY, LONGEST - committed) for *_, committed, _ in interrupted]
    assert death.bound == sum(bounds)
    assert all(tokens <= bound for tokens, bound in zip(lost, bounds, strict=True)), (lost, bounds)
    assert sum(lost) <= death.bound

    metrics = (run.path / "metrics" / "buffer.jsonl").read_text(encoding="utf-8").splitlines()
    newest = json.loads(metrics[-1])
    assert newest["faults/deaths"] == 1
    assert newest["faults/tokens_lost_bound"] == death.bound
    words = f"1 death: {death.samples} answers interrupted, {death.kept} tokens of them kept"
    assert words in run.text, "the summary tells it"
    assert words in asyncrl("status", run.path, cwd=tmp_path).out
    group = interrupted[0][0]
    assert f"at most {death.bound} lost" in asyncrl("story", run.path, str(group), cwd=tmp_path).out


def test_a_run_without_deaths_tells_of_none(tmp_path: Path, model: Path) -> None:
    with launched(tmp_path, model, {"run.num_rollout": 2}) as run:
        assert run.end() == ExitCode.FINISHED, run.text
    assert rows(run.path, "select * from deaths") == []
    assert "interrupted" not in run.text
