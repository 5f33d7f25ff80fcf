"""The desk and the supervisor's reception under a storm on their sockets, while honest peers work.

Real ROUTER sockets, the buffer's real role with its real store; the honest peers are the scripts of the
ledger's tests. They do a whole run while strangers and members gone mad throw rubbish: it has to end, and to
close.

Guards that these tests were seen to fail without: `gate.check`, the roles and identities of
`Door.welcome`, `updates_of`, the bounds of `messages.numbers`, `Complaints`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
import structlog
import zmq

from asyncrl.actor.base import SCHEMA, Context
from asyncrl.actor.supervisor import Supervisor
from asyncrl.buffer.audit import audit
from asyncrl.link import Limits, ServerLink, bind, connect
from asyncrl.link.screen import _MAX_REMEMBERED_PEERS
from asyncrl.messages import control, supervision
from asyncrl.messages.codec import encode
from asyncrl.messages.control import Kind, Report
from asyncrl.messages.parts import encode_body
from asyncrl.messages.sample import Lane, Prompt, Segment, Span, Status, pack_logprobs, pack_tokens
from asyncrl.messages.version import Manifest
from asyncrl.obs.view import MemberUpdate
from asyncrl.roles.buffer import BufferRole
from tests.desk import make_plan
from tests.support.storm import Storm, rss_bytes, share
from tests.unit.ledger_cast import Generator, Peer, Reward, Source, Trainer

DEADLINE_S = 30.0
"""For anything an honest peer waits for."""
GROWTH_BYTES = 48 << 20
STEPS = 6
CROWD = 24
"""Attackers connected at once."""
AHEAD = 4000
"""Messages that the attackers are ahead of their victim. ZeroMQ serves connections in turn, and thousands of
dead ones with a backlog would only measure how long that takes."""
LIFE = 40
"""Messages of one attacker; then it comes back as somebody else."""


class Attack:
    """Attackers on a thread of their own: dial, sometimes say a proper hello, throw, come back as another."""

    def __init__(
        self, address: str, storm: Storm, *, count: int, hello: Callable[[str], Any], victim: ServerLink
    ) -> None:
        self.sent = 0
        self._victim = victim
        self._address, self._storm, self._count, self._hello = address, storm, count, hello
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attack")
        self._lives = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def over(self) -> bool:
        """Whether every message was thrown."""
        return self.sent >= self._count

    def _run(self) -> None:
        context = zmq.Context()
        crowd = [self._dial(context) for _ in range(CROWD)]
        try:
            while not self.over and not self._stop.is_set():
                which = self._storm.draw.randrange(CROWD)
                if self._storm.draw.randrange(LIFE) == 0:
                    crowd[which].close(linger=2000)
                    crowd[which] = self._dial(context)
                self._throw(crowd[which])
                if self.sent - self._taken() > AHEAD:
                    self._stop.wait(0.01)  # not until it caught up: a closed connection may have lost some
        finally:
            for socket in crowd:
                socket.close(linger=2000)
            context.term()

    def _taken(self) -> int:
        now = self._victim.statistics()
        return now.received + now.malformed + now.ignored

    def _dial(self, context: zmq.Context[Any]) -> zmq.Socket[Any]:
        self._lives += 1
        name = f"mallory-{self._lives}"
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, f"{name}.life".encode())
        socket.setsockopt(zmq.SNDTIMEO, 200)
        socket.connect(self._address)
        if self._storm.draw.random() < 0.7:
            socket.send(encode(self._hello(name)))
        return socket

    def _throw(self, socket: zmq.Socket[Any]) -> None:
        with contextlib.suppress(zmq.Again):
            socket.send_multipart(self._storm.message())
            self.sent += 1
        if self._storm.draw.random() < 0.3:
            with contextlib.suppress(zmq.Again):
                while True:
                    socket.recv_multipart(zmq.NOBLOCK)


def hello(name: str, role: str, **fields: Any) -> control.Hello:
    facts = {"incarnation": "life", "protocol": control.PROTOCOL, "schema": SCHEMA, **fields}
    return control.Hello(name=name, role=role, **facts)


def corpus() -> list[list[bytes]]:
    """What may be said to the desk. Tokens are handed in only under fences that nobody was given."""
    spans = [Span(0, 1, 3)]
    tokens = Segment(tokens=pack_tokens([1, 2, 3]), logprobs=pack_logprobs([0.0] * 3), spans=spans)
    manifest = Manifest(
        run_id="run", version=5, incarnation=9, step=1, digest="d", num_bytes=0, tensors=[]
    )  # fmt: skip
    forged = [
        Report(fence=fence, group_id=fence % 9, index=fence % 2, status=status, offset=0, reason="forged")
        for fence in range(1, 40)
        for status in (Status.PENDING, Status.ABORTED, Status.FAILED)
    ]
    late = Report(
        fence=10**7, group_id=1, index=0, status=Status.COMPLETED, offset=0, num_tokens=3, spans=spans
    )
    said: list[tuple[Any, ...]] = [
        *((control.Reports(reports=[report]), b"") for report in forged[::7]),
        (control.Reports(reports=forged[:3]), b"", b"", b""),
        (control.Reports(reports=[late]), encode_body(tokens)),
        *((control.Scores(scores=[control.Scored(fence=f, group_id=1, index=0)]), b"x") for f in (3, 10**7)),
        *((control.Verdict(fence=f, group_id=1, keep=False, removed=[0, 7]),) for f in (2, 9, 10**7)),
        (control.Want(kind=Kind.GENERATE, samples=8, num_bytes=100, capacity=8),),
        (control.Want(kind=Kind.FILTER, samples=8, num_bytes=100),),
        (control.Want(kind=Kind.TRAIN, samples=1),),
        (
            control.Issue(lane=Lane.TRAIN, first_group=4, prompts=[control.Issued(2, 3, "set")]),
            encode_body(Prompt(tokens=pack_tokens([1, 2, 3]))),
        ),
        (control.Trained(batch=0, incarnation=1, step=1, digest="d", started=0.0, ended=1.0),),
        (control.Published(manifest=manifest),),
        (control.Saved(rollout_step=9, incarnation=1, path="p", step=9),),
        (control.EvaluationSeen(version=0, incarnation=1),),
        (control.Swapped(version=0, incarnation=1, pause_s=0.1, transfer_s=0.1, aborted=0,
                         recomputed_tokens=0),),
        (control.Heartbeat(version=3),),
        (control.Goodbye(reason="bored"),),
        (hello("trainer-9", "trainer"),),
        (hello("source", "source", incarnation="forged"),),
        (hello("gen-0", "generator", incarnation="forged"),),
        (hello("mallory-1", "generator", schema="other"),),
        (hello("x" * 5000, "generator"),),
        (hello("mallory-2", "king"),),
        (supervision.StatusRequest(),),
    ]  # fmt: skip
    return [[encode(message), *bodies] for message, *bodies in said]


class Honest:
    """The scripted peers of a whole run, over real sockets."""

    def __init__(self, address: str) -> None:
        self.answers = 0
        self._address = address
        self._outbox: asyncio.Queue[tuple[bytes, Any, list[bytes]]] = asyncio.Queue()
        self.trainer = Trainer("trainer", 1, self._say, num_rollout=STEPS)
        self.peers: list[Peer] = [
            Source("source", 1, self._say, prompts=1000),
            Generator("gen-0", 1, self._say, capacity=4),
            Reward("reward-0", 1, self._say, capacity=4),
            self.trainer,
        ]
        self.links = {
            p.peer: connect(address, identity=p.peer, receives=control.FromBuffer) for p in self.peers
        }

    def _say(self, peer: bytes, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, control.Hello):
            message = msgspec.structs.replace(message, schema=SCHEMA)
        self._outbox.put_nowait((peer, message, frames))

    async def work(self, may_train: Callable[[int], bool]) -> None:
        """Until the run is over; the trainer trains step n only when `may_train(n)`."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._write()), tasks.create_task(self._beat())]
            running += [tasks.create_task(self._read(peer)) for peer in self.peers]
            for peer in self.peers:
                peer.hello()
            while not self.trainer.finished:
                await asyncio.sleep(0.002)
                for peer in self.peers:
                    if peer is not self.trainer or may_train(self.trainer.step):
                        peer.work()
            for task in running:
                task.cancel()

    async def _write(self) -> None:
        while True:
            peer, message, frames = await self._outbox.get()
            await self.links[peer].send(message, frames)

    async def _read(self, peer: Peer) -> None:
        while True:
            delivery = await self.links[peer.peer].recv()
            assert not isinstance(delivery.message, control.Refused), delivery.message
            self.answers += 1
            peer.inbox.append((delivery.message, delivery.frames))
            peer.read()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.3)
            for peer in self.peers:
                self._say(peer.peer, control.Heartbeat(), [])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for link in self.links.values():
            await link.close(linger_s=0)


