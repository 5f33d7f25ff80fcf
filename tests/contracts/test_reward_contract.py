"""Every reward keeps one contract inside the sandbox, and the sandbox keeps its own against any user code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncrl.errors import ConfigError, RewardError
from asyncrl.messages.sample import Prompt, Sample, Score, Span, Status, pack_logprobs, pack_mask, pack_tokens
from asyncrl.rewards.base import FailureKind, RewardFailure, RewardSpec, Verdict
from asyncrl.rewards.sandbox import Sandbox

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 30
TIMEOUT_S = 3
"""Nobody but those that hang takes as long, however busy the machine is."""

USER_CODE = """
import asyncio, os, subprocess, sys, threading

def faulty(sample):
    print("noise", sample.index, flush=True)
    sys.stdout.buffer.write(b"\\x00" * 100)
    assert sys.stdin.read() == ""
    do = sample.metadata.get("do")
    if do == "hang": threading.Event().wait()
    if do == "exit": os._exit(3)
    if do == "sys.exit": sys.exit(3)
    if do == "segfault":
        import ctypes
        ctypes.string_at(0)
    if do == "raise": raise KeyError("lost")
    if do == "text": return "1.0"
    if do == "none": return None
    if do == "nan": return float("nan")
    if do == "dict": return {"score": 1.0}
    return 1.0

async def faulty_async(args, sample):
    do = sample.metadata.get("do")
    if do == "hang": await asyncio.Event().wait()
    if do == "block": threading.Event().wait()
    if do == "exit":
        await asyncio.sleep(0)
        os._exit(3)
    await asyncio.sleep(0)
    return args.own

def group(args, samples):
    if samples[0].metadata.get("do") == "short": return [1.0]
    if samples[0].metadata.get("do") == "one": return [1.0, None]
    if samples[0].metadata.get("do") == "hang": threading.Event().wait()
    return [float(sample.index) for sample in samples]

def spawns(sample):
    child = subprocess.Popen(["sleep", "1000"])
    open(sample.metadata["file"], "w").write(f"{os.getpid()} {child.pid}")
    threading.Event().wait()

def escapes(sample):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    open(sample.metadata["file"], "w").write(str(child.pid))
    os._exit(3)

def counts(sample):
    with open(sample.metadata["file"], "a") as file:
        file.write(f"{sample.index} ")
    if sample.index == 2: os._exit(3)
    return 1.0

