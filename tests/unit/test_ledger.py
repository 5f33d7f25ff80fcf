"""Single promises of the ledger, one scripted conversation each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ledger_cast import Evaluator, Generator, Reward, Trainer
from ledger_world import Setup, World

from asyncrl.buffer.book import Frame
from asyncrl.buffer.config import LedgerConfig
from asyncrl.buffer.fleet import Fleet
from asyncrl.buffer.states import LeaseRecord
from asyncrl.messages import control
from asyncrl.messages.control import Kind
from asyncrl.messages.parts import encode_body
from asyncrl.messages.sample import Lane, Score, Settled, Status

CONFIG = LedgerConfig(batch_size=2, max_staleness=1, tickets=4, num_rollout=4)
Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A run with these changes to `CONFIG` and to the setup; closed afterwards."""
    worlds: list[World] = []

    def build(setup: dict[str, Any] | None = None, **changes: Any) -> World:
        ledger = msgspec.structs.replace(CONFIG, **changes)
        worlds.append(World(tmp_path / str(len(worlds)), Setup(ledger=ledger, **(setup or {}))))
        return worlds[-1]

    yield build
    for world in worlds:
        world.desk.store.close()


def start(world: World, *names: str) -> None:
    """Everybody joins, version 0 is published and loaded, the first prompts are leased."""
    for name in names or ("source", "trainer", "gen-0", "reward-0"):
        world.join(name)
    for _ in range(4):
        settle(world)


def settle(world: World) -> None:
    """Everybody reads; generators load what is announced; nobody generates, scores or trains."""
    world.commit()
    for peer in world.peers.values():
        peer.read()
        if isinstance(peer, Generator):
            peer.swap()
    world.commit()


def generator(world: World, name: str = "gen-0") -> Generator:
    peer = world.peers[name]
    assert isinstance(peer, Generator)
    peer.read()
    return peer


def reward(world: World) -> Reward:
    peer = world.peers["reward-0"]
    assert isinstance(peer, Reward)
    peer.read()
    return peer


def trainer(world: World) -> Trainer:
    peer = world.peers["trainer"]
    assert isinstance(peer, Trainer)
    peer.read()
    return peer


def finish_jobs(world: World, name: str = "gen-0") -> None:
    peer = generator(world, name)
    for job in peer.free():
        peer.report(job, Status.COMPLETED, new=job.length - job.done)
    settle(world)


def score_all(world: World) -> None:
    reward(world).work()
    settle(world)


def reasons(world: World) -> dict[int, str | None]:
    return dict(world.desk.store.db.execute("select group_id, reason from groups").fetchall())


# Leases.


def test_a_group_goes_to_one_worker_and_is_split_only_when_it_fits_nobody(make: Make) -> None:
    """A worker with room for one sample takes one; the other waits as a partial of the same issue version."""
    world = make({"capacity": 1})
    start(world)
    (job,) = generator(world).jobs.values()
    group = world.desk.ledger.book.groups[job.sample.group_id]
    assert (job.sample.index, [s.state for s in group.samples]) == (0, ["generating", "fresh"])
    finish_jobs(world)
    (other,) = generator(world).jobs.values()
    assert (other.sample.group_id, other.sample.index) == (group.group_id, 1)


def test_a_worker_with_too_little_room_waits_for_a_whole_group(make: Make) -> None:
    world = make({"capacity": 3})
    start(world)
    assert len(generator(world).jobs) == 2
    assert world.desk.ledger.fleet.workers[generator(world).peer].credit[Kind.GENERATE] == 1


def test_an_item_larger_than_the_byte_window_passes_when_nothing_is_held() -> None:
    fleet = Fleet(dead_after_s=5.0)
    hello = control.Hello(name="g", role="generator", incarnation="1", protocol=1, schema="")
    worker = fleet.join(b"g", hello)
    fleet.want(worker, control.Want(kind=Kind.GENERATE, samples=4, num_bytes=100, version=0, capacity=4))
    assert fleet.fits(worker, 500)
    fleet.grant(worker, LeaseRecord(1, Kind.GENERATE, "g", "1", 0, [0], {0}, 0, 0.0, 500))
    assert not fleet.fits(worker, 1)
    fleet.want(worker, control.Want(kind=Kind.GENERATE, samples=0, num_bytes=500, version=0))
    assert fleet.fits(worker, 100)
    assert not fleet.fits(worker, 101)


