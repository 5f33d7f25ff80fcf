"""From tokens to log-probs with any transformers causal LM.

Owns the one way training runs a model: decoder over a packed row (or a padded batch), the head only at
positions that predict a response token, in chunks. `check_model` proves for the model at hand that this way
gives the model's own logits, so a model it does not fit is refused at load instead of trained wrongly.

Shape letters: T tokens of a micro-batch, R its response tokens, D hidden size, V vocabulary, S samples,
L longest sample.
"""

# ruff: noqa: N803, N806 -- tensors carry shape suffixes
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from asyncrl.algo.chunked import chunked_statistics
from asyncrl.algo.loss import TokenStatistics, token_statistics
from asyncrl.errors import ConfigError
from asyncrl.train.attention import NAME, plan_segments
from asyncrl.train.micro import MicroBatch

CHECK_LENGTHS = (5, 3, 9)
"""Tokens of the sequences that `check_model` compares."""
CHECK_TOLERANCE = 1e-3
"""Largest relative difference it takes for rounding (float32)."""


def hidden_states(model: Any, batch: MicroBatch, *, packed: bool) -> Tensor:
    """Last hidden states of the row [T, D]."""
    if packed:
        return _hidden_packed(model, batch.input_T, batch.position_T, batch.segments)
    return _hidden_padded(model, batch.input_T, batch.position_T, batch.lengths)


def response_hidden_states(model: Any, batch: MicroBatch, *, packed: bool) -> Tensor:
    """Hidden states that predict each response token [R, D]: what a value head reads, too."""
    return hidden_states(model, batch, packed=packed).index_select(0, batch.predict_R)


def row_logits(model: Any, batch: MicroBatch, *, packed: bool) -> Tensor:
    """Logits of every token of the row, float32 [T, V], for a loss function of the user's."""
    return model.get_output_embeddings()(hidden_states(model, batch, packed=packed)).float()


def _hidden_packed(model: Any, input_T: Tensor, position_T: Tensor, segments: Any) -> Tensor:
    output = model.base_model(
        input_ids=input_T[None], position_ids=position_T[None], use_cache=False, segments=segments
    )
    return output.last_hidden_state[0]


def _hidden_padded(model: Any, input_T: Tensor, position_T: Tensor, lengths: list[int]) -> Tensor:
    """The same through a batch padded on the right."""
    device = input_T.device
    lengths_S = torch.tensor(lengths, device=device)
    row_T = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths_S)
    input_SL = input_T.new_zeros(len(lengths), max(lengths))
    input_SL[row_T, position_T] = input_T
    mask_SL = torch.arange(max(lengths), device=device) < lengths_S.unsqueeze(1)
    output = model.base_model(input_ids=input_SL, attention_mask=mask_SL.long(), use_cache=False)
    return output.last_hidden_state[row_T, position_T]


def response_statistics(
    model: Any,
    batch: MicroBatch,
    *,
    packed: bool,
    temperature: float,
    chunk_size: int = -1,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """Log-prob and entropy of every response token of the micro-batch, [R] each.

    With `chunk_size` > 0 the logits of so many tokens are held at once, and computed again for the gradient.
    """
    hidden_RD = response_hidden_states(model, batch, packed=packed)
    head = model.get_output_embeddings()
    if chunk_size <= 0 or type(head) is not nn.Linear:
        return token_statistics(
            head(hidden_RD),
            targets_R=batch.target_R,
            temperature=temperature,
            entropy_gradient=entropy_gradient,
        )
    return chunked_statistics(
        hidden_RD,
        weight_VD=head.weight,
        bias_V=head.bias,
        targets_R=batch.target_R,
        temperature=temperature,
        chunk_size=chunk_size,
        entropy_gradient=entropy_gradient,
    )


@torch.no_grad()
def check_model(model: Any, *, packed: bool, device: torch.device) -> None:
    """Compare head(hidden_states) on a few tokens with the model's own logits, sequence by sequence.

    Raises ConfigError for models that scale or cap their logits, ignore position ids, or keep state across
    tokens other than through attention.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    lengths = list(CHECK_LENGTHS)
    input_T = torch.arange(sum(lengths), device=device) * 7 % vocab_size
    position_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    try:
        if packed:
            segments = plan_segments(lengths).to(device)
            hidden_TD = _hidden_packed(model, input_T, position_T, segments)
        else:
            hidden_TD = _hidden_padded(model, input_T, position_T, lengths)
        ours_TV = model.get_output_embeddings()(hidden_TD).float()
        theirs_TV = _own_logits(model, input_T, lengths).float()
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"trainer.hf_checkpoint: {_misfit(model, packed)} ({error})") from error
    difference = (ours_TV - theirs_TV).abs().max() / theirs_TV.abs().max().clamp(min=1e-6)
    tolerance = CHECK_TOLERANCE if model.dtype == torch.float32 else 30 * CHECK_TOLERANCE
    if not difference <= tolerance:
        raise ConfigError(
            f"trainer.hf_checkpoint: {_misfit(model, packed)} "
            f"(logits differ by {difference:.1e} of the largest)"
        )


def _own_logits(model: Any, input_T: Tensor, lengths: list[int]) -> Tensor:
    """The model's logits, one sequence at a time, with transformers' own attention."""
    implementation = model.config._attn_implementation  # noqa: SLF001 -- there is no public getter
    try:
        if implementation == NAME:
            model.set_attn_implementation("sdpa")
        parts = input_T.split(lengths)
        return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    finally:
        model.set_attn_implementation(implementation)


def _misfit(model: Any, packed: bool) -> str:
    hint = '; trainer.attn_implementation = "eager" fits the most models' if packed else ""
    return f"{type(model).__name__} cannot be trained as decoder + output head{hint}"
