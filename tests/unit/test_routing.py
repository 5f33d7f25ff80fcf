"""Routing replay in the trainer: the same experts, the model's own scores, the right gradient."""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from asyncrl.algo.routing import expert_scores, replayed, top_experts
from asyncrl.errors import ConfigError, DataError
from asyncrl.train.forward import response_statistics
from asyncrl.train.micro import Layout, MicroBatch
from asyncrl.train.routing import find_routers, recording, replaying, routing_rows
from asyncrl.train.rows import decode
from tests.moe_support import NUM_EXPERTS, NUM_LAYERS, TOP_K, VOCAB, make_moe
from tests.train_support import make_sample


def micro_batch(*lengths: tuple[int, int]) -> MicroBatch:
    """Random samples of (prompt, response) tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index, (num_prompt, num_response) in enumerate(lengths):
        ids = torch.randint(2, VOCAB, (num_prompt + num_response,), generator=generator).tolist()
        sample = make_sample(
            group_id=0,
            index=index,
            prompt=ids[:num_prompt],
            response=ids[num_prompt:],
            logprobs=[-1.0] * num_response,
            reward=1.0,
        )
        rows.append(decode(sample))
    return Layout(rows).micro_batch(range(len(rows)))


LENGTHS = ((3, 9), (1, 4), (7, 20), (2, 1))
NUM_TOKENS = sum(p + r for p, r in LENGTHS)


def packed_model(**options: Any) -> Any:
    from asyncrl.train.attention import NAME, register

    register()
    model = make_moe(**options)
    model.set_attn_implementation(NAME)
    return model


def loss_of(model: Any, micro: MicroBatch, *, packed: bool) -> Tensor:
    return response_statistics(model, micro, packed=packed, temperature=1.0).logprobs_R.sum()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def other_routing(seed: int = 3) -> Tensor:
    """Random experts, distinct within a token and layer."""
    scores = torch.rand(NUM_TOKENS, NUM_LAYERS, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    return scores.topk(TOP_K).indices.to(torch.int16)


# ---- the formula ----


def test_scores_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    scores, indices = top_experts(logits, top_k=2, normalize=True)
    assert indices.tolist() == [[1, 3]]
    torch.testing.assert_close(scores, torch.tensor([[2 / 3, 1 / 3]]))
    given = torch.tensor([[0, 2]])
    for rule, expected in (("softmax", [0.1, 0.15]), ("normalized", [0.4, 0.6]), ("chosen", [0.4, 0.6])):
        found = expert_scores(logits, indices_TK=given, rule=rule, dtype=torch.float32)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor([expected]))


def test_a_row_with_minus_one_is_the_model_s_own() -> None:
    own = torch.tensor([[0, 1], [2, 3], [4, 5]])
    given = torch.tensor([[7, 6], [-1, -1], [7, -1]], dtype=torch.int16)
    assert replayed(own, given_TK=given).tolist() == [[7, 6], [2, 3], [4, 5]]


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_scores_at_the_own_choice_are_the_own_scores_to_the_bit(
    seed: int, normalize: bool, dtype: torch.dtype
) -> None:
    logits = torch.randn(17, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed)).to(dtype)
    scores, indices = top_experts(logits, top_k=3, normalize=normalize)
    rule = "normalized" if normalize else "softmax"
    again = expert_scores(logits, indices_TK=indices, rule=rule, dtype=dtype)  # type: ignore[arg-type]
    assert torch.equal(again, scores)


# ---- the model ----


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_replaying_the_own_routing_changes_no_bit(normalize: bool, packed: bool) -> None:
    model = packed_model(normalize=normalize) if packed else make_moe(normalize=normalize)
    micro = micro_batch(*LENGTHS)
    lengths = None if packed else micro.lengths
    with recording(model, lengths=lengths) as record:
        plain = loss_of(model, micro, packed=packed)
    plain.backward()
    expected = gradients(model)
    assert record.indices_TLK.shape == (NUM_TOKENS, NUM_LAYERS, TOP_K)
    with replaying(model, record.indices_TLK, lengths=lengths):
        again = loss_of(model, micro, packed=packed)
        again.backward()
    found = gradients(model)
    assert torch.equal(again, plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[f"model.layers.{i}.mlp.gate.weight"].abs().sum() > 0 for i in range(NUM_LAYERS))


def test_packed_and_padded_record_and_replay_the_same() -> None:
    packed, padded = packed_model(), make_moe()
    micro = micro_batch(*LENGTHS)
    with recording(packed) as one, torch.no_grad():
        loss_of(packed, micro, packed=True)
    with recording(padded, lengths=micro.lengths) as two, torch.no_grad():
        loss_of(padded, micro, packed=False)
    assert torch.equal(one.indices_TLK, two.indices_TLK)
    given_TLK = other_routing()
    with replaying(packed, given_TLK), torch.no_grad():
        first = loss_of(packed, micro, packed=True)
    with replaying(padded, given_TLK, lengths=micro.lengths), torch.no_grad():
        second = loss_of(padded, micro, packed=False)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-4)


def by_hand(block: Any, x_TC: Tensor, indices_TK: Tensor) -> Tensor:
    """sum_k w_k expert_k(x), w = p at the indices over their sum, p = softmax of the router's logits."""
    probs_TE = (x_TC @ block.gate.weight.T).softmax(-1)
    rows = []
    for t, experts in enumerate(indices_TK.tolist()):
        chosen = torch.stack([probs_TE[t, e] for e in experts])
        weights = chosen / chosen.sum()
        out = torch.zeros_like(x_TC[t])
        for weight, e in zip(weights, experts, strict=True):
            gate, up = (block.experts.gate_up_proj[e] @ x_TC[t]).chunk(2)
            out = out + weight * (block.experts.down_proj[e] @ (nn.functional.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows)


def test_replaying_other_experts_is_the_formula_with_its_gradient() -> None:
    model = make_moe()
    block = model.model.layers[1].mlp
    x_TC = torch.randn(NUM_TOKENS, 32, generator=torch.Generator().manual_seed(0))
    given_TLK = other_routing()
    weight_TC = torch.randn(NUM_TOKENS, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for replay in (True, False):
        if replay:
            with replaying(model, given_TLK):
                out = block(x_TC[None])[0]
        else:
            out = by_hand(block, x_TC, given_TLK[:, 1])
        (out * weight_TC).sum().backward()
        results.append((out.detach(), gradients(model)))
    (found, found_grads), (expected, expected_grads) = results
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(block(x_TC[None])[0], expected, atol=1e-2)
    assert found_grads.keys() == expected_grads.keys()
    assert len(found_grads) == 3
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(found_grads[name], gradient, rtol=1e-3, atol=1e-4)
    assert expected_grads["model.layers.1.mlp.gate.weight"].abs().max() > 0.01


def test_rows_without_a_record_fall_back_and_the_others_do_not() -> None:
    model = packed_model()
    micro = micro_batch(*LENGTHS)
    with recording(model) as own, torch.no_grad():
        loss_of(model, micro, packed=True)
    given_TLK = other_routing()
    given_TLK[::2] = -1
    with replaying(model, given_TLK), recording(model) as taken, torch.no_grad():
        loss_of(model, micro, packed=True)
    assert torch.equal(taken.indices_TLK[1::2], given_TLK[1::2])
    # The first layer sees the same hidden states; deeper ones see what the replayed tokens became.
    assert torch.equal(taken.indices_TLK[::2, 0], own.indices_TLK[::2, 0])
    with replaying(model, torch.full_like(given_TLK, -1)), torch.no_grad():
        fallen_back = loss_of(model, micro, packed=True)
    with torch.no_grad():
        assert torch.equal(fallen_back, loss_of(model, micro, packed=True))


def test_gradient_checkpointing_replays_the_same_experts_when_it_recomputes() -> None:
    given_TLK = other_routing()
    micro = micro_batch(*LENGTHS)
    found = []
    for checkpointing in (False, True):
        model = packed_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        handle = model.model.layers[0].mlp.gate.register_forward_hook(count)
        with replaying(model, given_TLK):
            loss = loss_of(model, micro, packed=True)
            loss.backward()
        handle.remove()
        assert calls == 1 + checkpointing
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], value) for name, value in found[0][1].items())


