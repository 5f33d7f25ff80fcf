"""Routing replay: every forward pass of the trainer sends tokens to the experts that were recorded for them.

    with recording(model) as record: ...forward...          R2: the old policy's own choices
    with replaying(model, record.indices_TLK): ...forward and backward...
    routing_rows(rows)                                       R3: the engine's choices, from the samples

Owns the finding of a model's routers and the hooks on them. Works on any transformers model whose routers
return (logits, scores, indices) by a rule it knows, and refuses the others by name; never changes a weight.

Invariant: experts are held by layer and token, not in a queue, so a forward that is computed again for the
gradient (gradient checkpointing) replays the same, as long as the backward pass runs inside `replaying`.

Letters: T tokens of a row, L mixture-of-experts layers, K experts per token, E experts.
"""

# ruff: noqa: N802, N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asyncrl.algo.routing import RULES, Rule, expert_scores, replayed
from asyncrl.errors import ConfigError, DataError
from asyncrl.train.rows import Row

ROUTER, EXPERTS = "TopKRouter", "Experts"
"""What the class names of routers and of experts end with, in transformers 5."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Options of a configuration that tell how many experts a layer has."""
NUM_PROBES = 16
"""Random hidden states that a router's rule is found with."""
OPTIONS = "trainer.use_routing_replay, trainer.use_rollout_routing_replay"

Output = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Router:
    """One layer's router."""

    name: str
    module: nn.Module
    top_k: int
    num_experts: int
    rule: Rule


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of a model, first layer first. Raises ConfigError naming a class that cannot be replayed.

    A router is understood when its own scores follow from its own logits and indices by one of the rules of
    asyncrl.algo.routing; that is tried out on random hidden states.
    """
    modules = dict(model.named_modules())
    found = {name: module for name, module in modules.items() if type(module).__name__.endswith(ROUTER)}
    blocks = {name.rpartition(".")[0] for name, m in modules.items() if type(m).__name__.endswith(EXPERTS)}
    lost = sorted(block for block in blocks if not any(name.startswith(f"{block}.") for name in found))
    if lost:
        parts = ", ".join(type(child).__name__ for child in modules[lost[0]].children())
        raise ConfigError(
            f"{OPTIONS}: {type(model).__name__} has experts in {lost[0]} ({type(modules[lost[0]]).__name__}: "
            f"{parts}) but no router whose class ends with {ROUTER}; turn the option off for this model"
        )
    if not found:
        config = getattr(model, "config", None)
        many = any((getattr(config, name, None) or 0) > 1 for name in COUNTS)
        what = "experts whose routers are not known" if many else "no experts"
        raise ConfigError(f"{OPTIONS}: {type(model).__name__} has {what}; turn the option off for this model")
    return [_router(name, module) for name, module in found.items()]


@torch.no_grad()
def _router(name: str, module: nn.Module) -> Router:
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not isinstance(top_k, int):
        raise _not_understood(name, module, "it has no weight [experts, hidden] and top_k")
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(NUM_PROBES, weight.shape[1], generator=generator).to(weight)
    try:
        # Not through the hooks: a replay that is under way is not the router's own rule.
        logits_TE, scores_TK, indices_TK = module.forward(probe)
        shapes = (logits_TE.shape, scores_TK.shape, indices_TK.shape)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _not_understood(name, module, f"forward(hidden states) failed: {error}") from error
    num_experts = len(weight)
    if shapes != ((NUM_PROBES, num_experts), (NUM_PROBES, top_k), (NUM_PROBES, top_k)):
        raise _not_understood(name, module, f"it returns shapes {[list(shape) for shape in shapes]}")
    for rule in RULES:
        again = expert_scores(logits_TE, indices_TK=indices_TK, rule=rule, dtype=scores_TK.dtype)
        if torch.equal(again, scores_TK):
            return Router(name, module, top_k, num_experts, rule)
    raise _not_understood(name, module, "its scores are not a softmax of its logits at its indices")


def _not_understood(name: str, module: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f"{OPTIONS}: the router {name} ({type(module).__name__}) cannot be replayed: {reason}; "
        f"(logits, scores, indices) with scores by one of {', '.join(RULES)} is understood. Turn the option "
        "off for this model"
    )


class Record:
    """What `recording` found."""

    def __init__(self, routers: Sequence[Router], *, lengths: Sequence[int] | None) -> None:
        self._names = [router.name for router in routers]
        self._chosen: dict[str, Tensor] = {}
        self._lengths = lengths

    def add(self, name: str, indices_TK: Tensor) -> None:
        """Keep a layer's choice; a second forward replaces the first."""
        self._chosen[name] = indices_TK.detach().to(torch.int16)

    @property
    def indices_TLK(self) -> Tensor:
        """int16 [T, L, K]. Raises ValueError before a forward pass went through every layer."""
        missing = [name for name in self._names if name not in self._chosen]
        if missing:
            raise ValueError(f"recording: no forward pass went through {', '.join(missing)}")
        recorded_TLK = torch.stack([self._chosen[name] for name in self._names], dim=1)
        if self._lengths is None:
            return recorded_TLK
        return recorded_TLK[_padded_places(self._lengths, device=recorded_TLK.device)]


