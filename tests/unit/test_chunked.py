"""Log-probs and entropy in chunks: the same numbers and gradients as the plain path, in less memory."""

# ruff: noqa: N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from asyncrl.algo.chunked import chunked_statistics
from asyncrl.algo.loss import TokenStatistics, token_statistics

R, D, V = 13, 5, 17


class Head(NamedTuple):
    """Inputs of both paths, and the gradients that come back to the outputs."""

    hidden_RD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    targets_R: Tensor
    grad_logprobs_R: Tensor
    grad_entropy_R: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden_RD, self.weight_VD, self.bias_V) if x is not None]


def make(*, dtype: torch.dtype = torch.float64, bias: bool = True, scale: float = 1.0, seed: int = 0) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Head(
        hidden_RD=(scale * normal(R, D)).to(dtype).requires_grad_(),
        weight_VD=normal(V, D).to(dtype).requires_grad_(),
        bias_V=normal(V).to(dtype).requires_grad_() if bias else None,
        targets_R=torch.randint(V, (R,), generator=generator),
        grad_logprobs_R=normal(R).to(dtype),
        grad_entropy_R=normal(R).to(dtype),
    )


def plain(head: Head, *, temperature: float, entropy_gradient: bool) -> TokenStatistics:
    logits_RV = linear(head.hidden_RD, head.weight_VD, head.bias_V)
    return token_statistics(
        logits_RV, targets_R=head.targets_R, temperature=temperature, entropy_gradient=entropy_gradient
    )


def fused(
    head: Head, *, chunk_size: int, temperature: float = 1.0, entropy_gradient: bool = False
) -> TokenStatistics:
    return chunked_statistics(
        head.hidden_RD,
        weight_VD=head.weight_VD,
        bias_V=head.bias_V,
        targets_R=head.targets_R,
        temperature=temperature,
        chunk_size=chunk_size,
        entropy_gradient=entropy_gradient,
    )


def gradients(head: Head, statistics: TokenStatistics) -> tuple[Tensor, ...]:
    loss = (statistics.logprobs_R * head.grad_logprobs_R).sum()
    if statistics.entropy_R.requires_grad:
        loss = loss + (statistics.entropy_R * head.grad_entropy_R).sum()
    return torch.autograd.grad(loss, head.leaves)


