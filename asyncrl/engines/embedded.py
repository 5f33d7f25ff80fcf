"""The embedded engine: continuous batching in torch, in this process, without a server.

Owns one compute thread, on which the model is loaded, runs and is swapped. The event loop never computes and
never blocks: it puts commands into a queue and gets events by `call_soon_threadsafe`, once per decode step.

    generate / abort / load_weights --> inbox (SimpleQueue) --> compute thread: scheduler.step, step, step ...
    generate <-- asyncio.Queue per request <-- _deliver <-- call_soon_threadsafe

What ends the thread is handed to everybody who waits and to everybody who comes later: never a hang.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asyncrl.engines.base import Chunk, EngineStatistics, GenerateRequest, LoadReport, OnNewWeights
from asyncrl.engines.decoder import Decoder, read_checkpoint
from asyncrl.engines.model_config import read_config
from asyncrl.engines.scheduler import Scheduler, Swap
from asyncrl.engines.text import Decode
from asyncrl.engines.validate import check_request
from asyncrl.errors import AsyncrlError, ConfigError, DataError, RunError, WeightsError
from asyncrl.messages.sample import tokens_of

# How long `close` waits for the decode step in progress.
CLOSE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class _Submit:
    ticket: int
    request: GenerateRequest


@dataclass(frozen=True)
class _Abort:
    ticket: int


@dataclass(frozen=True)
class _Close:
    """The last command."""


_Command = _Submit | _Abort | Swap | _Close
_Stream = asyncio.Queue[Chunk | BaseException]


class Embedded:
    """An `Engine` for Hugging Face checkpoints of the Llama, Qwen2, Qwen3 and Qwen3-MoE families."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        max_concurrency: int,
        max_context_len: int,
        tokenizer_decode: Decode,
        num_threads: int = 1,
        device: str = "cpu",
        dtype: str = "float32",
        version: tuple[int, int] = (0, 1),
        capture_routing: bool = False,
    ) -> None:
        """Nothing is read before `start`.

        max_concurrency: rows of the batch. max_context_len: bound of prompt plus response, in tokens; a
        response that reaches it ends with "length". num_threads: torch's threads on the compute thread.
        version: (version, incarnation) that the model directory's weights are stamped with.
        capture_routing: keep the experts of every token, for requests that ask for them.
        """
        if max_concurrency < 1 or max_context_len < 2 or num_threads < 1:
            raise ConfigError(
                f"embedded engine: max_concurrency = {max_concurrency}, max_context_len = {max_context_len}, "
                f"num_threads = {num_threads}; at least 1, 2 and 1."
            )
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"embedded engine: dtype = {dtype!r}; allowed: float32, bfloat16, float16.")
        self.model_dir = Path(model_dir)
        self.max_concurrency, self.max_context_len = max_concurrency, max_context_len
        self._decode, self._num_threads = tokenizer_decode, num_threads
        self._device, self._dtype = device, dtype
        self._version = version
        self._capture_routing = capture_routing
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._tickets = itertools.count()
        self._streams: dict[int, _Stream] = {}
        self._running: dict[str, int] = {}
        self._swaps: set[asyncio.Future[LoadReport]] = set()
        self._failure: BaseException | None = None
        self._closed = False
        self._scheduler: Scheduler | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Load the model on the compute thread; waits for it. Raises DataError, ConfigError."""
        assert self._thread is None, "started twice"
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._compute, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        try:
            await ready
        except asyncio.CancelledError:
            # Loading cannot be interrupted, and nobody has to wait for it: the thread ends after it.
            self._thread = None
            self._inbox.put(_Close())
            raise

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`. The request is queued by the first `anext`. Raises ValueError, RunError."""
        self._check_open()
        check_request(
            request,
            max_context_len=self.max_context_len,
            running=self._running,
            captures_routing=self._capture_routing,
        )
        self._check_ids(request)
        ticket = next(self._tickets)
        stream = self._streams[ticket] = asyncio.Queue()
        self._running[request.uid] = ticket
        self._inbox.put(_Submit(ticket, request))
        finished = False
        try:
            while not finished:
                event = await stream.get()
                if isinstance(event, BaseException):
                    finished = True
                    raise self._error() from event
                finished = event.finish_reason is not None
                if finished:
                    self._forget(request.uid, ticket)
                yield event
        finally:
            self._forget(request.uid, ticket)
            if not finished:
                self._inbox.put(_Abort(ticket))

    def _check_ids(self, request: GenerateRequest) -> None:
        """Token ids that the model lacks would end the compute thread, and every other request with it."""
        assert self._scheduler is not None
        bound = self._scheduler.decoder.config.vocab_size
        ids = tokens_of(request.prompt + request.prefix)
        if int(ids.min()) < 0 or int(ids.max()) >= bound:
            raise ValueError(
                f"request {request.uid!r}: token ids {int(ids.min())} to {int(ids.max())}; the model has "
                f"0 to {bound - 1}. The prompt was made with another tokenizer."
            )

    def _forget(self, uid: str, ticket: int) -> None:
        self._streams.pop(ticket, None)
        if self._running.get(uid) == ticket:
            del self._running[uid]

    def abort(self, uid: str) -> None:
        """End a request with finish reason "abort"; unknown uids are ignored."""
        if uid in self._running:
            self._inbox.put(_Abort(self._running[uid]))

    async def load_weights(
        self, version: int, incarnation: int, tensors: Mapping[str, torch.Tensor], mode: OnNewWeights
    ) -> LoadReport:
        """See `Engine.load_weights`. Cancelling it before the swap drops the swap. Raises WeightsError."""
        self._check_open()
        report: asyncio.Future[LoadReport] = self._loop.create_future()
        self._swaps.add(report)
        done = self._resolver(report)
        self._inbox.put(
            Swap(
                version=version,
                incarnation=incarnation,
                tensors=tensors,
                mode=OnNewWeights(mode),
                done=done,
                cancelled=report.cancelled,
            )
        )
        try:
            return await report
        finally:
            self._swaps.discard(report)

    @property
    def version(self) -> tuple[int, int]:
        """(version, incarnation) that samples now."""
        return self._scheduler.version if self._scheduler is not None else self._version

    def statistics(self) -> EngineStatistics:
        """A snapshot; never blocks."""
        scheduler = self._scheduler
        if scheduler is None:
            return EngineStatistics(running=0, waiting=0, generated_tokens=0, prefilled_tokens=0, steps=0)
        running = len(scheduler.rows)
        return EngineStatistics(
            running=running,
            waiting=max(0, len(self._running) - running),
            generated_tokens=scheduler.counters.generated_tokens,
            prefilled_tokens=scheduler.counters.prefilled_tokens,
            steps=scheduler.counters.steps,
        )

    async def close(self) -> None:
        """Abort what runs, end the thread, free the model. May be called twice."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._inbox.put(_Close())
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._stopped
        except TimeoutError as error:
            raise RunError(
                f"embedded engine: a decode step ran longer than {CLOSE_TIMEOUT_S:.0f} s; not closed."
            ) from error
        # Its last act was to set the future, so this does not wait.
        thread.join()
        self._scheduler = None

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._error() from self._failure
        if self._closed or self._thread is None:
            raise RunError(
                f"embedded engine: {'closed' if self._closed else 'not started; call start() first'}."
            )

    def _error(self) -> AsyncrlError:
        assert self._failure is not None
        return RunError(f"embedded engine: the compute thread ended: {self._failure!r}.")

    # ---- on the compute thread ----

    def _compute(self, ready: asyncio.Future[None]) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            with torch.inference_mode():
                self._scheduler = scheduler = self._load()
                self._post(_resolve, ready, None)
                while self._take_commands(scheduler):
                    scheduler.step()
                    self._hand_over(scheduler)
                scheduler.abort_all()
                self._hand_over(scheduler)
        except BaseException as error:  # noqa: BLE001 - whatever ends the thread must reach those who wait for it
            self._post(self._fail, error, ready)
        self._post(self._end)

    def _load(self) -> Scheduler:
        config = read_config(self.model_dir)
        if self.max_context_len > config.max_position:
            raise ConfigError(
                f"embedded engine: max_context_len = {self.max_context_len}, but {self.model_dir} has "
                f"max_position_embeddings = {config.max_position}. Lower max_context_len."
            )
        if self._capture_routing and not config.moe_layers:
            raise ConfigError(
                f"trainer.use_rollout_routing_replay: {self.model_dir} has no experts; turn the option off."
            )
        decoder = Decoder(
            config,
            device=self._device,
            dtype=getattr(torch, self._dtype),
            max_positions=self.max_context_len,
        )
        try:
            decoder.load(read_checkpoint(self.model_dir))
        except WeightsError as error:
            raise DataError(
                f"{self.model_dir}: the checkpoint does not fit its config.json: {error}"
            ) from error
        return Scheduler(
            decoder=decoder,
            max_concurrency=self.max_concurrency,
            max_context_len=self.max_context_len,
            decode=self._decode,
            version=self._version,
            device=self._device,
            capture_routing=self._capture_routing,
        )

    def _take_commands(self, scheduler: Scheduler) -> bool:
        """Apply every command that is there; waits for one when there is nothing else to do. False: close."""
        block = not scheduler.busy
        while block or not self._inbox.empty():
            match self._inbox.get():
                case _Submit(ticket, request):
                    scheduler.submit(ticket, request)
                case _Abort(ticket):
                    scheduler.abort(ticket)
                case Swap() as swap:
                    scheduler.swap(swap)
                case _Close():
                    return False
            block = False
        return True

    def _hand_over(self, scheduler: Scheduler) -> None:
        if scheduler.events:
            self._post(self._deliver, scheduler.events)
            scheduler.events = []

    def _post(self, call: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            # The loop is closed: nobody is left who could wait for this.
            self._inbox.put(_Close())

    def _resolver(self, future: asyncio.Future[LoadReport]) -> Callable[[LoadReport | WeightsError], None]:
        return lambda result: self._post(_resolve, future, result)

    # ---- on the event loop, called by the compute thread ----

    def _deliver(self, events: list[tuple[int, Chunk]]) -> None:
        for ticket, chunk in events:
            stream = self._streams.get(ticket)
            if stream is not None:
                stream.put_nowait(chunk)

    def _fail(self, error: BaseException, ready: asyncio.Future[None]) -> None:
        self._failure = error
        _resolve(ready, error)
        for stream in self._streams.values():
            stream.put_nowait(error)

    def _end(self) -> None:
        """Nobody may wait for a thread that is gone."""
        for report in self._swaps:
            _resolve(
                report, self._error() if self._failure is not None else RunError("embedded engine: closed.")
            )
        for stream in self._streams.values():
            # For requests that were queued behind the close; the others have their last chunk before it.
            stream.put_nowait(Chunk(tokens=b"", logprobs=b"", spans=[], text="", finish_reason="abort"))
        _resolve(self._stopped, None)


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
