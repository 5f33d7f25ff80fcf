"""Token ids to text, a piece at a time.

Owns the position up to which a response's text was handed out. Never hands out a piece that ends inside a
character: its bytes wait for the tokens that complete it, or for `flush`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Decode = Callable[[list[int]], str]
"""Text of token ids; incomplete UTF-8 becomes the replacement character."""

REPLACEMENT = "\ufffd"
# A character has at most four bytes, so at most three tokens can wait for its last one.
MAX_WAITING = 3


def decode_letters(ids: Sequence[int]) -> str:
    """Ids as letters a-z, by remainder: the text of engines that have no tokenizer."""
    return (np.asarray(ids, dtype=np.int64) % 26 + 97).astype(np.uint8).tobytes().decode("ascii")


class Detokenizer:
    """The text of one response. Decodes a window that starts one piece back, because some tokenizers drop
    the space in front of the first token that they are given.
    """

    def __init__(self, decode: Decode, *, prefix: Sequence[int] = ()) -> None:
        """`prefix` is text handed out earlier: its tokens are context and its text is not repeated."""
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._done = 0
        self._context_text = ""
        if prefix:
            self.push(prefix)

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; calls `decode` once or twice when no character is split."""
        self._ids.extend(ids)
        num_ids = len(self._ids)
        for end in range(num_ids, max(self._done, num_ids - MAX_WAITING - 1), -1):
            text = self._decode(self._ids[self._context : end])
            if not text.endswith(REPLACEMENT):
                return self._advance(end, text)
        if num_ids - self._done > MAX_WAITING:
            # These bytes are no character at all: waiting longer would hold the text back for ever.
            return self.flush()
        return ""

    def flush(self) -> str:
        """What `push` still held back, replacement characters included."""
        if self._done == len(self._ids):
            return ""
        return self._advance(len(self._ids), self._decode(self._ids[self._context :]))

    def _advance(self, end: int, text: str) -> str:
        piece = text[len(self._context_text) :]
        if self._context == self._done:
            context_text = text
        else:
            context_text = self._decode(self._ids[self._done : end])
        # Only the last piece stays as context, so the window and its cost are bounded by the piece.
        self._context, self._done, self._context_text = self._done, end, context_text
        return piece
