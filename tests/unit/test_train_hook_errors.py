"""What a training hook does wrong is said in one line: the option, what came, what was expected, whose."""

# ruff: noqa: N806 -- tensors carry shape suffixes

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncrl.errors import PluginError
from asyncrl.train.backend import train_plan
from asyncrl.train.data import PreparedBatch, prepare_batch
from asyncrl.train.hooks import TrainHooks
from asyncrl.train.tokens import TokenData
from asyncrl.train.torch import hook_args
from tests.hook_support import (
    ADVANTAGE,
    BEFORE_LOG_PROB,
    BEFORE_STEP,
    CONVERT,
    LOSS,
    POSTPROCESS,
    REDUCER,
    REWARD,
    TIS,
    topology_of,
    user_hook,
    write_hook,
)
from tests.train_support import VOCAB, make_sample

NEEDED: dict[str, dict[str, Any]] = {
    TIS: {"algorithm.use_tis": True},
    LOSS: {"algorithm.loss_type": "custom_loss"},
}
GROUPS = [
    [
        make_sample(
            group_id=group,
            index=index,
            prompt=[3, 4],
            response=[5 + index] * (2 + index),
            logprobs=[-4.0] * (2 + index),
            reward=float(index),
            mask=[1] * (1 + index) + [0],
        )
        for index in range(2)
    ]
    for group in range(2)
]
"""Samples 0.0, 0.1, 1.0, 1.1 with 2, 3, 2, 3 response tokens."""


class Bench:
    """A batch with everything a hook may be handed, and one hook."""

    def __init__(self, option: str, path: str) -> None:
        given = {
            "rollout.rollout_batch_size": 2,
            "rollout.n_samples_per_prompt": 2,
            "rollout.rollout_max_response_len": 8,
            option: path,
            **NEEDED.get(option, {}),
        }
        self.plan = train_plan(topology_of(Path("model"), given))
        self.hooks = TrainHooks(self.plan.algorithm, args=hook_args(self.plan))

    def prepare(self) -> PreparedBatch:
        return prepare_batch(GROUPS, plan=self.plan, hooks=self.hooks)

    def data(self, prepared: PreparedBatch) -> TokenData:
        data = prepared.data
        data.old_R = data.rollout_R + 0.25
        data.kl_R = torch.zeros_like(data.rollout_R)
        data.advantage_R, data.return_R = data.rollout_R * 0 + 1, data.rollout_R * 0 + 1
        data.weigh(samples=range(4), per_token=False)
        return data

    def run(self) -> None:
        """Every call of a rollout step, as far as the hook is set."""
        hooks, prepared = self.hooks, self.prepare()
        data = self.data(prepared)
        hooks.log_probs_begin(None, store_prefix="ref_")
        if hooks.advantage is not None:
            hooks.set_advantages(data, prepared.rows)
        hooks.post_process(data, prepared.rows, prepared.samples, rollout_step=0)
        hooks.train_step_begins(rollout_step=0, step_index=0, model=None, optimizer=None, scheduler=None)
        micro = prepared.steps[0].micros[0]
        tokens = data.take(micro)
        loss_R = torch.ones_like(tokens.mask_R).requires_grad_()
        if hooks.custom_loss is not None:
            hooks.loss(torch.zeros(sum(micro.lengths), VOCAB, requires_grad=True), tokens, micro)
        if hooks.custom_tis is not None:
            assert tokens.old_R is not None
            hooks.correct(loss_R, tokens, trainer_R=tokens.old_R)
        if hooks.pg_loss_reducer is not None:
            hooks.reduce(loss_R, tokens, keep_R=torch.ones_like(loss_R))


def said(option: str, path: str) -> str:
    """What the operator reads when the hook is run."""
    with pytest.raises(PluginError) as caught:
        Bench(option, path).run()
    message = str(caught.value)
    assert message.startswith(f"{option}: ")
    assert "\n" not in message
    return message


def body(signature: str, text: str) -> str:
    lines = "".join(f"    {line}\n" for line in text.split("\n"))
    return f"import torch\n\ndef hook({signature}):\n{lines}"


