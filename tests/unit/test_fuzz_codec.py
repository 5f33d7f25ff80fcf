"""Whatever bytes arrive, decoding gives a message of a declared type or a ProtocolError, and keeps nothing.

Guards that these tests were seen to fail without: the broad except of `Codec.decode` and of `parts._decode`,
the bounds of `messages.numbers`, the lengths that `parts.unpack` and `check_segment` compare.
"""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import DataError, ProtocolError
from asyncrl.link import Complaints, Limits, shown
from asyncrl.link.screen import _MAX_REMEMBERED_PEERS, Screen
from asyncrl.messages import control, supervision
from asyncrl.messages.codec import Codec, encode, types_of
from asyncrl.messages.numbers import MAX
from asyncrl.messages.parts import GroupParts, encode_body, unpack
from asyncrl.messages.routing import routing_of
from asyncrl.messages.sample import (
    Prompt,
    Sample,
    Score,
    Segment,
    Span,
    Status,
    logprobs_of,
    mask_of,
    pack_logprobs,
    pack_routing,
    pack_tokens,
    tokens_of,
)
from asyncrl.messages.version import Manifest, TensorEntry
from tests.support.storm import Storm, renumbered, rss_bytes, share

GROWTH_BYTES = 16 << 20
MANIFEST = Manifest(
    run_id="run", version=3, incarnation=1, step=6, digest="d" * 32, num_bytes=128,
    tensors=[TensorEntry("w", [4, 8], "float32", 0, 128, "e" * 32)],
)  # fmt: skip
PARTS = GroupParts(
    group_id=4, indices=[0, 1], statuses=[Status.COMPLETED] * 2, segments=[2, 1], scored=True, removed=[1]
)
PROMPT = Prompt(tokens=pack_tokens([1, 2, 3]), text="1+2", label={"answer": [3, 4.5]}, metadata={"a": [1]})


def segment(count: int) -> Segment:
    return Segment(
        tokens=pack_tokens(range(count)),
        logprobs=pack_logprobs([-0.5] * count),
        loss_mask=b"\x01" * count,
        spans=[Span(1, 1, count - 1), Span(2, 1, 1)],
        text="x" * count,
        routed_experts=pack_routing([[[0, 1]]] * count),
        routed_top_k=2,
    )


