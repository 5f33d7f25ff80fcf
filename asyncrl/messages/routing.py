"""Recorded expert choices between bytes and arrays, with their one check.

Owns the convention: position t of a sample's P + R tokens has a row for t < P + R - 1, because the last token
was never put through the model. Decides nothing about how choices are recorded or replayed.

Letters: P prompt tokens, R response tokens, L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncrl.errors import DataError, ProtocolError
from asyncrl.messages.sample import Sample, pack_routing

Routing = NDArray[np.int16]

MAX_EXPERT = 2**15 - 1
"""Largest expert index that int16 holds."""


def routing_of(sample: Sample) -> Routing | None:
    """Read-only view [P + R - 1, L, K] of a sample's recorded experts; None where there are none.

    Raises DataError naming the sample when the bytes do not divide into its tokens, or when a token went to
    the same expert twice (a capture of zeros).
    """
    if not sample.routed_experts:
        return None
    name = f"{sample.group_id}.{sample.index}"
    num_rows = len(sample.prompt.tokens) // 4 + sample.num_tokens - 1
    flat = np.frombuffer(sample.routed_experts, dtype="<i2")
    top_k = sample.routed_top_k
    if top_k < 1 or num_rows < 1 or len(flat) % (num_rows * top_k):
        raise DataError(
            f"sample {name}: {len(flat)} routed experts do not divide into {num_rows} rows (prompt and "
            f"response less one) of {top_k} experts per layer"
        )
    routing = flat.reshape(num_rows, -1, top_k)
    if top_k > 1:
        twice = (routing[..., 0] == routing[..., 1]) & (routing[..., 0] >= 0)
        if twice.any():
            row, layer = (int(i) for i in np.argwhere(twice)[0])
            raise DataError(
                f"sample {name}: token {row} went to expert {int(routing[row, layer, 0])} of layer {layer} "
                "twice; the recorded routing is damaged or was never filled in"
            )
    return routing


def rows_of_hook(value: Any, *, first: int, last: int, where: str) -> tuple[bytes, int]:
    """(bytes, K) of the rows first .. last - 1 of what a hook left in `rollout_routed_experts`.

    `value` is an array or nested lists [last, L, K]. None counts as none, and so do the `first` rows alone
    that a resumed sample came with. Raises ProtocolError beginning with `where`.
    """
    if value is None or first >= last or (first and len(value) == first):
        return b"", 0
    try:
        routing = np.asarray(value)
    except ValueError as error:
        raise ProtocolError(f"{where}: rollout_routed_experts is no array: {error}") from error
    integers = np.issubdtype(routing.dtype, np.integer)
    if not integers or routing.ndim != 3 or len(routing) != last or not routing.size:
        raise ProtocolError(
            f"{where}: rollout_routed_experts is {routing.dtype} {list(routing.shape)}; integers "
            f"[{last}, layers, experts per token] are expected (one row per token but the last), or None"
        )
    if int(routing.min()) < -1 or int(routing.max()) > MAX_EXPERT:
        raise ProtocolError(
            f"{where}: rollout_routed_experts holds {int(routing.min())} to {int(routing.max())}; -1 (the "
            f"model chooses) to {MAX_EXPERT} are allowed"
        )
    return pack_routing(routing[first:last]), routing.shape[2]
