"""The scripted engine's time and lengths, under a clock that jumps to the next timer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from asyncrl.engines.base import Chunk, GenerateRequest, OnNewWeights, SamplingParams
from asyncrl.engines.scripted import Lengths, Scripted
from asyncrl.errors import ConfigError
from asyncrl.messages.sample import pack_tokens, tokens_of

TEN = Lengths(median=10, sigma=0.0)


class JumpingSelector:
    """Never waits: what the loop would have slept is added to its clock."""

    def __init__(self, selector: Any) -> None:
        self._selector = selector
        self.now = 0.0

    def select(self, timeout: float | None) -> Any:
        assert timeout is not None, "everything waits and no timer is set"
        self.now += max(0.0, timeout)
        return self._selector.select(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._selector, name)


def simulate(main: Coroutine[Any, Any, Any]) -> Any:
    """Run under virtual time, which starts at 0."""
    loop = asyncio.SelectorEventLoop()
    loop._selector = selector = JumpingSelector(loop._selector)  # type: ignore[attr-defined]
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main)


def ask(
    uid: str, *, seed: int = 1, every: int = 0, every_s: float = 0.0, prefix: bytes = b""
) -> GenerateRequest:
    return GenerateRequest(
        uid=uid,
        prompt=pack_tokens([1, 2]),
        prefix=prefix,
        params=SamplingParams(),
        seed=seed,
        progress_every_tokens=every,
        progress_every_s=every_s,
    )


async def timed(engine: Scripted, request: GenerateRequest) -> list[tuple[float, Chunk]]:
    loop = asyncio.get_running_loop()
    return [(round(loop.time(), 6), chunk) async for chunk in engine.generate(request)]


async def started(**options: Any) -> Scripted:
    engine = Scripted(lengths=TEN, token_latency_s=0.5, **options)
    await engine.start()
    return engine


def sizes(chunks: list[tuple[float, Chunk]]) -> list[int]:
    return [len(chunk.tokens) // 4 for _, chunk in chunks]


def test_chunks_come_at_the_latency_of_their_tokens() -> None:
    async def main() -> list[tuple[float, Chunk]]:
        return await timed(await started(), ask("a", every=4))

    chunks = simulate(main())
    assert [time for time, _ in chunks] == [2.0, 4.0, 5.0]
    assert sizes(chunks) == [4, 4, 2]


@pytest.mark.parametrize(
    ("every", "every_s", "times"),
    [
        (0, 1.5, [1.5, 3.0, 4.5, 5.0]),  # three tokens of half a second
        (0, 1.7, [2.0, 4.0, 5.0]),  # the first token after 1.7 s is the fourth
        (0, 0.1, [0.5 * n for n in range(1, 11)]),  # never an empty piece
        (2, 1.5, [1.0, 2.0, 3.0, 4.0, 5.0]),  # whichever is due first
        (4, 1.5, [1.5, 3.0, 4.5, 5.0]),
        (0, 60.0, [5.0]),
    ],
)
def test_chunks_come_with_the_first_token_after_their_time(
    every: int, every_s: float, times: list[float]
) -> None:
    async def main() -> list[tuple[float, Chunk]]:
        return await timed(await started(), ask("a", every=every, every_s=every_s))

    assert [time for time, _ in simulate(main())] == times


def test_requests_beyond_the_places_wait_their_turn() -> None:
    async def main() -> list[Any]:
        engine = await started(max_concurrency=2)
        return await asyncio.gather(*(timed(engine, ask(str(i), seed=i)) for i in range(5)))

    ends = [chunks[-1][0] for chunks in simulate(main())]
    assert ends == [5.0, 5.0, 10.0, 10.0, 15.0]


def test_abort_returns_the_tokens_of_the_time_that_passed_and_resumes() -> None:
    async def main() -> Any:
        engine = await started()
        asyncio.get_running_loop().call_later(1.7, engine.abort, "a")
        first = await timed(engine, ask("a"))
        rest = await timed(engine, ask("a", prefix=first[0][1].tokens))
        whole = await timed(engine, ask("a"))
        return first, rest, whole

    first, rest, whole = simulate(main())
    assert (first[0][0], sizes(first), first[0][1].finish_reason) == (1.7, [3], "abort")
    assert rest[-1][0] == pytest.approx(1.7 + 7 * 0.5)
    assert first[0][1].tokens + rest[0][1].tokens == whole[0][1].tokens
    assert first[0][1].logprobs + rest[0][1].logprobs == whole[0][1].logprobs


@pytest.mark.parametrize(
    ("mode", "ends", "spans", "pause"),
    [
        ("finish", 5.0, [(0, 10)], 2.0),
        ("keep", 7.0, [(0, 4), (1, 6)], 2.0),
        ("recompute", 7.0, [(0, 4), (1, 6)], 2.0),
        ("abort", 2.2, [(0, 4)], 2.0),
    ],
)
def test_a_push_takes_its_time_and_stamps_what_comes_later(
    mode: str, ends: float, spans: list[tuple[int, int]], pause: float
) -> None:
    async def main() -> Any:
        engine = await started(swap_s=2.0)
        running = asyncio.ensure_future(timed(engine, ask("a")))
        await asyncio.sleep(2.2)
        report = await engine.load_weights(1, 1, {}, OnNewWeights(mode))
        return report, await running, engine.version

    report, chunks, version = simulate(main())
    assert chunks[-1][0] == pytest.approx(ends)
    assert [(s.version, s.num_tokens) for s in chunks[-1][1].spans] == spans
    assert report.pause_s == pytest.approx(pause)
    assert version == (1, 1)


def test_finish_waits_for_the_last_of_the_running() -> None:
    async def main() -> Any:
        engine, loop = await started(), asyncio.get_running_loop()
        first = asyncio.ensure_future(timed(engine, ask("a")))
        await asyncio.sleep(2.0)
        second = asyncio.ensure_future(timed(engine, ask("b", seed=2)))
        await asyncio.sleep(0.2)
        await engine.load_weights(1, 1, {}, OnNewWeights.FINISH)
        return loop.time(), await first, await second

    swapped, first, second = simulate(main())
    assert swapped == pytest.approx(7.0)
    assert [chunks[-1][1].spans[0].version for chunks in (first, second)] == [0, 0]


def test_lengths_follow_their_distribution() -> None:
    lengths = Lengths(
        median=25, sigma=0.6, min_tokens=4, max_tokens=128, straggler_fraction=0.02, straggler_factor=8
    )
    plain = Lengths(median=25, sigma=0.6, min_tokens=4, max_tokens=128)
    drawn = np.array([lengths.draw(seed) for seed in range(8000)])
    without = np.array([plain.draw(seed) for seed in range(8000)])
    assert (without.min() >= 4, without.max() <= 128) == (True, True)
    assert abs(np.median(without) - 25) <= 1
    assert abs(np.log(without).std() - 0.6) < 0.05
    stragglers = drawn != without
    assert (drawn[stragglers] == 8 * without[stragglers]).all()
    assert abs(stragglers.mean() - 0.02) < 0.006
    assert abs(np.median(without[stragglers]) - 25) <= 4  # any answer may straggle, not the short ones


def test_tokens_are_a_function_of_seed_and_position() -> None:
    async def main() -> Any:
        engine = Scripted(lengths=Lengths(median=10, sigma=0.8), vocab_size=50)
        await engine.start()
        return [(await timed(engine, ask(str(s), seed=s)))[0][1] for s in (1, 2, 1)]

    one, two, again = simulate(main())
    assert one == again
    assert one.tokens != two.tokens
    assert tokens_of(one.tokens).max() < 50


def test_wrong_numbers_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Scripted(lengths=Lengths(median=0, min_tokens=9, max_tokens=8), token_latency_s=-1, max_concurrency=0)
    assert len(caught.value.problems) == 4
    assert "max_tokens = 8" in str(caught.value)


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, asyncrl.engines.scripted; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
