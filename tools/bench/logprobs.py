"""What does it cost to take log-probs in chunks, in memory and in seconds, at a vocabulary of 152k?

Forward and backward through an output head of hidden size 64 (so that the logits are what is large), three
ways: all logits at once, chunks under `torch.utils.checkpoint`, and `algo.chunked`, whose buffers are reused.
Each measurement is a process of its own; its peak resident memory counts minus that of a process that only
makes the inputs. Log-probs and gradients of the ways are compared as well.

A part of `python -m tools.bench`; by itself it is the child: `python -m tools.bench.logprobs --help`.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from asyncrl.algo.chunked import chunked_statistics
from asyncrl.algo.loss import token_statistics
from tools.bench.report import MIB, Options, Section, Table, Target, number, spread

VOCAB = 151_936
"""Qwen's."""
HIDDEN = 64
TOKENS = (1024, 2048)
CHUNKS = (64, 256, 1024)
SIDES = ("plain", "checkpoint", "fused")
INPUTS = "inputs"
"""The side that computes nothing."""
THREADS = 1
TARGET_CHUNK = 256
"""Tokens of a chunk for which memory has a target."""
TARGET_SHARE = 0.25
DEADLINE_S = 300.0


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What one process saw."""

    peak_bytes: int
    """Most resident memory of the process so far."""
    seconds: float = 0.0
    """Of the last forward and backward."""
    logprobs: float = 0.0
    """Sum of the log-probs."""
    gradients: list[float] = []
    """Norms of the gradients of hidden states and weight."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """All repeats of one side."""

    side: str
    tokens: int
    chunk: int
    """0 where there are no chunks."""
    mib: list[float]
    """Peak above the inputs."""
    seconds: list[float]
    check: Cost

    @property
    def peak_mib(self) -> float:
        """The median peak."""
        return statistics.median(self.mib)

    @property
    def typical_s(self) -> float:
        """The median time."""
        return statistics.median(self.seconds)


def peak_bytes() -> int:
    """Most resident memory of this program so far.

    Linux's VmHWM where there is one: `ru_maxrss` survives exec, so a child would begin at its parent's peak.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def logprobs_of(side: str, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, chunk: int) -> Tensor:
    """Log-probs [R] of one side; the entropy is reported, not differentiated, as in training by default."""
    if side == "fused":
        return chunked_statistics(
            hidden_RD, weight_VD=weight_VD, targets_R=targets_R, chunk_size=chunk
        ).logprobs_R

    def head(part_CD: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = linear(part_CD, weight_VD)
        return token_statistics(logits_CV, targets_R=target_C, entropy_gradient=False)

    if side == "plain":
        return head(hidden_RD, targets_R)[0]
    parts = zip(torch.split(hidden_RD, chunk), torch.split(targets_R, chunk), strict=True)
    return torch.cat([checkpoint(head, part, target, use_reentrant=False)[0] for part, target in parts])


def child(side: str, *, tokens: int, chunk: int, passes: int, seed: int) -> Cost:
    """Make the inputs, run `passes` times forward and backward, and say what it took."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    hidden_RD = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight_VD = torch.randn(VOCAB, HIDDEN).mul_(HIDDEN**-0.5).requires_grad_()
    targets_R = torch.randint(VOCAB, (tokens,))
    upstream_R = torch.randn(tokens)
    if side == INPUTS:
        return Cost(peak_bytes=peak_bytes())
    for _ in range(passes):
        hidden_RD.grad = weight_VD.grad = None
        began = time.perf_counter()
        logprobs_R = logprobs_of(side, hidden_RD, weight_VD, targets_R, chunk=chunk)
        torch.autograd.backward(logprobs_R, upstream_R)
        seconds = time.perf_counter() - began
    peak = peak_bytes()
    assert hidden_RD.grad is not None
    assert weight_VD.grad is not None
    return Cost(
        peak_bytes=peak,
        seconds=seconds,
        logprobs=float(logprobs_R.detach().double().sum()),
        gradients=[float(grad.double().norm()) for grad in (hidden_RD.grad, weight_VD.grad)],
    )


def spawn(side: str, *, tokens: int, chunk: int, passes: int, seed: int) -> Cost:
    """Run `child` in a fresh process."""
    command = [sys.executable, "-m", "tools.bench.logprobs", side, str(tokens), str(chunk), str(passes)]
    done = subprocess.run(
        [*command, "--seed", str(seed)], check=True, stdout=subprocess.PIPE, timeout=DEADLINE_S
    )
    return msgspec.json.decode(done.stdout, type=Cost)


def measure(options: Options) -> list[Figures]:
    """Every side at every size; the repeats of a size take turns."""
    repeats, passes = options.choose(quick=1, normal=3, full=5), options.choose(quick=1, normal=2)
    found = []
    for tokens in TOKENS:
        cases = [("plain", 0)] + [(side, chunk) for chunk in CHUNKS for side in SIDES[1:]]
        costs: dict[tuple[str, int], list[Cost]] = {case: [] for case in [*cases, (INPUTS, 0)]}
        for _ in range(repeats):
            for (side, chunk), seen in costs.items():
                seen.append(spawn(side, tokens=tokens, chunk=chunk, passes=passes, seed=options.seed))
        base = statistics.median(cost.peak_bytes for cost in costs.pop((INPUTS, 0)))
        found += [
            Figures(
                side=side,
                tokens=tokens,
                chunk=chunk,
                mib=[(cost.peak_bytes - base) / MIB for cost in seen],
                seconds=[cost.seconds for cost in seen],
                check=seen[0],
            )
            for (side, chunk), seen in costs.items()
        ]
    return found


def disagreement(figures: list[Figures]) -> float:
    """Largest relative difference of a checked figure from the plain side's at the same size."""
    plain = {figure.tokens: figure.check for figure in figures if figure.side == "plain"}
    worst = 0.0
    for figure in figures:
        expected = plain[figure.tokens]
        pairs = zip(
            [figure.check.logprobs, *figure.check.gradients],
            [expected.logprobs, *expected.gradients],
            strict=True,
        )
        worst = max(worst, *(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs))
    return worst


def table(figures: list[Figures], tokens: int) -> Table:
    """The sides at one number of tokens, against the plain one."""
    shown = [figure for figure in figures if figure.tokens == tokens]
    plain = next(figure for figure in shown if figure.side == "plain")
    rows = [
        [
            f"{figure.side} {figure.chunk or ''}".strip(),
            spread(figure.mib),
            f"{figure.peak_mib / plain.peak_mib:.2f}x",
            spread(figure.seconds),
            f"{figure.typical_s / plain.typical_s:.2f}x",
        ]
        for figure in shown
    ]
    logits = number(tokens * VOCAB * 4 / MIB)
    return Table(
        title=f"{tokens} tokens (their logits once: {logits} MiB); side and tokens of a chunk",
        columns=["side", "peak MiB", "of plain", "seconds", "of plain"],
        rows=rows,
    )


def run(options: Options) -> Section:
    """Measure all sizes; see the module's docstring."""
    figures = measure(options)
    by_case = {(figure.side, figure.tokens, figure.chunk): figure for figure in figures}
    targets = [
        Target(
            what=f"peak of fused over plain, {tokens} tokens in chunks of {TARGET_CHUNK}",
            value=by_case["fused", tokens, TARGET_CHUNK].peak_mib / by_case["plain", tokens, 0].peak_mib,
            bound=TARGET_SHARE,
            unit="x",
            at_least=False,
        )
        for tokens in TOKENS
    ]
    return Section(
        name="logprobs",
        title="log-probs of a large vocabulary, forward and backward",
        settings={
            "vocabulary": VOCAB,
            "hidden": HIDDEN,
            "dtype": "float32",
            "threads": THREADS,
            "seed": options.seed,
        },
        tables=[table(figures, tokens) for tokens in TOKENS],
        targets=targets,
        notes=[
            "peak resident memory above a process that only makes the inputs",
            f"log-prob sums and gradient norms agree with the plain side's to {disagreement(figures):.1e}",
        ],
        data={"figures": figures},
    )


def main() -> None:
    """The child: one side, its cost as JSON on standard output."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.logprobs", description="One measurement.")
    parser.add_argument("side", choices=[*SIDES, INPUTS])
    parser.add_argument("tokens", type=int)
    parser.add_argument("chunk", type=int)
    parser.add_argument("passes", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cost = child(given.side, tokens=given.tokens, chunk=given.chunk, passes=given.passes, seed=given.seed)
    print(msgspec.json.encode(cost).decode())


if __name__ == "__main__":
    main()
