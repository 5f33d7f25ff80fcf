"""Orders: which there can be, when they fire, and what they do to messages, files, clocks and processes."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.chaos import ORDERS, Life, Order, begin_life, check, read_journal, tapped_client, tapped_server
from asyncrl.chaos.detour import Detour
from asyncrl.errors import ConfigError, RunError
from asyncrl.link import ClientLink, Hub, ServerLink, bind, connect
from asyncrl.messages.control import (
    Ack,
    Acks,
    FromBuffer,
    Heartbeat,
    Kind,
    Lease,
    Leases,
    Need,
    Report,
    Reports,
    ToBuffer,
    Want,
)
from asyncrl.messages.parts import GroupParts
from asyncrl.messages.sample import Lane, Status
from asyncrl.topology.plan import Plan
from tests.support.topologies import compiled

DEADLINE_S = 10.0
ROOT = Path(__file__).parents[2]
GENERATORS = '[[generator]]\nname = "generator"\nreplicas = 2'


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compiled(tables=GENERATORS)


def beat(number: int) -> Heartbeat:
    return Heartbeat(version=number)


def numbers(*messages: Any) -> list[int]:
    return [message.version for message in messages]


def life(place: Path, *orders: Order, name: str = "generator-0") -> Life:
    return Life(name, orders=orders, run_dir=place, incarnation="abc")


def order(at: str, action: str, **fields: Any) -> Order:
    return Order(**{"actor": "generator-0", "at": at, "action": action} | fields)


# Which orders there can be.


def problem(plan: Plan, *, in_process: bool = False, **fields: Any) -> str:
    """Why an order is refused; empty when it is not."""
    wanted = Order(**{"actor": "generator-0", "at": "send:Reports", "action": "kill"} | fields)
    try:
        check([wanted], plan, source="orders.json", in_process=in_process)
    except ConfigError as error:
        return str(error)
    return ""


GOOD: list[dict[str, Any]] = [
    {},
    {"at": "received:Leases", "where": {"kind": "generate"}, "action": "stop", "nth": 3, "life": 2},
    {"at": "start", "action": "exit"},
    {"actor": "supervisor", "at": "receive:Telemetry", "peer": "trainer", "action": "freeze", "seconds": 1.0},
    {"actor": "trainer", "at": "file:os.rename:*/.step-*.tmp", "action": "errno:ENOSPC", "count": 3},
    {"actor": "buffer", "at": "send:Acks", "action": "delay", "seconds": 0.5, "count": 9},
    {"actor": "buffer", "at": "sent:Telemetry", "action": "cut"},
    {"actor": "attached-reward-0", "at": "send:Scores", "action": "duplicate"},
    {"actor": "reward", "at": "send:Hello", "action": "clock", "seconds": -3600.0},
    {"actor": "trainer", "at": "send:Published", "where": {"manifest.version": 3}, "action": "swap"},
]
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"actor": "generator-7"},
        "nobody of this run is called that; allowed: buffer, generator-0, generator-1",
    ),
    ({"at": "send:Rapports"}, 'generator never sends "Rapports"; it sends '),
    ({"at": "send:Leases"}, 'generator never sends "Leases"'),
    ({"at": "before:Reports"}, "no such moment; allowed: start, send:"),
    ({"at": "file:os.rename:*.tmp", "action": "drop"}, '"drop" cannot be done there; allowed: kill, stop'),
    ({"at": "sent:Reports", "action": "delay", "seconds": 1.0}, '"delay" cannot be done there'),
    ({"at": "send:Reports", "action": "errno:ENOSPC"}, '"errno:ENOSPC" cannot be done there'),
    ({"at": "file:open:*", "action": "errno:EWHAT"}, "allowed: kill, stop, freeze, clock, exit, errno:NAME"),
    ({"at": "file:os.frobnicate:*"}, "no audit event about a file; allowed: open, os.rename"),
    ({"at": "file:open:"}, "write file:EVENT:GLOB"),
    ({"actor": "buffer", "at": "send:Acks", "action": "cut"}, '"cut" cannot be done there'),
    ({"nth": 0}, "nth 0"),
    ({"count": 2}, '"kill" happens once'),
    ({"action": "freeze"}, "seconds 0"),
    ({"action": "drop", "seconds": 3.0}, "seconds 3"),
    ({"action": "delay", "seconds": -3.0}, "only a clock goes back"),
    ({"peer": "trainer"}, "leave it out"),
    ({"at": "start", "where": {"kind": "score"}}, "only messages have fields"),
    ({"where": {"stauts": "pending"}}, "Reports has no stauts; it has fence"),
]


@pytest.mark.parametrize("fields", GOOD)
def test_an_order_that_can_be_carried_out_is_taken(plan: Plan, fields: dict[str, Any]) -> None:
    assert not problem(plan, **fields)


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_an_order_that_cannot_happen_is_refused_with_why(
    plan: Plan, fields: dict[str, Any], words: str
) -> None:
    said = problem(plan, **fields)
    assert said.startswith('orders.json: order 0 ("')
    assert words in said


@pytest.mark.parametrize("action", ["kill", "stop", "freeze", "clock"])
def test_nothing_is_done_to_a_process_that_all_actors_share(plan: Plan, action: str) -> None:
    seconds = 1.0 if action in {"freeze", "clock"} else 0.0
    assert not problem(plan, action=action, seconds=seconds)
    assert "launch without --in-process" in problem(plan, action=action, seconds=seconds, in_process=True)
    assert "for processes" in problem(plan, at="file:open:*", action="exit", in_process=True)
    assert not problem(plan, action="exit", in_process=True)


def test_a_file_of_orders_is_read_only_where_the_environment_names_one(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ORDERS, raising=False)
    assert begin_life("trainer", plan=plan, run_dir=tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "orders.json"
    monkeypatch.setenv(ORDERS, str(file))
    for text in (None, b"{}", b'[{"actor": "trainer", "at": "start", "action": "kill", "nht": 2}]'):
        if text is not None:
            file.write_bytes(text)
        with pytest.raises(ConfigError, match=r"orders\.json: no list of orders"):
            begin_life("trainer", plan=plan, run_dir=tmp_path)
    file.write_bytes(msgspec.json.encode([order("send:Leases", "drop")]))
    with pytest.raises(ConfigError, match="generator never sends"):
        begin_life("trainer", plan=plan, run_dir=tmp_path)
    file.write_bytes(msgspec.json.encode([order("send:Reports", "drop")]))
    assert begin_life("trainer", plan=plan, run_dir=tmp_path) is not None
    assert [line["born"] for line in read_journal(tmp_path)] == ["trainer"]


# When they fire.


def fired(one: Life, kind: str, *messages: Any, peer: bytes = b"") -> list[bool]:
    return [one.at(kind, message, peer) is not None for message in messages]


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.booleans(), max_size=12))
def test_an_order_fires_at_the_nth_matching_moment_and_so_often_in_a_row(
    tmp_path_factory: pytest.TempPathFactory, nth: int, count: int, matching: list[bool]
) -> None:
    place = tmp_path_factory.mktemp("run")
    here = life(place, order("send:Heartbeat", "drop", nth=nth, count=count, where={"version": 1}))
    at = [number for number, match in enumerate(matching) if match][nth - 1 : nth - 1 + count]
    got = fired(here, "send", *(beat(int(match)) for match in matching))
    assert [number for number, hit in enumerate(got) if hit] == at
    assert sum("order" in line for line in read_journal(place)) == len(at)


def test_an_order_fires_once_in_a_run_and_only_in_its_life(tmp_path: Path) -> None:
    orders = [order("send:Heartbeat", "drop"), order("send:Heartbeat", "duplicate", life=3)]
    seen = []
    for _ in range(4):
        here = life(tmp_path, *orders)
        found = [here.at("send", beat(0)) for _ in range(2)]
        seen.append([item.action for item in found if item is not None])
    assert seen == [["drop"], [], ["duplicate"], []]
    lines = read_journal(tmp_path)
    assert [line["life"] for line in lines if "born" in line] == [1, 2, 3, 4]
    (first, second) = [line for line in lines if "order" in line]
    assert (first["order"], first["life"], second["order"], second["life"]) == (0, 1, 1, 3)
    assert first["actor"] == "generator-0"
    assert first["moment"] == "send:Heartbeat"
    assert first["pid"] == os.getpid()
    assert "Heartbeat(" in first["message"]


def test_orders_of_others_and_of_other_moments_do_nothing(tmp_path: Path) -> None:
    orders = [order("send:Heartbeat", "drop", actor="generator-1"), order("receive:Heartbeat", "drop")]
    here = life(tmp_path, *orders)
    assert fired(here, "send", beat(0), Want(kind=Kind.TRAIN, samples=1)) == [False, False]


def test_two_orders_about_one_message_take_turns(tmp_path: Path) -> None:
    here = life(tmp_path, order("send:Heartbeat", "drop"), order("send:Heartbeat", "duplicate"))
    found = [here.at("send", beat(0)) for _ in range(3)]
    assert [item and item.action for item in found] == ["drop", "duplicate", None]
    here = life(
        tmp_path / "counted",
        order("send:Heartbeat", "drop", count=2),
        order("send:Heartbeat", "duplicate", nth=3),
    )
    found = [here.at("send", beat(0)) for _ in range(4)]
    assert [item and item.action for item in found] == ["drop", "drop", "duplicate", None]


def test_a_message_is_known_by_its_fields_or_by_those_of_one_element(tmp_path: Path) -> None:
    def report(fence: int, status: Status) -> Report:
        return Report(fence=fence, group_id=0, index=0, status=status, offset=0)

    wanted = order("send:Reports", "drop", where={"status": "pending", "fence": 2}, count=9)
    here = life(tmp_path, wanted)
    mixed = Reports(reports=[report(1, Status.PENDING), report(2, Status.COMPLETED)])
    right = Reports(reports=[report(1, Status.COMPLETED), report(2, Status.PENDING)])
    assert fired(here, "send", mixed, right, Reports(reports=[])) == [False, True, False]
    parts = GroupParts(group_id=7, indices=[], statuses=[], segments=[])
    leased = Leases(leases=[Lease(fence=1, kind=Kind.SCORE, parts=parts)])
    for where, expected in (
        ({"kind": "score"}, True),
        ({"kind": "generate"}, False),
        ({"kind": "score", "parts.group_id": 7}, True),
        ({"kind": "score", "parts.group_id": 8}, False),
    ):
        place = tmp_path / str(where)
        assert fired(life(place, order("receive:Leases", "drop", where=where)), "receive", leased) == [
            expected
        ]


def test_a_server_tells_its_peers_apart(tmp_path: Path) -> None:
    here = life(
        tmp_path, order("send:Acks", "drop", actor="buffer", peer="generator-1", count=9), name="buffer"
    )
    acks = Acks(acks=[Ack(1, 2, 3, 4, accepted=True)])
    for peer, expected in ((b"generator-1.f00", True), (b"generator-10.f00", False), (b"generator-1", True)):
        assert fired(here, "send", acks, peer=peer) == [expected]


def test_exit_raises_out_of_the_call_once(tmp_path: Path) -> None:
    here = life(tmp_path, order("received:Leases", "exit"))
    with pytest.raises(RunError, match="generator-0: ordered to fail at received:Leases"):
        here.at("received", Leases(leases=[]))
    assert here.at("received", Leases(leases=[])) is None


# What happens to messages.


@asynccontextmanager
async def talk(
    place: Path, *orders: Order, scheme: str = "memory"
) -> AsyncIterator[tuple[ServerLink, ClientLink]]:
    """A desk and a generator under orders, which have met."""
    hub = Hub()
    address = {"memory": "memory://desk", "tcp": "tcp://127.0.0.1:0"}[scheme]
    server = tapped_server(bind(address, receives=ToBuffer, hub=hub), life(place, *orders, name="buffer"))
    dial = functools.partial(
        connect, server.address, identity=b"generator-0.abc", receives=FromBuffer, hub=hub
    )
    client = tapped_client(dial, life(place, *orders))
    async with asyncio.timeout(DEADLINE_S):
        await client.send(Want(kind=Kind.GENERATE, samples=1))
        await server.recv()
        yield server, client
        await client.close(linger_s=0)
        await server.close(linger_s=0)


WAYS = {
    "out of a client": ("generator-0", "send", False),
    "into a server": ("buffer", "receive", False),
    "out of a server": ("buffer", "send", True),
    "into a client": ("generator-0", "receive", True),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[str, str, bool]:
    """(actor, moment, whether the server speaks): the four places where a message can be rerouted."""
    return WAYS[request.param]


async def arrivals(
    place: Path, way: tuple[str, str, bool], action: str, *, say: int, expect: int, **fields: Any
) -> list[int]:
    """What comes at the other end when this many numbered messages are said, the third under an order."""
    actor, moment, from_server = way
    ordered = Order(
        actor=actor, at=f"{moment}:{'Need' if from_server else 'Heartbeat'}", action=action, nth=3, **fields
    )
    got = []
    async with talk(place, ordered) as (server, client):
        for number in range(say):
            if from_server:
                await server.send(b"generator-0.abc", Need(lane=Lane.TRAIN, version=number), [b"%d" % number])
            else:
                await client.send(beat(number), [b"%d" % number])
        for _ in range(expect):
            delivery = await (client if from_server else server).recv()
            assert delivery.frames == [b"%d" % delivery.message.version]
            got.append(delivery.message.version)
        assert not await more(client if from_server else server)
    return got


async def more(link: ServerLink | ClientLink) -> bool:
    """Whether anything further is there."""
    waiting = asyncio.ensure_future(link.recv())
    for _ in range(5):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    return not waiting.cancelled()


async def test_dropped(tmp_path: Path, way: tuple[str, str, bool]) -> None:
    assert await arrivals(tmp_path, way, "drop", say=6, expect=4, count=2) == [0, 1, 4, 5]


async def test_duplicated(tmp_path: Path, way: tuple[str, str, bool]) -> None:
    assert await arrivals(tmp_path, way, "duplicate", say=5, expect=7, count=2) == [0, 1, 2, 2, 3, 3, 4]


async def test_swapped_with_the_next(tmp_path: Path, way: tuple[str, str, bool]) -> None:
    assert await arrivals(tmp_path, way, "swap", say=5, expect=5, seconds=60.0) == [0, 1, 3, 2, 4]


async def test_swapped_with_nothing_it_comes_by_itself(tmp_path: Path, way: tuple[str, str, bool]) -> None:
    assert await arrivals(tmp_path, way, "swap", say=3, expect=3, seconds=0.05) == [0, 1, 2]


async def test_delayed_while_others_overtake(tmp_path: Path, way: tuple[str, str, bool]) -> None:
    got = await arrivals(tmp_path, way, "delay", say=6, expect=6, seconds=0.05, count=2)
    assert got == [0, 1, 4, 5, 2, 3]


async def test_what_was_swapped_does_not_come_once_more() -> None:
    came: list[int] = []
    detour = Detour[int](lambda _, item: came.append(item))
    swap = order("send:Heartbeat", "swap", seconds=60.0)
    assert [detour.route(swap, b"a", 1), detour.route(None, b"b", 2), detour.pending] == [[], [2], True]
    assert [detour.route(None, b"a", 3), detour.pending, came] == [[3, 1], False, []]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["say", "cancel", "recv"]), max_size=30))
def test_a_cancelled_recv_loses_nothing_while_messages_are_on_a_detour(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    """Fails where `recv` lets its receive be cancelled with it, or takes a message and then waits."""

    async def scenario() -> tuple[int, list[int]]:
        place = tmp_path_factory.mktemp("run")
        orders = [
            order("receive:Need", "delay", actor="generator-0", nth=nth, seconds=0.001, count=2)
            for nth in (1, 5)
        ]
        said, got = 0, []
        async with talk(place, *orders, order("receive:Need", "swap", nth=3)) as (server, client):
            for step in steps:
                if step == "say":
                    await server.send(b"generator-0.abc", Need(lane=Lane.TRAIN, version=said))
                    said += 1
                elif step == "cancel" or len(got) < said:
                    waiting = asyncio.ensure_future(client.recv())
                    for _ in range(len(got) % 3):
                        await asyncio.sleep(0)
                    waiting.cancel()
                    await asyncio.wait([waiting])
                    if not waiting.cancelled():
                        got.append(waiting.result().message.version)
            while len(got) < said:
                got.append((await client.recv()).message.version)
        return said, got

    said, got = asyncio.run(scenario())
    assert sorted(got) == list(range(said))


async def test_what_is_delayed_reaches_one_who_waits_already(tmp_path: Path) -> None:
    async with talk(tmp_path, order("receive:Need", "delay", seconds=0.02)) as (server, client):
        waiting = asyncio.ensure_future(client.recv())
        await server.send(b"generator-0.abc", Need(lane=Lane.TRAIN, version=1))
        assert (await waiting).message.version == 1


@pytest.mark.parametrize("scheme", ["memory", "tcp"])
async def test_closing_ends_who_waits_and_loses_what_is_under_way(tmp_path: Path, scheme: str) -> None:
    orders = [order("send:Heartbeat", "delay", seconds=60.0), order("receive:Need", "delay", seconds=60.0)]
    async with talk(tmp_path, *orders, scheme=scheme) as (server, client):
        await client.send(beat(1))
        await server.send(b"generator-0.abc", Need(lane=Lane.TRAIN))
        waiting = asyncio.ensure_future(client.recv())
        await asyncio.wait([waiting], timeout=0.1)
        assert not waiting.done()
        await client.close(linger_s=0)
        with pytest.raises(RunError, match="closed"):
            await waiting


@pytest.mark.parametrize("moment", ["send", "sent"])
@pytest.mark.parametrize("scheme", ["memory", "tcp"])
async def test_a_cut_is_counted_and_the_conversation_goes_on(
    tmp_path: Path, scheme: str, moment: str
) -> None:
    async with talk(tmp_path, order(f"{moment}:Heartbeat", "cut"), scheme=scheme) as (server, client):
        waiting = asyncio.ensure_future(client.recv())
        await asyncio.sleep(0)
        assert client.cuts == 0
        await client.send(beat(1))
        assert client.cuts == 1
        if moment == "send":
            assert (await server.recv()).message == beat(1)
        await client.send(beat(2))
        while (await server.recv()).message != beat(2):
            pass
        await server.send(b"generator-0.abc", Need(lane=Lane.TRAIN, version=7))
        assert (await waiting).message.version == 7


async def test_a_message_is_lost_with_its_connection(tmp_path: Path) -> None:
    orders = [order("send:Heartbeat", action, where={"version": 1}) for action in ("drop", "cut")]
    async with talk(tmp_path, *orders, scheme="tcp") as (server, client):
        for number in (1, 2):
            await client.send(beat(number))
        assert client.cuts == 1
        assert (await server.recv()).message == beat(2)
        assert not await more(server)


async def test_a_connection_that_was_cut_is_closed_before_the_next_one_is_dialled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when both are open at once: a ROUTER that meets the dead one last never hears the live one."""
    hub = Hub()
    server = bind("tcp://127.0.0.1:0", receives=ToBuffer, hub=hub)
    alive: set[ClientLink] = set()
    beside: list[int] = []

    def dial() -> ClientLink:
        link = connect(server.address, identity=b"generator-0.abc", receives=FromBuffer, hub=hub)
        close = link.close

        async def closed(*, linger_s: float = 1.0) -> None:
            await close(linger_s=linger_s)
            alive.discard(link)

        monkeypatch.setattr(link, "close", closed)
        beside.append(len(alive))
        alive.add(link)
        return link

    client = tapped_client(dial, life(tmp_path, order("send:Heartbeat", "cut")))
    async with asyncio.timeout(DEADLINE_S):
        await client.send(beat(1))
        assert (await server.recv()).message == beat(1)
        await client.close(linger_s=0)
        await server.close(linger_s=0)
    assert (beside, alive) == ([0, 0], set())


