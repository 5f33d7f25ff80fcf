"""Talking to a live run from outside: find it, ask it, join it."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncrl.actor.base import SCHEMA, Actor
from asyncrl.errors import ConfigError, DataError, ExitCode, RunError, StalledError
from asyncrl.link import Key, connect, read_key
from asyncrl.messages.control import PROTOCOL
from asyncrl.messages.supervision import AttachReply, AttachRequest, FromSupervisor, Reply, StatusRequest
from asyncrl.run.rundir import is_live, newest_run, read_status
from asyncrl.topology.load import override
from asyncrl.topology.plan import Plan

ANSWER_S = 10.0
"""How long a run may take to answer a question."""
CHECK_S = 2.0
"""How often an attached process looks whether the run is still there."""
LEAVE_S = 30.0
"""How long an attached process may take to let go of its engine once its run is gone."""
LOST_AFTER = 3
"""Unanswered questions in a row after which the run counts as gone."""


class Place(NamedTuple):
    """Where a run is."""

    address: str
    """Of its supervisor; empty when it is not live."""
    path: Path | None
    """Its directory, where it is on this host."""


def find(address_or_run: str | None) -> Place:
    """A run by address or directory; None is the newest one below runs/. Raises DataError."""
    if address_or_run is None:
        path = newest_run(Path("runs"), live=True) or newest_run(Path("runs"), live=False)
        if path is None:
            raise DataError("no run below runs/; name an address (tcp://HOST:PORT) or a run directory")
        return find(str(path))
    if "://" in address_or_run:
        return Place(address_or_run, None)
    path = Path(address_or_run)
    status = read_status(path)
    return Place(status.address if is_live(path) else "", path)


async def ask(
    address: str, message: msgspec.Struct, *, key: Key | None, deadline_s: float = ANSWER_S
) -> msgspec.Struct:
    """One question to a supervisor. Raises StalledError when nobody answers."""
    link = connect(
        address, identity=f"cli.{uuid.uuid4().hex[:12]}".encode(), receives=FromSupervisor, security=key
    )
    try:
        async with asyncio.timeout(deadline_s):
            await link.send(message)
            answer: msgspec.Struct = (await link.recv()).message
            return answer
    except TimeoutError:
        raise StalledError(
            f"{address}: no answer in {deadline_s:.0f} s. Is the run live (asyncrl status RUN), is this the "
            "address it printed, and is --key the key file that it was started with?"
        ) from None
    finally:
        await link.close(linger_s=0)


def question(place: Place, message: msgspec.Struct, *, key: Path | None) -> Reply:
    """`ask`, from synchronous code, for an answer that is a Reply."""
    if not place.address:
        raise RunError(f"{place.path} is not live; see `asyncrl status {place.path}`")
    answer = asyncio.run(ask(place.address, message, key=read_key(key) if key else None))
    if not isinstance(answer, Reply):
        raise RunError(
            f"{place.address}: answered with {type(answer).__name__}; is it an asyncrl supervisor?"
        )
    return answer


async def attach(
    role: str,
    address: str,
    *,
    key_path: Path | None,
    name: str,
    overrides: list[str],
    on_joined: object = None,
) -> ExitCode:
    """Join a live run and work until it ends, until we are detached, or until Ctrl-C (which drains)."""
    key = read_key(key_path) if key_path else None
    request = AttachRequest(role=role, name=name, protocol=PROTOCOL, schema=SCHEMA, host=os.uname().nodename)
    reply = await ask(address, request, key=key)
    if not isinstance(reply, AttachReply) or reply.problem:
        raise ConfigError(f"{address}: {getattr(reply, 'problem', 'this is not an asyncrl supervisor')}")
    plan = _local_plan(msgspec.json.decode(reply.plan, type=Plan), key_path, overrides)
    actor = _make_actor(plan, role, reply, address)
    if callable(on_joined):
        on_joined(actor, reply)
    living = asyncio.create_task(actor.run())
    watching = asyncio.create_task(_watch(address, key))
    done, _ = await asyncio.wait([living, watching], return_when=asyncio.FIRST_COMPLETED)
    if living in done:
        watching.cancel()
        return living.result()
    living.cancel()
    # What does not end by then ends with this process: the run it worked for is gone either way.
    await asyncio.wait([living], timeout=LEAVE_S)
    watching.result()
    raise AssertionError("the watcher only ends by an error")


def _local_plan(plan: Plan, key_path: Path | None, overrides: list[str]) -> Plan:
    """The run's plan with what differs on this host."""
    topology = plan.topology
    if key_path is not None:
        topology = msgspec.structs.replace(
            topology, run=msgspec.structs.replace(topology.run, key=str(key_path))
        )
    if overrides:
        topology = override(topology, overrides, source="--set")
    return msgspec.structs.replace(plan, topology=topology)


def _make_actor(plan: Plan, role: str, reply: AttachReply, address: str) -> Actor:
    from asyncrl.actor.host import make_actors

    run_dir = Path(reply.run_dir)
    if not (run_dir / "plan.json").exists():
        run_dir = Path("asyncrl-attached") / reply.name
    attempt = run_dir / f"attached-{reply.name}"
    (attempt / "log").mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics").mkdir(exist_ok=True)
    (actor,) = make_actors(
        plan,
        reply.name,
        run_dir=run_dir,
        attempt_dir=attempt,
        incarnation=uuid.uuid4().hex[:12],
        control=address,
        buffer=reply.buffer_address,
        index=0,
        role=role,
    )
    return actor


async def _watch(address: str, key: Key | None) -> None:
    """Raises RunError once the run no longer answers."""
    missed = 0
    while True:
        await asyncio.sleep(CHECK_S)
        try:
            await ask(address, StatusRequest(), key=key, deadline_s=CHECK_S)
            missed = 0
        except StalledError:
            missed += 1
        if missed >= LOST_AFTER:
            raise RunError(f"{address}: the run no longer answers; what was handed in is safe with it")
