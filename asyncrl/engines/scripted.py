"""An engine without a model: answers are a function of the seed, time is a function of their length.

Owns its running requests and a schedule of simulated tokens. Token t and its log-probability are pure
functions of (seed, t), the length of the seed alone, so results do not depend on speed, order or resumption.
Takes its time from the running event loop, so that it runs under a virtual clock; with latency 0 it takes no
time and does no work per token. Never imports torch and ignores the tensors of a push.

It has no logits: temperature, top_p, top_k and stop strings have no effect; stop_token_ids, ignore_eos and
the length limits do.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from asyncrl.engines.base import Chunk, EngineStatistics, GenerateRequest, LoadReport, OnNewWeights
from asyncrl.engines.noise import Seeds, hash_words, seed_word, uniform
from asyncrl.engines.spans import Mark, spans_between
from asyncrl.engines.text import Decode, Detokenizer, decode_letters
from asyncrl.engines.validate import check_request
from asyncrl.errors import ConfigError, RunError
from asyncrl.messages.sample import Tokens, pack_logprobs, pack_tokens

if TYPE_CHECKING:
    import torch

# Streams of numbers that must not meet those of the tokens, which count up from 0.
LENGTH_POSITION = -1
STRAGGLER_POSITION = -2
NORMAL = NormalDist()
# Log-probabilities that scripted tokens have, chosen by the hash's highest 8 bits: probabilities 0.05 to 1.
LOGPROBS = np.log(np.linspace(0.05, 1.0, 256)).astype(np.float32)
LOGPROBS.setflags(write=False)
LOGPROB_SHIFT = np.uint64(56)


class Lengths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long answers are: lognormal, cut to a range, with a share of stragglers on top."""

    median: float = 25.0
    """Tokens."""
    sigma: float = 0.6
    """Standard deviation of the length's logarithm; 0 makes every answer `median` long."""
    min_tokens: int = 1
    max_tokens: int = 128
    """Bound before the straggler factor."""
    straggler_fraction: float = 0.0
    """Share of answers that are longer by a factor."""
    straggler_factor: float = 8.0

    def problems(self) -> list[str]:
        """What is wrong with the numbers, one line each."""
        wrong = {
            f"median = {self.median}; above 0": not self.median > 0,
            f"sigma = {self.sigma}; at least 0": not self.sigma >= 0,
            f"min_tokens = {self.min_tokens}; 1 to max_tokens = {self.max_tokens}": not (
                1 <= self.min_tokens <= self.max_tokens
            ),
            f"straggler_fraction = {self.straggler_fraction}; 0 to 1": not 0 <= self.straggler_fraction <= 1,
            f"straggler_factor = {self.straggler_factor}; at least 1": not self.straggler_factor >= 1,
        }
        return [f"scripted engine: {text}." for text, found in wrong.items() if found]

    def draw(self, seed: int) -> int:
        """The answer's length in tokens, a function of the seed."""
        for_length, for_straggler = uniform(seed, LENGTH_POSITION), uniform(seed, STRAGGLER_POSITION)
        length = self.median
        if self.sigma > 0:
            # inv_cdf is open at 0 and 1.
            length *= math.exp(self.sigma * NORMAL.inv_cdf(min(max(for_length, 1e-12), 1 - 1e-12)))
        length = min(max(round(length), self.min_tokens), self.max_tokens)
        return round(length * self.straggler_factor) if for_straggler < self.straggler_fraction else length


@dataclass(kw_only=True, eq=False)
class _Run:
    """One request. Positions are response tokens, the prefix included."""

    request: GenerateRequest
    total: int
    """Response tokens at which it ends by itself."""
    reason: str
    tokens: Tokens
    """int32 [total]."""
    words: Seeds
    """uint64 [total], the hashes that the tokens and their log-probabilities come from."""
    detokenizer: Detokenizer
    sent: int
    done: int
    """Tokens sampled when `since` was."""
    since: float = 0.0
    running: bool = False
    aborted: bool = False
    marks: list[Mark] = field(default_factory=list)
    wake: asyncio.Future[None] | None = None

    def interrupt(self) -> None:
        """Let the request look around before its time."""
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)