@contextlib.asynccontextmanager
async def desk(tmp_path: Path) -> AsyncIterator[BufferRole]:
    """The buffer's role, alive, with a supervisor that only listens."""
    plan = make_plan(num_rollout=STEPS, rollout="max_refused_per_step = 100000\nmax_attempts = 1000")
    control_link = bind(f"ipc://{tmp_path}/c", receives=supervision.ToSupervisor)
    role = BufferRole(
        Context(
            name="buffer", role="buffer", incarnation="b", plan=plan, run_dir=tmp_path, attempt_dir=tmp_path,
            control_address=control_link.address, desk_address=f"ipc://{tmp_path}/d",
        )
    )  # fmt: skip
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(plan))
    known = asyncio.Event()

    async def listen() -> None:
        while True:
            delivery = await control_link.recv()
            if isinstance(delivery.message, control.Hello) and delivery.message.address:
                known.set()

    async with asyncio.TaskGroup() as tasks:
        listening, living = tasks.create_task(listen()), tasks.create_task(role.run())
        await asyncio.wait_for(known.wait(), DEADLINE_S)
        yield role
        assert not living.done(), "the desk lives"
        role.leave()
        await living
        listening.cancel()
    await control_link.close(linger_s=0)


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """What is logged."""
    with structlog.testing.capture_logs() as captured:
        yield captured


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - another task's state has no event
            await asyncio.sleep(0.01)
    assert condition(), what