def assert_same(actual: Any, expected: Any, *, relative: float) -> None:
    """Each within `relative` of the largest entry: a gradient of nearly zero has no digits of its own."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def test_vector_14_log_prob_entropy_and_gradient() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], requires_grad=True)
    for chunk_size in (1, 2):
        found = chunked_statistics(
            logits,
            weight_VD=torch.eye(3),
            targets_R=torch.tensor([2, 0]),
            chunk_size=chunk_size,
            entropy_gradient=True,
        )
        assert found.logprobs_R.tolist() == pytest.approx([-0.407606, -1.098612], abs=1e-5)
        assert found.entropy_R.tolist() == pytest.approx([0.832396, 1.098612], abs=1e-5)
        (gradient,) = torch.autograd.grad(found.logprobs_R.sum() + 0.5 * found.entropy_R.sum(), logits)
        # onehot - p - p (log p + H) / 2, by hand
        assert gradient[0].tolist() == pytest.approx([-0.019123, -0.174343, 0.193465], abs=1e-5)
        assert gradient[1].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3], abs=1e-5)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, R, 10 * R])
def test_it_is_the_plain_path(
    dtype: torch.dtype,
    relative: float,
    bias: bool,
    temperature: float,
    entropy_gradient: bool,
    chunk_size: int,
) -> None:
    head = make(dtype=dtype, bias=bias)
    expected = plain(head, temperature=temperature, entropy_gradient=entropy_gradient)
    found = fused(head, chunk_size=chunk_size, temperature=temperature, entropy_gradient=entropy_gradient)
    assert_same(found, expected, relative=relative)
    assert_same(gradients(head, found), gradients(head, expected), relative=relative)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_that_of_finite_differences(entropy_gradient: bool, bias: bool) -> None:
    head = make(bias=bias)

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        part = head._replace(hidden_RD=leaves[0], weight_VD=leaves[1], bias_V=leaves[2] if bias else None)
        found = fused(part, chunk_size=4, temperature=1.3, entropy_gradient=entropy_gradient)
        return tuple(found) if entropy_gradient else (found.logprobs_R,)

    assert torch.autograd.gradcheck(outputs, tuple(head.leaves))


@settings(max_examples=50, deadline=None)
@given(
    first=st.integers(1, 2 * R),
    second=st.integers(1, 2 * R),
    temperature=st.floats(0.1, 5.0),
    scale=st.floats(0.0, 30.0),
    seed=st.integers(0, 1000),
)
def test_the_chunk_size_changes_only_rounding(
    first: int, second: int, temperature: float, scale: float, seed: int
) -> None:
    head = make(scale=scale, seed=seed)
    one = fused(head, chunk_size=first, temperature=temperature, entropy_gradient=True)
    other = fused(head, chunk_size=second, temperature=temperature, entropy_gradient=True)
    torch.testing.assert_close(tuple(one), tuple(other), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(head, one), gradients(head, other), rtol=1e-10, atol=1e-10)


def test_two_runs_give_the_same_bits() -> None:
    head = make(dtype=torch.float32)
    runs = []
    for _ in range(2):
        found = fused(head, chunk_size=4, temperature=0.7, entropy_gradient=True)
        runs.append([*found, *gradients(head, found)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_repeated_backward_is_the_same() -> None:
    head = make()
    loss = fused(head, chunk_size=4, entropy_gradient=True).logprobs_R.sum()
    once = torch.autograd.grad(loss, head.leaves, retain_graph=True)
    again = torch.autograd.grad(loss, head.leaves)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_a_reported_entropy_has_no_gradient() -> None:
    found = fused(make(), chunk_size=4)
    assert found.logprobs_R.requires_grad
    assert not found.entropy_R.requires_grad


def test_the_entropy_alone_has_its_own_gradient() -> None:
    head = make()
    found, expected = (
        torch.autograd.grad((statistics.entropy_R * head.grad_entropy_R).sum(), head.leaves)
        for statistics in (
            fused(head, chunk_size=4, temperature=0.7, entropy_gradient=True),
            plain(head, temperature=0.7, entropy_gradient=True),
        )
    )
    assert_same(found, expected, relative=1e-12)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_wants_a_gradient_gets_one(wanted: int) -> None:
    head = make()
    expected = gradients(head, plain(head, temperature=1.0, entropy_gradient=True))[wanted]
    for index, leaf in enumerate(head.leaves):
        leaf.requires_grad_(index == wanted)
    found = fused(head, chunk_size=4, entropy_gradient=True)
    torch.autograd.backward(list(found), [head.grad_logprobs_R, head.grad_entropy_R])
    assert [leaf.grad is not None for leaf in head.leaves] == [index == wanted for index in range(3)]
    assert_same([head.leaves[wanted].grad], [expected], relative=1e-12)


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        found = fused(make(), chunk_size=4)
    assert found.logprobs_R.grad_fn is None


def test_a_step_along_the_gradient_makes_the_tokens_likelier() -> None:
    head = make()
    before = fused(head, chunk_size=4).logprobs_R
    stepped = [
        leaf + 1e-3 * grad
        for leaf, grad in zip(head.leaves, torch.autograd.grad(before.sum(), head.leaves), strict=True)
    ]
    after = fused(head._replace(hidden_RD=stepped[0], weight_VD=stepped[1], bias_V=stepped[2]), chunk_size=4)
    assert after.logprobs_R.sum() > before.sum()


@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_large_logits_lose_no_more_than_the_plain_path_does(scale: float) -> None:
    head = make(dtype=torch.float32, scale=scale)
    expected = plain(head, temperature=1.0, entropy_gradient=True)
    found = fused(head, chunk_size=4, entropy_gradient=True)
    assert_same([found.logprobs_R], [expected.logprobs_R], relative=1e-6)
    torch.testing.assert_close(found.entropy_R, expected.entropy_R, rtol=1e-5, atol=1e-6)
    assert_same(gradients(head, found), gradients(head, expected), relative=1e-5)


def test_bfloat16_weights_give_float32_log_probs_of_bfloat16_logits() -> None:
    head = make(dtype=torch.bfloat16)
    expected = plain(head, temperature=0.7, entropy_gradient=True)
    found = fused(head, chunk_size=R, temperature=0.7, entropy_gradient=True)
    assert found.logprobs_R.dtype == found.entropy_R.dtype == torch.float32
    assert_same(found, expected, relative=1e-5)
    assert_same(gradients(head, found), gradients(head, expected), relative=2**-7)


def test_a_bfloat16_weight_gradient_is_summed_in_float32() -> None:
    count = 1024  # in bfloat16 a sum of equal terms stops growing at 256 of them
    hidden = torch.ones(count, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(count, dtype=torch.int64)
    found = chunked_statistics(hidden, weight_VD=weight, bias_V=bias, targets_R=targets, chunk_size=1)
    torch.autograd.backward(found.logprobs_R.sum())
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) * count
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.dtype == bias.grad.dtype == torch.bfloat16
    assert torch.equal(weight.grad.float(), expected[:, None].expand(4, 2))
    assert torch.equal(bias.grad.float(), expected)


class Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every place in memory that held logits of a chunk, and the most elements of any result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: set[int] = set()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self.most = max(self.most, item.numel())
                if item.dim() == 2 and item.shape[1] == 997 and item.shape[0] > 5:
                    self.places.add(item.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize(
    ("dtype", "entropy_gradient", "forward", "backward"),
    [
        (torch.float32, False, 2, 1),
        (torch.float32, True, 2, 2),
        (torch.bfloat16, False, 3, 2),
        (torch.bfloat16, True, 3, 3),
    ],
)
def test_no_more_than_the_promised_buffers_ever_exist(
    dtype: torch.dtype, entropy_gradient: bool, forward: int, backward: int
) -> None:
    tokens, vocab, chunk_size = 120, 997, 8
    hidden = torch.randn(tokens, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 3, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    with Widest() as going:
        found = chunked_statistics(
            hidden,
            weight_VD=weight,
            targets_R=targets,
            chunk_size=chunk_size,
            entropy_gradient=entropy_gradient,
        )
    loss = found.logprobs_R.sum() + (found.entropy_R.sum() if entropy_gradient else 0)
    with Widest() as coming:
        torch.autograd.backward(loss)
    assert (len(going.places), len(coming.places)) == (forward, backward)
    assert max(going.most, coming.most) == chunk_size * vocab


def test_no_tokens_are_no_surprise() -> None:
    head = make()
    head = head._replace(
        hidden_RD=head.hidden_RD.detach()[:0].requires_grad_(),
        targets_R=head.targets_R[:0],
    )
    found = fused(head, chunk_size=4, entropy_gradient=True)
    assert found.logprobs_R.shape == found.entropy_R.shape == (0,)
    parts = torch.autograd.grad(found.logprobs_R.sum() + found.entropy_R.sum(), head.leaves)
    assert [part.shape for part in parts] == [leaf.shape for leaf in head.leaves]
    assert all(not part.any() for part in parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0; at least 1"),
        ({"temperature": 0.0}, r"temperature is 0\.0; it must be finite and above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"targets_R": torch.zeros(R + 1, dtype=torch.int64)}, r"targets \[R\]; got .*\(14,\)"),
        ({"targets_R": torch.zeros(R, 1, dtype=torch.int64)}, r"targets \[R\]; got .*\(13, 1\)"),
        ({"targets_R": torch.zeros(R, dtype=torch.int32)}, "targets be int64; got .*int32"),
        ({"weight_VD": torch.zeros(V, D + 1, dtype=torch.float64)}, r"got \(13, 5\), \(17, 6\)"),
        ({"bias_V": torch.zeros(1, dtype=torch.float64)}, r"\(1,\) and \(13,\)"),
        ({"weight_VD": torch.zeros(V, D)}, r"share one floating dtype.*torch\.float32, torch\.float64"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    head = make()
    given_: dict[str, Any] = {
        "weight_VD": head.weight_VD,
        "bias_V": head.bias_V,
        "targets_R": head.targets_R,
        "chunk_size": 4,
    }
    with pytest.raises(ValueError, match=message):
        chunked_statistics(head.hidden_RD, **(given_ | change))