@contextmanager
def recording(
    model: nn.Module | Sequence[Router], *, lengths: Sequence[int] | None = None
) -> Iterator[Record]:
    """Record the experts of the forward pass inside; the result is ready when it ends.

    `model` may be what `find_routers` returned for it, which saves the search. `lengths` are the tokens of
    each sequence where the forward pads them on the right; the record is in packed order all the same.
    Raises ConfigError.
    """
    routers = _routers_of(model)
    record = Record(routers, lengths=lengths)

    def hook_of(router: Router) -> Callable[[nn.Module, Any, Output], None]:
        return lambda module, args, output: record.add(router.name, output[2])  # noqa: ARG005 -- torch's signature

    with _hooks([(router, hook_of(router)) for router in routers]):
        yield record


@contextmanager
def replaying(
    model: nn.Module | Sequence[Router], indices_TLK: Tensor, *, lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """Send the tokens of every forward pass inside to the given experts, int [T, L, K].

    Scores come from the model's own logits at those experts, so the gradient reaches the router. A token
    whose entry is -1 goes where the model sends it. `lengths` as in `recording`; `indices_TLK` is in packed
    order. Recomputation for the gradient replays too, so the backward pass belongs inside.

    Raises ConfigError for the model, DataError where the indices do not fit it, ValueError (in the forward)
    where the number of tokens differs.
    """
    routers = _routers_of(model)
    _check_fits(routers, indices_TLK)
    if lengths is not None:
        indices_TLK = _padded(indices_TLK, lengths=lengths)
    hooks = [
        (router, _replay_hook(router, given_TK))
        for router, given_TK in zip(routers, indices_TLK.unbind(1), strict=True)
    ]
    with _hooks(hooks):
        yield


def _replay_hook(router: Router, given_TK: Tensor) -> Callable[[nn.Module, Any, Output], Output]:
    def hook(module: nn.Module, args: Any, output: Output) -> Output:  # noqa: ARG001 -- torch's signature
        logits_TE, scores_TK, own_TK = output
        if len(own_TK) != len(given_TK):
            raise ValueError(
                f"replaying: {router.name} saw {len(own_TK)} tokens, the routing holds {len(given_TK)}"
            )
        indices_TK = replayed(own_TK, given_TK=given_TK)
        again_TK = expert_scores(logits_TE, indices_TK=indices_TK, rule=router.rule, dtype=scores_TK.dtype)
        return logits_TE, again_TK, indices_TK

    return hook


@contextmanager
def _hooks(hooks: list[tuple[Router, Callable[..., Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for router, hook in hooks:
            stack.callback(router.module.register_forward_hook(hook).remove)
        yield


def _routers_of(model: nn.Module | Sequence[Router]) -> Sequence[Router]:
    return find_routers(model) if isinstance(model, nn.Module) else model


def _check_fits(routers: Sequence[Router], indices_TLK: Tensor) -> None:
    top_k, num_experts = routers[0].top_k, routers[0].num_experts
    if indices_TLK.shape[1:] != (len(routers), top_k):
        raise DataError(
            f"recorded routing is {list(indices_TLK.shape[1:])}, [layers, experts per token]; the model has "
            f"[{len(routers)}, {top_k}]: the engine samples with another model than the trainer trains"
        )
    if indices_TLK.numel() and int(indices_TLK.max()) >= num_experts:
        raise DataError(
            f"recorded routing names expert {int(indices_TLK.max())}; the model has 0 to {num_experts - 1}"
        )


def _padded_places(lengths: Sequence[int], *, device: torch.device) -> Tensor:
    """int64 [T]: where each token of the packed row lies in the flattened padded batch."""
    longest = max(lengths)
    parts = [torch.arange(length) + longest * i for i, length in enumerate(lengths)]
    return torch.cat(parts).to(device)


def _padded(indices_TLK: Tensor, *, lengths: Sequence[int]) -> Tensor:
    """The same for the flattened padded batch; -1 at padding."""
    if sum(lengths) != len(indices_TLK):
        raise ValueError(f"replaying: {len(indices_TLK)} tokens do not fill sequences of {list(lengths)}")
    padded = indices_TLK.new_full((len(lengths) * max(lengths), *indices_TLK.shape[1:]), -1)
    padded[_padded_places(lengths, device=indices_TLK.device)] = indices_TLK
    return padded


def routing_rows(rows: Sequence[Row], *, num_tokens: int | None = None) -> Tensor | None:
    """The recorded experts of samples laid end to end, int16 [T, L, K]; None where no sample has any.

    The last token of a sample was never put through the engine's model and has -1, as have samples without a
    record and the padding up to `num_tokens`. Raises DataError naming two samples whose shapes differ.
    """
    recorded = [(row.name, row.routed_experts) for row in rows if row.routed_experts is not None]
    if not recorded:
        return None
    first, shape = recorded[0][0], recorded[0][1].shape[1:]
    for name, routing in recorded:
        if routing.shape[1:] != shape:
            raise DataError(
                f"sample {name}: routed experts [layers, per token] are {list(routing.shape[1:])}, but "
                f"{list(shape)} in sample {first}; one run has one model"
            )
    total = sum(row.num_tokens for row in rows)
    indices_TLK = torch.full((max(total, num_tokens or 0), *shape), -1, dtype=torch.int16)
    start = 0
    for row in rows:
        if row.routed_experts is not None:
            part = torch.from_numpy(row.routed_experts.copy())
            indices_TLK[start : start + len(part)] = part
        start += row.num_tokens
    return indices_TLK