async def test_a_run_ends_and_closes_in_a_storm(tmp_path: Path, lines: list[Any]) -> None:
    """Honest peers train every step, attackers are named, nothing of them stays, and the audit closes."""
    count = share(0.32)
    before = 0
    async with desk(tmp_path) as role, Honest(f"ipc://{tmp_path}/d") as honest:

        def generator_or_reward(name: str) -> control.Hello:
            return hello(name, "generator" if name[-1] in "02468" else "reward")

        storm = Storm(corpus(), seed=7)
        victim = role.door.server
        with Attack(honest._address, storm, count=count, hello=generator_or_reward, victim=victim) as attack:
            working = asyncio.create_task(honest.work(lambda step: attack.sent * STEPS >= step * count))
            while not attack.over and not working.done():
                await asyncio.sleep(0.05)
                before = before or (rss_bytes() if attack.sent > count // 5 else 0)
            done, _ = await asyncio.wait([working], timeout=DEADLINE_S)
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            assert done, f"step {honest.trainer.step}, {honest.answers} answers, {role.ledger.counts()}"
            assert honest.trainer.step == STEPS
            await until(lambda: attack.over, "the storm is over")
        fleet = role.ledger.fleet
        mine = {peer.peer for peer in honest.peers}
        await until(lambda: set(fleet.workers) <= mine, "attackers are forgotten")
        check_named(lines)
        assert {w.peer for w in fleet._by_identity.values()} <= mine
        assert not fleet.leases
        assert not role.ledger.book.groups
        assert len(victim._screen._strikes) <= _MAX_REMEMBERED_PEERS  # type: ignore[attr-defined]
        assert victim.statistics().malformed > count // 20
        grown = rss_bytes() - before
        assert grown < GROWTH_BYTES, f"{grown >> 20} MiB more"
    report = audit(tmp_path)
    assert report.closes, [(e.name, e.broken) for e in report.broken]


def check_named(lines: list[Any]) -> None:
    """Every complaint names its peer and a reason; how many there are has a bound."""
    complaints = [x for x in lines if x["event"] in {"malformed", "unknown", "expelled", "unwelcome"}]
    assert {x["event"] for x in complaints} >= {"malformed", "unknown"}
    assert all("mallory-" in x["peer"] and x["why"] for x in complaints)
    assert len(complaints) < 20 + 120, "a flood of rubbish is no flood of lines"


@pytest.mark.parametrize(
    ("message", "bodies", "words"),
    [
        (control.Reports(reports=[Report(fence=1, group_id=0, index=0, status=Status.PENDING, offset=0)]), 0,
         "Reports with 0 bodies; 1 belong to it"),
        (control.Heartbeat(), 2, "Heartbeat with 2 bodies; 0 belong to it"),
        (control.Saved(rollout_step=1, incarnation=1, path="", step=1), 0, "which only a trainer may"),
        (control.Want(kind=Kind.TRAIN, samples=1), 0, "which only a trainer may"),
        (control.Want(kind=Kind.GENERATE, samples=1, version=3), 0,
         "it names version 3.0; the newest one is none"),
    ],
)  # fmt: skip
async def test_whoever_breaks_the_protocol_is_told_why_and_expelled(
    tmp_path: Path, lines: list[Any], message: Any, bodies: int, words: str
) -> None:
    async with desk(tmp_path) as role:
        link = connect(f"ipc://{tmp_path}/d", identity=b"gen-7.life", receives=control.FromBuffer)
        await link.send(hello("gen-7", "generator"))
        welcome = (await asyncio.wait_for(link.recv(), DEADLINE_S)).message
        assert isinstance(welcome, control.Welcome)
        await link.send(message, [b"x"] * bodies)
        refused = (await asyncio.wait_for(link.recv(), DEADLINE_S)).message
        assert isinstance(refused, control.Refused)
        assert words in refused.reason
        assert not role.ledger.fleet.workers
        assert any(x["event"] == "expelled" and words in x["why"] for x in lines)
        await link.close(linger_s=0)


async def test_a_fence_of_somebody_else_is_no_excuse(tmp_path: Path) -> None:
    """A result under another worker's live lease expels its sender, and the lease stays whole."""
    async with desk(tmp_path) as role, Honest(f"ipc://{tmp_path}/d") as honest:
        honest.peers[1].work = honest.peers[1].swap  # type: ignore[method-assign, attr-defined]
        working = asyncio.create_task(honest.work(lambda _: True))
        await until(lambda: bool(role.ledger.fleet.leases), "the generator holds a lease")
        fence, lease = next(iter(role.ledger.fleet.leases.items()))
        link = connect(f"ipc://{tmp_path}/d", identity=b"gen-7.life", receives=control.FromBuffer)
        await link.send(hello("gen-7", "generator"))
        forged = Report(fence=fence, group_id=lease.group_id, index=0, status=Status.FAILED, offset=0)
        await link.send(control.Reports(reports=[forged]), [b""])
        answers = [(await asyncio.wait_for(link.recv(), DEADLINE_S)).message for _ in range(2)]
        refused = [answer for answer in answers if isinstance(answer, control.Refused)]
        assert [f"fence {fence}, which is gen-0's" in answer.reason for answer in refused] == [True]
        assert role.ledger.fleet.leases[fence] is lease
        assert lease.remaining == set(lease.indices)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await link.close(linger_s=0)


async def test_the_supervisor_answers_in_a_storm(tmp_path: Path, lines: list[Any]) -> None:
    """Rubbish and forged telemetry change nothing: `status` is answered, and names nobody else."""
    count = share(0.08)
    plan = make_plan(num_rollout=STEPS)
    supervisor = Supervisor(plan, launcher=None, run_dir=tmp_path, address="")  # type: ignore[arg-type]
    supervisor._link = bind(
        f"ipc://{tmp_path}/s", receives=supervision.ToSupervisor, limits=Limits(),
        on_malformed=lambda peer, why: supervisor._complain("malformed", peer, why),
    )  # fmt: skip
    member = supervisor.roster.join("gen-0", "generator", "life")
    reading = asyncio.create_task(supervisor._read())
    storm = Storm(to_supervisor(), seed=11)
    client = connect(f"ipc://{tmp_path}/s", identity=b"gen-0.life", receives=supervision.FromSupervisor)
    await client.send(hello("gen-0", "generator"))
    asked = 0
    with Attack(
        f"ipc://{tmp_path}/s",
        storm,
        count=count,
        hello=lambda n: hello(n, "generator", schema=""),
        victim=supervisor._link,
    ) as attack:
        while not attack.over:
            await client.send(supervision.StatusRequest())
            reply = (await asyncio.wait_for(client.recv(), DEADLINE_S)).message
            assert isinstance(reply, supervision.Reply)
            asked += 1
    assert asked > 20
    assert not reading.done(), "the supervisor reads on"
    assert member.last_words == ""
    assert set(supervisor.watch.reports) <= {"gen-0"}
    assert set(supervisor.roster.members) <= {"gen-0", "evaluator"}
    complaints = [x for x in lines if x["event"] == "malformed"]
    assert 0 < len(complaints) < 100
    assert all(x["peer"] for x in complaints)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await client.close(linger_s=0)
    await supervisor._link.close(linger_s=0)


def to_supervisor() -> list[list[bytes]]:
    facts = msgspec.json.encode([MemberUpdate(name="ghost", role="generator", state="running")])
    said = [
        supervision.Telemetry(name="ghost", facts=facts),
        supervision.Telemetry(name="gen-0", facts=facts),
        supervision.Telemetry(name="gen-0", facts=b"[" * 3000),
        supervision.Telemetry(name="gen-0", facts=b'{"no": "list"}'),
        supervision.Exiting(name="gen-0", code=1, message="forged last words"),
        supervision.Acquitted(incarnations=["life"], reason="forged"),
        supervision.AttachRequest(role="generator", protocol=1, schema="s"),
        supervision.AttachRequest(role="generator", protocol=control.PROTOCOL, schema=SCHEMA, name="../../x"),
        supervision.DetachRequest(name="nobody"),
        supervision.StatusRequest(),
        hello("ghost", "generator", schema="other"),
        hello("ghost", "king"),
    ]
    return [[encode(message)] for message in said]