BODIES = [encode_body(b) for b in (PROMPT, segment(5), segment(3), Score(reward=1.0), segment(4), Score())]
MESSAGES: dict[Any, list[Any]] = {
    control.ToBuffer: [
        control.Hello(name="g-0", role="generator", incarnation="i", protocol=1, schema="s", pid=7),
        control.Want(kind=control.Kind.GENERATE, samples=4, num_bytes=100, version=2, capacity=8),
        control.Reports(
            reports=[
                control.Report(fence=1, group_id=2, index=0, status=Status.PENDING, offset=3, num_tokens=4,
                               spans=[Span(1, 1, 4)])
            ]
        ),
        control.Scores(scores=[control.Scored(fence=1, group_id=2, index=0, reward=0.5)]),
        control.Verdict(fence=1, group_id=2, keep=True, removed=[0, 1]),
        control.Issue(lane=control.Lane.TRAIN, first_group=1, prompts=[control.Issued(8, 3, "set")]),
        control.Trained(batch=1, incarnation=1, step=2, digest="d", started=1.5, ended=2.5, tokens=9),
        control.Published(manifest=MANIFEST),
        control.Swapped(version=1, incarnation=1, pause_s=0.5, transfer_s=0.5, aborted=0,
                        recomputed_tokens=3),
        control.Saved(rollout_step=1, incarnation=1, path="p", step=2),
    ],
    control.FromBuffer: [
        control.Welcome(run_id="run", announced=MANIFEST, trainer=control.TrainerStart(incarnation=1)),
        control.Leases(leases=[control.Lease(fence=3, kind=control.Kind.SCORE, parts=PARTS, version=1)]),
        control.Acks(acks=[control.Ack(1, 2, 0, 4, accepted=True)]),
        control.BatchPart(batch=1, part=0, num_parts=2, groups=[PARTS], num_bytes=77),
    ],
    supervision.ToSupervisor: [
        supervision.Telemetry(name="g-0", facts=b"[]"),
        supervision.AttachRequest(role="generator", protocol=1, schema="s"),
        supervision.Exiting(name="g-0", code=1, message="x"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("union", MESSAGES, ids=["to-buffer", "from-buffer", "to-supervisor"])
def test_a_storm_at_the_screen(union: Any) -> None:
    """Every message is admitted whole or dropped with a reason that names its peer; nothing is kept."""
    complaints: list[tuple[bytes, str]] = []
    limits = Limits(max_frame_bytes=4096, max_frames=64)
    screen = Screen(union, limits=limits, on_malformed=lambda peer, why: complaints.append((peer, why)))
    storm = Storm([[encode(m), b"body"] for m in MESSAGES[union]], seed=1)
    kinds = types_of(union)
    count, admitted, before = share(0.15), 0, 0
    for number in range(count):
        peer = f"peer-{number // 20}".encode()
        complaints.clear()
        delivery = screen.admit(peer, storm.message())
        if delivery is not None:
            admitted += 1
            assert isinstance(delivery.message, kinds)
        assert all(who == peer and why for who, why in complaints), "the peer is named"
        if number == count // 5:
            before = rss_bytes()
    assert count * 0.2 < admitted < count * 0.8, "the storm is neither all good nor all bad"
    assert len(screen._strikes) <= _MAX_REMEMBERED_PEERS
    assert rss_bytes() - before < GROWTH_BYTES


def test_a_storm_of_bodies() -> None:
    """Samples are put together from any frames and any claims about them, or a ProtocolError says why not."""
    draw, count, before = random.Random(3), share(0.15), 0
    storm = Storm([[encode_body(PARTS), *BODIES]], seed=3)  # type: ignore[arg-type]
    whole = 0
    for number in range(count):
        header, *frames = storm.message()
        try:
            parts = msgspec.msgpack.decode(header, type=GroupParts)
        except Exception:  # noqa: BLE001 - the codec's test is about these
            parts = PARTS
            if draw.random() < 0.3:
                frames = BODIES
        with contextlib.suppress(ProtocolError):
            for group in unpack([parts], frames):
                for sample in group:
                    whole += 1
                    read(sample)
        if number == count // 5:
            before = rss_bytes()
    assert whole > count // 10
    assert rss_bytes() - before < GROWTH_BYTES


def read(sample: Sample) -> None:
    """What trainers and rewards do first: every array of one sample has its length."""
    count = len(tokens_of(sample.tokens))
    assert len(logprobs_of(sample.logprobs)) == len(mask_of(sample.loss_mask)) == count
    assert sum(span.num_tokens for span in sample.spans) == count
    tokens_of(sample.prompt.tokens)
    with contextlib.suppress(DataError):
        routing_of(sample)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({field for union in MESSAGES for kind in types_of(union) for field in kind.__struct_fields__})


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(kind.__name__ for kind in types_of(control.ToBuffer))),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=8),
)
def test_right_tags_with_any_fields(tag: str, fields: dict[str, Any]) -> None:
    frame = msgspec.msgpack.encode({**fields, "type": tag})
    with contextlib.suppress(ProtocolError):
        assert type(Codec(control.ToBuffer).decode(frame)).__name__ == tag


@pytest.mark.parametrize("message", MESSAGES[control.ToBuffer], ids=lambda m: type(m).__name__)
def test_numbers_that_no_table_holds_are_refused(message: Any) -> None:
    """Every number of a message to the buffer fits SQLite after any sum of two."""
    codec, draw = Codec(control.ToBuffer), random.Random(0)
    for _ in range(300):
        with contextlib.suppress(ProtocolError):
            decoded = codec.decode(renumbered(encode(message), draw))
            for number in numbers(msgspec.to_builtins(decoded)):
                assert abs(number) <= MAX if isinstance(number, int) else math.isfinite(number)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Segment(tokens=b"abc"), "3 bytes of tokens are no int32 array"),
        (Segment(tokens=pack_tokens([1, 2]), logprobs=b"1234"), "4 bytes of log-probs for 2 tokens"),
        (Segment(tokens=pack_tokens([1]), logprobs=b"1234", loss_mask=b"11"), "a mask of 2 for 1"),
        (
            Segment(tokens=pack_tokens([1]), logprobs=b"1234", spans=[Span(0, 1, 2)]),
            "spans of 2 tokens for 1",
        ),
    ],
)
def test_a_segment_that_does_not_fit_together_is_named(wrong: Segment, words: str) -> None:
    parts = GroupParts(group_id=9, indices=[3], statuses=[Status.COMPLETED], segments=[1])
    with pytest.raises(ProtocolError, match=f"sample 9.3: {words}"):
        unpack([parts], [BODIES[0], encode_body(wrong)])


def test_complaints_run_dry_and_come_back() -> None:
    complaints = Complaints(burst=3, per_s=1.0)
    written = [complaints.admit(10.0) for _ in range(100)]
    assert written == [0, 0, 0, *[None] * 97]
    assert complaints.admit(11.5) == 97, "the next line says what was left out"
    assert complaints.admit(11.5) is None
    assert complaints.total == 102


def test_an_identity_is_shown_without_its_control_characters() -> None:
    assert shown(b"g-0.\n\x1b[2J\xff") == "g-0.\\n\\x1b[2J\\\\xff"
