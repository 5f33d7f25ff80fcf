"""The doctor's report: one sentence, and below it everything it rests on. Text for people, JSON for machines.

RUN/doctor/DATE-TIME.txt  RUN/doctor/DATE-TIME.json
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from asyncrl.obs.causes import WAITS, cause, since_step
from asyncrl.obs.stacks import Stack, short
from asyncrl.obs.text import duration, size
from asyncrl.obs.vitals import Case, Desk, Facts, Member, Process

DIRECTORY = "doctor"
"""Below the run directory."""
NEWEST_MESSAGES = 6
"""Kinds of message that the text shows of each process; the JSON has all."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's docstring."""

    cause: str
    case: Case
    path: str = ""
    """Where its text lies; empty when it could not be written."""


def report_on(case: Case) -> Report:
    """Judge a case."""
    return Report(cause=cause(case), case=case)


def save(report: Report, directory: Path) -> Report:
    """Write both forms below a run directory; a disk that refuses costs the files, never the report."""
    stem = time.strftime("%Y%m%d-%H%M%S", time.gmtime(report.case.at))
    folder = directory / DIRECTORY
    number = 0
    while (folder / f"{stem}{f'-{number}' * bool(number)}.json").exists():
        number += 1
    path = folder / f"{stem}{f'-{number}' * bool(number)}.txt"
    saved = msgspec.structs.replace(report, path=str(path))
    try:
        folder.mkdir(exist_ok=True)
        path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(saved), indent=1))
        path.write_text(text(saved), encoding="utf-8")
    except OSError:
        # A full or broken disk is one of the things a doctor is called for.
        return report
    return saved


def text(report: Report) -> str:
    """The report for people; its first line is the cause."""
    return "\n".join([report.cause, "", *_lines(report.case)]) + "\n"


def _lines(case: Case) -> Iterator[str]:
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(case.at))
    how = f"{'live' if case.live else 'not live'}, {case.phase}, step {case.step}"
    yield f"{case.run}  {how}{since_step(case)}  ({at})"
    members = [*([case.supervisor] if case.supervisor is not None else []), *case.members]
    if members:
        yield from ("", "members")
    for member in members:
        yield f"  {_member(member)}"
    for desk in (m.facts.desk for m in members if m.facts is not None and m.facts.desk is not None):
        yield from ("", *_desk(desk))
    for member in members:
        yield from _details(member)
    if case.events:
        yield from ("", "last events", *(f"  {event}" for event in case.events))


def _member(member: Member) -> str:
    words = [f"{member.name:<16}{member.state:<11}"]
    words.append(f"pid {member.pid}" if member.pid else "")
    words.append(f"on {member.host}" if member.host and not member.local else "")
    facts = member.facts
    if facts is None:
        state = f" (state {member.process.state})" if member.process is not None else ""
        words.append(f"DOES NOT ANSWER{state}" if member.asked else f"not asked{state}")
        words.append(f"last heard {duration(member.heard_s)} ago" if member.heard_s is not None else "")
    else:
        words += _state(facts)
    words.append(f"restarted {member.restarts} times" if member.restarts else "")
    words.append(f'last words: "{member.last_words}"' if member.last_words else "")
    return "  ".join(word for word in words if word)


def _state(facts: Facts) -> Iterator[str]:
    waits = [f"{WAITS.get(w.name, w.name)} {duration(w.seconds)}" for w in facts.waits]
    yield f"waits for {', '.join(waits)}" if waits else "busy"
    if facts.side_waits:
        yield "beside it: " + ", ".join(f"{w.name} {duration(w.seconds)}" for w in facts.side_waits)
    if facts.capacity or facts.held:
        yield f"holds {facts.held} of {facts.capacity}"
    if facts.version is not None:
        yield f"version {facts.version}"
    if facts.announced is not None:
        yield f"told to load {facts.announced} {duration(facts.announced_s)} ago"
    yield f"lag {duration(facts.loop_lag_s)}"
    yield size(facts.rss_bytes)


def _desk(desk: Desk) -> Iterator[str]:
    states = ", ".join(f"{count} {state}" for state, count in desk.counts.items())
    yield "buffer"
    yield f"  samples    {states}"
    used = f"{desk.tickets_used} of {desk.tickets_total} used"
    yield f"  tickets    {used}, {desk.outstanding} groups outstanding"
    goal = f" of {desk.target}" if desk.target is not None else ""
    ended = ", the data have ended" if desk.source_ended else ""
    yield f"  batches    {desk.next_batch} cut, {desk.num_trained} trained{goal}{ended}"
    yield f"  refused    {desk.refused} groups since the last batch"
    yield f"  versions   {desk.published} published, {desk.announced} announced"
    full = " (too little: nothing is given out)" if desk.low_on_disk else ""
    yield f"  disk       {size(desk.free_bytes)} free, {size(desk.min_free_bytes)} wanted{full}"
    for worker in desk.workers:
        credit = ", ".join(f"{count} {kind}" for kind, count in worker.credit.items()) or "none"
        oldest = f", the oldest {duration(worker.oldest_lease_s)}" if worker.leases else ""
        yield (
            f"  {worker.name:<16} heard {duration(worker.silent_s)} ago, credit {credit} "
            f"({size(worker.credit_bytes)}), {worker.leases} leases{oldest}"
        )


def _details(member: Member) -> Iterator[str]:
    facts = member.facts
    if facts is not None:
        yield from ("", f"{member.name} (pid {member.pid})")
        queues = [f"{name} {count}" for name, count in facts.queues.items()]
        queues += [
            f"{name} link {link.get('queued', 0)} of {link.get('max_queued', 0)}"
            for name, link in facts.links.items()
        ]
        yield f"  queues     {', '.join(queues) or 'none'}"
        newest = facts.spoken[:NEWEST_MESSAGES]
        said = [f"{m.way} {m.kind} {duration(m.age_s)} ago ({m.count})" for m in newest]
        yield f"  messages   {', '.join(said) or 'none'}"
        gauges = [f"{name} {value:g}" for name, value in facts.gauges.items() if value]
        if gauges:
            yield f"  gauges     {', '.join(gauges)}"
        yield from _stacks(facts.stacks)
    elif member.process is not None and member.process.stacks:
        yield from ("", f"{member.name} (pid {member.pid}), by signal")
        yield from _stacks(member.process.stacks)
    for child in member.children:
        yield from _child(member, child)


def _child(member: Member, child: Process) -> Iterator[str]:
    how = f"({child.command}), state {child.state}, {size(child.rss_bytes)}"
    yield f"  child {child.pid} of {member.name} {how}"
    yield from _stacks(child.stacks)


def _stacks(stacks: list[Stack]) -> Iterator[str]:
    for stack in stacks:
        yield f"  {stack.kind} {stack.name}"
        for frame in stack.frames:
            yield f"    {frame.function}  {short(frame.file)}:{frame.line}"
