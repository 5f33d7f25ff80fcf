"""Groups that failed for good: what they are, why, how to see a failing reward fail here, how to try again.

Reads a run's records; the one thing it writes is a request to issue failed groups again (`data.retries`).
A failed group stays failed and settled: trying again makes a new group that names the old one. User code runs
in the sandbox of a reward worker, or in this process where the operator asks for that.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asyncrl.buffer.contents import GroupRow, group, groups, samples
from asyncrl.buffer.records import Records
from asyncrl.data import retries
from asyncrl.data.retries import RetryRequest
from asyncrl.errors import ConfigError, DataError
from asyncrl.messages.control import Kind
from asyncrl.messages.sample import Lane, Sample, Score, Settled
from asyncrl.rewards.base import RewardFailure, Verdict, check_group, normalise
from asyncrl.rewards.judge import Judge
from asyncrl.rewards.sandbox import Sandbox
from asyncrl.rewards.spec import reward_spec
from asyncrl.run.rescore import as_generated
from asyncrl.run.rundir import is_live, read_plan
from asyncrl.topology.plan import Plan

_ATTEMPTS = re.compile(r"sample (\d+): (\d+) attempts at (\w+) failed; the last: (.*)", re.DOTALL)
_FILTER = "filter: "


class Failed(NamedTuple):
    """One group in quarantine."""

    row: GroupRow
    stage: Kind | None
    """What kept failing; None where the note does not say."""
    sample: int
    """The position of the one that failed; -1: the group as a whole."""
    attempts: int
    error: str
    """The last one."""
    at: float
    """Unix seconds."""
    pending: bool
    """Somebody asked for another try, and it was not issued yet."""
    tried_as: list[int]
    """Groups that try it again."""

    @property
    def uid(self) -> str:
        """GROUP, or GROUP.SAMPLE where one sample is to blame."""
        return str(self.row.group_id) if self.sample < 0 else f"{self.row.group_id}.{self.sample}"


def failed(records: Records) -> list[Failed]:
    """Every group that failed for good, in order."""
    tried: dict[int, list[int]] = {}
    for old, new in records.retries():
        tried.setdefault(old, []).append(new)
    asked = [request.group_id for request in retries.requests(records.run_dir)]
    at = dict(
        records.db.execute("select group_id, settled_at from groups where reason = 'failed'").fetchall()
    )
    return [
        _failed(row, at[row.group_id], asked.count(row.group_id), tried.get(row.group_id, []))
        for row in groups(records, settled=[Settled.FAILED])
    ]


def _failed(row: GroupRow, at: float, asked: int, tried: list[int]) -> Failed:
    pending = asked > len(tried)
    match = _ATTEMPTS.fullmatch(row.note)
    if match is not None:
        index, attempts, stage, error = match.groups()
        return Failed(row, Kind(stage), int(index), int(attempts), error, at, pending, tried)
    if row.note.startswith(_FILTER):
        return Failed(row, Kind.FILTER, -1, 1, row.note.removeprefix(_FILTER), at, pending, tried)
    return Failed(row, None, -1, 0, row.note, at, pending, tried)


def find(records: Records, group_id: int) -> Failed:
    """One group in quarantine. Raises DataError where it is not there, and says where it is instead."""
    for one in failed(records):
        if one.row.group_id == group_id:
            return one
    row = group(records, group_id)
    state = "there is no such group" if row is None else f"it is {row.reason or 'in flight'}"
    raise DataError(
        f"{records.run_dir}: group {group_id} is not in quarantine: {state}; "
        f"`asyncrl quarantine ls {records.run_dir}` lists what is"
    )


# Again.


def ask_again(run_dir: Path, group_ids: Sequence[int]) -> bool:
    """Have these groups issued again, all or none; returns whether the run is live and takes them up now.

    Raises:
        DataError: a group is not in quarantine, was tried again already, or the run will issue nothing more.
        StorageError: a prompt's body is gone, or the request cannot be written.
    """
    with Records(run_dir) as records:
        _may_issue(records)
        problems, wanted = [], []
        for group_id in dict.fromkeys(group_ids):
            one = find(records, group_id)
            problem = _why_not(one)
            if problem:
                problems.append(f"{run_dir}: group {group_id} {problem}")
                continue
            (tokens,) = records.db.execute(
                "select prompt_tokens from groups where group_id = ?", (group_id,)
            ).fetchone()
            wanted.append(
                RetryRequest(
                    group_id=group_id,
                    num_tokens=tokens,
                    dataset=one.row.dataset,
                    prompt=records.body(one.row.prompt_body),
                    asked_at=time.time(),
                )
            )
    if problems:
        raise DataError(*problems)
    retries.ask(run_dir, wanted)
    return is_live(run_dir)


def _why_not(one: Failed) -> str:
    if one.row.lane != Lane.TRAIN:
        return "is of an evaluation, which is over; the next evaluation asks its prompt anyway"
    if one.pending:
        return "waits for its next try already"
    if one.tried_as:
        return f"was tried again as group {one.tried_as[-1]}; if that failed too, retry that one"
    return ""


def _may_issue(records: Records) -> None:
    meta = dict(records.db.execute("select key, value from meta").fetchall())
    plan = read_plan(records.run_dir)
    target = meta.get("target", plan.num_rollout)
    over = ""
    if records.imported:
        over = "it was imported"
    elif target is not None and len(records.batches()) >= int(target):
        over = f"all its {target} batches are cut"
    elif meta.get("source_ended"):
        over = "its data have ended, and the source is asked for nothing more"
    if over:
        raise DataError(
            f"{records.run_dir}: no group can be tried again: {over}. Start another run from its checkpoint."
        )


# The reward, here.


class Outcome(NamedTuple):
    """What user code made of recorded samples."""

    what: str
    """What was run, in words."""
    results: list[tuple[str, Score | Verdict | RewardFailure]]
    """By GROUP.SAMPLE, or by GROUP for a verdict."""


class _Job(NamedTuple):
    plan: Plan
    table: int
    """Of [[reward]]."""
    kind: Kind
    whole: bool
    """The reward takes the whole group."""
    samples: list[Sample]
    """Those to judge."""


def run_reward(
    run_dir: Path, group_id: int, index: int | None, *, here: bool, on_output: Callable[[str], None]
) -> Outcome:
    """Run the reward (or the filters) that a group failed in over what was recorded.

    Args:
        run_dir: the run.
        group_id: a group in quarantine.
        index: the sample; None: the one that failed, or all of them.
        here: in this process, without a deadline: what user code raises leaves this function as it is, and
            breakpoints work. Otherwise in a sandbox, as a reward worker runs it.
        on_output: gets what user code prints in the sandbox.

    Raises:
        DataError: the group is not in quarantine, or no reward was at fault.
        ConfigError: the reward cannot be loaded.
        StorageError: a body is gone.
    """
    job = _job(run_dir, group_id, index)
    spec = reward_spec(job.plan, job.table)
    what = f'reward "{spec.use}"' if job.kind is Kind.SCORE else "filters"
    results = asyncio.run(_here(job) if here else _sandboxed(job, on_output))
    if job.kind is Kind.FILTER:
        return Outcome(f"{what} of the run", [(str(group_id), results[0])])
    names = [f"{group_id}.{sample.index}" for sample in job.samples]
    chosen = [
        pair for pair in zip(names, results, strict=True) if index is None or pair[0].endswith(f".{index}")
    ]
    return Outcome(what, chosen)


def _job(run_dir: Path, group_id: int, index: int | None) -> _Job:
    plan = read_plan(run_dir)
    with Records(run_dir) as records:
        one = find(records, group_id)
        if one.stage not in {Kind.SCORE, Kind.FILTER}:
            raise DataError(
                f"{run_dir}: group {group_id} failed before a reward saw it: {one.error}; "
                f"`asyncrl story {run_dir} {group_id}` tells what happened"
            )
        table = _table(plan, records, group_id, one.stage)
        found = samples(records, one.row)
    if one.stage is Kind.FILTER:
        return _Job(plan, table, Kind.FILTER, whole=True, samples=found)
    whole = plan.topology.reward[table].group_rm and one.row.lane == Lane.TRAIN
    if index is None and one.sample >= 0:
        index = one.sample
    chosen = [sample for sample in found if whole or sample.index == index]
    if not chosen:
        raise ConfigError(f"{run_dir}: group {group_id} has no sample {index}; it has {len(found)}, from 0")
    return _Job(plan, table, Kind.SCORE, whole=whole, samples=[as_generated(sample) for sample in chosen])


def _table(plan: Plan, records: Records, group_id: int, kind: Kind) -> int:
    """The [[reward]] table of the worker that had the group last; the first for one that was attached."""
    rows = records.db.execute(
        "select worker from leases where group_id = ? and kind = ? order by fence desc limit 1",
        (group_id, str(kind)),
    ).fetchall()
    by_name = {process.name: process.index for process in plan.processes if process.role == "reward"}
    return (by_name.get(rows[0][0]) if rows else None) or 0


async def _sandboxed(job: _Job, on_output: Callable[[str], None]) -> list[Score | Verdict | RewardFailure]:
    table = job.plan.topology.reward[job.table]
    async with Sandbox(
        reward_spec(job.plan, job.table), timeout_s=table.timeout_s, name="quarantine", on_output=on_output
    ) as sandbox:
        if job.kind is Kind.FILTER:
            return [await sandbox.verdict(job.samples)]
        if job.whole:
            return list(await sandbox.score_group(job.samples))
        return list(await sandbox.score(job.samples))


async def _here(job: _Job) -> list[Score | Verdict | RewardFailure]:
    spec = reward_spec(job.plan, job.table)
    # As the sandbox's children find user code.
    sys.path += [path for path in spec.search_paths if path not in sys.path]
    judge, hooks = Judge(spec), spec.hook_samples(job.samples)
    if job.kind is Kind.FILTER:
        return [await judge.verdict(hooks)]
    values: list[Any] = (
        check_group(await judge.score_group(hooks), job.samples, spec=spec)
        if job.whole
        else [await judge.score(hook) for hook in hooks]
    )
    return [
        normalise(value, sample, hook, spec=spec)
        for value, sample, hook in zip(values, job.samples, hooks, strict=True)
    ]


def as_json(one: Failed) -> dict[str, Any]:
    """A group in quarantine as plain data."""
    return {
        "group_id": one.row.group_id,
        "lane": one.row.lane,
        "dataset": one.row.dataset,
        "stage": None if one.stage is None else str(one.stage),
        "sample": None if one.sample < 0 else one.sample,
        "attempts": one.attempts,
        "error": one.error,
        "settled_at": one.at,
        "samples": one.row.num_samples,
        "tokens": one.row.num_tokens,
        "retry_pending": one.pending,
        "tried_as": one.tried_as,
    }
