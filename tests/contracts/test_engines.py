"""One contract over the engines: embedded and scripted. Every wait here has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_case import (
    CONFIG,
    DEADLINE_S,
    LONG,
    PROMPT,
    VOCAB,
    Answer,
    Case,
    answer,
    ask,
    begin,
    collect,
    swapped_in_the_middle,
    turns,
    weights,
)
from safetensors.torch import save_file

from asyncrl.engines.base import Engine, GenerateRequest, OnNewWeights, SamplingParams
from asyncrl.engines.embedded import Embedded
from asyncrl.engines.scripted import Lengths, Scripted
from asyncrl.engines.text import decode_letters
from asyncrl.errors import RunError
from asyncrl.messages.sample import Span, pack_tokens


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(0), path / "model.safetensors")
    return path


@pytest.fixture(params=["embedded", "scripted"])
def case(request: pytest.FixtureRequest, model_dir: Path) -> Case:
    if request.param == "embedded":

        def embedded(**options: Any) -> Engine:
            return Embedded(model_dir, max_context_len=4096, **options)

        return Case(embedded, weights, computes_elsewhere=True)

    def scripted(**options: Any) -> Engine:
        return Scripted(vocab_size=VOCAB, lengths=Lengths(median=12, max_tokens=30), **options)

    slowly = {"token_latency_s": 0.0005}
    return Case(scripted, lambda _: {}, computes_elsewhere=False, slowly=slowly)


async def test_a_seed_fixes_the_answer_whatever_else_runs(case: Case) -> None:
    async with case.engine() as engine:
        (alone,) = await answer(engine, ask())
        others = [ask(f"b{i}", seed=100 + i, max_new_tokens=3 + 4 * i) for i in range(6)]
        crowd = await answer(engine, *others, ask())
    assert crowd[-1].tokens == alone.tokens
    assert len({tuple(a.tokens[:3]) for a in crowd}) > 1
    assert len(alone.tokens) == LONG


async def test_a_prompt_without_a_prefix_key_gives_the_same_answer(case: Case) -> None:
    async with case.engine() as engine:
        (shared,) = await answer(engine, ask())
        request = GenerateRequest(uid="x", prompt=PROMPT, params=ask().params, seed=7)
        (single,) = await answer(engine, request)
    assert single.tokens == shared.tokens
    np.testing.assert_allclose(single.logprobs, shared.logprobs, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 2, 17, LONG - 1])
async def test_a_resumed_answer_continues_as_if_it_had_never_stopped(case: Case, cut: int) -> None:
    async with case.engine() as engine:
        (whole,) = await answer(engine, ask())
        prefix = pack_tokens(whole.tokens[:cut])
        (rest,) = await answer(engine, ask(prefix=prefix))
    assert rest.tokens == whole.tokens[cut:]
    np.testing.assert_allclose(rest.logprobs, whole.logprobs[cut:], atol=1e-4)
    assert whole.text.endswith(rest.text)
    assert len(rest.text) == LONG - cut


async def test_a_prefix_that_is_complete_gives_one_empty_chunk(case: Case) -> None:
    async with case.engine() as engine:
        (whole,) = await answer(engine, ask())
        (rest,) = await answer(engine, ask(prefix=pack_tokens(whole.tokens)))
    assert (rest.tokens, rest.reason, len(rest.chunks)) == ([], "length", 1)


async def test_abort_hands_back_what_was_sampled(case: Case) -> None:
    gate = case.gate()
    async with case.engine(decode=gate) as engine:
        iterator, first = await begin(engine, ask(every=4))
        engine.abort("a")
        engine.abort("nobody")
        gate.opened.set()
        partial = Answer([first, *(await collect(iterator)).chunks])
        (whole,) = await answer(engine, ask())
        (rest,) = await answer(engine, ask(prefix=pack_tokens(partial.tokens)))
    assert partial.reason == "abort"
    assert 4 <= len(partial.tokens) < LONG
    assert partial.tokens + rest.tokens == whole.tokens
    assert partial.text + rest.text == whole.text


async def test_abort_of_a_waiting_request_is_empty(case: Case) -> None:
    gate = case.gate()
    async with case.engine(decode=gate, max_concurrency=1) as engine:
        running, _ = await begin(engine, ask("running", every=4))
        waiting = asyncio.ensure_future(collect(engine.generate(ask("waiting"))))
        await turns()
        engine.abort("waiting")
        gate.opened.set()
        given_up = await waiting
        await collect(running)
    assert (given_up.tokens, given_up.reason) == ([], "abort")


async def test_closing_the_iterator_ends_the_request(case: Case) -> None:
    gate = case.gate()
    async with case.engine(decode=gate, max_concurrency=1) as engine:
        endless, _ = await begin(engine, ask("endless", every=4, max_new_tokens=4000))
        await endless.aclose()
        gate.opened.set()
        (after,) = await answer(engine, ask("after"))
        assert len(after.tokens) == LONG
        assert engine.statistics().generated_tokens < 1000


async def test_spans_and_log_probabilities_cover_every_token(case: Case) -> None:
    async with case.engine() as engine:
        (got,) = await answer(engine, ask(every=6))
    for chunk in got.chunks:
        assert sum(s.num_tokens for s in chunk.spans) * 4 == len(chunk.tokens) == len(chunk.logprobs)
    assert (got.logprobs <= 0).all()
    assert np.isfinite(got.logprobs).all()
    assert got.text == decode_letters(got.tokens)


async def test_progress_comes_at_least_every_so_many_tokens(case: Case) -> None:
    async with case.engine() as engine:
        often, once = await answer(engine, ask("a", every=6), ask("b"))
    sizes = [len(c.tokens) // 4 for c in often.chunks]
    assert max(sizes) <= 6
    assert [c.finish_reason for c in often.chunks[:-1]] == [None] * (len(sizes) - 1)
    assert len(once.chunks) == 1
    assert often.tokens == once.tokens


async def test_progress_comes_when_its_time_has_come_whatever_its_tokens(case: Case) -> None:
    """Fails without the time rule: the first request would come in one piece."""
    async with case.engine(**case.slowly) as engine:
        soon, late, both = await answer(
            engine, ask("a", every_s=1e-9), ask("b", every_s=1e6), ask("c", every=6, every_s=1e6)
        )
    assert [len(c.tokens) // 4 for c in soon.chunks] == [1] * LONG
    assert [c.finish_reason for c in soon.chunks] == [None] * (LONG - 1) + ["length"]
    assert len(late.chunks) == 1
    assert [len(c.tokens) // 4 for c in both.chunks] == [6, 6, 6, 6, 6, 6, 4]
    assert soon.tokens == late.tokens == both.tokens
    assert sum(s.num_tokens for s in soon.spans) == LONG


@pytest.mark.parametrize("mode", [OnNewWeights.KEEP, OnNewWeights.RECOMPUTE])
async def test_a_swap_under_a_running_request_shows_in_its_spans(case: Case, mode: OnNewWeights) -> None:
    async with swapped_in_the_middle(case, mode) as (engine, during, report, later):
        assert engine.version == (1, 2)
    assert [(s.version, s.incarnation) for s in during.spans] == [(0, 1), (1, 2)]
    assert (len(during.tokens), during.reason) == (LONG, "length")
    assert report.aborted == 0
    assert report.pause_s >= 0
    known = 5 + during.spans[0].num_tokens
    assert report.recomputed_tokens in ([0] if mode is OnNewWeights.KEEP else [known - 1, known])
    assert later.spans == [Span(1, 2, LONG)]


async def test_abort_mode_hands_back_partials_that_the_new_version_resumes(case: Case) -> None:
    async with swapped_in_the_middle(case, OnNewWeights.ABORT) as (engine, during, report, later):
        (rest,) = await answer(engine, ask(prefix=pack_tokens(during.tokens)))
    assert (during.reason, report.aborted) == ("abort", 1)
    assert [s.version for s in during.spans] == [0]
    assert rest.spans == [Span(1, 2, LONG - len(during.tokens))]
    assert later.spans == [Span(1, 2, LONG)]


async def test_finish_mode_waits_for_the_running_and_holds_the_waiting(case: Case) -> None:
    async with swapped_in_the_middle(case, OnNewWeights.FINISH) as (engine, during, report, later):
        assert engine.version == (1, 2)
    assert during.spans == [Span(0, 1, LONG)]
    assert later.spans == [Span(1, 2, LONG)]
    assert report.aborted == 0


@pytest.mark.parametrize("mode", list(OnNewWeights))
async def test_a_push_to_an_idle_engine_concerns_what_comes_later(case: Case, mode: OnNewWeights) -> None:
    async with case.engine() as engine:
        (before,) = await answer(engine, ask())
        report = await engine.load_weights(3, 1, case.weights(1), mode)
        (after,) = await answer(engine, ask())
        await engine.load_weights(4, 1, case.weights(0), mode)
        (again,) = await answer(engine, ask())
    assert (report.aborted, report.recomputed_tokens) == (0, 0)
    assert [a.spans for a in (before, after, again)] == [[Span(v, 1, LONG)] for v in (0, 3, 4)]
    assert again.tokens == before.tokens
    assert (after.tokens != before.tokens) == case.computes_elsewhere  # the scripted one has no weights


async def test_a_stop_token_ends_the_answer_and_stays_in_it(case: Case) -> None:
    async with case.engine() as engine:
        (whole,) = await answer(engine, ask())
        stop = whole.tokens[11]
        (cut,) = await answer(engine, ask(stop_token_ids=[stop]))
    end = whole.tokens.index(stop) + 1
    assert cut.tokens == whole.tokens[:end]
    assert cut.reason == "stop"
    assert cut.text == whole.text[:end]


async def test_end_tokens_are_not_taken_before_the_minimum(case: Case) -> None:
    async with case.engine() as engine:
        answers = await answer(
            engine,
            *(
                ask(str(i), seed=i, ignore_eos=False, min_new_tokens=25, stop_token_ids=[2, 3, 4])
                for i in range(8)
            ),
        )
    assert all(25 <= len(a.tokens) <= LONG for a in answers)
    assert any(a.reason == "stop" for a in answers)


async def test_an_answer_is_never_longer_than_its_limit(case: Case) -> None:
    async with case.engine() as engine:
        answers = await answer(
            engine,
            *(
                ask(str(i), seed=i, ignore_eos=False, max_new_tokens=i + 1, stop_token_ids=[2, 3, 4])
                for i in range(30)
            ),
        )
    assert all(len(a.tokens) <= i + 1 for i, a in enumerate(answers))
    assert all(a.reason == "stop" for i, a in enumerate(answers) if len(a.tokens) <= i)
    assert {a.reason for a in answers} == {"stop", "length"}


async def test_more_requests_than_places_all_end(case: Case) -> None:
    async with case.engine(max_concurrency=2) as engine:
        crowd = await answer(engine, *(ask(str(i), seed=i, max_new_tokens=5 + i) for i in range(9)))
        statistics = engine.statistics()
    assert [len(a.tokens) for a in crowd] == [5 + i for i in range(9)]
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.generated_tokens == sum(5 + i for i in range(9))


async def test_a_failure_reaches_everybody_and_nobody_hangs(case: Case) -> None:
    def broken(_: list[int]) -> str:
        raise ZeroDivisionError("broken decode")

    async with case.engine(decode=broken) as engine:
        requests = [ask(str(i), seed=i, every=4) for i in range(3)]
        runs = [asyncio.ensure_future(collect(engine.generate(r))) for r in requests]
        results = await asyncio.gather(*runs, return_exceptions=True)
        assert all(isinstance(r, RunError) and "broken decode" in str(r) for r in results), results
        with pytest.raises(RunError, match="broken decode"):
            await answer(engine, ask("later"))
        with pytest.raises(RunError, match="broken decode"):
            await engine.load_weights(1, 1, case.weights(1), OnNewWeights.KEEP)


async def test_close_aborts_what_runs_and_may_be_called_twice(case: Case) -> None:
    gate = case.gate()
    async with case.engine(decode=gate) as engine:
        iterator, first = await begin(engine, ask(every=4))
        closing = asyncio.ensure_future(engine.close())
        await turns()
        gate.opened.set()
        partial = Answer([first, *(await collect(iterator)).chunks])
        await closing
        await engine.close()
        assert partial.reason == "abort"
        assert len(partial.tokens) < LONG
        with pytest.raises(RunError, match="closed"):
            await answer(engine, ask())


async def test_wrong_requests_are_refused_by_name_and_harm_nobody(case: Case) -> None:
    gate = case.gate()
    async with case.engine(decode=gate) as engine:
        iterator, first = await begin(engine, ask(every=4))
        wrong = {
            "uid": ask(),
            "max_new_tokens": ask("b", max_new_tokens=0),
            "min_new_tokens": ask("c", min_new_tokens=LONG + 1),
            "temperature": ask("d", temperature=-1.0),
            "top_p": ask("e", top_p=0.0),
            "top_k": ask("f", top_k=0),
            "progress_every_s": ask("h", every_s=-1.0),
            "prompt": GenerateRequest(uid="g", prompt=b"", params=SamplingParams(), seed=1),
        }
        for word, request in wrong.items():
            with pytest.raises(ValueError, match=word):
                await answer(engine, request)
        gate.opened.set()
        rest = await collect(iterator)
    assert len(first.tokens) // 4 + len(rest.tokens) == LONG


async def test_a_cancelled_consumer_frees_its_place(case: Case) -> None:
    gate = case.gate()
    async with case.engine(decode=gate, max_concurrency=1) as engine:
        endless = engine.generate(ask("endless", every=4, max_new_tokens=4000))
        async with asyncio.timeout(DEADLINE_S):
            await anext(endless)
        waiting = asyncio.ensure_future(collect(engine.generate(ask("waiting"))))
        await turns()
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await endless.aclose()
        gate.opened.set()
        (after,) = await answer(engine, ask("waiting"))
    assert len(after.tokens) == LONG
