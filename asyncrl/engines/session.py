"""One sample's way through an engine: a lease in, segments out, by the engine itself or by a user's function.

Sampling randomness is a function of (run seed, group, sample, token position): a resumed sample never
repeats numbers, and group mates differ.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import xxhash

from asyncrl.engines.base import Chunk, Engine, GenerateRequest, SamplingParams
from asyncrl.errors import PluginError
from asyncrl.messages.hooks import Args, HookSample, hook_sample, segment_of
from asyncrl.messages.sample import Lane, Sample, Segment, Status, logprobs_of, pack_tokens, tokens_of
from asyncrl.topology.plan import Plan
from asyncrl.topology.progress import hand_ins

FINISH = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
"""Engines' finish reasons as statuses."""


class Piece(NamedTuple):
    """Tokens to hand in, and how the sample stands with them."""

    segment: Segment
    status: Status


def sampling_params(plan: Plan, lane: Lane) -> SamplingParams:
    """How samples of a lane are sampled."""
    rollout, evals = plan.topology.rollout, plan.topology.eval
    training = lane is Lane.TRAIN
    return SamplingParams(
        temperature=_first(None if training else evals.eval_temperature, rollout.rollout_temperature),
        top_p=_first(None if training else evals.eval_top_p, rollout.rollout_top_p),
        top_k=int(_first(None if training else evals.eval_top_k, rollout.rollout_top_k)),
        max_new_tokens=int(
            _first(None if training else evals.eval_max_response_len, rollout.rollout_max_response_len)
        ),
        min_new_tokens=rollout.rollout_min_new_tokens if training else 0,
        stop=rollout.rollout_stop,
        stop_token_ids=rollout.rollout_stop_token_ids,
    )


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def seed_of(plan: Plan, sample: Sample) -> int:
    """The seed of one sample, a function of the run's seed, the group and the position in it."""
    text = f"{plan.topology.source.rollout_seed}:{sample.lane}:{sample.group_id}:{sample.index}"
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def request_for(plan: Plan, sample: Sample, *, uid: str) -> GenerateRequest:
    """What to ask the engine for."""
    params, every = sampling_params(plan, sample.lane), hand_ins(plan.topology.rollout)
    return GenerateRequest(
        uid=uid,
        prompt=sample.prompt.tokens,
        prefix=sample.tokens,
        params=params,
        seed=seed_of(plan, sample),
        prefix_key=f"{sample.lane}:{sample.group_id}",
        progress_every_tokens=every.tokens,
        progress_every_s=every.seconds,
        return_routed_experts=plan.topology.trainer.use_rollout_routing_replay and sample.lane is Lane.TRAIN,
    )


async def warm_up(engine: Engine) -> None:
    """One token of no sample's: whatever an engine does at its first request is done before work comes."""
    params = SamplingParams(max_new_tokens=1)
    request = GenerateRequest(uid="warm-up", prompt=pack_tokens([0]), params=params, seed=0)
    async for _ in engine.generate(request):
        pass


async def generate(engine: Engine, request: GenerateRequest) -> AsyncIterator[Piece]:
    """The pieces of one response; the last one has a status other than PENDING."""
    if len(request.prefix) // 4 >= request.params.max_new_tokens:
        yield Piece(Segment(), Status.TRUNCATED)
        return
    async for chunk in engine.generate(request):
        status = Status.PENDING if chunk.finish_reason is None else FINISH[chunk.finish_reason]
        yield Piece(_segment(chunk), status)


def _segment(chunk: Chunk) -> Segment:
    return Segment(
        tokens=chunk.tokens,
        logprobs=chunk.logprobs,
        spans=chunk.spans,
        text=chunk.text,
        routed_experts=chunk.routed_experts,
        routed_top_k=chunk.routed_top_k,
    )


class EngineHandle:
    """What a custom generate function finds as `args.engine`: SGLang's /generate, as a coroutine."""

    def __init__(self, engine: Engine, template: GenerateRequest) -> None:
        self._engine = engine
        self._template = template
        self._calls = 0
        self.aborted = False

    async def generate(
        self, *, input_ids: list[int], sampling_params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One generation; returns the reply of SGLang's /generate (text, meta_info). Raises ValueError."""
        self._calls += 1
        params = dict(sampling_params or {})
        known = {name: params[name] for name in SamplingParams.__struct_fields__ if name in params}
        if isinstance(known.get("stop"), str):
            known["stop"] = [known["stop"]]
        request = GenerateRequest(
            uid=f"{self._template.uid}/{self._calls}",
            prompt=pack_tokens(input_ids),
            params=SamplingParams(**{name: value for name, value in known.items() if value is not None}),
            seed=self._template.seed + self._calls,
        )
        chunks = [chunk async for chunk in self._engine.generate(request)]
        reason = chunks[-1].finish_reason or "abort"
        self.aborted = self.aborted or reason == "abort"
        return _reply(chunks, reason)


def _reply(chunks: list[Chunk], reason: str) -> dict[str, Any]:
    ids = [int(t) for chunk in chunks for t in tokens_of(chunk.tokens)]
    logprobs = [float(p) for chunk in chunks for p in logprobs_of(chunk.logprobs)]
    spans = [span for chunk in chunks for span in chunk.spans]
    newest = spans[-1] if spans else None
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "meta_info": {
            "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, ids, strict=True)],
            "finish_reason": {"type": reason},
            "weight_version": f"{newest.version}.{newest.incarnation}" if newest else "",
            "spans": [[span.version, span.incarnation, span.num_tokens] for span in spans],
            "completion_tokens": len(ids),
        },
    }


async def generate_custom(
    function: Callable[..., Any], engine: Engine, request: GenerateRequest, sample: Sample, args: Args
) -> Piece:
    """One response by a user's function (args, sample, sampling_params) -> sample.

    Raises:
        PluginError: it raised, or returned something other than a sample.
        ProtocolError: the sample's arrays do not fit each other.
    """
    hook = hook_sample(sample)
    handle = EngineHandle(engine, request)
    own = Args(vars(args))
    own.engine = handle
    params = {name: getattr(request.params, name) for name in SamplingParams.__struct_fields__}
    wants_lane = "evaluation" in inspect.signature(function).parameters
    extra = {"evaluation": sample.lane is Lane.EVAL} if wants_lane else {}
    try:
        result = await function(own, hook, params, **extra)
    except Exception as error:  # user code: whatever it raises is that sample's named failure
        text = f"{type(error).__name__}: {error}"
        raise PluginError(f"rollout.custom_generate_function_path: raised {text}") from error
    if not isinstance(result, HookSample):
        raise PluginError(
            f"rollout.custom_generate_function_path: returned {type(result).__name__}, a sample is expected"
        )
    if handle.aborted:
        return Piece(Segment(), Status.ABORTED)
    status = result.status if result.status in {Status.COMPLETED, Status.TRUNCATED} else Status.COMPLETED
    return Piece(segment_of(result, sample, incarnation=engine.version[1]), status)
