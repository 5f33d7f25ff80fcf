"""The interface of an engine: what a generator role asks, whatever runs behind it.

An engine owns its weights and its running requests. It never talks to the buffer and knows no leases. It
stamps every token with the version that sampled it, and it never samples under weights it was not given by
`load_weights` (or, for version 0, loaded from the model directory and had verified by the caller).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from asyncrl.messages.sample import Span

if TYPE_CHECKING:
    import torch


class OnNewWeights(StrEnum):
    """What happens to running requests when new weights arrive (Miles: `pause_generation_mode`)."""

    FINISH = "finish"
    """Nothing new starts until the running requests ended and the weights are swapped."""
    ABORT = "abort"
    """Running requests end at once with finish reason "abort"; their tokens are resumed elsewhere."""
    RECOMPUTE = "recompute"
    """Swap, then rebuild the KV cache of running requests under the new weights (Miles: retract)."""
    KEEP = "keep"
    """Swap under the running requests and keep their KV cache (Miles: in_place)."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to sample one response; names and meanings are SGLang's."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""
    max_new_tokens: int = 1024
    """Response tokens in total, the prefix included."""
    min_new_tokens: int = 0
    """End tokens and stops are not taken before this many response tokens."""
    stop: list[str] = []
    """Strings that end the response; kept in the text and in the tokens."""
    stop_token_ids: list[int] = []
    """Token ids that end the response, beside the model's own end tokens; kept in the tokens."""
    ignore_eos: bool = False


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One response to sample, or to continue."""

    uid: str
    """Unique among the running requests of the engine; names the request for `abort`."""
    prompt: bytes
    """int32 [P]."""
    prefix: bytes = b""
    """int32 [R0], response tokens sampled earlier (a partial rollout); never returned again."""
    params: SamplingParams
    seed: int
    """The number of response token t is a pure function of (seed, t), so a resumed response never repeats
    numbers and two samples with different seeds differ."""
    prefix_key: str = ""
    """Requests with the same non-empty key have the same prompt: its prefill may be shared."""
    progress_every_tokens: int = 0
    """Yield a chunk at least every so many tokens; 0: not for their number."""
    progress_every_s: float = 0.0
    """Yield a chunk with the first token sampled so many seconds after the last chunk (or the start);
    0: not for the time. With both 0 there is one chunk, at the end."""
    return_routed_experts: bool = False
    """Whether chunks carry the experts that tokens went to; the engine must capture them."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens sampled since the last chunk of the same request."""

    tokens: bytes
    """int32 [C]; may be empty in a last chunk."""
    logprobs: bytes
    """float32 [C]: log_softmax(logits / temperature) at the token, before top-p and top-k (temperature 1
    when greedy)."""
    spans: list[Span]
    """Versions of the C tokens."""
    text: str
    """Decoded tokens; a chunk that ends inside a character leaves it to the next."""
    finish_reason: str | None = None
    """None while the request runs; "stop", "length" or "abort" in its last chunk."""
    routed_experts: bytes = b""
    """int16 [rows, L, K] where the request asked for it: the K experts in each of L layers, of every token
    whose forward pass sampled the next one. P + C - 1 rows with the first response tokens, then C rows."""
    routed_top_k: int = 0
    """K."""


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a swap of weights did."""

    pause_s: float
    """From the last token under the old version to the first under the new; where nothing runs any more, to
    the moment one may be sampled."""
    aborted: int
    """Requests that ended with "abort" (mode abort only)."""
    recomputed_tokens: int
    """Tokens whose KV cache was rebuilt (mode recompute only)."""


class EngineStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for gauges."""

    running: int
    waiting: int
    generated_tokens: int
    """Response tokens sampled since start."""
    prefilled_tokens: int
    steps: int


class Engine(Protocol):
    """See the module's docstring. All methods are called on one event loop; compute happens elsewhere."""

    async def start(self) -> None:
        """Load the model of version 0 and be ready for `generate`. Raises DataError, ConfigError."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Sample a response; the last chunk has a finish reason. Closing the iterator aborts the request."""

    def abort(self, uid: str) -> None:
        """End a running or waiting request with finish reason "abort"; unknown uids are ignored."""

    async def load_weights(
        self, version: int, incarnation: int, tensors: Mapping[str, torch.Tensor], mode: OnNewWeights
    ) -> LoadReport:
        """Swap to these weights (Hugging Face names; copied before this returns). Raises WeightsError."""

    @property
    def version(self) -> tuple[int, int]:
        """(version, incarnation) that samples now."""

    def statistics(self) -> EngineStatistics:
        """A snapshot; never blocks."""

    async def close(self) -> None:
        """Abort what runs and free everything. May be called twice."""
