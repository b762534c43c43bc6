"""The use cases of corpora."""

from __future__ import annotations

from collections.abc import Callable

from ferryman_service.application.paging import Page, Pager
from ferryman_service.application.ports import CorpusStore, CorpusUpload
from ferryman_service.application.requests import request_id_violations, required
from ferryman_service.domain.corpora import Corpus, CorpusHeader
from ferryman_service.domain.errors import InvalidRequest, Violation
from ferryman_service.domain.language_tags import language_tag_violation
from ferryman_service.domain.names import name_violations
from ferryman_service.domain.stored import UnreadableRow


class CorpusUseCases:
    """What CorpusService does."""

    def __init__(self, *, corpora: CorpusStore, pager: Pager) -> None:
        """Store the ports."""
        self._corpora = corpora
        self._pager = pager

    def begin_upload(self, header: CorpusHeader, request_id: str) -> CorpusUpload:
        """Start an upload; raises InvalidRequest with every violation of the header."""
        violations = list(request_id_violations(request_id, "header.request_id"))
        violations += name_violations(header.display_name, "header.display_name")
        for field, tag in (("source_language", header.source_language), ("target_language", header.target_language)):
            if (wrong := language_tag_violation(tag)) is not None:
                violations.append(Violation(field=f"header.{field}", description=wrong, reason="INVALID_LANGUAGE"))
        if violations:
            raise InvalidRequest(violations)
        return self._corpora.begin_upload(header, request_id.lower())

    def get(self, corpus_id: str) -> Corpus:
        """Return a corpus; raises InvalidRequest (empty id), CorpusNotFound, RowUnreadable."""
        if violations := list(required(corpus_id, "corpus_id")):
            raise InvalidRequest(violations)
        return self._corpora.get(corpus_id)

    def delete(self, corpus_id: str) -> None:
        """Remove a corpus; raises InvalidRequest (empty id), CorpusNotFound, CorpusInUse."""
        if violations := list(required(corpus_id, "corpus_id")):
            raise InvalidRequest(violations)
        self._corpora.delete(corpus_id)

    def list_page(
        self, page_size: int, page_token: str, takes: Callable[[Corpus | UnreadableRow], bool]
    ) -> Page[Corpus | UnreadableRow]:
        """Return a page of corpora, newest first; `takes` is the Pager's."""
        return self._pager.page(
            listing="corpora by place",
            page_size=page_size,
            page_token=page_token,
            fetch=self._corpora.list_page,
            key_of=lambda corpus: corpus.place,
            takes=takes,
        )
