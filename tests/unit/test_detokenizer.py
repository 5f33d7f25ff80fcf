"""Text in pieces: their sum is the text of the whole, and no piece splits a character."""

from __future__ import annotations

import pytest

from asyncrl.engines.text import REPLACEMENT, Detokenizer

TEXT = "a\u00e9\u20ac\U0001f600 b"
IDS = list(TEXT.encode())


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def words(ids: list[int]) -> str:
    """Like sentencepiece: the space before the first word is dropped."""
    return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_pieces_add_up_and_end_between_characters(size: int) -> None:
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(IDS[i : i + size]) for i in range(0, len(IDS), size)]
    assert "".join(pieces) == TEXT
    assert REPLACEMENT not in "".join(pieces)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("cut", range(len(IDS)))
def test_a_resumed_text_brings_the_character_its_prefix_ended_in(cut: int) -> None:
    first = Detokenizer(decode).push(IDS[:cut]) if cut else ""
    assert first + Detokenizer(decode, prefix=IDS[:cut]).push(IDS[cut:]) == TEXT


def test_flush_shows_what_never_became_a_character() -> None:
    detokenizer = Detokenizer(decode)
    assert detokenizer.push(IDS[:2]) == "a"
    assert detokenizer.flush() == REPLACEMENT


def test_bytes_that_are_no_characters_do_not_hold_the_text_back() -> None:
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push([0xFF]) for _ in range(8)]
    assert len("".join(pieces)) >= 4


def test_a_tokenizer_that_drops_the_first_space_loses_none() -> None:
    detokenizer = Detokenizer(words)
    assert "".join(detokenizer.push([i]) for i in range(5)) == words(list(range(5)))
