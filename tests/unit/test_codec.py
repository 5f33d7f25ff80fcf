"""The codec: what is written is read back, and whatever else is read is a ProtocolError."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import ProtocolError
from asyncrl.messages.codec import Codec, SizeLimits, check_sizes, encode, num_bytes, schema_hash, types_of
from asyncrl.messages.sample import Prompt, Segment, Span
from asyncrl.messages.version import Manifest


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    number: int
    text: str = ""
    extra: Any = None


class Tree(msgspec.Struct, frozen=True, tag="tree"):
    children: list[Tree] = []
    data: bytes = b""


CODEC = Codec(Ping | Tree)
HASHED = "from asyncrl.messages.codec import schema_hash; from asyncrl.messages.version import Manifest;"


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.text(), st.binary())
def test_what_is_written_is_read_back(number: int, text: str, data: bytes) -> None:
    for message in (Ping(number, text), Tree([Tree(), Tree([], data)])):
        assert CODEC.decode(encode(message)) == message
        assert CODEC.decode(memoryview(encode(message))) == message


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_protocol_error(frame: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(CODEC.decode(frame), (Ping, Tree))


@settings(deadline=None)
@given(st.data())
def test_any_damage_gives_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    frame = bytearray(encode(Ping(5, "text", {"a": [1, 2.5, None, b"x"]})))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        assert isinstance(CODEC.decode(frame), (Ping, Tree))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xa4ping\xa5extra" + b"\x91" * 5000,
        b"\x83\xa4type\xa4ping\xa6number\x01\xa4text\xa1\xff",
        encode(Ping(1)) + b"\x00",
        msgspec.msgpack.encode({"type": "other"}),
        msgspec.msgpack.encode({"type": "ping", "number": "seven"}),
    ],
)
def test_rubbish_is_a_protocol_error_that_names_what_was_expected(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match="Ping, Tree"):
        CODEC.decode(frame)


def test_a_header_over_the_limit_is_refused_before_it_is_decoded() -> None:
    codec = Codec(Ping, limits=SizeLimits(max_header_bytes=10))
    with pytest.raises(ProtocolError, match="header of 1000 bytes; at most 10"):
        codec.decode(b"\xc1" * 1000)


def test_sizes_are_checked_at_the_edge() -> None:
    limits = SizeLimits(max_header_bytes=4, max_frame_bytes=8, max_frames=2)
    check_sizes([b"1234", b"12345678", memoryview(bytearray(8)).cast("i")], limits=limits)
    for frames in ([], [b"12345"], [b"1", b"123456789"], [b"1", b"", b"", b""]):
        with pytest.raises(ProtocolError):
            check_sizes(frames, limits=limits)


def test_a_view_weighs_its_bytes_and_not_its_items() -> None:
    assert num_bytes(memoryview(bytearray(12)).cast("i"), b"12") == 14


def test_a_message_of_another_type_is_refused_undecoded() -> None:
    CODEC.check(Ping(1))
    with pytest.raises(ProtocolError, match="Span"):
        CODEC.check(Span(0, 1, 1))


def test_types_of_a_union_and_of_one() -> None:
    assert types_of(Ping | Tree) == (Ping, Tree)
    assert types_of(Ping) == (Ping,)


def test_the_schema_hash_is_the_same_in_every_process_and_order() -> None:
    command = [sys.executable, "-c", f"{HASHED} print(schema_hash(Manifest))"]
    other = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    assert other == schema_hash(Manifest)
    assert schema_hash(Ping | Tree) == schema_hash([Tree, Ping])


def struct(fields: list[tuple[str, Any]], **options: Any) -> type[msgspec.Struct]:
    return msgspec.defstruct("Named", fields, **options)


def test_the_schema_hash_sees_names_types_tags_and_what_is_reached() -> None:
    inner = struct([("x", int)])
    other = struct([("x", str)])
    variants = [
        struct([("a", int)]),
        struct([("b", int)]),
        struct([("a", str)]),
        struct([("a", int)], tag="n"),
        struct([("a", int)], array_like=True),
        struct([("a", int), ("b", int)]),
        struct([("a", int), ("b", int)], array_like=True),
        struct([("b", int), ("a", int)], array_like=True),
        msgspec.defstruct("Other", [("a", int)]),
        msgspec.defstruct("Outer", [("a", list[inner])]),  # type: ignore[valid-type]
        msgspec.defstruct("Outer", [("a", list[other])]),  # type: ignore[valid-type]
    ]
    assert len({schema_hash(variant) for variant in variants}) == len(variants)
    assert schema_hash(Prompt | Segment) != schema_hash(Prompt)
    assert schema_hash(Tree) == schema_hash(Tree)
