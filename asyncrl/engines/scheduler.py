"""Continuous batching: who runs, who waits, and what happens between two decode steps.

Owns the waiting requests, the rows, the KV cache and the model; lives on the compute thread and is plain
synchronous code. Rows join and leave at every step. Never talks to the event loop: `step` collects events,
the caller delivers them.

A request joins with its last known token pending and everything before it in the cache, so that a fresh
response, a resumed one and a mate of a filled prompt take their next token in the same way.
"""
# ruff: noqa: N806 -- tensors carry shape suffixes

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncrl.engines.base import Chunk, GenerateRequest, LoadReport, OnNewWeights
from asyncrl.engines.cache import KVCache, PrefixStore, SavedPrompt
from asyncrl.engines.decoder import Decoder
from asyncrl.engines.noise import uniforms
from asyncrl.engines.prefill import Piece, decode_attention, fill
from asyncrl.engines.rows import Rows, Work, make_work
from asyncrl.engines.sampling import sample
from asyncrl.engines.spans import Mark
from asyncrl.engines.text import Decode
from asyncrl.errors import NumericsError, WeightsError

# Prompt tokens whose keys and values are kept for group mates that come later.
PREFIX_STORE_TOKENS = 8192


@dataclass(kw_only=True)
class Swap:
    """New weights that wait for their moment."""

    version: int
    incarnation: int
    tensors: Mapping[str, torch.Tensor]
    mode: OnNewWeights
    done: Callable[[LoadReport | WeightsError], None]
    """Called on the compute thread, once."""
    cancelled: Callable[[], bool]
    """Whether nobody waits for it any more; it is then dropped."""
    since: float = 0.0
    """When the engine learned of it."""
    was_running: bool = False
    """Whether a token under the old version could still come after that."""


@dataclass(kw_only=True)
class Counters:
    """What `statistics` shows; written by the compute thread only."""

    generated_tokens: int = 0
    prefilled_tokens: int = 0
    steps: int = 0


