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
_SIGNATURE_BYTES: Final = 16

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Page(Generic[Item]):
    """A page, and the token of the next one (empty: this is the last)."""

    items: Sequence[Item]
    next_page_token: str


class Pager:
    """Turns "the rows after this key" into pages with tokens that nobody else can make."""

    def __init__(self, key: bytes) -> None:
        """Store the secret that signs tokens."""
        self._key = key

    def page(
        self,
        *,
        listing: str,
        page_size: int,
        page_token: str,
        fetch: Callable[[str | None, int], Sequence[Item]],
        key_of: Callable[[Item], str],
    ) -> Page[Item]:
        """Return the page after `page_token`.

        `listing` names the listing with its filter and order; a token of another listing is refused. `fetch(after,
        limit)` returns rows after a key. Raises InvalidRequest (page_size, page_token).
        """
        size, after = self._check(listing, page_size, page_token)
        rows = fetch(after, size + 1)
        more = len(rows) > size
        items = rows[:size]
        return Page(items=items, next_page_token=self._token(listing, key_of(items[-1])) if more else "")

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