class Scripted:
    """An `Engine` for tests, dry runs and benchmarks."""

    def __init__(
        self,
        *,
        lengths: Lengths | None = None,
        token_latency_s: float = 0.0,
        swap_s: float = 0.0,
        max_concurrency: int = 256,
        vocab_size: int = 1000,
        tokenizer_decode: Decode = decode_letters,
        version: tuple[int, int] = (0, 1),
    ) -> None:
        """Raises ConfigError naming every number that is wrong.

        token_latency_s: simulated seconds per token and request, whatever else runs. swap_s: simulated
        seconds that a push stops generation for. max_concurrency: requests at once; more wait their turn.
        """
        self.lengths = lengths or Lengths()
        wrong = {
            f"token_latency_s = {token_latency_s}; at least 0": not token_latency_s >= 0,
            f"swap_s = {swap_s}; at least 0": not swap_s >= 0,
            f"max_concurrency = {max_concurrency}; at least 1": max_concurrency < 1,
            f"vocab_size = {vocab_size}; at least 1": vocab_size < 1,
        }
        problems = self.lengths.problems() + [f"scripted engine: {t}." for t, bad in wrong.items() if bad]
        if problems:
            raise ConfigError(*problems)
        self.token_latency_s, self.swap_s = token_latency_s, swap_s
        self.max_concurrency, self.vocab_size = max_concurrency, vocab_size
        self._decode = tokenizer_decode
        self._version = version
        self._runs: dict[str, _Run] = {}
        self._waiting: deque[_Run] = deque()
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._swap_lock = asyncio.Lock()
        self._held = False
        self._open = False
        self._failure: Exception | None = None
        self._generated_tokens = self._prefilled_tokens = 0

    async def start(self) -> None:
        """Be ready; nothing is loaded."""
        self._loop = asyncio.get_running_loop()
        self._open = True

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`. Raises ValueError, RunError."""
        self._check_open()
        check_request(request, max_context_len=None, running=self._runs)
        run = self._runs[request.uid] = self._make_run(request)
        try:
            await self._turn(run)
            while True:
                await self._reach(run, self._boundary(run))
                chunk = self._chunk(run)
                if chunk.finish_reason is not None:
                    self._leave(run)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._leave(run)

    def _make_run(self, request: GenerateRequest) -> _Run:
        params, prefix = request.params, np.frombuffer(request.prefix, dtype="<i4")
        length = params.max_new_tokens if params.ignore_eos else self.lengths.draw(request.seed)
        stopped = length <= params.max_new_tokens and not params.ignore_eos
        total = min(max(length, params.min_new_tokens), params.max_new_tokens)
        words = hash_words(np.array([seed_word(request.seed)]), np.arange(total))
        tokens = (words % np.uint64(self.vocab_size)).astype(np.int32)
        if params.stop_token_ids:
            first = max(params.min_new_tokens, len(prefix))
            hits = np.flatnonzero(np.isin(tokens[first:], params.stop_token_ids))
            if len(hits):
                total, stopped = first + int(hits[0]) + 1, True
        # A prefix that is as long as the answer leaves one empty, last chunk.
        total = max(total, len(prefix))
        return _Run(
            request=request,
            total=total,
            reason="stop" if stopped else "length",
            tokens=tokens[:total],
            words=words[:total],
            detokenizer=Detokenizer(self._decode, prefix=prefix.tolist()),
            sent=len(prefix),
            done=len(prefix),
        )

    async def _turn(self, run: _Run) -> None:
        """Wait for a free place; unblocked by a request that leaves, a swap that is over, an abort."""
        # One round of the loop per request, so that a consumer of instant answers does not starve the others.
        await asyncio.sleep(0)
        self._waiting.append(run)
        self._start_waiting()
        while not (run.running or run.aborted):
            run.wake = self._loop.create_future()
            await run.wake
        self._check_failure()

    def _start_waiting(self) -> None:
        while self._waiting and not self._held and self._num_running < self.max_concurrency:
            run = self._waiting.popleft()
            run.running, run.since = True, self._loop.time()
            run.marks = [Mark(*self._version, run.done)]
            self._num_running += 1
            self._idle.clear()
            self._prefilled_tokens += len(run.request.prompt) // 4 + run.done
            run.interrupt()

    def _leave(self, run: _Run) -> None:
        """Free the request's place; may be called twice."""
        if self._runs.get(run.request.uid) is not run:
            return
        del self._runs[run.request.uid]
        if run.running:
            self._num_running -= 1
        else:
            self._waiting = deque(other for other in self._waiting if other is not run)
        if self._num_running == 0:
            self._idle.set()
        self._start_waiting()

    def _boundary(self, run: _Run) -> int:
        """Response tokens at which the next chunk is due."""
        request, boundary = run.request, run.total
        if request.progress_every_tokens:
            boundary = min(boundary, run.sent + request.progress_every_tokens)
        if request.progress_every_s and self.token_latency_s:
            # Sampling time, in which a swap does not count: the same chunks whatever the clock does.
            tokens = math.ceil(request.progress_every_s / self.token_latency_s - 1e-6)
            boundary = min(boundary, run.sent + max(1, tokens))
        return boundary

    async def _reach(self, run: _Run, boundary: int) -> None:
        """Wait until so many tokens are sampled, or until the request is aborted."""
        if not run.running or run.aborted:
            return
        if self.token_latency_s == 0:
            run.done = boundary
            return
        while not run.aborted and self._tokens_at(run, self._loop.time()) < boundary:
            run.wake = self._loop.create_future()
            timer = self._loop.call_at(
                run.since + (boundary - run.done) * self.token_latency_s, run.interrupt
            )
            try:
                await run.wake
            finally:
                timer.cancel()
        self._check_failure()

    def _tokens_at(self, run: _Run, now: float) -> int:
        if self.token_latency_s == 0 or not run.running:
            return run.done
        # The fraction forgives the rounding of a timer that fires at the boundary itself.
        elapsed = math.floor((now - run.since) / self.token_latency_s + 1e-6)
        return min(run.total, run.done + max(0, elapsed))

    def _settle(self, run: _Run) -> None:
        """Bring `done` up to now, so that what changes next concerns later tokens only."""
        now = self._loop.time()
        done = self._tokens_at(run, now)
        run.since += (done - run.done) * self.token_latency_s
        run.done = done

    def _chunk(self, run: _Run) -> Chunk:
        """Everything sampled since the last chunk, up to the boundary that is due."""
        end = run.done if run.aborted or self.token_latency_s == 0 else self._boundary(run)
        start, run.sent = run.sent, end
        reason = "abort" if run.aborted and end < run.total else run.reason if end >= run.total else None
        tokens = run.tokens[start:end]
        try:
            text = run.detokenizer.push(tokens.tolist())
        except Exception as error:
            # A broken decode function breaks every request: all are told, as the embedded engine does.
            self._fail(error)
            raise self._error() from error
        self._generated_tokens += end - start
        return Chunk(
            tokens=pack_tokens(tokens),
            logprobs=pack_logprobs(LOGPROBS[run.words[start:end] >> LOGPROB_SHIFT]),
            spans=spans_between(run.marks, start, end),
            text=text + (run.detokenizer.flush() if reason in ("stop", "length") else ""),
            finish_reason=reason,
        )

    def abort(self, uid: str) -> None:
        """End a request with finish reason "abort"; unknown uids are ignored."""
        run = self._runs.get(uid)
        if run is not None and not run.aborted:
            self._settle(run)
            run.aborted = True
            run.interrupt()

    async def load_weights(
        self, version: int, incarnation: int, tensors: Mapping[str, torch.Tensor], mode: OnNewWeights
    ) -> LoadReport:
        """Stamp later tokens with this version; waits for running requests in mode finish, and `swap_s`."""
        del tensors
        self._check_open()
        async with self._swap_lock:
            return await self._swap((version, incarnation), OnNewWeights(mode))

    async def _swap(self, version: tuple[int, int], mode: OnNewWeights) -> LoadReport:
        self._held = True
        try:
            if mode is OnNewWeights.FINISH:
                await self._idle.wait()
            self._check_open()
            started = self._loop.time()
            running = [run for run in self._runs.values() if run.running and not run.aborted]
            for run in running:
                self._settle(run)
                # Generation stands still for the swap: the next token comes that much later.
                run.since += self.swap_s
                run.marks.append(Mark(*version, run.done))
            if mode is OnNewWeights.ABORT:
                for run in running:
                    self.abort(run.request.uid)
            if self.swap_s:
                await asyncio.sleep(self.swap_s)
            self._version = version
        finally:
            self._held = False
            self._start_waiting()
        known = sum(len(run.request.prompt) // 4 + run.done for run in running)
        return LoadReport(
            pause_s=self._loop.time() - started,
            aborted=len(running) if mode is OnNewWeights.ABORT else 0,
            recomputed_tokens=known if mode is OnNewWeights.RECOMPUTE else 0,
        )

    @property
    def version(self) -> tuple[int, int]:
        """(version, incarnation) that samples now."""
        return self._version

    def statistics(self) -> EngineStatistics:
        """A snapshot; never blocks."""
        return EngineStatistics(
            running=self._num_running,
            waiting=len(self._runs) - self._num_running,
            generated_tokens=self._generated_tokens,
            prefilled_tokens=self._prefilled_tokens,
            steps=0,
        )

    async def close(self) -> None:
        """Abort what runs. May be called twice."""
        self._open = False
        for uid in list(self._runs):
            self.abort(uid)
        self._idle.set()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for run in self._runs.values():
            run.aborted = True
            run.interrupt()
        self._idle.set()

    def _check_open(self) -> None:
        self._check_failure()
        if not self._open:
            raise RunError("scripted engine: closed, or not started; call start() first.")

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise self._error() from self._failure

    def _error(self) -> RunError:
        return RunError(f"scripted engine: a request failed: {self._failure!r}.")