async def test_moments_come_in_their_order(tmp_path: Path) -> None:
    moments = ["send:Heartbeat", "sent:Heartbeat", "receive:Need", "received:Need"]
    orders = [order(at, "freeze", seconds=1e-9) for at in moments]
    async with talk(tmp_path, *orders) as (server, client):

        def so_far() -> list[str]:
            return [line["moment"] for line in read_journal(tmp_path) if "order" in line]

        await client.send(beat(1))
        assert so_far() == moments[:2]
        await server.send(b"generator-0.abc", Need(lane=Lane.TRAIN))
        await client.recv()
        assert so_far() == moments[:3], "it is handled only when the next one is asked for"
        assert not await more(client)
        assert so_far() == moments


# What happens to processes.

CHILD = """
import sys, time
from pathlib import Path
import msgspec
from asyncrl.chaos import Life, Order
from asyncrl.messages.control import Heartbeat
here = Path(sys.argv[1])
life = Life("a", orders=msgspec.json.decode(sys.argv[2], type=list[Order]), run_dir=here, incarnation="i")
print("begun", flush=True)
{work}
print("ended", flush=True)
"""


def child(place: Path, work: str, **fields: Any) -> subprocess.Popen[str]:
    """A process whose only actor is under one order."""
    code = CHILD.format(work=work)
    orders = msgspec.json.encode([Order(**{"actor": "a"} | fields)]).decode()
    return subprocess.Popen(
        [sys.executable, "-c", code, str(place), orders],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.split(), err


def test_kill_at_a_message_ends_the_process_there(tmp_path: Path) -> None:
    code, out, _ = finish(child(tmp_path, 'life.at("send", Heartbeat())', at="send:Heartbeat", action="kill"))
    assert (code, out) == (-signal.SIGKILL, ["begun"])
    assert [line.get("order") for line in read_journal(tmp_path)] == [None, 0]


def test_kill_at_the_start_ends_the_process_before_anything_else(tmp_path: Path) -> None:
    assert finish(child(tmp_path, "", at="start", action="kill"))[:2] == (-signal.SIGKILL, [])
    assert finish(child(tmp_path, "", at="start", action="kill"))[:2] == (0, ["begun", "ended"]), "once"


def test_stop_at_a_file_stops_before_it_is_done_until_continued(tmp_path: Path) -> None:
    work = '(here / ".a.tmp").write_text("1"); (here / ".a.tmp").rename(here / "a")'
    process = child(tmp_path, work, at="file:os.rename:*/.a.tmp", action="stop")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert (tmp_path / ".a.tmp").exists()
    assert not (tmp_path / "a").exists()
    assert read_journal(tmp_path)[-1]["message"] == str(tmp_path / ".a.tmp")
    os.kill(process.pid, signal.SIGCONT)
    assert finish(process)[:2] == (0, ["begun", "ended"])
    assert (tmp_path / "a").exists()


def test_errno_fails_so_many_matching_accesses(tmp_path: Path) -> None:
    work = """
for name in ("b", "a1", "a2", "a3"):
    try:
        (here / name).write_text(name)
    except OSError as error:
        print(name, error.errno, flush=True)
"""
    process = child(tmp_path, work, at="file:open:*/a*", action="errno:ENOSPC", count=2)
    assert finish(process)[1] == ["begun", "a1", "28", "a2", "28", "ended"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a3", "b", "orders.jsonl"]


def test_exit_at_a_file_is_an_error_out_of_the_call(tmp_path: Path) -> None:
    process = child(tmp_path, '(here / "d").mkdir()', at="file:os.mkdir:*/d", action="exit")
    code, out, err = finish(process)
    assert (code, out) == (1, ["begun"])
    assert "RunError: a: ordered to fail at file:os.mkdir:*/d" in err
    assert not (tmp_path / "d").exists()


def test_a_clock_jumps_for_the_process_and_not_for_the_journal(tmp_path: Path) -> None:
    work = 'life.at("send", Heartbeat()); print(time.time(), flush=True)'
    process = child(tmp_path, work, at="send:Heartbeat", action="clock", seconds=-3600.0)
    _, (_, there, _), _ = finish(process)
    assert float(there) + 3600.0 == pytest.approx(time.time(), abs=60.0)
    assert read_journal(tmp_path)[-1]["time"] == pytest.approx(time.time(), abs=60.0)


def test_freeze_holds_the_thread_up(tmp_path: Path) -> None:
    work = 'began = time.monotonic(); life.at("send", Heartbeat()); print(time.monotonic() - began)'
    process = child(tmp_path, work, at="send:Heartbeat", action="freeze", seconds=0.3)
    assert float(finish(process)[1][1]) >= 0.3
