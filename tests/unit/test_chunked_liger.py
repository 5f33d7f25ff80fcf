"""When Liger's kernel computes the log-probs of a chunked head, and how it is called."""

from __future__ import annotations

import sys
from importlib.machinery import BuiltinImporter, ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from asyncrl.algo import chunked
from asyncrl.algo.chunked import chunked_statistics, implementation_for
from asyncrl.algo.loss import token_statistics


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "liger"),
        ({"device_type": "cpu", "capability": None}, "chunked"),
        ({"capability": None}, "chunked"),
        ({"capability": (8, 0)}, "chunked"),
        ({"capability": (10, 0)}, "chunked"),
        ({"dtype": torch.float32}, "chunked"),
        ({"dtype": torch.float16}, "chunked"),
        ({"has_bias": True}, "chunked"),
        ({"deterministic": True}, "chunked"),
        ({"entropy_gradient": True}, "chunked"),
    ],
)
def test_liger_is_chosen_only_where_its_kernel_fits(change: dict[str, Any], expected: str) -> None:
    case: dict[str, Any] = {
        "device_type": "cuda",
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "has_bias": False,
        "deterministic": False,
        "entropy_gradient": False,
    }
    case |= change
    assert implementation_for(case.pop("device_type"), **case) == expected


class Operator:
    """Liger's operator by its documentation: (input, weight, target, temperature, ignore, tiles, entropy)."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float,
        ignore: int,
        tiles: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        assert (ignore, tiles, entropy) == (-100, 1, True)
        found = token_statistics(linear(hidden, weight), targets_R=target, temperature=temperature)
        return -found.logprobs_R, found.entropy_R.to(hidden.dtype)


def test_through_liger_come_log_probs_with_a_gradient_and_an_entropy_without() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(13, 5, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(17, 5, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(17, (13,))
    upstream = torch.randn(13)
    found = chunked._liger_statistics(Operator, hidden, weight, targets, temperature=0.7)
    expected = token_statistics(
        linear(hidden, weight), targets_R=targets, temperature=0.7, entropy_gradient=False
    )
    assert torch.equal(found.logprobs_R, expected.logprobs_R)
    assert found.entropy_R.dtype == torch.float32
    torch.testing.assert_close(found.entropy_R, expected.entropy_R, rtol=2**-8, atol=0)
    assert not found.entropy_R.requires_grad
    ours, theirs = (
        torch.autograd.grad((statistics.logprobs_R * upstream).sum(), [hidden, weight])
        for statistics in (found, expected)
    )
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("installed", "attributes", "expected"),
    [
        (["liger_kernel", "liger_kernel.ops", "cutlass"], True, True),
        (["liger_kernel", "liger_kernel.ops", "cutlass"], False, False),
        (["liger_kernel", "liger_kernel.ops"], True, False),
        ([], True, False),
    ],
    ids=["all", "too old", "without its kernels", "not installed"],
)
def test_liger_is_found_only_with_its_operator_and_kernels(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], attributes: bool, expected: bool
) -> None:
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])
    for name in ("liger_kernel", "liger_kernel.ops", "cutlass"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in installed:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        if attributes:
            vars(module)["LigerFusedLinearScaledCrossEntropyFunction"] = Operator
        monkeypatch.setitem(sys.modules, name, module)
    assert chunked._liger_operator() is (Operator if expected else None)


def test_a_cpu_never_asks_for_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())  # without a spec: asking would raise
    found = chunked_statistics(
        torch.zeros(3, 2, dtype=torch.bfloat16),
        weight_VD=torch.zeros(4, 2, dtype=torch.bfloat16),
        targets_R=torch.zeros(3, dtype=torch.int64),
        chunk_size=2,
    )
    assert found.logprobs_R.shape == (3,)