def test_the_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = packed_model()
    micro = micro_batch(*LENGTHS)
    routers = find_routers(model)
    with (
        pytest.raises(ValueError, match="saw 47 tokens, the routing holds 46"),
        replaying(routers, other_routing()[:-1]),
    ):
        loss_of(model, micro, packed=True)
    with recording(routers) as record:
        pass
    with pytest.raises(ValueError, match=r"no forward pass went through model\.layers\.0\.mlp\.gate"):
        _ = record.indices_TLK
    assert not any(module._forward_hooks for module in model.modules())


# ---- what fits and what does not ----


def test_routing_of_another_model_is_refused() -> None:
    model = make_moe()
    with (
        pytest.raises(DataError, match=r"is \[2, 2\].*the model has \[3, 2\]"),
        replaying(model, other_routing()[:, :2]),
    ):
        pass
    with (
        pytest.raises(DataError, match="names expert 8; the model has 0 to 7"),
        replaying(model, other_routing() + 1),
    ):
        pass


def tiny(kind: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | options)))


@pytest.mark.parametrize(
    ("kind", "options", "rule"),
    [
        ("mixtral", {"num_local_experts": 4}, "normalized"),
        ("olmoe", {"num_experts": 4, "norm_topk_prob": False}, "softmax"),
        ("qwen2_moe", {"num_experts": 4, "norm_topk_prob": True}, "normalized"),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, "chosen"),
    ],
)
def test_routers_of_other_families_are_understood(kind: str, options: dict[str, Any], rule: str) -> None:
    torch.manual_seed(0)
    model = tiny(kind, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name or "router" in name:
                parameter.normal_()
    routers = find_routers(model)
    assert [router.rule for router in routers] == [rule, rule]
    ids = torch.arange(6)[None]
    with recording(routers) as record, torch.no_grad():
        plain = model(input_ids=ids).logits
    with replaying(routers, record.indices_TLK), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM has no experts"):
        find_routers(tiny("qwen3"))


def test_experts_behind_an_unknown_router_are_refused_by_class() -> None:
    model = tiny("deepseek_v3", n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=0)
    with pytest.raises(ConfigError, match="DeepseekV3TopkRouter"):
        find_routers(model)


class SigmoidTopKRouter(nn.Module):
    """A router whose scores are no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.randn(4, 16)), 2

    def forward(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x_TC @ self.weight.T
        return logits, *logits.sigmoid().topk(self.top_k)


def test_scores_by_another_rule_are_refused_by_class() -> None:
    with pytest.raises(ConfigError, match=r"1 \(SigmoidTopKRouter\) cannot be replayed: its scores are not"):
        find_routers(nn.Sequential(nn.Linear(1, 1), SigmoidTopKRouter()))


# ---- rows ----


def test_rows_are_laid_end_to_end_and_the_last_token_is_the_model_s() -> None:
    def row(index: int, num_prompt: int, num_response: int, *, routed: bool) -> Any:
        sample = make_sample(
            group_id=4,
            index=index,
            prompt=[2] * num_prompt,
            response=[3] * num_response,
            logprobs=[-1.0] * num_response,
            reward=1.0,
        )
        if routed:
            count = num_prompt + num_response - 1
            values = torch.arange(count * 2 * 3, dtype=torch.int16).numpy()
            sample.routed_experts, sample.routed_top_k = values.astype("<i2").tobytes(), 3
        return decode(sample)

    rows = [row(0, 2, 2, routed=True), row(1, 1, 2, routed=False), row(2, 1, 1, routed=True)]
    indices = routing_rows(rows, num_tokens=11)
    assert indices is not None
    assert indices.shape == (11, 2, 3)
    assert indices.dtype == torch.int16
    assert indices[:, 0, 0].tolist() == [0, 6, 12, -1, -1, -1, -1, 0, -1, -1, -1]
    assert indices[1].flatten().tolist() == list(range(6, 12))
    assert routing_rows([rows[1]]) is None
    other = row(3, 1, 1, routed=False)
    object.__setattr__(other, "routed_experts", rows[2].routed_experts[:, :1])
    with pytest.raises(DataError, match=r"sample 4\.3.*\[1, 3\], but \[2, 3\] in sample 4\.0"):
        routing_rows([*rows, other])
