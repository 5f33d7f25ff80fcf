"""The bytes of a message: a header frame, then body frames.

A header is the msgpack of one tagged struct; bodies are opaque bytes that this module never looks into. It
owns how a header is written and read, how large anything may be, and the hash by which two processes know
that they mean the same structs. It opens no socket and keeps no state.

Invariants: sizes are checked before anything is decoded, and whatever the bytes are, `Codec.decode` returns a
message of a declared type or raises `ProtocolError`, nothing else.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import xxhash

from asyncrl.errors import ProtocolError

KiB = 1024
MiB = 1024 * KiB

Body = bytes | bytearray | memoryview
"""What may travel as a frame."""

_ENCODER = msgspec.msgpack.Encoder()


class SizeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a message may weigh at most."""

    max_header_bytes: int = 16 * MiB
    """A manifest of 20,000 tensors takes about 3 MiB."""
    max_frame_bytes: int = 64 * MiB
    """One body. A response of a million tokens takes 9 MB."""
    max_frames: int = 16_384
    """Bodies in one message."""


def encode(message: msgspec.Struct) -> bytes:
    """The header frame of a message."""
    return _ENCODER.encode(message)


def num_bytes(*frames: Body) -> int:
    """Bytes in all frames together."""
    return sum(f.nbytes if isinstance(f, memoryview) else len(f) for f in frames)


def check_sizes(frames: Sequence[Body], *, limits: SizeLimits) -> None:
    """Accept a header frame and its bodies by size alone.

    Raises:
        ProtocolError: there is no header, there are too many bodies, or a frame is too large.
    """
    if not frames:
        raise ProtocolError("a message without a header frame; the first frame has to be the header")
    size = num_bytes(frames[0])
    if size > limits.max_header_bytes:
        raise ProtocolError(f"header of {size} bytes; at most {limits.max_header_bytes} are allowed")
    check_bodies(frames[1:], limits=limits)


def check_bodies(bodies: Sequence[Body], *, limits: SizeLimits) -> None:
    """Accept the bodies of a message by number and size. Raises ProtocolError."""
    if len(bodies) > limits.max_frames:
        raise ProtocolError(f"{len(bodies)} body frames; at most {limits.max_frames} are allowed")
    for position, body in enumerate(bodies):
        size = len(body) if type(body) is bytes else num_bytes(body)  # nearly always bytes, and many
        if size > limits.max_frame_bytes:
            raise ProtocolError(
                f"body frame {position} has {size} bytes; at most {limits.max_frame_bytes} are allowed"
            )


class Codec:
    """Reads the headers of one conversation: a tagged struct, or a union of them (`Hello | Work | Ack`)."""

    def __init__(self, receives: Any, *, limits: SizeLimits | None = None) -> None:
        self.types = types_of(receives)
        self.limits = limits or SizeLimits()
        self._decoder = msgspec.msgpack.Decoder(receives)

    def decode(self, frame: Body) -> Any:
        """The message in a header frame. Raises ProtocolError for anything that is not one."""
        size = num_bytes(frame)
        if size > self.limits.max_header_bytes:
            raise ProtocolError(f"header of {size} bytes; at most {self.limits.max_header_bytes} are allowed")
        try:
            return self._decoder.decode(frame)
        # Bytes of a stranger provoke more than DecodeError (UnicodeDecodeError, RecursionError, OverflowError
        # seen); whichever it is, the peer is at fault and not this process.
        except Exception as error:
            raise ProtocolError(f"header is not one of {self.names}: {error}") from error

    def check(self, message: Any) -> None:
        """Accept a message that was never encoded by its type alone. Raises ProtocolError."""
        if not isinstance(message, self.types):
            raise ProtocolError(f"message of type {type(message).__name__} is not one of {self.names}")

    @property
    def names(self) -> str:
        """The types this codec reads, for messages to people."""
        return ", ".join(t.__name__ for t in self.types)


def types_of(union: Any) -> tuple[type, ...]:
    """The structs of a union, or the one struct itself, in the order given."""
    if typing.get_origin(union) in {typing.Union, types.UnionType}:
        return typing.get_args(union)
    return (union,)


def schema_hash(receives: Any) -> str:
    """Fingerprint of structs and of all they reach: names, tags, fields and field types. 32 hex digits.

    Equal in every process that has the same definitions. Docstrings and default values do not count;
    the order of array-like fields does.

    Args:
        receives: a struct, a union of structs, or an iterable of either.
    """
    roots = list(receives) if isinstance(receives, Iterable) else [receives]
    seen: dict[str, str] = {}
    for root in roots:
        for struct in types_of(root):
            _describe(msgspec.inspect.type_info(struct), seen)
    text = "\n".join(f"{name}: {seen[name]}" for name in sorted(seen))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _describe(info: Any, seen: dict[str, str]) -> str:
    """The type in words that do not depend on the process; structs are described once, in `seen`."""
    if isinstance(info, msgspec.inspect.StructType):
        return _describe_struct(info, seen)
    if isinstance(info, msgspec.inspect.EnumType):
        return f"{info.cls.__name__}{sorted(repr(member.value) for member in info.cls)}"
    if isinstance(info, msgspec.inspect.UnionType):
        return " | ".join(sorted(_describe(t, seen) for t in info.types))
    if isinstance(info, msgspec.inspect.Type):
        fields = [f"{name}={_describe(getattr(info, name), seen)}" for name in info.__struct_fields__]
        return f"{type(info).__name__}({', '.join(fields)})"
    if isinstance(info, tuple):
        return f"({', '.join(_describe(item, seen) for item in info)})"
    return repr(info)


def _describe_struct(info: msgspec.inspect.StructType, seen: dict[str, str]) -> str:
    name = f"{info.cls.__module__}.{info.cls.__qualname__}"
    if name not in seen:
        seen[name] = ""  # a struct that contains itself is described once
        fields = [
            f"{f.encode_name}{'' if f.required else '?'}={_describe(f.type, seen)}" for f in info.fields
        ]
        ordered = fields if info.array_like else sorted(fields)
        seen[name] = f"tag={info.tag_field}:{info.tag} array={info.array_like} {'; '.join(ordered)}"
    return name