SIGNATURES = {
    TIS: "args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs",
    LOSS: "args, batch, logits, sum_of_sample_mean",
    REDUCER: "total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False",
    ADVANTAGE: "args, rollout_data",
    REWARD: "args, samples",
    CONVERT: "args, samples",
    POSTPROCESS: "args, rollout_id, rollout_data",
    BEFORE_LOG_PROB: "args, model, store_prefix",
    BEFORE_STEP: "args, rollout_id, step_id, model, optimizer, opt_param_scheduler",
}
DATA = (
    "data = dict(tokens=[s.tokens for s in samples],"
    " response_lengths=[s.response_length for s in samples], rewards=[s.reward for s in samples],"
    " loss_masks=[s.loss_mask for s in samples], sample_indices=[s.index for s in samples],"
    " rollout_log_probs=[s.rollout_log_probs for s in samples])\n"
)
"""A converted batch that is right, to be spoiled."""
SET = "rollout_data['advantages'] = [torch.ones(n) for n in rollout_data['response_lengths']]\n"
SET += "rollout_data['returns'] = [a.clone() for a in rollout_data['advantages']]\n"

WRONG: list[tuple[str, str, tuple[str, ...]]] = [
    # Importance sampling.
    (TIS, "return pg_loss", ("returned a tensor of shape [10]", "(pg_loss, masks, dict of metrics)")),
    (TIS, "return pg_loss.sum(), loss_masks, {}", ("pg_loss came as a tensor of shape []", "shape [10]")),
    (TIS, "return pg_loss.detach(), loss_masks, {}", ("pg_loss has no gradient",)),
    (TIS, "return pg_loss, torch.cat(loss_masks), {}", ("masks", "shape [10]", "list of 4, one per sample")),
    (TIS, "return pg_loss, loss_masks[1:], {}", ("masks", "a list of 3", "list of 4")),
    (TIS, "return pg_loss, loss_masks[:3] + [loss_masks[3][1:]], {}", ("sample 1.1", "[2]", "expected [3]")),
    (TIS, "return pg_loss, loss_masks[:3] + [None], {}", ("sample 1.1 came with NoneType", "numbers")),
    (TIS, "return pg_loss, [m * 0.5 for m in loss_masks], {}", ("sample 0.0 has 0.5", "0 or 1")),
    (TIS, "return pg_loss, loss_masks, [1.0]", ("metrics came as a list of 1", "a dict by name")),
    (TIS, "return pg_loss, loss_masks, {'x': 'much'}", ('metric "x"', "str 'much'", "numbers")),
    (TIS, "return pg_loss, loss_masks, {'x': torch.ones(3)}", ('metric "x"', "[3]", "[10]", "4 tensors")),
    # Losses and reducers.
    (LOSS, "return logits.sum()", ("returned a tensor of shape []", "(loss, dict of metrics)")),
    (LOSS, "return logits.sum(-1), {}", ("the loss came as a tensor of shape [1, 18]", "one number")),
    (LOSS, "return 0.5, {}", ("the loss came as float 0.5", "a tensor of one number")),
    (LOSS, "return logits.sum().detach(), {}", ("the loss has no gradient", "logits")),
    (LOSS, "return logits.sum(), {'x': torch.ones(2)}", ('metric "x"', "shape [2]", "one number")),
    (LOSS, "return logits.sum(), None", ("metrics came as NoneType", "a dict by name")),
    (REDUCER, "return torch.tensor(1.0)", ("returned a tensor of shape []", "a function of the loss per")),
    (REDUCER, "return lambda x: x", ("the loss came as a tensor of shape [10]", "one number")),
    (REDUCER, "return lambda x: x.sum().item()", ("the loss came as float 6.0", "a tensor of one number")),
    (REDUCER, "return lambda x: x.detach().sum()", ("the loss has no gradient", "the loss per token")),
    # Advantages.
    (ADVANTAGE, "return {'advantages': []}", ("returned a dict with advantages", "changed in place")),
    (ADVANTAGE, "del rollout_data['returns']", ("without returns", "4 tensors, one per sample")),
    (ADVANTAGE, SET + "rollout_data['advantages'].pop()", ('["advantages"]', "a list of 3", "list of 4")),
    (ADVANTAGE, SET + "rollout_data['returns'][1] = torch.ones(7)",
     ('["returns"]', "sample 0.1", "[7]", "expected [3]", "one value per response token")),
    (ADVANTAGE, SET + "rollout_data['advantages'][2] = 1.0", ("sample 1.0", "shape []", "expected [2]")),
    (ADVANTAGE, SET + "rollout_data['advantages'][2] = torch.full((2,), torch.nan)",
     ('["advantages"]', "sample 1.0 has nan", "finite")),
    # Rewards.
    (REWARD, "return [s.reward for s in samples]", ("returned a list of 4", "(raw_rewards, rewards)")),
    (REWARD, "return None", ("returned NoneType", "(raw_rewards, rewards)")),
    (REWARD, "return [0.0] * 3, [0.0] * 4", ("raw_rewards", "a list of 3", "list of 4")),
    (REWARD, "return [0.0] * 4, 0.0", ("rewards", "float 0.0", "list of 4")),
    (REWARD, "return [0.0] * 4, [0.0, 0.0, {'acc': 1}, 0.0]",
     ("rewards", "sample 1.0", "a dict with acc", "a number")),
    (REWARD, "r = torch.tensor([0.0, 1.0]) / 0\nreturn [0.0] * 4, r.tolist() * 2",
     ("rewards", "sample 0.0 came with nan", "finite")),
    # Converted samples.
    (CONVERT, "return [s.tokens for s in samples]", ("returned a list of 4", "a dict with tokens")),
    (CONVERT, DATA + "del data['loss_masks']\nreturn data",
     ("returned a dict with tokens", "expected a dict with", "loss_masks")),
    (CONVERT, DATA + "data['rewards'].pop()\nreturn data", ('"rewards"', "a list of 3", "list of 4")),
    (CONVERT, DATA + "data['sample_indices'][1] = 9\nreturn data",
     ('"sample_indices"[1] is 9', "the index of a sample it was given, 0 to 3")),
    (CONVERT, DATA + "data['loss_masks'][3] = [1]\nreturn data",
     ("sample 1.1", '"loss_masks" has shape [1]', "[3], its response length")),
    (CONVERT, DATA + "data['loss_masks'][3] = [1, 2, 0]\nreturn data", ("sample 1.1", "expected 0 and 1")),
    (CONVERT, DATA + "data['loss_masks'][3] = [1, 0.5, 0]\nreturn data", ("sample 1.1", "fractions")),
    (CONVERT, DATA + "data['rollout_log_probs'][3] = ['a', 'b', 'c']\nreturn data",
     ("sample 1.1", '"rollout_log_probs" came with a list of 3', "numbers")),
    (CONVERT, DATA + "data['tokens'][2] = data['tokens'][2][-2:]\nreturn data",
     ("sample 1.0", '"tokens" has 2', '"response_lengths" says 2', "one prompt token")),
    (CONVERT, DATA + "data['tokens'][2] = [data['tokens'][2]]\nreturn data",
     ("sample 1.0", '"tokens" has shape [1, 4]', "one list of token ids")),
    (CONVERT, DATA + "data['tokens'][2][0] = -100\nreturn data", ("sample 1.0", "-100", "token ids")),
    (CONVERT, DATA + "del data['rollout_log_probs']\ndata['tokens'][2][3] = 60\nreturn data",
     ("sample 1.0", "no beginning", 'no "rollout_log_probs"')),
    (CONVERT, DATA + "data['multimodal_train_inputs'] = [{'pixels': 1}] * 4\nreturn data",
     ("multimodal_train_inputs", "only text")),
    (CONVERT, DATA + "data['rollout_routed_experts'] = [[[[0, 1]]] * 2] * 4\nreturn data",
     ("sample 0.0", '"rollout_routed_experts" has shape [2, 1, 2]', "[3, layers, experts per token]")),
    # After log-probs.
    (POSTPROCESS, "rollout_data['loss_masks'].pop()", ('["loss_masks"]', "a list of 3", "list of 4")),
    (POSTPROCESS, "rollout_data['loss_masks'][1] = torch.ones(2)",
     ('["loss_masks"]', "sample 0.1", "[2]", "expected [3]")),
    (POSTPROCESS, "rollout_data['loss_masks'][1][0] = 3", ("sample 0.1 has 3", "0 or 1")),
    (POSTPROCESS, "rollout_data['rewards'] = 1.0", ('["rewards"]', "float 1.0", "list of 4")),
    (POSTPROCESS, "return {'loss_masks': []}", ("returned a dict with loss_masks", "changed in place")),
]  # fmt: skip


