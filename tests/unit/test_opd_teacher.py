"""A teacher behind a server: its log-probs come to the trainer as they are, or the sample fails by name."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from aiohttp import web

from asyncrl.errors import ConfigError, DataError, ExitCode, RewardError
from asyncrl.messages.hooks import HookSample, hook_sample
from asyncrl.messages.sample import Lane, Sample, Score, logprobs_of, pack_logprobs, tokens_of
from asyncrl.rewards.base import FailureKind, RewardFailure, RewardSpec, normalise
from asyncrl.rewards.judge import Judge
from asyncrl.rewards.sandbox import Sandbox
from asyncrl.rewards.teacher import Teacher
from asyncrl.topology import words
from asyncrl.topology.plan import Plan
from asyncrl.train.torch import TorchBackend
from tests.support import topologies
from tests.support.inside import run_inside
from tests.train_support import make_groups, make_plan, make_sample, write_model

Answer = Callable[[dict[str, Any]], Awaitable[web.Response]]
SAMPLE = make_sample(
    group_id=7, index=1, prompt=[5, 6], response=[8, 9, 10], logprobs=[-1.0] * 3, reward=0.5, mask=[1, 0, 1]
)
SCORE = Score(reward=0.5)


class SGLang:
    """What SGLang 0.5.23 answers to a request for the log-probs of given tokens, in a thread of its own."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.requests: list[dict[str, Any]] = []
        self.next: list[Answer] = []
        """Answers to give before those of the model."""
        self.url = ""

    async def generate(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.requests.append(asked)
        return await self.next.pop(0)(asked) if self.next else web.json_response(self.answer(asked))

    @torch.no_grad()
    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """As recorded: of the logits as they are, whatever the temperature; null for the first token."""
        ids, first = asked["input_ids"], asked["logprob_start_len"]
        logits = self.model(torch.tensor([ids])).logits[0, :-1]
        found = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        tokens = [[None, ids[first], None]]
        tokens += [[found[place - 1], ids[place], None] for place in range(first + 1, len(ids))]
        meta: dict[str, Any] = {"id": "1", "finish_reason": {"type": "length", "length": 0}}
        meta |= {"prompt_tokens": len(ids), "weight_version": "default", "input_token_logprobs": tokens}
        return {"text": "", "output_ids": [], "meta_info": {**meta, "output_token_logprobs": []}}

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()


@contextmanager
def served(model_dir: Path) -> Iterator[SGLang]:
    server, ready, stop, loop = (
        SGLang(model_dir),
        threading.Event(),
        asyncio.Event(),
        asyncio.new_event_loop(),
    )
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(ready, stop),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher)."""
    place = tmp_path_factory.mktemp("opd")
    return write_model(place / "student", seed=0), write_model(place / "teacher", seed=1)


@pytest.fixture(scope="module")
def running(models: tuple[Path, Path]) -> Iterator[SGLang]:
    with served(models[1]) as server:
        yield server


@pytest.fixture
def server(running: SGLang) -> SGLang:
    running.requests.clear()
    running.next.clear()
    return running


async def complete(
    url: str, samples: list[Sample], results: list[Any] | None = None, *, timeout_s: float = 20.0
) -> list[Any]:
    teacher = Teacher(url, temperature=0.5, timeout_s=timeout_s)
    try:
        return list(await teacher.complete(samples, results or [SCORE] * len(samples)))
    finally:
        await teacher.close()


async def taught(url: str) -> list[list[Sample]]:
    """A batch whose scores have been completed by the server."""
    groups = make_groups(seed=3)
    flat = [sample for group in groups for sample in group]
    for sample, score in zip(flat, await complete(url, flat, [s.score for s in flat]), strict=True):
        sample.score = score
    return groups


def backend(models: tuple[Path, Path], **algorithm: Any) -> TorchBackend:
    made = TorchBackend(make_plan(models[0], trainer={"max_tokens_per_gpu": 100}, algorithm=algorithm))
    made.load()
    return made


# What comes to the trainer.


async def test_an_engines_log_probs_are_a_frozen_models(server: SGLang, models: tuple[Path, Path]) -> None:
    groups = await taught(server.url)
    prepared = backend(models, use_opd=True, opd_type="engine").prepare(groups)
    frozen = backend(models, use_opd=True, opd_teacher_load=str(models[1]))
    inside = frozen.prepare(make_groups(seed=3))
    data, rollout = replace(inside.data), frozen._rollout
    rollout.passes.log_probs("teacher_R", rollout.policies.teacher, inside.forwards, data, prefix="teacher_")
    assert prepared.data.teacher_R is not None
    torch.testing.assert_close(prepared.data.teacher_R, data.teacher_R, atol=1e-4, rtol=0)
    assert float(prepared.data.mask_R.min()) == 0, "masked tokens are among them"
    assert not torch.allclose(prepared.data.teacher_R, prepared.data.rollout_R, atol=0.1)


@pytest.mark.parametrize(
    "algorithm", [{"use_opd": True, "opd_kl_coef": 0.3}, {"advantage_estimator": "on_policy_distillation"}]
)
async def test_training_is_the_same_from_both(
    algorithm: dict[str, Any], server: SGLang, models: tuple[Path, Path]
) -> None:
    outside = backend(models, opd_type="engine", **algorithm)
    inside = backend(models, opd_teacher_load=str(models[1]), **algorithm)
    theirs = outside.train(outside.prepare(await taught(server.url)), rollout_step=0).metrics
    ours = inside.train(inside.prepare(make_groups(seed=3)), rollout_step=0).metrics
    assert abs(ours["train/opd_reverse_kl"]) > 0.01
    for name in ("train/opd_reverse_kl", "rollout/advantages", "train/pg_loss", "train/grad_norm"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name


async def test_a_batch_with_a_sample_without_is_refused_by_its_name(
    server: SGLang, models: tuple[Path, Path]
) -> None:
    groups = await taught(server.url)
    groups[1][2].score = SCORE
    with pytest.raises(DataError, match=r"sample 1\.2: has no teacher log-probs.*teacher_url"):
        backend(models, advantage_estimator="on_policy_distillation", opd_type="engine").prepare(groups)


async def test_log_probs_nobody_asked_for_change_nothing(server: SGLang, models: tuple[Path, Path]) -> None:
    plain, given = backend(models), backend(models)
    expected = plain.train(plain.prepare(make_groups(seed=3)), rollout_step=0).metrics
    found = given.train(given.prepare(await taught(server.url)), rollout_step=0).metrics
    assert found["train/loss"] == expected["train/loss"]
    assert "train/opd_reverse_kl" not in found


# The request and its answer.


async def test_the_request_is_sglangs(server: SGLang) -> None:
    (score,) = await complete(server.url, [SAMPLE])
    assert server.requests == [
        {
            "input_ids": [5, 6, 8, 9, 10],
            "sampling_params": {"temperature": 0.5, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 1,
        }
    ]
    assert score.reward == 0.5
    assert len(logprobs_of(score.teacher_logprobs)) == 3


async def test_a_whole_address_is_taken_as_it_is(server: SGLang) -> None:
    bare, slash, whole = [
        (await complete(f"{server.url}{path}", [SAMPLE]))[0] for path in ("", "/", "/generate")
    ]
    assert bare == slash == whole
    (missing,) = await complete(f"{server.url}/v1/elsewhere", [SAMPLE])
    assert "status 404" in missing.message


async def test_only_what_is_trained_and_has_none_is_asked_for(server: SGLang) -> None:
    failed = RewardFailure(kind=FailureKind.CRASH, message="boom")
    own = Score(reward=1.0, teacher_logprobs=pack_logprobs([-3.0] * 3))
    held_out = msgspec.structs.replace(SAMPLE, lane=Lane.EVAL)
    empty = make_sample(group_id=7, index=2, prompt=[5], response=[], logprobs=[], reward=0.0)
    given = [failed, own, SCORE, SCORE]
    assert await complete(server.url, [SAMPLE, SAMPLE, held_out, empty], given) == given
    assert server.requests == []


def tokens(*entries: Any) -> dict[str, Any]:
    return {"meta_info": {"input_token_logprobs": list(entries)}}


GOOD = ([None, 6, None], [-1.0, 8, None], [-2.0, 9, None], [-3.0, 10, "x"])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("nonsense", "expected JSON with meta_info.input_token_logprobs"),
        ("{}", "missing required field `meta_info`"),
        ('{"meta_info": {"input_token_logprobs": null}}', "Expected `array`, got `null`"),
        (tokens([None, 6]), "Expected `array` of length 3"),
        (tokens(), "answered 0 log-probs; expected 3"),
        (tokens(*GOOD[:1], *GOOD[2:]), "answered 2 log-probs; expected 3"),
        (tokens(*GOOD[:3], [-3.0, 11, None]), "answered for token 11 at response token 2; expected 10"),
        (tokens(GOOD[0], [None, 8, None], *GOOD[2:]), "answered None at response token 0"),
        (json.dumps(tokens(*GOOD)).replace("-2.0", "-1e999"), "expected"),
    ],
)
async def test_an_answer_of_another_shape_fails_the_sample_by_name(
    answer: Any, says: str, server: SGLang
) -> None:
    async def odd(_: dict[str, Any]) -> web.Response:
        return web.Response(text=answer if isinstance(answer, str) else json.dumps(answer))

    server.next.append(odd)
    odd_one, fine = await complete(server.url, [SAMPLE, SAMPLE])
    assert isinstance(fine, Score) != isinstance(odd_one, Score), "the other sample has its score"
    failure = fine if isinstance(odd_one, Score) else odd_one
    assert failure.kind is FailureKind.INVALID
    assert failure.message.startswith(f"group 7 sample 1: teacher: {server.url}/generate answered ")
    assert says in failure.message


async def test_entries_before_the_response_are_left_out(server: SGLang) -> None:
    async def from_the_start(_: dict[str, Any]) -> web.Response:
        return web.json_response(tokens([None, 5, None], [-9.0, 6, None], *GOOD[1:]))

    server.next.append(from_the_start)
    (score,) = await complete(server.url, [SAMPLE])
    assert logprobs_of(score.teacher_logprobs).tolist() == [-1.0, -2.0, -3.0]


# What goes wrong on the way.


def status(code: int, text: str = "") -> Answer:
    async def answer(_: dict[str, Any]) -> web.Response:
        return web.Response(status=code, text=text)

    return answer


async def test_a_server_in_trouble_is_asked_again(server: SGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncrl.rewards.service.FIRST_PAUSE_S", 0.01)
    server.next += [status(500), status(503), status(429)]
    (score,) = await complete(server.url, [SAMPLE])
    assert isinstance(score, Score)
    assert len(server.requests) == 4


async def test_a_refusal_is_final_and_told(server: SGLang) -> None:
    server.next.append(status(400, "longer than the model's context length"))
    (failure,) = await complete(server.url, [SAMPLE])
    assert failure.kind is FailureKind.EXCEPTION
    assert "status 400" in failure.message
    assert "context length" in failure.message
    assert len(server.requests) == 1


async def test_a_slow_server_costs_the_sample_its_time_and_no_more(server: SGLang) -> None:
    async def never(_: dict[str, Any]) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    server.next.append(never)
    (failure,) = await complete(server.url, [SAMPLE], timeout_s=0.2)
    assert failure.kind is FailureKind.TIMEOUT
    assert failure.message.startswith(f"group 7 sample 1: teacher: {server.url}/generate took over 0.2 s")


async def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (failure,) = await complete(url, [SAMPLE], timeout_s=0.3)
    assert failure.kind is FailureKind.TIMEOUT
    assert f"{url}/generate took over 0.3 s; last: ClientConnectorError Cannot connect" in failure.message


# A reward function that brings them itself.


@pytest.mark.parametrize("values", [[-1.0, -2.0, -3], np.array([-1, -2, -3.0]), torch.tensor([-1.0, -2, -3])])
def test_what_a_reward_function_sets_is_kept(values: Any) -> None:
    hook = hook_sample(SAMPLE)
    assert hook.teacher_log_probs is None
    hook.teacher_log_probs = values
    score = normalise(1.0, SAMPLE, hook, spec=RewardSpec(use="a:b"))
    assert logprobs_of(score.teacher_logprobs).tolist() == [-1.0, -2.0, -3.0]
    assert hook_sample(msgspec.structs.replace(SAMPLE, score=score)).teacher_log_probs == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([-1.0], "to 1 values; 3 numbers are needed"),
        ([], "to 0 values; 3 numbers are needed"),
        (-1.0, r"to -1\.0; 3 numbers are needed"),
        ([-1.0, float("nan"), -1.0], r"\[1\] to nan; a finite number"),
        ([-1.0, -1.0, None], r"\[2\] to None; a finite number"),
    ],
)
def test_what_cannot_be_log_probs_is_refused_by_the_samples_name(values: Any, says: str) -> None:
    hook = hook_sample(SAMPLE)
    hook.teacher_log_probs = values
    with pytest.raises(RewardError, match=r'reward "a:b": group 7 sample 1: set teacher_log_probs.*' + says):
        normalise(1.0, SAMPLE, hook, spec=RewardSpec(use="a:b"))


async def test_a_users_reward_reaches_the_trainer(tmp_path: Path, models: tuple[Path, Path]) -> None:
    code = tmp_path / "own_teacher.py"
    code.write_text(
        "def judge(args, sample):\n"
        "    sample.teacher_log_probs = [-0.5 * token for token in sample.tokens[-sample.response_length:]]\n"
        "    return 1.0\n"
    )
    groups = make_groups(seed=5, num_groups=1)
    async with Sandbox(RewardSpec(use=f"{code}:judge")) as sandbox:
        for sample, score in zip(groups[0], await sandbox.score(groups[0]), strict=True):
            assert isinstance(score, Score)
            sample.score = score
    prepared = backend(models, use_opd=True, opd_type="engine").prepare(groups)
    ids = np.concatenate([tokens_of(sample.tokens) for sample in groups[0]])
    assert prepared.data.teacher_R is not None
    assert prepared.data.teacher_R.tolist() == (-0.5 * ids).tolist()


async def test_no_reward_is_zero() -> None:
    assert await Judge(RewardSpec(use="none")).score(HookSample(response="x")) == 0.0


# The topology.

ENGINE = ["algorithm.use_opd=true", "algorithm.opd_type=engine"]
URL = "reward.teacher_url=http://teacher:30000"


def compiled(*overrides: str, tables: str = "[[reward]]") -> Plan:
    return topologies.compiled(*overrides, tables=tables)


@pytest.mark.parametrize(
    ("overrides", "tables", "says"),
    [
        (ENGINE, "[[reward]]", 'required by algorithm.opd_type = "engine" with use = "math"'),
        (
            ["algorithm.advantage_estimator=on_policy_distillation", "algorithm.opd_type=engine"],
            '[[reward]]\nteacher_url = "http://t"\n[[reward]]\nname = "other"',
            'reward "other".teacher_url: required',
        ),
        ([URL], "[[reward]]", "nothing uses the teacher's log-probs"),
        ([*ENGINE, "reward.teacher_url=teacher:30000"], "[[reward]]", "starts with http://"),
    ],
)
def test_a_teacher_that_is_missing_or_idle_is_refused(overrides: list[str], tables: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compiled(*overrides, tables=tables)
    (problem,) = caught.value.problems
    assert says in problem


@pytest.mark.parametrize(
    "overrides",
    [
        [*ENGINE, URL],
        [*ENGINE, URL, "reward.use=none"],
        [*ENGINE, "reward.use=my:judge"],
        [URL, "algorithm.custom_advantage_function_path=my:advantages"],
    ],
)
def test_a_teacher_that_is_needed_and_there_is_fine(overrides: list[str]) -> None:
    compiled(*overrides)


def test_a_temperature_that_sglang_does_not_apply_is_warned_of() -> None:
    warned = words.warnings(compiled(*ENGINE, URL, "rollout.rollout_temperature=0.7"))
    assert any("reward.teacher_url" in line and "rollout_temperature = 0.7" in line for line in warned)
    assert not any("teacher_url" in line for line in words.warnings(compiled(*ENGINE, URL)))


# All of it.


def test_a_run_distils_from_a_server(tmp_path: Path, model: Path) -> None:
    with served(model) as server:
        run = run_inside(
            tmp_path,
            model,
            {
                "reward.use": "none",
                "reward.teacher_url": server.url,
                "algorithm.advantage_estimator": "on_policy_distillation",
                "algorithm.opd_type": "engine",
                "trainer.lr": 1e-2,
            },
        )
        asked = len(server.requests)
    assert run.code == ExitCode.FINISHED, run.detail
    distances = [
        row["train/opd_reverse_kl"] for row in run.metrics("trainer") if "train/opd_reverse_kl" in row
    ]
    # The teacher is the initial model: nothing to learn at first, and a distance once it has moved.
    assert abs(distances[0]) < 1e-4
    assert asked >= 3 * 4 * 2
