"""What hooks receive, what they may give back, and the built-in rewards by themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from asyncrl.errors import ConfigError, DataError, ProtocolError, RewardError
from asyncrl.messages.hooks import GENERATED_REWARD, Args, HookSample, hook_sample, prompt_of, segment_of
from asyncrl.messages.sample import (
    Lane,
    Prompt,
    Sample,
    Score,
    Span,
    Status,
    assemble,
    logprobs_of,
    mask_of,
    pack_logprobs,
    pack_mask,
    pack_tokens,
    tokens_of,
)
from asyncrl.rewards.base import RewardSpec, check_group, normalise
from asyncrl.rewards.builtin.boxed import last_boxed
from asyncrl.rewards.builtin.math_answer import math_reward
from asyncrl.rewards.builtin.remote import RemoteReward
from asyncrl.rewards.builtin.simple import deterministic_random, random_reward
from asyncrl.rewards.judge import Judge
from plugins import filters, generate, rewards


def make_sample(**changes: Any) -> Sample:
    values: dict[str, Any] = {
        "group_id": 7,
        "index": 1,
        "prompt": Prompt(tokens=pack_tokens([5, 6]), text="2+2=", label="4", metadata={"level": 1}),
        "status": Status.COMPLETED,
        "tokens": pack_tokens([8, 9, 10]),
        "logprobs": pack_logprobs([-0.5, -0.25, 0.0]),
        "loss_mask": pack_mask([1, 1, 0]),
        "spans": [Span(3, 1, 2), Span(4, 1, 1)],
        "text": "4",
        "metadata": {"level": 1},
    }
    return Sample(**{**values, **changes})


def test_hooks_receive_slimes_attributes_and_lists() -> None:
    hook = hook_sample(make_sample(score=Score(reward=1.0, detail={"acc": 1.0})), group_size=4)
    assert (hook.group_index, hook.index) == (7, 29)
    assert hook.tokens == [5, 6, 8, 9, 10]
    assert hook.response_length == 3
    assert hook.loss_mask == [1, 1, 0]
    assert hook.rollout_log_probs == [-0.5, -0.25, 0.0]
    assert hook.weight_versions == ["3.1", "4.1"]
    assert hook.status == "completed" == hook.Status.COMPLETED
    assert hook.get_reward_value(SimpleNamespace(reward_key="acc")) == 1.0


def test_a_hooks_copy_is_its_own() -> None:
    sample = make_sample(metadata={"nested": {"a": 1}})
    hook_sample(sample).metadata["nested"]["a"] = 2
    assert sample.metadata == {"nested": {"a": 1}}


def test_to_dict_and_back_keeps_ad_hoc_attributes() -> None:
    hook = hook_sample(make_sample())
    hook.tool_calls = 3  # type: ignore[attr-defined]
    data = hook.to_dict()
    assert data["status"] == "completed"
    assert HookSample.from_dict(data) == hook
    assert HookSample.from_dict(data).tool_calls == 3  # type: ignore[attr-defined]


def test_a_generate_function_without_changes_adds_an_empty_segment() -> None:
    base = make_sample(score=None)
    segment = segment_of(hook_sample(base), base, incarnation=1)
    assert (segment.num_tokens, segment.text, segment.metadata, segment.spans) == (0, "", {}, [])


def test_appended_tokens_become_a_segment_with_exact_spans() -> None:
    base = make_sample(score=None)
    hook = hook_sample(base)
    hook.append_response_tokens([11], text="!", log_probs=[-1.0], meta_info={"weight_version": "5"})
    hook.append_response_tokens([12, 13], text=" hint", trainable=False)
    hook.append_response_tokens([14], text="?", log_probs=[-2.0], meta_info={"weight_version": "6.2"})
    hook.metadata["turns"] = 2
    hook.remove_sample = True
    segment = segment_of(hook, base, incarnation=2)
    assert tokens_of(segment.tokens).tolist() == [11, 12, 13, 14]
    assert mask_of(segment.loss_mask).tolist() == [1, 0, 0, 1]
    assert logprobs_of(segment.logprobs).tolist() == [-1.0, 0.0, 0.0, -2.0]
    assert segment.spans == [Span(5, 2, 3), Span(6, 2, 1)]
    assert segment.text == "! hint?"
    assert segment.metadata == {"turns": 2, "remove_sample": True}
    whole = assemble(group_id=7, index=1, prompt=base.prompt, segments=[segment])
    assert hook_sample(whole).remove_sample


def test_tokens_set_by_hand_count_as_the_oldest_version() -> None:
    base = make_sample(tokens=b"", logprobs=b"", loss_mask=b"", spans=[], text="", status=Status.PENDING)
    hook = hook_sample(base)
    hook.tokens, hook.response, hook.response_length = [5, 6, 1, 2], "ab", 2
    hook.loss_mask, hook.rollout_log_probs = None, [-1.0, -1.0]
    hook.weight_versions = ["9", "8", "11"]
    segment = segment_of(hook, base, incarnation=1)
    assert segment.spans == [Span(8, 1, 2)]
    assert mask_of(segment.loss_mask).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss_mask": [1, 1]}, "loss_mask has 2 values, response_length is 3"),
        ({"loss_mask": [1, 1, 2]}, r"loss_mask holds \[2\]"),
        ({"rollout_log_probs": None}, "rollout_log_probs is None but 2 tokens are trainable"),
        ({"rollout_log_probs": [0.0]}, "rollout_log_probs has 1 values"),
        (
            {"rollout_log_probs": [0.0, float("nan"), 0.0]},
            r"rollout_log_probs\[1\] of a trainable token is nan",
        ),
        (
            {"response_length": 4, "loss_mask": [0] * 4, "rollout_log_probs": [0.0] * 4},
            r"tokens \(5\) must be",
        ),
        ({"tokens": [5, 7, 8, 9, 10]}, "prompt's 2 tokens, unchanged"),
        ({"response": "other"}, "no longer starts with"),
    ],
)
def test_what_is_wrong_with_a_generated_sample_is_named(changes: dict[str, Any], says: str) -> None:
    base = make_sample()
    hook = hook_sample(base)
    vars(hook).update(changes)
    with pytest.raises(ProtocolError, match=f"group 7 sample 1: .*{says}"):
        segment_of(hook, base, incarnation=1)


def test_prompt_of_tokenises_text_and_messages() -> None:
    def tokenize(prompt: Any) -> tuple[str, list[int]]:
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        return text, [ord(c) for c in text]

    messages = [{"role": "user", "content": "hi"}]
    prompt = prompt_of(
        HookSample(index=0, prompt=messages, label=3, metadata={"a": 1}), tokenize, dataset="d"
    )
    assert tokens_of(prompt.tokens).tolist() == [104, 105]
    assert (prompt.text, prompt.messages, prompt.label, prompt.dataset) == ("hi", messages, 3, "d")
    with pytest.raises(DataError, match="sample 4 has an empty prompt"):
        prompt_of(HookSample(index=4), tokenize)


def test_args_behaves_like_the_references_namespace(tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("own_weight: 0.5\neps_clip: 0.3\n")
    args = Args({"eps_clip": 0.2, "rm_type": "math"}, custom_config_path=str(config))
    assert (args.eps_clip, args.own_weight) == (0.3, 0.5)
    assert getattr(args, "missing", 4) == 4
    assert not hasattr(args, "missing")
    assert vars(args)["rm_type"] == "math"
    with pytest.raises(AttributeError, match=r"args\.eps_clipp: no such option; close to it: eps_clip"):
        _ = args.eps_clipp
    config.write_text("- a list\n")
    with pytest.raises(ConfigError, match="custom_config_path"):
        Args({}, custom_config_path=str(config))


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.int64(1), np.bool_(1), np.array(1.0)])
def test_numbers_of_every_kind_are_scores(value: Any) -> None:
    sample = make_sample()
    score = normalise(value, sample, hook_sample(sample), spec=RewardSpec(use="a:b"))
    assert score == Score(reward=1.0)
    assert type(score.reward) is float


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "returned None"),
        ("1.0", "returned str '1.0'"),
        (float("nan"), "returned nan"),
        (float("-inf"), "returned -inf"),
        ([1.0], r"returned list \[1.0\]"),
        (np.array([1.0, 2.0]), "returned ndarray"),
        (10**400, "returned int"),
        ({"score": 1.0}, "set reward_key to one of them"),
    ],
)
def test_what_is_no_reward_is_named_and_never_zero(value: Any, says: str) -> None:
    sample = make_sample()
    with pytest.raises(RewardError, match=f'reward "a:b": group 7 sample 1: .*{says}'):
        normalise(value, sample, hook_sample(sample), spec=RewardSpec(use="a:b"))


def test_dict_rewards_need_their_key_and_keep_their_detail() -> None:
    spec = RewardSpec(use="a:b", reward_key="score", eval_reward_key="acc")
    value = {"score": np.float64(0.5), "acc": True, "pred": "4"}
    sample = make_sample()
    score = normalise(value, sample, hook_sample(sample), spec=spec)
    assert (score.reward, score.detail) == (0.5, {"score": 0.5, "acc": True, "pred": "4"})
    held_out = make_sample(lane=Lane.EVAL)
    assert normalise(value, held_out, hook_sample(held_out), spec=spec).reward == 1.0
    with pytest.raises(RewardError, match='without reward_key "score"'):
        normalise({"acc": 1}, sample, hook_sample(sample), spec=spec)
    with pytest.raises(RewardError, match="cannot travel"):
        normalise({"score": 1, "object": object()}, sample, hook_sample(sample), spec=spec)


def test_what_a_reward_adds_to_its_copy_comes_along() -> None:
    sample = make_sample()
    hook = hook_sample(sample)
    hook.metadata["seen"] = np.int64(2)
    hook.remove_sample = True
    score = normalise(1, sample, hook, spec=RewardSpec(use="a:b"))
    assert score == Score(reward=1.0, metadata={"seen": 2}, remove_sample=True)


def test_a_batched_reward_returns_one_value_each() -> None:
    group = [make_sample(index=i) for i in range(2)]
    spec = RewardSpec(use="a:b", group_rm=True)
    assert check_group(np.array([0.0, 1.0]), group, spec=spec) == [0.0, 1.0]
    with pytest.raises(RewardError, match="returned 1 rewards for 2 samples"):
        check_group([1.0], group, spec=spec)
    with pytest.raises(RewardError, match="a list of 2 rewards"):
        check_group(1.0, group, spec=spec)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        ("none", None),
        (r"\boxed{1", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"first \boxed{3}, no: \boxed{4}", r"\boxed{4}", 1.0),
        ("The answer is 42.", 42, 1.0),
        (r"\boxed{41}", "42", 0.0),
        ("no idea", "42", 0.0),
        ("", "42", 0.0),
        (r"\boxed{}", "42", 0.0),
        (r"\boxed{2x+2}", "2(x+1)", 1.0),
        ("0", 0, 1.0),
    ],
)
def test_math(response: str, label: Any, reward: float) -> None:
    assert math_reward(None, HookSample(response=response, label=label)) == reward


@pytest.mark.parametrize("label", [None, "", "  "])
def test_math_without_a_label_is_an_error_not_a_zero(label: Any) -> None:
    with pytest.raises(ValueError, match="label"):
        math_reward(None, HookSample(response="4", label=label))


def test_coins_are_fair_enough_and_repeatable() -> None:
    hooks = [HookSample(group_index=g, index=g, response=str(g)) for g in range(200)]
    for coin in (random_reward, deterministic_random):
        values = [coin(SimpleNamespace(rollout_seed=1), hook) for hook in hooks]
        assert values == [coin(SimpleNamespace(rollout_seed=1), hook) for hook in hooks]
        assert set(values) == {0.0, 1.0}
        assert 60 < sum(values) < 140


async def test_boxed_sees_only_the_box_and_data_may_choose_a_built_in() -> None:
    judge = Judge(RewardSpec(use="boxed_exact"))
    assert await judge.score(HookSample(response=r"I say \boxed{4}", label="4")) == 1.0
    assert await judge.score(HookSample(response="4", label="4")) == 0.0
    chosen = HookSample(response="4", label="4", metadata={"rm_type": "exact"})
    assert await judge.score(chosen) == 1.0
    with pytest.raises(RewardError, match="data cannot name code"):
        await judge.score(HookSample(metadata={"rm_type": "os:system"}))
    with pytest.raises(
        ConfigError, match=r"metadata\.rm_type: reward \"dapo\" is known but not built in yet"
    ):
        await judge.score(HookSample(metadata={"rm_type": "dapo"}))


async def test_a_reward_that_generation_set_stands() -> None:
    sample = HookSample(response="5", label="4", metadata={GENERATED_REWARD: 0.75})
    assert await Judge(RewardSpec(use="exact")).score(sample) == 0.75


def test_a_judge_that_cannot_be_built_says_why() -> None:
    with pytest.raises(ConfigError, match="remote_rm needs it"):
        Judge(RewardSpec(use="remote_rm"))
    with pytest.raises(ConfigError, match=r"rollout\.buffer_filter_path: expected def name"):
        Judge(RewardSpec(use="exact", buffer_filter_path="plugins.filters:nonzero_std"))


async def test_remote_rm_tries_again_and_returns_what_the_service_says() -> None:
    seen: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(await request.json())
        if len(seen) == 1:
            return web.Response(status=503)
        return web.json_response({"score": 0.5}) if len(seen) == 2 else web.Response(status=404, text="gone")

    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    reward, args = RemoteReward(), SimpleNamespace(rm_url=f"http://127.0.0.1:{port}/")
    try:
        assert await reward(args, HookSample(prompt="p", response="r", label=3)) == {"score": 0.5}
        assert seen == [{"prompt": "p", "response": "r", "label": 3}] * 2
        with pytest.raises(RewardError, match="status 404"):
            await reward(args, HookSample())
    finally:
        await reward.close()
        await runner.cleanup()


async def test_copy_me_rewards() -> None:
    assert rewards.length_aware(HookSample(response=" 4 ", label=4, response_length=100)) == pytest.approx(
        0.9
    )
    value = await rewards.format_and_answer(Args({}), HookSample(response="Answer: 4", label=4))
    assert value == {"score": 1.1, "right": 1.0, "format": 1.0}
    group = [HookSample(response=r, label="4", response_length=n) for r, n in [("4", 9), ("4", 5), ("3", 1)]]
    assert await rewards.best_of_group(None, group) == [0.5, 1.0, 0.0]


def test_copy_me_filters() -> None:
    def group(*values: float) -> list[HookSample]:
        return [HookSample(reward=value) for value in values]

    assert filters.nonzero_std(Args({}), group(0.0, 1.0)).keep
    assert filters.nonzero_std(Args({}), group(1.0, 1.0)) == filters.FilterOutput(
        keep=False, reason="zero_std_1.0"
    )
    assert not filters.nonzero_std(Args({}), group(1.0)).keep
    one, other = HookSample(status=Status.TRUNCATED), HookSample(status=Status.COMPLETED)
    filters.drop_truncated(None, [[one], [other]])
    assert (one.remove_sample, other.remove_sample) == (True, False)
    buffer = [[one], [other]]
    assert filters.pop_first(None, None, buffer, 1) == [[one]]
    assert buffer == [[other]]


class ScriptedReplies:
    """An engine for hooks that answers as SGLang's /generate does, from a list."""

    def __init__(self, *turns: tuple[list[int], str, str]) -> None:
        self.turns = list(turns)
        self.calls: list[tuple[list[int], int]] = []

    async def generate(self, *, input_ids: list[int], sampling_params: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((input_ids, sampling_params["max_new_tokens"]))
        tokens, text, reason = self.turns.pop(0)
        entries = [[-0.5, token, None] for token in tokens]
        meta = {
            "output_token_logprobs": entries,
            "finish_reason": {"type": reason},
            "weight_version": str(3 + len(self.turns)),
        }
        return {"text": text, "meta_info": meta}


async def test_copy_me_generate_tries_once_more_with_a_masked_hint() -> None:
    base = make_sample(tokens=b"", logprobs=b"", loss_mask=b"", spans=[], text="", status=Status.PENDING)
    engine = ScriptedReplies(([1, 2], "no", "stop"), ([3], "####4", "length"))
    args = Args({"engine": engine, "hint_tokens": [70, 71], "hint_text": " hint ", "is_done": "####"})
    hook = await generate.generate(args, hook_sample(base), {"max_new_tokens": 10})
    assert engine.calls == [([5, 6], 10), ([5, 6, 1, 2, 70, 71], 6)]
    segment = segment_of(hook, base, incarnation=1)
    assert mask_of(segment.loss_mask).tolist() == [1, 1, 0, 0, 1]
    assert segment.spans == [Span(4, 1, 4), Span(3, 1, 1)]
    assert (segment.text, hook.status) == ("no hint ####4", Status.TRUNCATED)


async def test_copy_me_generate_leaves_a_finished_answer_alone() -> None:
    base = make_sample(tokens=b"", logprobs=b"", loss_mask=b"", spans=[], text="", status=Status.PENDING)
    args = Args({"engine": ScriptedReplies(([1], "####4", "stop")), "hint_tokens": [70], "is_done": "####"})
    hook = await generate.generate(args, hook_sample(base), {"max_new_tokens": 10})
    assert (hook.response_length, hook.status) == (1, "completed")