@pytest.mark.parametrize(("option", "text", "words"), WRONG)
def test_a_wrong_answer_is_named_with_what_was_expected(
    tmp_path: Path, option: str, text: str, words: tuple[str, ...]
) -> None:
    message = said(option, write_hook(tmp_path, body(SIGNATURES[option], text)))
    for word in words:
        assert word in message, message


def test_a_sample_mask_of_another_length_is_named(tmp_path: Path) -> None:
    path = write_hook(tmp_path, body("args, samples", "samples[1][0].loss_mask = [1]"))
    message = said(POSTPROCESS, path)
    assert "sample.loss_mask: sample 1.0 came with shape [1]; expected [2]" in message


@pytest.mark.parametrize("option", SIGNATURES)
def test_an_exception_in_a_hook_is_reported_with_its_line(tmp_path: Path, option: str) -> None:
    text = "\n".join(
        [
            f"def hook({SIGNATURES[option]}):",
            "    return helper({})",
            "",
            "def helper(found):",
            "    found['no']",
        ]
    )
    path = write_hook(tmp_path, text + "\n")
    bench = Bench(option, path)
    with pytest.raises(PluginError) as caught:
        bench.run()
    file = path.rpartition(":")[0]
    assert str(caught.value) == f"{option}: {path} failed at {file}:5 (helper): KeyError: 'no'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_exception_in_a_reducer_is_reported_with_its_line(tmp_path: Path) -> None:
    path = write_hook(tmp_path, body(SIGNATURES[REDUCER], "return lambda x: x.split([1])[0].sum()"))
    assert re.search(r" failed at .*mine\.py:4 \(<lambda>\): RuntimeError: ", said(REDUCER, path))