@pytest.mark.parametrize("changes", [{"filters": True}, {"group_rm": True}, {"evaluates": True}])
def test_work_that_did_not_fit_is_not_forgotten(make: Make, changes: dict[str, Any]) -> None:
    """With no byte window at all, workers get one item after the other, and every one in the end."""
    world = make({"window": 0}, **changes)
    world.finish()
    assert world.desk.ledger.batches.num_trained == 4


def test_a_late_result_under_an_old_fence_is_refused_by_name(make: Make) -> None:
    world = make()
    start(world, "source", "trainer", "gen-0", "gen-1", "reward-0")
    old = generator(world)
    job = next(iter(old.jobs.values()))
    old.report(job, Status.PENDING, new=1)
    settle(world)
    world.partition("gen-0")
    before = world.desk.ledger.book.totals["received.tokens"]
    old.acknowledged.clear()
    old.report(job, Status.COMPLETED, new=2)
    assert world.desk.ledger.book.totals["refused.results"] == 1
    world.commit()
    acks = [message for message, _ in old.inbox if isinstance(message, control.Acks)]
    answers = [(ack.accepted, ack.reason) for message in acks for ack in message.acks]
    assert answers == [(False, "the lease is not valid any more")]
    assert world.desk.ledger.book.totals["received.tokens"] == before
    world.check()
    world.finish()


def test_what_was_refused_stays_counted_when_the_desk_starts_again(make: Make) -> None:
    """Fails when the count is not committed with the refusal, or not read back."""
    world = make()
    start(world)
    peer = generator(world)
    job = peer.free()[0]
    job.done = 1
    peer.report(job, Status.PENDING, new=1)
    world.commit()
    world.crash(committed=False, survivors=False)
    assert world.desk.ledger.book.totals["refused.results"] == 1
    world.commit()
    stored = world.desk.store.db.execute("select value from totals where key = 'refused.results'").fetchone()
    assert stored == (1,)


def test_a_repeat_of_an_accepted_result_is_acknowledged_again_and_changes_nothing(make: Make) -> None:
    world = make()
    start(world)
    peer = generator(world)
    job = peer.free()[0]
    for status, new in ((Status.PENDING, 2), (Status.COMPLETED, job.length - 2)):
        peer.report(job, status, new=new)
        tokens = world.desk.ledger.book.totals["received.tokens"]
        peer.repeat(job)
        assert world.desk.ledger.book.totals["received.tokens"] == tokens
        assert world.desk.ledger.book.totals["refused.results"] == 0
        acks = [m for _, m, _ in world.desk.commit() if isinstance(m, control.Acks)]
        told = [(ack.accepted, ack.last) for message in acks for ack in message.acks]
        assert told == [(True, status is not Status.PENDING)] * 2


def test_progress_is_taken_only_where_the_committed_length_ends(make: Make) -> None:
    world = make()
    start(world)
    peer = generator(world)
    job = peer.free()[0]
    job.done = 1
    peer.report(job, Status.PENDING, new=1)
    assert world.desk.ledger.book.totals["received.tokens"] == 0
    assert world.desk.ledger.book.totals["refused.results"] == 1


# Attempts.


def kill(world: World, *, ours: bool = False, progress: int = 0) -> None:
    """gen-0 dies with what it holds, having handed in `progress` tokens of each; another life joins."""
    peer = generator(world)
    for job in peer.free():
        if progress:
            peer.report(job, Status.PENDING, new=progress)
    world.die("gen-0", seen=True, ours=ours)
    world.join("gen-0")
    for _ in range(3):
        settle(world)


def test_a_suspect_is_leased_alone_before_it_fails_its_group(make: Make) -> None:
    world = make(max_attempts=3)
    start(world)
    assert len(generator(world).jobs) == 4
    kill(world)
    assert len(generator(world).jobs) == 4, "one attempt may have been bad luck"
    kill(world)
    jobs = generator(world).jobs
    assert len(jobs) == 1, "a suspect is leased alone"
    failing = next(iter(jobs.values())).sample.group_id
    kill(world)
    assert reasons(world)[failing] == Settled.FAILED
    assert len(generator(world).jobs) == 1
    assert [r for r in reasons(world).values() if r] == [Settled.FAILED]
    world.finish()


