"""Opaque page tokens: signed, and bound to the listing they belong to."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from ferryman_service.domain.errors import InvalidRequest, Violation

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 500
PAGE_BYTES: Final = 4 * 2**20
"""A page ends before the row that would make it larger, but for a page of one row."""
_PORTION_ROWS: Final = 64
"""Rows that are read from the store at a time: a page that ends by its size leaves few unused."""
_SIGNATURE_BYTES: Final = 16

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Page(Generic[Item]):
    """A page, and the token of the next one (empty: this is the last)."""

    items: Sequence[Item]
    next_page_token: str


def _takes_all(_: object) -> bool:
    return True


class Pager:
    """Turns "the rows after this key" into pages with tokens that nobody else can make."""

    def __init__(self, key: bytes) -> None:
        """Store the secret that signs tokens."""
        assert key, "whoever knows the secret can make tokens, and everybody knows an empty one"
        self._key = key

    def page(
        self,
        *,
        listing: str,
        page_size: int,
        page_token: str,
        fetch: Callable[[str | None, int], Sequence[Item]],
        key_of: Callable[[Item], str],
        takes: Callable[[Item], bool] = _takes_all,
    ) -> Page[Item]:
        """Return the page after `page_token`.

        `listing` names the listing with its filter and order; a token of another listing is refused. `fetch(after,
        limit)` returns rows after a key. `takes` is shown each row in turn; the page ends before the first one that it
        does not take, which must not be the first of all. Raises InvalidRequest (page_size, page_token).
        """
        size, after = self._check(listing, page_size, page_token)
        items: list[Item] = []
        while True:
            wanted = min(size + 1 - len(items), _PORTION_ROWS)
            rows = fetch(after, wanted)
            for row in rows:
                if len(items) == size or not takes(row):
                    return Page(items=items, next_page_token=self._token(listing, key_of(items[-1])))
                items.append(row)
            if len(rows) < wanted:
                return Page(items=items, next_page_token="")
            after = key_of(rows[-1])

    def _check(self, listing: str, page_size: int, page_token: str) -> tuple[int, str | None]:
        violations = []
        after = None
        if page_size < 0:
            text = f"is {page_size}, must not be negative; 0 is the default of {DEFAULT_PAGE_SIZE}"
            violations.append(Violation(field="page_size", description=text, reason="OUT_OF_RANGE"))
        if page_token:
            after = self._read(listing, page_token)
            if after is None:
                text = "was not made by this server for this listing; begin again without it"
                violations.append(Violation(field="page_token", description=text, reason="INVALID_PAGE_TOKEN"))
        if violations:
            raise InvalidRequest(violations)
        return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE), after

    def _token(self, listing: str, after: str) -> str:
        body = json.dumps(after).encode()
        return base64.urlsafe_b64encode(self._sign(listing, body) + body).decode().rstrip("=")

    def _read(self, listing: str, token: str) -> str | None:
        try:
            raw = base64.urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4))
        except (binascii.Error, UnicodeEncodeError):
            return None
        signature, body = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(listing, body)):
            return None
        return str(json.loads(body))

    def _sign(self, listing: str, body: bytes) -> bytes:
        return hmac.digest(self._key, listing.encode() + b"\0" + body, hashlib.sha256)[:_SIGNATURE_BYTES]
