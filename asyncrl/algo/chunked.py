"""Log-prob and entropy of tokens from hidden states, without the logits of all tokens at once.

Owns one autograd function over the output head: the logits of `chunk_size` tokens are computed, reduced to
three numbers a token (their maximum, log-sum and entropy) and overwritten by the next chunk's; the backward
pass computes them again and turns them in place into their own gradient. It gives what
`loss.token_statistics(linear(hidden, weight, bias))` gives, up to rounding. It never reduces over tokens,
never looks inside a head (whether that is a plain linear layer is the caller's to know), and is not twice
differentiable.

Invariants: at most two [chunk, V] buffers in the working precision (float32, or float64 for float64 weights)
live at any time, and one more in the weights' dtype where that is narrower; they are allocated once a pass;
the order of every sum is fixed, so equal inputs and chunk size give equal bits.

On a GPU, Liger (0.8.2 and later) has one operator that returns what is needed here, log-probs and entropy
of each token with a gradient for each token: `LigerFusedLinearScaledCrossEntropyFunction`.
`implementation_for` chooses it where it is a kernel and costs only digits of a reported entropy: Hopper,
bfloat16, no bias, entropy not differentiated. Elsewhere Liger itself falls back to chunks of 512 tokens in
torch, with the weight's gradient summed in the weight's dtype; and its kernel differentiates an entropy
rounded to bfloat16. There the function below is the better one. Of Liger's others,
`LigerFusedLinearCrossEntropy` has no entropy, and without a reduction its weight gradient was wrong before
its pull request 1298; `fused_selective_log_softmax` takes finished logits and has no gradient; the GRPO
losses contain a loss of their own. The Liger path has run on no GPU here: only the choice and the calling
convention are tested.

Shape letters: R response tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

# ruff: noqa: N803, N806, N815 -- tensors carry shape suffixes
from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asyncrl.algo.loss import TokenStatistics

Implementation = Literal["chunked", "liger"]
"""Who computes: the function of this module, or Liger's kernel."""
HOPPER = (9, 0)
"""The compute capability that Liger's kernel is written for."""
NO_TARGET = -100
"""Liger's mark for rows to leave out; no token has it."""