@dataclass(kw_only=True)
class Scheduler:
    """See the module's docstring."""

    decoder: Decoder
    max_concurrency: int
    max_context_len: int
    decode: Decode
    version: tuple[int, int]
    device: str = "cpu"
    capture_routing: bool = False
    """Keep the experts that every token went to (the decoder must have some)."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, for progress and pauses."""
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        config = self.decoder.config
        self.waiting: deque[Work] = deque()
        self.rows = Rows(
            max_rows=self.max_concurrency,
            max_context_len=self.max_context_len,
            vocab_size=config.vocab_size,
            clock=self.clock,
            routing_shape=config.routing_shape if self.capture_routing else None,
        )
        self.cache = KVCache(
            config,
            max_slots=self.max_concurrency,
            max_positions=self.max_context_len,
            device=self.device,
            dtype=self.decoder.embedding.dtype,
        )
        self.prefixes = PrefixStore(max_tokens=PREFIX_STORE_TOKENS)
        self.events: list[tuple[int, Chunk]] = []
        self._swaps: deque[Swap] = deque()
        self._taken: list[tuple[Swap, float, int, int]] = []
        """Swaps that are done and not reported: (swap, since when it paused, aborted, recomputed tokens)."""
        self._is_end_V = np.zeros(config.vocab_size, dtype=bool)
        self._is_end_V[[i for i in config.eos_ids if i < config.vocab_size]] = True
        self._last_token_time = 0.0

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.waiting or self.rows.works or self._swaps)

    def submit(self, ticket: int, request: GenerateRequest) -> None:
        """Queue a request; it joins at the next step that has room."""
        self.waiting.append(make_work(ticket, request, decode=self.decode))

    def abort(self, ticket: int) -> None:
        """End a request with finish reason "abort"; an unknown ticket has finished already."""
        for slot, work in enumerate(self.rows.works):
            if work.ticket == ticket:
                self._end({slot: "abort"})
                return
        for work in self.waiting:
            if work.ticket == ticket:
                self.waiting.remove(work)
                self.events.append((ticket, _nothing("abort")))
                return

    def abort_all(self) -> None:
        """End everything, running or waiting."""
        for ticket in [work.ticket for work in (*self.rows.works, *self.waiting)]:
            self.abort(ticket)

    def swap(self, swap: Swap) -> None:
        """Queue new weights; they are taken between two steps, in the order they came."""
        swap.since, swap.was_running = self.clock(), bool(self.rows.works)
        self._swaps.append(swap)

    def step(self) -> None:
        """Swap if it is time, let requests join, sample one token for every row."""
        while self._swaps and self._may_swap(self._swaps[0]):
            self._do_swap(self._swaps.popleft())
        if not self._swaps:
            self._admit()
        if self.rows.works:
            self._decode_step()
        self._report_swaps()

    def _may_swap(self, swap: Swap) -> bool:
        return swap.mode is not OnNewWeights.FINISH or not self.rows.works or swap.cancelled()

    def _do_swap(self, swap: Swap) -> None:
        if swap.cancelled():
            return
        try:
            self.decoder.check(swap.tensors)
        except WeightsError as error:
            # Refused weights concern the one who pushed them; nothing has changed.
            swap.done(error)
            return
        aborted = len(self.rows) if swap.mode is OnNewWeights.ABORT else 0
        if aborted:
            self._end(dict.fromkeys(range(aborted), "abort"))
        self.decoder.load(swap.tensors)
        self.version = (swap.version, swap.incarnation)
        self.prefixes.clear()
        self.rows.stamp(*self.version)
        recomputed = 0
        if swap.mode is OnNewWeights.RECOMPUTE:
            recomputed = self._recompute()
        since = self._last_token_time if swap.was_running else swap.since
        self._taken.append((swap, since, aborted, recomputed))

    def _recompute(self) -> int:
        """Fill every row's cache anew; tokens that were sampled keep the routing they were sampled with."""
        slots = list(range(len(self.rows)))
        kept = [view.copy() if (view := self.rows.unsent_routing(s)) is not None else None for s in slots]
        recomputed = self._fill_rows(slots)
        for slot, old in zip(slots, kept, strict=True):
            new = self.rows.unsent_routing(slot)
            if new is not None and old is not None:
                new[:] = old
        return recomputed

    def _report_swaps(self) -> None:
        """Say how swaps went: after the first token under the new weights, where anything runs."""
        now = self.clock()
        for swap, since, aborted, recomputed in self._taken:
            swap.done(LoadReport(pause_s=now - since, aborted=aborted, recomputed_tokens=recomputed))
        self._taken.clear()

    def _admit(self) -> None:
        joined = []
        while self.waiting and len(self.rows) < self.max_concurrency:
            work = self.waiting.popleft()
            sequence = len(work.sequence)
            limit = min(work.prompt_length + work.request.params.max_new_tokens, self.max_context_len)
            if sequence >= limit:
                self.events.append((work.ticket, _nothing("length")))
                continue
            work.marks = [Mark(*self.version, sequence)]
            joined.append(self.rows.join(work, limit=limit))
        if joined:
            self._fill_rows(joined)

    def _fill_rows(self, slots: list[int]) -> int:
        """Bring everything but the rows' last tokens into the cache. Returns their tokens."""
        rows = self.rows
        self.cache.reserve(len(rows), int(rows.length[slots].max(initial=1)))
        shared: dict[tuple[str, bytes], list[int]] = {}
        rest = []
        for slot in slots:
            request, known = rows.works[slot].request, int(rows.length[slot]) - 1
            start = int(rows.prompt_length[slot]) - 1 if request.prefix_key else 0
            if start > 0:
                shared.setdefault((request.prefix_key, request.prompt), []).append(slot)
            if known > start:
                rest.append(Piece(slot, start, rows.tokens_SE[slot, start:known]))
        self._fill_prompts(shared)
        self.counters.prefilled_tokens += self._fill(rest)
        return int((rows.length[slots] - 1).sum())

    def _fill(self, pieces: list[Piece]) -> int:
        return fill(self.decoder, self.cache, pieces, routed_SELK=self.rows.routed_SELK)

    def _fill_prompts(self, shared: dict[tuple[str, bytes], list[int]]) -> None:
        """Each distinct prompt once, in its first mate's slot; then copied to the others."""
        saved = {key: self.prefixes.get(key) for key in shared}
        pieces = []
        for key, slots in shared.items():
            if saved[key] is None:
                known = int(self.rows.prompt_length[slots[0]]) - 1
                pieces.append(Piece(slots[0], 0, self.rows.tokens_SE[slots[0], :known]))
        self.counters.prefilled_tokens += self._fill(pieces)
        for key, slots in shared.items():
            prompt, copies = saved[key], slots
            if prompt is None:
                prompt, copies = self._save(slots[0]), slots[1:]
                self.prefixes.put(key, prompt)
            if copies:
                self.cache.restore(copies, prompt.kv_LeKD)
            if self.rows.routed_SELK is not None and prompt.routed is not None:
                self.rows.routed_SELK[copies, : len(prompt.routed)] = prompt.routed

    def _save(self, slot: int) -> SavedPrompt:
        num_known, routed = int(self.rows.prompt_length[slot]) - 1, self.rows.routed_SELK
        return SavedPrompt(
            kv_LeKD=self.cache.save(slot, num_known),
            routed=None if routed is None else routed[slot, :num_known].copy(),
        )

    def _decode_step(self) -> None:
        rows, n = self.rows, len(self.rows)
        length = rows.length[:n]
        longest = int(length.max())
        self.cache.reserve(n, longest)
        slots = np.arange(n)
        positions, responded = length - 1, length - rows.prompt_length[:n]
        attend = decode_attention(
            self.cache,
            num_kv_heads=self.decoder.config.num_kv_heads,
            lengths_n=self._tensor(length),
            longest=longest,
        )
        routed_nLK = None if rows.routed_SELK is None else self.decoder.new_routing(n)
        x_nC = self.decoder.hidden(
            self._tensor(rows.tokens_SE[slots, positions].astype(np.int64)),
            positions_N=self._tensor(positions),
            cache=self.cache,
            places_N=self._tensor(slots * self.cache.num_positions + positions),
            attend=attend,
            routed_NLK=routed_nLK,
        )
        if rows.routed_SELK is not None and routed_nLK is not None:
            rows.routed_SELK[slots, positions] = routed_nLK.cpu().numpy()
        tokens, logprobs = sample(
            self.decoder.logits(x_nC),
            uniforms_N=self._tensor(uniforms(rows.seeds[:n], responded)),
            params=rows.params(self.device),
            banned_NV=self._banned(),
        )
        self._take(tokens.cpu().numpy(), logprobs.cpu().numpy())

    def _take(self, tokens: NDArray[np.int64], logprobs: NDArray[np.float32]) -> None:
        """Write a step's tokens down. Raises NumericsError where the model gave no distribution."""
        if not np.isfinite(logprobs).all():
            uid = self.rows.works[int(np.argmin(np.isfinite(logprobs)))].request.uid
            version = ".".join(map(str, self.version))
            raise NumericsError(
                f"embedded engine: NaN or Inf in the logits of {uid!r} under version v{version}."
            )
        self.rows.append(tokens, logprobs)
        self._last_token_time = self.clock()
        self.counters.steps += 1
        self.counters.generated_tokens += len(tokens)
        self._collect(tokens)

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _banned(self) -> torch.Tensor | None:
        """End tokens, bool [n, V], of the rows that are not long enough to end; None where there are none."""
        rows, n = self.rows, len(self.rows)
        early = np.flatnonzero(rows.length[:n] < rows.min_length[:n])
        if not len(early):
            return None
        banned = np.zeros((n, rows.vocab_size), dtype=bool)
        for slot in early:
            if rows.eos[slot]:
                banned[slot] = self._is_end_V
            own = rows.works[slot].request.params.stop_token_ids
            banned[slot, [token for token in own if 0 <= token < rows.vocab_size]] = True
        return self._tensor(banned)

    def _collect(self, tokens: NDArray[np.int64]) -> None:
        """Hand out what is due and end what ended."""
        rows, n = self.rows, len(self.rows)
        length = rows.length[:n]
        stopped = self._is_end_V[tokens] & rows.eos[:n]
        for slot in np.flatnonzero(rows.own_stops[:n]):
            stopped[slot] |= rows.found_stop(int(slot))
        ended = stopped | (length >= rows.limit[:n])
        due = (length >= rows.due[:n]) | (rows.due_at[:n] <= self._last_token_time)
        for slot in np.flatnonzero(due & ~ended):
            self.events.append((rows.works[slot].ticket, rows.chunk(int(slot), None)))
        if ended.any():
            self._end({int(s): "stop" if stopped[s] else "length" for s in np.flatnonzero(ended)})

    def _end(self, reasons: dict[int, str]) -> None:
        """Finish rows. From the last slot down, so that the row that fills a hole is never one that ends."""
        for slot in sorted(reasons, reverse=True):
            self.events.append((self.rows.works[slot].ticket, self.rows.chunk(slot, reasons[slot])))
            last = self.rows.leave(slot)
            if last != slot:
                self.cache.move(last, slot, int(self.rows.length[slot]) - 1)


def _nothing(finish_reason: str) -> Chunk:
    return Chunk(tokens=b"", logprobs=b"", spans=[], text="", finish_reason=finish_reason)
