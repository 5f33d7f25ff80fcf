"""What every engine refuses before it runs a request."""

from __future__ import annotations

from collections.abc import Container

from asyncrl.engines.base import GenerateRequest


def check_request(
    request: GenerateRequest,
    *,
    max_context_len: int | None,
    running: Container[str],
    captures_routing: bool = False,
) -> None:
    """Raise ValueError naming the request and what is wrong with it."""
    params, num_prompt = request.params, len(request.prompt) // 4
    # The texts are written only when there is something to say: this runs for every request.
    fits = max_context_len is None or num_prompt < max_context_len
    lengths_fit = params.max_new_tokens >= 1 and 0 <= params.min_new_tokens <= params.max_new_tokens
    samples = params.temperature >= 0 and 0 < params.top_p <= 1 and (params.top_k == -1 or params.top_k >= 1)
    whole = len(request.prompt) % 4 == 0 == len(request.prefix) % 4
    progress = request.progress_every_tokens >= 0 and request.progress_every_s >= 0
    rest = whole and progress and "" not in params.stop and request.uid not in running
    uncaptured = request.return_routed_experts and not captures_routing
    if num_prompt and fits and lengths_fit and samples and rest and not uncaptured:
        return
    found = [text for text, wrong in _problems(request, max_context_len, running).items() if wrong]
    if uncaptured:
        found.append("return_routed_experts is set, but the engine was not made to capture routing")
    raise ValueError(f"request {request.uid!r}: {'; '.join(found)}.")


def _problems(
    request: GenerateRequest, max_context_len: int | None, running: Container[str]
) -> dict[str, bool]:
    """What may be wrong, and whether it is."""
    params, num_prompt = request.params, len(request.prompt) // 4
    return {
        "a request with this uid is running": request.uid in running,
        "the prompt is empty": num_prompt == 0,
        f"prompt of {len(request.prompt)} and prefix of {len(request.prefix)} bytes; multiples of 4": (
            len(request.prompt) % 4 != 0 or len(request.prefix) % 4 != 0
        ),
        f"the prompt has {num_prompt} tokens, which leaves no room for a response in max_context_len = "
        f"{max_context_len}": max_context_len is not None and num_prompt >= max_context_len,
        f"temperature = {params.temperature}; at least 0": not params.temperature >= 0,
        f"top_p = {params.top_p}; above 0, at most 1": not 0 < params.top_p <= 1,
        f"top_k = {params.top_k}; at least 1, or -1 for off": params.top_k != -1 and params.top_k < 1,
        f"max_new_tokens = {params.max_new_tokens}; at least 1": params.max_new_tokens < 1,
        f"min_new_tokens = {params.min_new_tokens}; 0 to max_new_tokens = {params.max_new_tokens}": not (
            0 <= params.min_new_tokens <= params.max_new_tokens
        ),
        "an empty stop string": "" in params.stop,
        f"progress_every_tokens = {request.progress_every_tokens}; at least 0": request.progress_every_tokens
        < 0,
        f"progress_every_s = {request.progress_every_s}; at least 0": not request.progress_every_s >= 0,
    }