@pytest.mark.parametrize(("ours", "progress"), [(True, 0), (False, 1)])
def test_attempts_that_progressed_or_that_we_killed_do_not_count(
    make: Make, *, ours: bool, progress: int
) -> None:
    world = make(max_attempts=2)
    start(world)
    for _ in range(2):
        kill(world, ours=ours, progress=progress)
    samples = [s for g in world.desk.ledger.book.groups.values() for s in g.samples]
    assert {sample.attempts for sample in samples} == {0}
    assert sum(sample.tokens for sample in samples) == 2 * 4 * progress, "tokens handed in are kept"


def test_progress_that_is_thrown_away_does_not_excuse_an_attempt(make: Make) -> None:
    """Without partials a sample that always fails after some tokens would be tried for ever."""
    world = make(max_attempts=2, partial_rollout=False)
    start(world)
    kill(world, progress=1)
    jobs = generator(world).jobs
    assert len(jobs) == 1
    assert next(iter(jobs.values())).done == 0
    kill(world, progress=1)
    assert Settled.FAILED in reasons(world).values()


def test_a_score_that_keeps_failing_fails_its_group_and_never_counts_as_zero(make: Make) -> None:
    world = make(max_attempts=2)
    start(world)
    finish_jobs(world)
    for _ in range(2):
        peer = reward(world)
        for fence in list(peer.jobs):
            peer.do(fence, good=False)
        settle(world)
    assert Settled.FAILED in reasons(world).values()
    rows = world.desk.store.db.execute("select count(*) from samples where reward is not null").fetchone()
    assert rows == (0,)


def test_one_bad_score_of_a_whole_group_is_scored_again(make: Make) -> None:
    """Under group_rm the group is leased once more for the sample whose score failed."""
    world = make(group_rm=True)
    start(world)
    finish_jobs(world)
    peer = reward(world)
    fence, (lease, samples, size) = next(iter(peer.jobs.items()))
    group_id = samples[0].group_id
    bad = control.Scored(fence=fence, group_id=group_id, index=0, error="no number")
    good = control.Scored(fence=fence, group_id=group_id, index=1, reward=1.0)
    peer.send(control.Scores(scores=[bad, good]), b"", encode_body(Score(reward=1.0)))
    peer.want(Kind.SCORE, 2, size)
    del peer.jobs[fence]
    settle(world)
    again = [x for x in reward(world).jobs.values() if x[0].parts.group_id == lease.parts.group_id]
    assert [x[0].parts.indices for x in again] == [[0, 1]]
    world.finish()


# Batches.


def test_oversampling_settles_the_surplus_and_never_trains_it_late(make: Make) -> None:
    """B = 1, no staleness, 3 tickets: the first group to be ready is trained, the others are surplus."""
    world = make(
        {"capacity": 6}, batch_size=1, max_staleness=0, tickets=3, on_straggler="drop", num_rollout=2
    )
    start(world)
    peer = generator(world)
    assert len(peer.jobs) == 6
    for job in peer.free():
        if job.sample.group_id == 1:
            peer.report(job, Status.COMPLETED, new=2)
    settle(world)
    score_all(world)
    assert reasons(world)[0] == Settled.SURPLUS
    assert reasons(world)[2] == Settled.SURPLUS
    assert world.desk.ledger.batches.records[0].groups == 1
    world.finish()
    assert Settled.STALE not in reasons(world).values()


def test_a_straggler_is_dropped_by_name_or_waited_for(make: Make) -> None:
    for policy, expected in (("drop", Settled.STALE), ("wait", None)):
        world = make(
            {"capacity": 12}, batch_size=1, max_staleness=1, tickets=2, on_straggler=policy, num_rollout=4
        )
        start(world)
        peer = generator(world)
        for job in peer.free():
            if job.sample.group_id != 0:
                peer.report(job, Status.COMPLETED, new=1)
        settle(world)
        score_all(world)
        trainer(world).train()
        settle(world)
        finish_but(world, 0)
        assert reasons(world)[0] == expected
        world.finish()
        assert reasons(world)[0] == (expected or Settled.TRAINED)


