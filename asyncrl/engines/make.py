"""The engine that a [[generator]] table names."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from asyncrl.engines.base import Engine
from asyncrl.engines.text import Decode
from asyncrl.errors import ConfigError, DataError
from asyncrl.topology.plan import Plan


class ScriptedOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """generator.scripted: parameters of the scripted engine; see `Scripted` and `Lengths`."""

    median: float = 25.0
    sigma: float = 0.6
    min_tokens: int = 1
    max_tokens: int = 128
    straggler_fraction: float = 0.0
    straggler_factor: float = 8.0
    token_latency_s: float = 0.0
    swap_s: float = 0.0
    vocab_size: int = 1000


def make_engine(plan: Plan, index: int, *, decode: Decode) -> Engine:
    """An engine that is not started yet. Raises ConfigError, DataError."""
    table = plan.topology.generator[index]
    capture_routing = plan.topology.trainer.use_rollout_routing_replay
    if table.engine == "scripted":
        if capture_routing:
            raise ConfigError(
                f'generator "{table.name}".engine: "scripted" has no experts, so '
                "trainer.use_rollout_routing_replay has to be off"
            )
        return _scripted(table.scripted, concurrency=table.concurrency)
    if table.engine == "embedded":
        from asyncrl.engines.embedded import Embedded

        return Embedded(
            plan.topology.trainer.hf_checkpoint,
            max_concurrency=table.concurrency,
            max_context_len=context_len(plan),
            tokenizer_decode=decode,
            num_threads=table.num_threads,
            capture_routing=capture_routing,
        )
    raise ConfigError(f'generator "{table.name}".engine: "{table.engine}" is not built in')


def context_len(plan: Plan) -> int:
    """Prompt and answer together: rollout_max_context_len, or what the model can do. Raises DataError."""
    if plan.topology.rollout.rollout_max_context_len is not None:
        return plan.topology.rollout.rollout_max_context_len
    path = Path(plan.topology.trainer.hf_checkpoint) / "config.json"
    try:
        return int(json.loads(path.read_bytes()).get("max_position_embeddings", 2048))
    except (OSError, ValueError) as error:
        raise DataError(f"trainer.hf_checkpoint: {path} cannot be read: {error}") from error


def _scripted(options: dict[str, object], *, concurrency: int) -> Engine:
    from asyncrl.engines.scripted import Lengths, Scripted

    try:
        given = msgspec.convert(options, ScriptedOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"generator.scripted: {error}") from error
    names = Lengths.__struct_fields__
    return Scripted(
        lengths=Lengths(**{name: getattr(given, name) for name in names}),
        token_latency_s=given.token_latency_s,
        swap_s=given.swap_s,
        vocab_size=given.vocab_size,
        max_concurrency=concurrency,
    )
