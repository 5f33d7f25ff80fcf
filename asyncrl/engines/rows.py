"""The running requests of the embedded engine as arrays, one row per request.

Owns everything that a decode step reads or writes per row, so that a step is a handful of numpy calls however
many rows run. Rows 0 .. n-1 are in use; a row that leaves is replaced by the last one, here and in the KV
cache. Never touches the model.

Letters: S slots, E positions of a context; L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncrl.engines.base import Chunk, GenerateRequest
from asyncrl.engines.noise import seed_word
from asyncrl.engines.sampling import BatchParams
from asyncrl.engines.spans import Mark, spans_between
from asyncrl.engines.text import Decode, Detokenizer
from asyncrl.messages.sample import pack_logprobs, pack_routing, pack_tokens, tokens_of

# A number no context reaches: "never" for the length at which something is due.
NEVER = 2**62


@dataclass(kw_only=True)
class Work:
    """What one request needs beyond the arrays."""

    ticket: int
    """Names the request between the threads; a uid may come again, a ticket never does."""
    request: GenerateRequest
    detokenizer: Detokenizer
    marks: list[Mark] = field(default_factory=list)
    sent: int = 0
    """Sequence length up to which tokens were handed out."""
    text: str = ""
    """Text found while looking for stop strings and not yet handed out."""
    tail: str = ""
    """The end of the text before that: a stop string may have begun in it."""

    @property
    def sequence(self) -> NDArray[np.int32]:
        """int32 [P + R0]: the prompt and what was sampled earlier."""
        return tokens_of(self.request.prompt + self.request.prefix)

    @property
    def prompt_length(self) -> int:
        """Prompt tokens."""
        return len(self.request.prompt) // 4


def make_work(ticket: int, request: GenerateRequest, *, decode: Decode) -> Work:
    """A request made ready. The prefix is decoded once: a character or a stop string may have begun in it."""
    detokenizer = Detokenizer(decode)
    tail = detokenizer.push(tokens_of(request.prefix).tolist()) if request.prefix else ""
    return Work(ticket=ticket, request=request, detokenizer=detokenizer, tail=tail)


class Rows:
    """The arrays. A row's sequence is prompt + response; `length` counts what is known of it."""

    def __init__(
        self,
        *,
        max_rows: int,
        max_context_len: int,
        vocab_size: int,
        clock: Callable[[], float],
        routing_shape: tuple[int, int] | None = None,
    ) -> None:
        """`clock` gives seconds, for progress; `routing_shape` is (L, K) where routing is captured."""
        self.vocab_size = vocab_size
        self._clock = clock
        self.works: list[Work] = []
        # The operating system gives pages when they are written, so the bound costs nothing by itself.
        self.tokens_SE = np.zeros((max_rows, max_context_len + 1), dtype=np.int32)
        self.logprobs_SE = np.zeros((max_rows, max_context_len + 1), dtype=np.float32)
        #: Where the token at a position went, known once it was put through the model.
        self.routed_SELK: NDArray[np.int16] | None = None
        if routing_shape is not None:
            self.routed_SELK = np.zeros((*self.tokens_SE.shape, *routing_shape), dtype=np.int16)
        self.integers = np.zeros((6, max_rows), dtype=np.int64)
        #: Known tokens; the last one has no keys and values yet.
        self.length, self.prompt_length, self.limit, self.min_length, self.due, self.top_k = self.integers
        self.flags = np.zeros((3, max_rows), dtype=bool)
        #: Ends at the model's end tokens; has stops of its own; is greedy.
        self.eos, self.own_stops, self.greedy = self.flags
        self.floats = np.ones((2, max_rows), dtype=np.float32)
        self.temperature, self.top_p = self.floats
        self.seeds = np.zeros(max_rows, dtype=np.uint64)
        #: When a chunk is due, whatever the number of tokens in it.
        self.due_at = np.full(max_rows, np.inf)
        self._params: BatchParams | None = None

    def __len__(self) -> int:
        return len(self.works)

    def join(self, work: Work, *, limit: int) -> int:
        """Take a request in; `limit` is the sequence length at which it ends. Returns its slot."""
        slot, params = len(self.works), work.request.params
        sequence = work.sequence
        self.works.append(work)
        self.tokens_SE[slot, : len(sequence)] = sequence
        work.sent = len(sequence)
        self.length[slot], self.prompt_length[slot] = len(sequence), work.prompt_length
        self.limit[slot] = limit
        self.min_length[slot] = work.prompt_length + params.min_new_tokens
        self._set_due(slot)
        self.eos[slot] = not params.ignore_eos
        self.own_stops[slot] = bool(params.stop or params.stop_token_ids)
        self.greedy[slot] = params.temperature == 0
        self.temperature[slot] = params.temperature or 1.0
        self.top_p[slot] = params.top_p
        self.top_k[slot] = params.top_k if params.top_k > 0 else self.vocab_size
        self.seeds[slot] = seed_word(work.request.seed)
        self._params = None
        return slot

    def _set_due(self, slot: int) -> None:
        """When the row's next chunk is due, counted from now and from what it has sampled."""
        request = self.works[slot].request
        self.due[slot] = self.length[slot] + (request.progress_every_tokens or NEVER)
        self.due_at[slot] = self._clock() + request.progress_every_s if request.progress_every_s else np.inf

    def leave(self, slot: int) -> int:
        """Drop a row; the last one takes its slot. Returns the slot that was the last one's."""
        last = len(self.works) - 1
        self.works[slot] = self.works[last]
        self.works.pop()
        if slot != last:
            used = self.length[last]
            self.tokens_SE[slot, :used] = self.tokens_SE[last, :used]
            self.logprobs_SE[slot, :used] = self.logprobs_SE[last, :used]
            if self.routed_SELK is not None:
                self.routed_SELK[slot, :used] = self.routed_SELK[last, :used]
            for array in (self.integers, self.flags, self.floats):
                array[:, slot] = array[:, last]
            self.seeds[slot], self.due_at[slot] = self.seeds[last], self.due_at[last]
        self._params = None
        return last

    def append(self, tokens_n: NDArray[np.int64], logprobs_n: NDArray[np.float32]) -> None:
        """One sampled token for every row."""
        n = len(self.works)
        rows, length = np.arange(n), self.length[:n]
        self.tokens_SE[rows, length] = tokens_n
        self.logprobs_SE[rows, length] = logprobs_n
        self.length[:n] += 1

    def params(self, device: str) -> BatchParams:
        """Sampling parameters as tensors; made anew only when a row joined or left."""
        if self._params is None:
            self._params = self._make_params(device)
        return self._params

    def _make_params(self, device: str) -> BatchParams:
        n = len(self.works)
        scaled = bool((self.temperature[:n] != 1).any())
        cut = bool(((self.top_p[:n] < 1) | (self.top_k[:n] < self.vocab_size)).any())

        def tensor(array: NDArray[Any]) -> torch.Tensor:
            # Copied: the arrays go on changing.
            return torch.tensor(array[:n], device=device)

        return BatchParams(
            temperature_N1=tensor(self.temperature).unsqueeze(1) if scaled else None,
            greedy_N=tensor(self.greedy) if self.greedy[:n].any() else None,
            top_p_N=tensor(self.top_p) if cut else None,
            top_k_N=tensor(self.top_k) if cut else None,
        )

    def stamp(self, version: int, incarnation: int) -> None:
        """From now on every row's tokens are this version's."""
        for slot, work in enumerate(self.works):
            work.marks.append(Mark(version, incarnation, int(self.length[slot])))

    def unsent_routing(self, slot: int) -> NDArray[np.int16] | None:
        """A view [e, L, K]: where the tokens went whose routing was not handed out yet."""
        if self.routed_SELK is None:
            return None
        sent = self.works[slot].sent
        # With the first response tokens goes the whole prompt; from then on one row for each token.
        first = 0 if sent == self.prompt_length[slot] else sent - 1
        return self.routed_SELK[slot, first : int(self.length[slot]) - 1]

    def found_stop(self, slot: int) -> bool:
        """Whether the newest token ends the row by its own stop token ids or stop strings."""
        work, end = self.works[slot], int(self.length[slot])
        params, token = work.request.params, int(self.tokens_SE[slot, end - 1])
        stopped = token in params.stop_token_ids
        if params.stop:
            piece = work.detokenizer.push([token])
            stopped |= any(stop in _window(work.tail + work.text, stop) + piece for stop in params.stop)
            work.text += piece
        return stopped and end >= self.min_length[slot]

    def chunk(self, slot: int, finish_reason: str | None) -> Chunk:
        """What was sampled since the row's last chunk."""
        work, end = self.works[slot], int(self.length[slot])
        asked = work.request.return_routed_experts and end > work.sent
        routed = self.unsent_routing(slot) if asked else None
        start, work.sent = work.sent, end
        self._set_due(slot)
        tokens = self.tokens_SE[slot, start:end]
        text = work.text if work.request.params.stop else work.detokenizer.push(tokens.tolist())
        if finish_reason not in (None, "abort"):
            # Only a finished text shows an incomplete character; an aborted one may be continued.
            text += work.detokenizer.flush()
        if work.request.params.stop:
            work.tail, work.text = (work.tail + text)[-max(map(len, work.request.params.stop)) :], ""
        return Chunk(
            tokens=pack_tokens(tokens),
            logprobs=pack_logprobs(self.logprobs_SE[slot, start:end]),
            spans=spans_between(work.marks, start, end),
            text=text,
            finish_reason=finish_reason,
            routed_experts=b"" if routed is None else pack_routing(routed),
            routed_top_k=0 if routed is None else routed.shape[-1],
        )


def _window(text: str, stop: str) -> str:
    """As much of the text's end as a stop string may have begun in without being complete."""
    return text[-(len(stop) - 1) :] if len(stop) > 1 else ""