def finish_but(world: World, straggler: int) -> None:
    for _ in range(3):
        peer = generator(world)
        for job in peer.free():
            if job.sample.group_id != straggler:
                peer.report(job, Status.COMPLETED, new=1)
        settle(world)
        score_all(world)


@pytest.mark.parametrize(("partial", "steps", "left_over"), [(True, 3, 0), (False, 2, 1)])
def test_a_remainder_is_trained_smaller_or_is_unneeded(
    make: Make, *, partial: bool, steps: int, left_over: int
) -> None:
    world = make({"prompts": 5}, num_rollout=None, allow_partial_train_step=partial)
    world.finish()
    counts = list(reasons(world).values())
    assert world.desk.ledger.batches.num_trained == steps
    assert counts.count(Settled.UNNEEDED) == left_over
    assert counts.count(Settled.TRAINED) == 5 - left_over


def test_a_trainer_hears_of_the_end_only_after_its_last_batch(make: Make) -> None:
    """Told earlier, it would stop before batches that are recorded already."""
    world = make({"prompts": 4}, num_rollout=None)
    start(world)
    for _ in range(3):
        finish_jobs(world)
        score_all(world)
    assert world.desk.ledger.batches.target == 2
    assert not trainer(world).ending
    trainer(world).train()
    settle(world)
    assert not trainer(world).ending
    trainer(world).train()
    settle(world)
    assert trainer(world).ending
    world.finish()


def test_too_many_refusals_in_a_row_fail_the_run_by_name(make: Make) -> None:
    world = make(filters=True, max_refused_per_step=3)
    start(world)
    for _ in range(20):
        finish_jobs(world)
        peer = reward(world)
        for fence, (lease, _, _) in list(peer.jobs.items()):
            peer.do(fence, good=lease.kind is Kind.SCORE)
        settle(world)
        if world.desk.ledger.failure:
            break
    text = world.desk.ledger.failure
    assert "4 groups in a row" in text
    assert "rollout.max_refused_per_step = 3" in text
    assert "all the same" in text
    # A verdict that was on its way does not rewrite the reason.
    world.desk.ledger._count_refusal("later")
    assert world.desk.ledger.failure == text


def test_the_source_is_asked_for_no_more_than_the_run_needs(make: Make) -> None:
    world = make(evaluates=True, eval_interval=1)
    world.finish()
    lanes = dict(world.desk.store.db.execute("select lane, count(*) from groups group by 1").fetchall())
    assert lanes[Lane.TRAIN] == 4 * 2, "4 steps of 2 groups"


def test_prompts_handed_in_twice_are_one_group(make: Make) -> None:
    world = make()
    start(world)
    count = world.desk.ledger.book.next_group
    issue = control.Issue(lane=Lane.TRAIN, first_group=0, prompts=[control.Issued(2, 3)], cursor=b"x")
    world.desk.ledger.issue(issue, [Frame(b"p", "d")], world.desk.now)
    assert world.desk.ledger.book.next_group == count
    assert world.desk.ledger.cursor != b"x"


# Evaluations and versions.


def evaluating(make: Make, **changes: Any) -> World:
    """A run whose version 1 is published while version 0 is being evaluated."""
    world = make(
        {"capacity": 8, "exact": changes.pop("exact", True)}, evaluates=True, eval_interval=1, **changes
    )
    start(world, "source", "trainer", "gen-0", "gen-1", "reward-0", "evaluator")
    for name in ("gen-0", "gen-1"):
        peer = generator(world, name)
        for job in peer.free():
            if job.sample.lane is Lane.TRAIN:
                peer.report(job, Status.COMPLETED, new=job.length)
    for _ in range(2):
        settle(world)
        score_all(world)
    trainer(world).train()
    settle(world)
    published = world.desk.ledger.versions.published
    assert published is not None
    assert published.version == 1
    return world


def test_an_evaluation_holds_back_the_announcement_of_a_newer_version(make: Make) -> None:
    world = evaluating(make)
    assert {generator(world, name).version for name in ("gen-0", "gen-1")} == {(0, 1)}
    for _ in range(4):
        for name in ("gen-0", "gen-1"):
            finish_jobs(world, name)
        score_all(world)
    assert generator(world).version[0] == 1
    assert world.peers["evaluator"].seen[0] == (0, 1)  # type: ignore[attr-defined]
    world.finish()


