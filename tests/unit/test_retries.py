"""Requests to retry a group: taken once each, in order, by a cursor that says how many were."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.data.retries import FILE, Retries, RetryRequest, ask, requests
from asyncrl.errors import DataError


def request(group_id: int) -> RetryRequest:
    return RetryRequest(group_id=group_id, num_tokens=3, dataset="d", prompt=b"\x00\xff\n", asked_at=1.5)


def taken(retries: Retries, n: int) -> list[int]:
    return [one.group_id for one in retries.next(n)]


def test_requests_come_back_as_they_were_asked(tmp_path: Path) -> None:
    ask(tmp_path, [request(3), request(1)])
    ask(tmp_path, [request(7)])
    assert requests(tmp_path) == [request(3), request(1), request(7)]
    assert requests(tmp_path / "nowhere") == []


def test_each_is_taken_once_and_a_cursor_continues_exactly_there(tmp_path: Path) -> None:
    retries = Retries(tmp_path)
    assert taken(retries, 5) == []
    assert retries.wrap(b'{"row":1}') == b'{"row":1}', "a run without retries keeps the source's own cursor"
    ask(tmp_path, [request(g) for g in range(5)])
    assert taken(retries, 2) == [0, 1]
    cursor = retries.wrap(b'{"row":2}')
    assert taken(retries, 9) == [2, 3, 4]
    assert taken(retries, 9) == []
    # The desk had not committed what came after `cursor`: it is issued again, nothing before it is.
    again = Retries(tmp_path)
    assert again.unwrap(cursor) == b'{"row":2}'
    assert taken(again, 9) == [2, 3, 4]
    ask(tmp_path, [request(9)])
    assert taken(again, 9) == [9]
    assert again.unwrap(b"") == b""
    assert taken(again, 1) == [0]


@given(inner=st.binary(), count=st.integers(1, 10**6))
def test_any_cursor_survives_the_wrapping(inner: bytes, count: int) -> None:
    retries, other = Retries(Path()), Retries(Path())
    retries.taken = count
    assert other.unwrap(retries.wrap(inner)) == inner
    assert other.taken == count


def test_a_line_that_is_being_written_is_not_there_yet_and_a_torn_one_is_written_over(tmp_path: Path) -> None:
    ask(tmp_path, [request(1)])
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"group_id": 2, "num_')
    assert requests(tmp_path) == [request(1)]
    ask(tmp_path, [request(3)])
    assert requests(tmp_path) == [request(1), request(3)]


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    ask(tmp_path, [request(1)])
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"group_id": 2}\n')
    with pytest.raises(DataError, match=r"retries\.jsonl, line 2: no request"):
        requests(tmp_path)
    with pytest.raises(DataError, match="line 2"):
        Retries(tmp_path).next(1)
