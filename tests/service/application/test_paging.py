"""Pages: complete, in order, and only with tokens of ours."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.application.paging import MAX_PAGE_SIZE, Pager
from ferryman_service.domain.errors import InvalidRequest

ROWS = [f"row{n:04}" for n in range(1200)]


def fetch(after, limit):
    start = 0 if after is None else ROWS.index(after) + 1
    return ROWS[start : start + limit]


def page(size=0, token="", listing="rows", key=b"secret"):
    return Pager(key).page(listing=listing, page_size=size, page_token=token, fetch=fetch, key_of=str)


@pytest.mark.parametrize("size", [0, 1, 7, 100, 400, 1200, 5000])
def test_the_pages_together_are_the_listing(size):
    rows, token = [], ""
    while True:
        current = page(size, token)
        assert len(current.items) <= min(size or 50, MAX_PAGE_SIZE)
        rows += current.items
        token = current.next_page_token
        if not token:
            break
        if size == 1 and len(rows) > 20:
            return
    assert rows == ROWS


def test_a_page_ends_before_the_row_that_it_does_not_take():
    rows, token, lengths = [], "", []
    while not rows or token:
        taken = []
        current = Pager(b"secret").page(
            listing="rows",
            page_size=500,
            page_token=token,
            fetch=fetch,
            key_of=str,
            takes=lambda row, taken=taken: len(taken) < 130 and not taken.append(row),
        )
        assert taken == current.items
        rows, token = rows + taken, current.next_page_token
        lengths.append(len(taken))
    assert rows == ROWS
    assert lengths == [130] * 9 + [30]


def refused(**arguments):
    with pytest.raises(InvalidRequest) as caught:
        page(**arguments)
    return [(violation.field, violation.reason) for violation in caught.value.violations]


def test_a_token_of_another_listing_or_server_is_refused():
    token = page(5).next_page_token
    assert refused(token=token, listing="others") == [("page_token", "INVALID_PAGE_TOKEN")]
    assert refused(token=token, key=b"other") == [("page_token", "INVALID_PAGE_TOKEN")]


def test_a_token_does_not_show_and_does_not_allow_a_key():
    raw = base64.urlsafe_b64encode(b"0" * 16 + b'"row0100"').decode().rstrip("=")
    assert refused(token=raw) == [("page_token", "INVALID_PAGE_TOKEN")]


@given(st.text(min_size=1))
def test_no_text_is_a_token(text):
    assert refused(token=text) == [("page_token", "INVALID_PAGE_TOKEN")]


def test_all_violations_at_once():
    assert [field for field, _ in refused(size=-1, token="x")] == ["page_size", "page_token"]