def chunked_statistics(
    hidden_RD: Tensor,
    *,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    targets_R: Tensor,
    temperature: float = 1.0,
    chunk_size: int,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """Log-prob and entropy [R] of `targets_R` (int64) under softmax((hidden weight^T + bias) / temperature).

    The product is taken in the weights' dtype, all else in at least float32, as `token_statistics` does;
    the results are at least float32. With z = logits / T, p = softmax(z), H = -sum(p log p) and incoming
    gradients g, h of log-prob and entropy: dL/dlogits = (g (onehot - p) - h p (log p + H)) / T. Gradients
    reach hidden, weight and bias where they want one; a weight below float32 has its gradient summed over
    chunks in float32. Without `entropy_gradient` the entropy is only reported. `chunk_size` in tokens, >= 1;
    Liger's kernel, where `implementation_for` chooses it, has its own bound: 1,024 tokens in bfloat16.

    Raises ValueError for shapes, dtypes, temperature or chunk size that do not fit. Source: vector 14.
    """
    _check(hidden_RD, weight_VD, bias_V, targets_R, temperature=temperature, chunk_size=chunk_size)
    operator = _liger_operator() if _prefers_liger(hidden_RD, bias_V, entropy_gradient) else None
    if operator is not None:
        return _liger_statistics(operator, hidden_RD, weight_VD, targets_R, temperature=temperature)
    logprobs_R, entropy_R = _ChunkedStatistics.apply(
        hidden_RD, weight_VD, bias_V, targets_R, temperature, chunk_size, entropy_gradient
    )
    return TokenStatistics(logprobs_R=logprobs_R, entropy_R=entropy_R)


def implementation_for(
    device_type: str,
    *,
    entropy_gradient: bool,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    has_bias: bool,
    deterministic: bool,
) -> Implementation:
    """Who computes on such a device, as far as the inputs decide; without the package it is "chunked" anyway.

    `capability` is CUDA's (None off NVIDIA), `deterministic` whether torch was told to be: Liger makes no
    such promise. The other conditions are explained at the top of this module.
    """
    kernel = device_type == "cuda" and capability == HOPPER and dtype == torch.bfloat16 and not has_bias
    return "liger" if kernel and not entropy_gradient and not deterministic else "chunked"


class _Buffers(NamedTuple):
    """What a pass writes its logits into."""

    logits_CV: Tensor
    """In the working precision."""
    narrow_CV: Tensor | None
    """In the weights' dtype, where that is narrower."""
    spare_CV: Tensor | None
    """As `logits_CV`, where two are needed."""

    def first(self, count: int) -> _Buffers:
        """The same for a chunk of `count` tokens."""
        return _Buffers(*(None if buffer is None else buffer[:count] for buffer in self))  # type: ignore[arg-type]


class _ChunkedStatistics(torch.autograd.Function):
    """See `chunked_statistics`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_R: Tensor,
        temperature: float,
        chunk_size: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        maximum_R, log_sum_R, logprobs_R, entropy_R = (
            torch.empty(len(hidden_RD), dtype=_precision(weight_VD.dtype), device=hidden_RD.device)
            for _ in range(4)
        )
        buffers = _allocate(weight_VD, min(chunk_size, len(hidden_RD)), spare=True)
        for rows in _chunks(len(hidden_RD), chunk_size):
            chunk = buffers.first(rows.stop - rows.start)
            _write_logits(chunk, hidden_RD[rows], weight_VD, bias_V, temperature)
            torch.amax(chunk.logits_CV, dim=-1, out=maximum_R[rows])
            shifted_CV = chunk.logits_CV.sub_(maximum_R[rows, None])
            exp_CV = torch.exp(shifted_CV, out=chunk.spare_CV)
            sum_C = exp_CV.sum(-1)
            torch.log(sum_C, out=log_sum_R[rows])
            target_C = shifted_CV.gather(-1, targets_R[rows, None]).squeeze(-1)
            logprobs_R[rows] = target_C - log_sum_R[rows]
            entropy_R[rows] = log_sum_R[rows] - exp_CV.mul_(shifted_CV).sum(-1) / sum_C
        # Maximum and log-sum are kept apart: their sum, the logsumexp, loses digits where logits are large.
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, targets_R, maximum_R, log_sum_R, entropy_R)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_R: Tensor | None, grad_entropy_R: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        if grad_logprobs_R is None and grad_entropy_R is None:
            return nothing
        hidden_RD, weight_VD, bias_V, targets_R, maximum_R, log_sum_R, entropy_R = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden_RD = (
            torch.empty_like(hidden_RD, memory_format=torch.contiguous_format) if wants_hidden else None
        )
        grad_weight_VD = _zeros_like(weight_VD) if wants_weight else None
        grad_bias_V = _zeros_like(bias_V) if wants_bias else None
        buffers = _allocate(weight_VD, min(ctx.chunk_size, len(hidden_RD)), spare=grad_entropy_R is not None)
        for rows in _chunks(len(hidden_RD), ctx.chunk_size):
            chunk = buffers.first(rows.stop - rows.start)
            _write_logits(chunk, hidden_RD[rows], weight_VD, bias_V, ctx.temperature)
            chunk.logits_CV.sub_(maximum_R[rows, None]).sub_(log_sum_R[rows, None])
            _into_gradient(
                chunk,
                targets_R[rows],
                entropy_R[rows],
                None if grad_logprobs_R is None else grad_logprobs_R[rows] / ctx.temperature,
                None if grad_entropy_R is None else grad_entropy_R[rows] / ctx.temperature,
            )
            _add_gradients(chunk, rows, hidden_RD, weight_VD, grad_hidden_RD, grad_weight_VD, grad_bias_V)
        return (
            grad_hidden_RD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *nothing[3:],
        )


def _write_logits(
    chunk: _Buffers, hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float
) -> None:
    """Write logits / temperature into `logits_CV`."""
    product_CV = chunk.logits_CV if chunk.narrow_CV is None else chunk.narrow_CV
    if bias_V is None:
        torch.mm(hidden_CD, weight_VD.t(), out=product_CV)
    else:
        torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=product_CV)
    if chunk.narrow_CV is not None:
        chunk.logits_CV.copy_(chunk.narrow_CV)
    if temperature != 1.0:
        chunk.logits_CV.div_(temperature)


def _into_gradient(
    chunk: _Buffers,
    targets_C: Tensor,
    entropy_C: Tensor,
    grad_C: Tensor | None,
    grad_entropy_C: Tensor | None,
) -> None:
    """Turn the log-probs in `logits_CV` into dL/dlogits, in place; both gradients already divided by T."""
    log_p_CV = chunk.logits_CV
    if grad_entropy_C is None:
        assert grad_C is not None
        gradient_CV = log_p_CV.exp_().mul_(-grad_C.unsqueeze(1))
    else:
        p_CV = torch.exp(log_p_CV, out=chunk.spare_CV)
        gradient_CV = log_p_CV.add_(entropy_C.unsqueeze(1)).mul_(-grad_entropy_C.unsqueeze(1))
        if grad_C is not None:
            gradient_CV.sub_(grad_C.unsqueeze(1))
        gradient_CV.mul_(p_CV)
    if grad_C is not None:
        # One target a row: nothing is added twice, so this needs no atomics and stays deterministic.
        gradient_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] += grad_C


def _add_gradients(
    chunk: _Buffers,
    rows: slice,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    grad_hidden_RD: Tensor | None,
    grad_weight_VD: Tensor | None,
    grad_bias_V: Tensor | None,
) -> None:
    """Carry dL/dlogits to the inputs: products in the weights' dtype, sums in the accumulators'."""
    gradient_CV = chunk.logits_CV
    product_CV = gradient_CV if chunk.narrow_CV is None else chunk.narrow_CV.copy_(gradient_CV)
    if grad_hidden_RD is not None:
        torch.mm(product_CV, weight_VD, out=grad_hidden_RD[rows])
    if grad_weight_VD is not None:
        if chunk.narrow_CV is None:
            grad_weight_VD.addmm_(product_CV.t(), hidden_RD[rows])
        else:
            grad_weight_VD.add_(product_CV.t() @ hidden_RD[rows])
    if grad_bias_V is not None:
        grad_bias_V.add_(gradient_CV.sum(0))


def _precision(dtype: torch.dtype) -> torch.dtype:
    """What reductions over the vocabulary run in."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _zeros_like(parameter: Tensor) -> Tensor:
    """An accumulator for the gradient of `parameter`."""
    return torch.zeros_like(
        parameter, dtype=_precision(parameter.dtype), memory_format=torch.contiguous_format
    )


def _allocate(weight_VD: Tensor, count: int, *, spare: bool) -> _Buffers:
    """Buffers for chunks of up to `count` tokens."""
    precision = _precision(weight_VD.dtype)
    shape = (count, len(weight_VD))
    logits_CV = weight_VD.new_empty(shape, dtype=precision)
    return _Buffers(
        logits_CV=logits_CV,
        narrow_CV=None if weight_VD.dtype == precision else weight_VD.new_empty(shape),
        spare_CV=torch.empty_like(logits_CV) if spare else None,
    )


def _chunks(count: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, count, chunk_size):
        yield slice(start, min(start + chunk_size, count))


def _check(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    *,
    temperature: float,
    chunk_size: int,
) -> None:
    """Refuse what would otherwise fail deep inside, or broadcast."""
    if chunk_size < 1:
        raise ValueError(
            f"chunked_statistics: chunk_size is {chunk_size}; at least 1 token (use token_statistics for all)"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"chunked_statistics: temperature is {temperature}; it must be finite and above 0")
    fits = hidden_RD.dim() == weight_VD.dim() == 2 and hidden_RD.shape[1] == weight_VD.shape[1]
    fits = fits and targets_R.shape == hidden_RD.shape[:1]
    if not fits or (bias_V is not None and bias_V.shape != weight_VD.shape[:1]):
        bias = "none" if bias_V is None else tuple(bias_V.shape)
        raise ValueError(
            "chunked_statistics: expected hidden [R, D], weight [V, D], bias [V] or none and targets [R]; "
            f"got {tuple(hidden_RD.shape)}, {tuple(weight_VD.shape)}, {bias} and {tuple(targets_R.shape)}"
        )
    dtypes = {hidden_RD.dtype, weight_VD.dtype} | (set() if bias_V is None else {bias_V.dtype})
    if len(dtypes) > 1 or not weight_VD.dtype.is_floating_point or targets_R.dtype != torch.int64:
        raise ValueError(
            "chunked_statistics: hidden, weight and bias must share one floating dtype, targets be int64; "
            f"got {', '.join(sorted(map(str, dtypes)))} and {targets_R.dtype}"
        )


def _prefers_liger(hidden_RD: Tensor, bias_V: Tensor | None, entropy_gradient: bool) -> bool:
    """Whether `implementation_for` says so for these tensors; Liger refuses empty inputs."""
    nvidia = hidden_RD.is_cuda and torch.version.hip is None
    choice = implementation_for(
        hidden_RD.device.type,
        entropy_gradient=entropy_gradient,
        capability=torch.cuda.get_device_capability(hidden_RD.device) if nvidia else None,
        dtype=hidden_RD.dtype,
        has_bias=bias_V is not None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return choice == "liger" and len(hidden_RD) > 0


def _liger_operator() -> Any | None:
    """Liger's operator; None without the package, its CuTe kernels, or a version that has it."""
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("cutlass") is None:
        return None
    try:
        operators = importlib.import_module("liger_kernel.ops")
    except ImportError:
        return None
    return getattr(operators, "LigerFusedLinearScaledCrossEntropyFunction", None)


def _liger_statistics(
    operator: Any, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, temperature: float
) -> TokenStatistics:
    """Through Liger: it returns -log-prob in float32, and the entropy in the weights' dtype."""
    loss_R, entropy_R = operator.apply(
        hidden_RD, weight_VD, targets_R, temperature, NO_TARGET, 1, True
    )  # fmt: skip
    return TokenStatistics(logprobs_R=-loss_R, entropy_R=entropy_R.detach().float())