def test_an_evaluation_that_nobody_can_serve_is_given_up_for_a_newer_one(make: Make) -> None:
    """Trainer and generators die with the evaluated version: newcomers must not wait for it for ever."""
    world = evaluating(make, exact=False)
    for name in ("gen-0", "gen-1", "trainer"):
        world.die(name, seen=True)
    world.finish()
    seen = world.peers["evaluator"].seen  # type: ignore[attr-defined]
    assert (0, 1) not in seen
    assert seen[-1][0] == 4
    assert Settled.UNNEEDED in reasons(world).values()


def test_an_evaluation_outlives_a_restart_of_the_desk(make: Make) -> None:
    """Generators that serve the evaluated version are not sent on to the newer one before it has ended."""
    world = evaluating(make)
    world.crash(committed=False, survivors=True)
    settle(world)
    assert generator(world).version == (0, 1)
    world.finish()
    assert world.peers["evaluator"].seen[0] == (0, 1)  # type: ignore[attr-defined]


def test_the_last_version_is_evaluated_again_when_its_weights_were_lost(make: Make) -> None:
    """The trainer dies before its last checkpoint and comes to other weights: those are what is evaluated."""
    world = make({"exact": False, "save_interval": 100}, evaluates=True, num_rollout=1)
    world.join_all()
    for _ in range(30):
        world.commit()
        for name, peer in list(world.peers.items()):
            peer.read()
            if name != "trainer":
                peer.work()
        boss = trainer(world)
        boss.num_rollout = None  # it publishes its step, but does not save yet
        boss.train()
    evaluator = world.peers["evaluator"]
    assert isinstance(evaluator, Evaluator)
    assert evaluator.seen[-1] == (1, 1)
    world.die("trainer", seen=True)
    world.finish()
    assert evaluator.seen[-1] == (1, 2)


def test_a_newcomer_is_told_where_the_bytes_are_after_the_trainer_came_back(make: Make) -> None:
    world = make()
    start(world)
    world.die("trainer", seen=True)
    world.join("gen-1")
    settle(world)
    assert generator(world, "gen-1").announced is None, "nobody serves the bytes"
    world.join("trainer")
    for _ in range(3):
        settle(world)
    assert generator(world, "gen-1").version == (0, 1)
    announced = generator(world, "gen-1").announced
    assert announced is not None
    assert announced.path == "life2"


def test_prompts_of_a_forgotten_evaluation_keep_their_ordinals(make: Make) -> None:
    world = make()
    start(world)
    first = world.desk.ledger.book.next_group
    issue = control.Issue(
        lane=Lane.EVAL, first_group=first, prompts=[control.Issued(2, 3)], ended=True, version=7
    )
    world.desk.ledger.issue(issue, [Frame(b"p", "d")], world.desk.now)
    world.commit()
    assert reasons(world)[first] == Settled.UNNEEDED
    assert world.desk.ledger.book.next_group == first + 1


# The trainer's restart.


def test_a_restarted_trainer_is_handed_the_recorded_batches_in_order(make: Make) -> None:
    world = make({"save_interval": 2, "prefetch": 2}, max_staleness=3, tickets=8, num_rollout=6)
    world.join_all()
    for _ in range(12):
        for name in (*[n for n in world.peers if n.startswith("gen")], "source"):
            world.peers[name].read()
            world.peers[name].work()
        world.commit()
        score_all(world)
        if trainer(world).step < 3:
            trainer(world).train()
    assert trainer(world).step == 3
    old = trainer(world)
    trained = world.desk.ledger.book.totals["settled.trained.groups"]
    published = world.desk.ledger.versions.published
    world.die("trainer", seen=True)
    world.join("trainer")
    settle(world)
    new = trainer(world)
    assert (new.number, new.step) == (2, 2), "from the checkpoint of step 2"
    assert [batch for batch, _ in new.batches][:1] == [2]
    assert world.desk.ledger.book.totals["settled.trained.groups"] == trained - 2
    world.desk.take(
        new.peer, control.Trained(batch=2, incarnation=1, step=3, digest="", started=0, ended=0), []
    )
    assert world.desk.ledger.batches.num_trained == 2, "the word of a replaced life changes nothing"
    assert world.desk.ledger.versions.published == published, "the published step never goes back"
    world.finish()
    assert [batch for batch, _ in new.trained] == [2, 3, 4, 5]
    assert new.trained[0][1] == old.trained[2][1], "the batch is the same to the token"