def bad_verdict(args, samples): return "keep"
def three(a, b, c): return 1.0
"""


def make(index: int = 0, do: str | None = None, **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "group_id": 1,
        "index": index,
        "prompt": Prompt(tokens=pack_tokens([1]), text="p", label="4"),
        "status": Status.COMPLETED,
        "tokens": pack_tokens([2, 3]),
        "logprobs": pack_logprobs([-1, -1]),
        "loss_mask": pack_mask([1, 1]),
        "spans": [Span(0, 1, 2)],
        "text": "Answer: 4",
        "metadata": {"do": do} if do else {},
    }
    return Sample(**{**values, **changes})


@pytest.fixture
def user(tmp_path: Path) -> Callable[..., RewardSpec]:
    """A specification for a function of USER_CODE."""
    (tmp_path / "user_code.py").write_text(USER_CODE)
    (tmp_path / "own.yaml").write_text("own: 0.25\n")

    def spec(function: str, **options: Any) -> RewardSpec:
        place = {"search_paths": [str(tmp_path)], "custom_config_path": str(tmp_path / "own.yaml")}
        return RewardSpec(use=f"user_code:{function}", **place, **options)

    return spec


def failure(result: object) -> RewardFailure:
    assert isinstance(result, RewardFailure)
    return result


@pytest.mark.parametrize(
    "spec",
    [
        RewardSpec(use="exact"),
        RewardSpec(use="boxed_math"),
        RewardSpec(use="math"),
        RewardSpec(use="random"),
        RewardSpec(use="deterministic_random"),
        RewardSpec(use="plugins.rewards:length_aware"),
        RewardSpec(use=f"{REPOSITORY}/plugins/rewards.py:length_aware"),
        RewardSpec(use="plugins.rewards.format_and_answer", reward_key="score"),
        RewardSpec(use="plugins.rewards:best_of_group", group_rm=True),
    ],
    ids=lambda spec: spec.use.rpartition("/")[2],
)
async def test_a_reward_gives_each_sample_one_finite_repeatable_score(spec: RewardSpec) -> None:
    samples = [make(index) for index in range(3)]
    async with asyncio.timeout(DEADLINE_S), Sandbox(spec, timeout_s=10) as sandbox:
        judge = sandbox.score_group if spec.group_rm else sandbox.score
        results = await judge(samples)
        assert len(results) == 3
        assert all(isinstance(result, Score) for result in results)
        assert await judge(samples) == results


@pytest.mark.parametrize(
    ("do", "kind", "says"),
    [
        ("hang", FailureKind.TIMEOUT, f"took over {TIMEOUT_S} s and was killed"),
        ("exit", FailureKind.CRASH, "exit status 3"),
        ("segfault", FailureKind.CRASH, "killed by SIGSEGV"),
        ("sys.exit", FailureKind.EXCEPTION, "SystemExit: 3"),
        ("raise", FailureKind.EXCEPTION, "KeyError: 'lost'"),
        ("text", FailureKind.INVALID, "returned str '1.0'"),
        ("none", FailureKind.INVALID, "returned None"),
        ("nan", FailureKind.INVALID, "returned nan"),
        ("dict", FailureKind.INVALID, "set reward_key"),
    ],
)
async def test_a_fault_costs_its_own_sample_only(
    user: Callable[..., RewardSpec], do: str, kind: FailureKind, says: str
) -> None:
    samples = [make(0), make(1), make(2, do), make(3), make(4)]
    async with asyncio.timeout(DEADLINE_S), Sandbox(user("faulty"), timeout_s=TIMEOUT_S) as sandbox:
        results = await sandbox.score(samples)
        culprit = failure(results.pop(2))
        assert results == [Score(reward=1.0)] * 4
        assert culprit.kind == kind
        assert says in culprit.message
        assert "user_code:faulty" in culprit.message
        assert "group 1 sample 2" in culprit.message
        assert await sandbox.score([make(9)]) == [Score(reward=1.0)]
    if do == "raise":
        assert "in faulty" in culprit.traceback
    if do == "segfault":
        assert "Segmentation fault" in culprit.traceback


async def test_coroutines_run_side_by_side_and_only_culprits_fail(user: Callable[..., RewardSpec]) -> None:
    samples = [make(0, "hang"), make(1), make(2, "exit"), make(3), make(4, "block"), make(5)]
    async with asyncio.timeout(DEADLINE_S), Sandbox(user("faulty_async"), timeout_s=TIMEOUT_S) as sandbox:
        results = await sandbox.score(samples)
    kinds = [result.kind if isinstance(result, RewardFailure) else result.reward for result in results]
    assert kinds == ["timeout", 0.25, "crash", 0.25, "timeout", 0.25]


async def test_a_group_is_judged_by_one_call(user: Callable[..., RewardSpec]) -> None:
    async with asyncio.timeout(DEADLINE_S), Sandbox(user("group", group_rm=True), timeout_s=5) as sandbox:
        assert await sandbox.score_group([make(0), make(1)]) == [Score(reward=0.0), Score(reward=1.0)]
        short = await sandbox.score_group([make(0, "short"), make(1)])
        assert all("returned 1 rewards for 2 samples" in failure(result).message for result in short)
        one = await sandbox.score_group([make(0, "one"), make(1)])
        assert one[0] == Score(reward=1.0)
        assert "group 1 sample 1" in failure(one[1]).message
        hung = await sandbox.score_group([make(0, "hang"), make(1)])
        assert [failure(result).kind for result in hung] == [FailureKind.TIMEOUT] * 2


async def test_filters_give_verdicts_and_their_faults_are_no_verdict(user: Callable[..., RewardSpec]) -> None:
    spec = RewardSpec(
        use="exact",
        dynamic_sampling_filter_path="plugins.filters:nonzero_std",
        buffer_filter_path="plugins.filters:pop_first",
        rollout_sample_filter_path="plugins.filters:drop_truncated",
    )

    def scored(*rewards: float) -> list[Sample]:
        return [make(i, score=Score(reward=r), status=Status.TRUNCATED) for i, r in enumerate(rewards)]

    async with asyncio.timeout(DEADLINE_S), Sandbox(spec, timeout_s=5) as sandbox:
        assert await sandbox.verdict(scored(0.0, 1.0)) == Verdict(keep=True, removed=[0, 1])
        assert await sandbox.verdict(scored(1.0, 1.0)) == Verdict(keep=False, reason="zero_std_1.0")
    bad = user("faulty", dynamic_sampling_filter_path="user_code:bad_verdict")
    async with asyncio.timeout(DEADLINE_S), Sandbox(bad, timeout_s=5) as sandbox:
        assert "returned str 'keep'" in failure(await sandbox.verdict(scored(1.0))).message


async def test_what_was_judged_before_a_crash_is_not_judged_again(
    user: Callable[..., RewardSpec], tmp_path: Path
) -> None:
    samples = [make(i, metadata={"file": str(tmp_path / "calls")}) for i in range(4)]
    async with asyncio.timeout(DEADLINE_S), Sandbox(user("counts"), timeout_s=5) as sandbox:
        results = await sandbox.score(samples)
    assert [isinstance(result, Score) for result in results] == [True, True, False, True]
    assert (tmp_path / "calls").read_text().split() == ["0", "1", "2", "3"]


async def test_several_children_share_the_work_and_keep_the_order() -> None:
    samples = [make(i, text=str(i), prompt=Prompt(tokens=b"", label=str(i % 2))) for i in range(200)]
    async with asyncio.timeout(DEADLINE_S), Sandbox(RewardSpec(use="exact"), concurrency=2) as sandbox:
        results = await sandbox.score(samples)
        assert await sandbox.score([]) == []
        assert sandbox.statistics() == {"results": 200, "restarts": 0, "free": 2}
    assert [i for i, result in enumerate(results) if result == Score(reward=1.0)] == [0, 1]


async def test_a_reward_that_cannot_be_loaded_is_a_configuration_error(
    user: Callable[..., RewardSpec],
) -> None:
    for spec, says in [
        (RewardSpec(use="dapo"), "known but not built in yet"),
        (user("missing"), 'no "missing"'),
        (
            user("three"),
            r"expected def name\(sample\) or def name\(args, sample\); found def three\(a, b, c\)",
        ),
    ]:
        with pytest.raises(ConfigError, match=says):
            await Sandbox(spec).start()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os._exit(5)", "exit status 5"),
        ("import threading; threading.Event().wait()", "within 2 s"),
    ],
)
async def test_the_first_import_has_its_own_deadline(tmp_path: Path, code: str, says: str) -> None:
    file = tmp_path / "stuck.py"
    file.write_text(code)
    with pytest.raises(RewardError, match=says):
        async with asyncio.timeout(DEADLINE_S):
            await Sandbox(RewardSpec(use=f"{file}:f"), start_timeout_s=2).start()


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def until_gone(pid: int) -> None:
    """Wait for the end of a process that is no child of ours."""
    deadline = time.monotonic() + DEADLINE_S
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with contextlib.closing(os.fdopen(handle)):
        while is_running(pid):
            assert select.select([handle], [], [], deadline - time.monotonic())[0], f"{pid} still runs"


async def test_what_user_code_started_dies_with_it(user: Callable[..., RewardSpec], tmp_path: Path) -> None:
    sample = make(0, metadata={"file": str(tmp_path / "pids")})
    async with asyncio.timeout(DEADLINE_S), Sandbox(user("spawns"), timeout_s=TIMEOUT_S) as sandbox:
        (result,) = await sandbox.score([sample])
        assert failure(result).kind == FailureKind.TIMEOUT
        for pid in map(int, (tmp_path / "pids").read_text().split()):
            until_gone(pid)


async def test_a_process_that_got_away_holds_nothing_up(
    user: Callable[..., RewardSpec], tmp_path: Path
) -> None:
    sample = make(0, metadata={"file": str(tmp_path / "pid")})
    async with asyncio.timeout(DEADLINE_S), Sandbox(user("escapes"), timeout_s=5) as sandbox:
        (result,) = await sandbox.score([sample])
        assert failure(result).kind == FailureKind.CRASH
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_closing_ends_a_call_that_is_under_way(user: Callable[..., RewardSpec]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        sandbox = Sandbox(user("faulty"), timeout_s=20)
        await sandbox.start()
        call = asyncio.create_task(sandbox.score([make(0, "hang"), make(1)]))
        await asyncio.wait([call], timeout=0.3)
        assert not call.done()
        await sandbox.close()
        with pytest.raises(RewardError, match="the sandbox is closed"):
            await call


async def test_a_cancelled_call_leaves_no_child_in_an_unknown_state(user: Callable[..., RewardSpec]) -> None:
    async with asyncio.timeout(DEADLINE_S), Sandbox(user("faulty"), timeout_s=20) as sandbox:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await sandbox.score([make(0, "hang")])
        assert await sandbox.score([make(1)]) == [Score(reward=1.0)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hanging_child_dies_when_its_parent_is_killed(
    user: Callable[..., RewardSpec], tmp_path: Path
) -> None:
    user("faulty")
    parent = textwrap.dedent(f"""
        import asyncio
        from asyncrl.rewards.base import RewardSpec
        from asyncrl.rewards.sandbox import Sandbox
        from tests.contracts.test_reward_contract import make
        async def main():
            spec = RewardSpec(use={str(tmp_path / "user_code.py")!r} + ":faulty")
            async with Sandbox(spec) as sandbox:
                print(next(iter(sandbox._children))._process.pid, flush=True)
                await sandbox.score([make(0, "hang")])
        asyncio.run(main())
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "."},
    )
    with process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    until_gone(pid)


def test_the_parent_imports_neither_torch_nor_user_code() -> None:
    heavy = "{'torch', 'math_verify', 'sympy', 'aiohttp'}"
    code = f"import sys, asyncrl.rewards.sandbox; print({heavy} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert output.stdout.strip() == "set()"
