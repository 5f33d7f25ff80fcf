"""A custom generate function to copy: one answer, and where it is wrong one more try after a hint.

    [rollout]
    custom_generate_function_path = "plugins.generate:generate"

    [run]
    custom_config_path = "generate.yaml"     # hint_tokens: [11, 12], hint_text: " Check. ", is_done: "####"

What the model did not sample (the hint) is in the response with loss mask 0, so it is never trained on.
"""

from __future__ import annotations

from typing import Any

STATUS = {"stop": "completed", "length": "truncated", "abort": "aborted"}
"""The engine's finish reasons and the sample's status for each."""


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """Slime's signature. `args.engine.generate` answers as SGLang's /generate does."""
    await _turn(args, sample, sampling_params)
    hint = list(getattr(args, "hint_tokens", []))
    needs_hint = sample.status == "completed" and hint and args.is_done not in sample.response
    if needs_hint and sample.response_length + len(hint) < sampling_params["max_new_tokens"]:
        sample.append_response_tokens(hint, text=args.hint_text, trainable=False)
        await _turn(args, sample, sampling_params)
    return sample


async def _turn(args: Any, sample: Any, sampling_params: dict[str, Any]) -> None:
    """One call of the engine, from everything so far; its tokens are appended to the sample."""
    room = sampling_params["max_new_tokens"] - sample.response_length
    reply = await args.engine.generate(
        input_ids=list(sample.tokens), sampling_params={**sampling_params, "max_new_tokens": room}
    )
    meta = reply["meta_info"]
    sample.append_response_tokens(
        [entry[1] for entry in meta["output_token_logprobs"]],
        text=reply["text"],
        log_probs=[entry[0] for entry in meta["output_token_logprobs"]],
        meta_info=meta,
    )
    sample.status = sample.Status(STATUS[meta["finish_reason"]["type"]])
