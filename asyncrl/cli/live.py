"""Commands about live runs: `attach`, `detach`, `status`; and `keys`, which lets them cross hosts."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from asyncrl.actor.base import Actor
from asyncrl.errors import ExitCode
from asyncrl.link import make_key
from asyncrl.messages.supervision import AttachReply, DetachRequest, StatusRequest
from asyncrl.obs import log
from asyncrl.obs.stacks import answering
from asyncrl.obs.text import duration, short
from asyncrl.run.overview import overview
from asyncrl.run.remote import Place, find, question
from asyncrl.run.remote import attach as join
from asyncrl.run.rundir import read_status

SHOWN = (
    "steps", "versions", "evaluations", "samples", "leases", "tokens", "lengths", "dropped", "quarantine",
    "deaths",
)  # fmt: skip
"""Facts that `status` shows a line of, in order."""


def attach(role: str, address: str, *, key: Path | None, name: str | None, overrides: list[str]) -> int:
    """Work for a live run until it ends, Ctrl-C (drains) or `asyncrl detach`."""
    import uvloop

    place = find(address)
    if not place.address:
        Console(stderr=True).print(
            f"asyncrl: {place.path} is not live; nothing to attach to", highlight=False
        )
        return int(ExitCode.FAILED)
    console = Console(highlight=False)

    def joined(actor: Actor, reply: AttachReply) -> None:
        console.print(
            f"attached as {reply.name} to {place.address}; Ctrl-C hands work back and leaves", soft_wrap=True
        )
        loop = asyncio.get_running_loop()
        leaving: set[asyncio.Task[None]] = set()

        def leave() -> None:
            actor.state = "draining"
            leaving.add(loop.create_task(actor.drain()))

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, leave)

    logging = log.configure(
        actor=name or role, run_dir=None, console="pretty" if sys.stderr.isatty() else "plain"
    )
    try:
        joining = join(
            role, place.address, key_path=key, name=name or "", overrides=overrides, on_joined=joined
        )
        with answering():
            code = uvloop.run(joining)
    finally:
        logging.close()
    console.print("left the run" if code is ExitCode.DRAINED else "the run has ended")
    return int(ExitCode.FINISHED)


def detach(name: str, *, run: str | None, drain: bool, key: Path | None) -> int:
    """Ask a member to leave; returns once the supervisor has passed it on."""
    reply = question(find(run), DetachRequest(name=name, drain=drain), key=key)
    Console(stderr=not reply.ok, highlight=False).print(reply.text if reply.ok else f"asyncrl: {reply.text}")
    return int(ExitCode.FINISHED if reply.ok else ExitCode.FAILED)


def status(run: str | None, *, as_json: bool, key: Path | None) -> int:
    """Print how a run stands."""
    place = find(run)
    facts = _facts(place, key)
    # Where the output is no terminal nobody says how wide it is, and a cut table helps nobody.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if as_json:
        console.out(msgspec.json.format(msgspec.json.encode(facts), indent=1).decode(), highlight=False)
    else:
        _show(facts, console)
    return int(ExitCode.FINISHED)


def _facts(place: Place, key: Path | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"run": str(place.path or place.address), "live": bool(place.address)}
    if place.path is not None:
        facts["status"] = msgspec.to_builtins(read_status(place.path))
        facts |= overview(place.path)
    if place.address:
        facts |= msgspec.json.decode(question(place, StatusRequest(), key=key).data)
    return facts


def _show(facts: dict[str, Any], console: Console) -> None:
    state = facts.get("status", {})
    phase = facts.get("phase") or state.get("phase", "?")
    console.print(f"{facts['run']}  {'live, ' if facts['live'] else ''}{phase}", style="bold")
    if state.get("detail"):
        console.print(f"  {state['detail']}", soft_wrap=True)
    if state.get("address") and facts["live"]:
        console.print(f"  attach with: asyncrl attach generator {state['address']}", soft_wrap=True)
    for title in SHOWN:
        if facts.get(title):
            console.print(f"  {title:<12}{facts[title]}", soft_wrap=True)
    if facts.get("members"):
        console.print(_members(facts["members"]))
        for member in facts["members"]:
            for words in filter(None, (member["why"], (member.get("report") or {}).get("problem"))):
                console.print(f"  {member['name']}: {words}", style="yellow", soft_wrap=True, markup=False)


def _members(members: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("  member", "state", "version", "tokens", "waits for", "pid", "restarts"):
        table.add_column(heading, no_wrap=True)
    for member in members:
        report = member.get("report") or {}
        waits = report.get("waits_for") or ""
        since = f" {duration(report.get('waits_for_s') or 0.0)}" if waits else ""
        version = report.get("version")
        table.add_row(
            f"  {member['name']}", _state(member), "" if version is None else str(version),
            short(report.get("generated_tokens") or 0), f"{waits}{since}", str(member["pid"] or ""),
            _restarts(member),
        )  # fmt: skip
    return table


def _restarts(member: dict[str, Any]) -> str:
    """How often it was started again, and what its lives died of."""
    deaths = ", ".join(f"{count} {reason}" for reason, count in sorted(member["deaths"].items()))
    return f"{member['restarts']} ({deaths})" if deaths else str(member["restarts"])


def _state(member: dict[str, Any]) -> str:
    """Attached members are marked; the evaluator shares the source's process and is none of its own."""
    attached = member.get("attached") and member["role"] != "evaluator"
    words = [str(member["state"]), "leaving" if member["leaving"] else "", "attached" if attached else ""]
    return ", ".join(filter(None, words))


def keys(path: Path) -> int:
    """Write a key file that lets processes of other hosts join."""
    make_key(path)
    Console(highlight=False).print(
        f'{path}: made. Set run.key = "{path}" in the topology, copy the file to the other hosts safely, '
        f"and attach with --key {path}. Whoever has the file is a member of the run.",
        soft_wrap=True,
    )
    return int(ExitCode.FINISHED)