def test_a_worker_that_never_comes_back_after_a_restart_of_the_desk_frees_its_work(make: Make) -> None:
    world = make()
    start(world)
    held = len(world.desk.ledger.fleet.leases)
    assert held
    del world.peers["gen-0"]
    world.crash(committed=False, survivors=True)
    world.commit()
    assert len(world.desk.ledger.fleet.leases) == held, "it has its full time to come back"
    world.tick(world.setup.ledger.dead_after_s + 1)
    assert not world.desk.ledger.fleet.leases
    world.finish()


def test_what_was_leased_but_never_sent_is_sent_after_the_restart(make: Make) -> None:
    world = make()
    start(world, "source", "trainer", "reward-0")
    world.join("gen-0")
    world.commit()
    generator(world).swap()
    world.crash(committed=True, survivors=True)
    world.commit()
    assert len(generator(world).jobs) == 4
    assert world.desk.ledger.fleet.workers[generator(world).peer].credit[Kind.GENERATE] == 0
    world.finish()


@pytest.mark.parametrize("jump", [-600.0, 3600.0])
def test_setting_the_clock_neither_kills_anybody_nor_keeps_the_dead(make: Make, jump: float) -> None:
    """Fails when silence is counted on the clock of the records: `Fleet.steady` is another one."""
    world = make()
    start(world)
    world.crash(committed=True, survivors=False)
    for name in ("source", "trainer", "reward-0"):
        world.join(name)
    world.tick(1)
    del world.peers["reward-0"]
    world.desk.now += jump  # nobody but the records sees it: the world's ticks go on as they did
    world.tick(0)
    assert world.desk.ledger.fleet.find("reward-0", "life2") is not None
    assert world.desk.ledger.fleet.find("trainer", "life2") is not None
    world.tick(world.setup.ledger.dead_after_s + 1)
    assert world.desk.ledger.fleet.find("reward-0", "life2") is None
    assert world.desk.ledger.fleet.find("trainer", "life2") is not None


def test_an_absent_worker_has_its_full_time_when_the_desk_stood_still(make: Make) -> None:
    """Fails when only the silence of those who are here is forgiven."""
    world = make()
    start(world)
    del world.peers["gen-0"]
    world.crash(committed=False, survivors=True)
    world.tick(1)
    held = len(world.desk.ledger.fleet.leases)
    assert held
    world.desk.ledger.fleet.steady += 60
    world.desk.members.tick(world.desk.now)
    assert len(world.desk.ledger.fleet.leases) == held
    world.tick(world.setup.ledger.dead_after_s + 1)
    assert not world.desk.ledger.fleet.leases


def test_silence_while_the_desk_stood_still_is_not_charged(make: Make) -> None:
    world = make()
    start(world)
    world.tick(1)
    world.desk.ledger.fleet.steady += 60
    assert world.desk.members.tick(world.desk.now) == []
    world.tick(1)
    world.silent.add("gen-0")
    world.tick(10)
    assert world.desk.ledger.fleet.find("gen-0", "life1") is None
    assert world.desk.ledger.fleet.find("reward-0", "life1") is not None


def test_a_row_never_runs_ahead_of_its_bodies(make: Make) -> None:
    """Events that arrive while a transaction is being written belong to the next one."""
    world = make()
    start(world)
    peer = generator(world)
    job = peer.free()[0]
    peer.report(job, Status.PENDING, new=1)
    transaction = world.desk.ledger.book.take()
    job.acked = True
    peer.report(job, Status.COMPLETED, new=2)
    world.desk.store.write(transaction)
    rows = world.desk.store.db.execute(
        "select sum(tokens), (select sum(num_tokens) from bodies where kind = 'segment') from samples"
    ).fetchone()
    assert rows == (1, 1)
