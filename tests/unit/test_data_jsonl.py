"""A JSONL file is indexed once, row by row, and every unusable line is named."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.data.jsonl import SHOWN_BAD_LINES, JsonlIndex, split_slice
from asyncrl.errors import DataError


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    path.write_bytes(b"".join(line + end for line in lines))
    return path


def rows(index: JsonlIndex) -> list[dict[str, Any]]:
    return [index.row(i) for i in range(len(index))]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_rows_survive_line_ends_blank_lines_unicode_and_a_byte_order_mark(
    tmp_path: Path, end: bytes, bom: bytes
) -> None:
    values = [{"a": "é\u2028漢 👩"}, {"a": 10**30}, {"a": "x\\n"}]
    lines = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    path = write(tmp_path / "p", bom + lines[0], b"", b"  \t", lines[1], lines[2], b"", end=end)
    index = JsonlIndex.build(path)
    assert rows(index) == values
    assert [index.line_number(i) for i in range(3)] == [1, 4, 5]
    assert index.num_bad == 0


def test_the_last_line_needs_no_end(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert rows(JsonlIndex.build(path)) == [{"a": 1}, {"a": 2}]


BAD = {
    b"{": "not JSON",
    b'{"a": 1} x': "not JSON (Extra data, column 10)",
    b"[1]": "not a JSON object but list",
    b"null": "not a JSON object but NoneType",
    b'{"a": "\xff"}': "not UTF-8 (byte 8 of the line)",
    b"[" * 100_000: "nested too deeply",
    b'{"a": ' + b"1" * 5000 + b"}": "not JSON that can be read",
    '{"a": 1}'.encode("utf-16"): "not UTF-8 (byte 1 of the line)",
    b'{"a": "' + b"x" * 200_000 + b'"}': "longer than 150000 bytes",
    b'{"b": 1}': "no a",
}


def no_a(row: dict[str, Any]) -> str | None:
    return None if "a" in row else "no a"


@pytest.mark.parametrize("line", BAD, ids=list(BAD.values()))
def test_a_bad_line_is_named_with_its_number_or_skipped_and_counted(tmp_path: Path, line: bytes) -> None:
    good = b'{"a": 1}'
    path = write(tmp_path / "p", good, b"", line, good)
    with pytest.raises(DataError, match="on_bad_line = skip") as caught:
        JsonlIndex.build(path, check=no_a, max_line_bytes=150_000)
    assert f"prompt_data: {path} has 1 bad lines beside 2 good ones" in str(caught.value)
    assert "line 3: " in str(caught.value)
    assert BAD[line] in str(caught.value)
    index = JsonlIndex.build(path, check=no_a, max_line_bytes=150_000, on_bad_line="skip")
    assert (len(index), index.num_bad, index.bad[0].line) == (2, 1, 3)
    assert index.row(1) == {"a": 1}
    assert index.line_number(1) == 4


def test_many_bad_lines_are_counted_and_some_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "p", b'{"a": 1}', *[b"{"] * 50)
    with pytest.raises(DataError, match="and 45 more"):
        JsonlIndex.build(path)
    index = JsonlIndex.build(path, on_bad_line="skip")
    assert index.num_bad == 50
    assert len(index.bad) == SHOWN_BAD_LINES


@pytest.mark.parametrize("on_bad_line", ["fail", "skip"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, on_bad_line: Any) -> None:
    for lines, said in ((), "is empty"), ((b"", b" "), "is empty"), ((b"{", b"["), "2 bad lines beside 0"):
        with pytest.raises(DataError, match=said):
            JsonlIndex.build(write(tmp_path / "p", *lines), on_bad_line=on_bad_line)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'prompt_data: ".*absent" cannot be read: No such file'):
        JsonlIndex.build(tmp_path / "absent")
    with pytest.raises(DataError, match=r"eval_prompt_data: .* Is a directory"):
        JsonlIndex.build(tmp_path, option="eval_prompt_data")


def test_a_row_that_changed_after_the_scan_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p", b'{"a": 1}', b'{"a": 2}')
    index = JsonlIndex.build(path)
    write(path, b'{"a": 1}', b'{"a": 3}')
    assert index.row(0) == {"a": 1}
    with pytest.raises(DataError, match="line 2: changed since"):
        index.row(1)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        index.row(0)


def test_the_fingerprint_is_of_the_rows(tmp_path: Path) -> None:
    first = JsonlIndex.build(write(tmp_path / "a", b'{"a": 1}', b'{"a": 2}')).fingerprint
    assert (
        JsonlIndex.build(write(tmp_path / "b", b'{"a": 1}', b"", b'{"a": 2}', end=b"\r\n")).fingerprint
        == first
    )
    assert JsonlIndex.build(write(tmp_path / "c", b'{"a": 2}', b'{"a": 1}')).fingerprint != first


def test_a_slice_selects_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "p", *(b'{"a": %d}' % i for i in range(5)))
    assert [row["a"] for row in rows(JsonlIndex.build(f"{path}@[1:3]"))] == [1, 2]
    assert [row["a"] for row in rows(JsonlIndex.build(f"{path}@[-2:]"))] == [3, 4]
    with pytest.raises(DataError, match="slice selects none of the 5 rows"):
        JsonlIndex.build(f"{path}@[7:]")
    assert split_slice("x@y.jsonl") == (Path("x@y.jsonl"), slice(None))


def test_the_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "p"
    num_rows, num_bytes = 2000, 4000
    path.write_bytes((b'{"a": "' + b"x" * num_bytes + b'"}\n') * num_rows)
    tracemalloc.start()
    try:
        index = JsonlIndex.build(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index) == num_rows
    assert peak < 0.1 * num_rows * num_bytes


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.lists(st.sampled_from([b"{}", b"\n", b"\r\n", b"x", b" "])).map(b"".join)
)
def test_any_bytes_are_rows_bad_lines_or_blank(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "p"
    path.write_bytes(data + b"\n{}\n")
    index = JsonlIndex.build(path, on_bad_line="skip", max_line_bytes=50)
    num_lines = sum(
        1 for line in path.read_bytes().split(b"\n") if line.removeprefix(b"\xef\xbb\xbf").strip()
    )
    assert len(index) + index.num_bad == num_lines
    assert rows(index)[-1] == {}