def test_an_exception_below_a_library_is_placed_in_the_hooks_file(tmp_path: Path) -> None:
    text = "logits.sum()\nreturn sum_of_sample_mean(torch.ones(3)), {}"
    path = write_hook(tmp_path, body(SIGNATURES[LOSS], text))
    assert f"{path.rpartition(':')[0]}:5 (hook): RuntimeError" in said(LOSS, path)


def test_an_unknown_option_on_args_is_named_with_the_close_ones(tmp_path: Path) -> None:
    path = write_hook(tmp_path, body(SIGNATURES[ADVANTAGE], "args.eps_clipp"))
    message = said(ADVANTAGE, path)
    assert "AttributeError: args.eps_clipp: no such option; close to it: eps_clip" in message


def test_metrics_must_be_the_same_in_every_micro_batch_of_a_step(tmp_path: Path) -> None:
    text = "args.calls = getattr(args, 'calls', 0) + 1\nreturn logits.sum(), {f'm{args.calls}': 1.0}"
    bench = Bench(LOSS, write_hook(tmp_path, body(SIGNATURES[LOSS], text)))
    bench.run()
    bench.run()  # another optimizer step may have others
    prepared = bench.prepare()
    micro = prepared.steps[0].micros[0]
    tokens = bench.data(prepared).take(micro)
    with pytest.raises(PluginError, match="metrics m3 came for one micro-batch and m2 for another"):
        bench.hooks.loss(torch.zeros(sum(micro.lengths), VOCAB, requires_grad=True), tokens, micro)


def test_a_samples_hook_is_refused_beside_a_conversion(tmp_path: Path) -> None:
    given = {
        POSTPROCESS: user_hook("mask_samples"),
        CONVERT: user_hook("convert_samples_to_train_data"),
    }
    plan = train_plan(topology_of(Path("model"), given))
    with pytest.raises(PluginError, match=r"write it as \(args, rollout_id, rollout_data\)"):
        TrainHooks(plan.algorithm, args=hook_args(plan))


@pytest.mark.parametrize("option", SIGNATURES)
def test_another_signature_is_refused_before_anything_runs(tmp_path: Path, option: str) -> None:
    path = write_hook(tmp_path, "def hook(one, two, three, four, five, six, seven):\n    pass\n")
    with pytest.raises(PluginError) as caught:
        Bench(option, path)
    assert f"{option}: expected def name(" in str(caught.value)
    assert "found def hook(one, two, three, four, five, six, seven)" in str(caught.value)


def test_what_is_right_passes_through_the_same_bench(tmp_path: Path) -> None:
    """The cases above fail by what is wrong in them."""
    for name, option in {
        "icepop_function": TIS,
        "policy_loss_function": LOSS,
        "get_pg_loss_reducer": REDUCER,
        "compute_advantages": ADVANTAGE,
        "group_normalise": REWARD,
        "convert_samples_to_train_data": CONVERT,
        "remember_args": POSTPROCESS,
    }.items():
        Bench(option, user_hook(name)).run()
    for option, text in ((CONVERT, DATA + "return data"), (ADVANTAGE, SET)):
        place = tmp_path / option
        place.mkdir()
        Bench(option, write_hook(place, body(SIGNATURES[option], text))).run()


def test_the_cause_shows_the_users_own_traceback(tmp_path: Path) -> None:
    bench = Bench(REWARD, write_hook(tmp_path, body("args, samples", "return samples.rewards")))
    with pytest.raises(PluginError) as caught:
        bench.run()
    cause = caught.value.__cause__
    assert cause is not None
    assert "return samples.rewards" in "".join(traceback.format_exception(cause))
