"""Corpora: their text in files, their rows in SQL."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, insert, select, tuple_

from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.corpora import Corpus, CorpusFiles, CorpusHeader
from ferryman_service.domain.errors import CorpusNotFound, RequestIdReused
from ferryman_service.stores import tables
from ferryman_service.stores.corpus_description import (
    DESCRIPTION_FILE,
    corpus_from_values,
    corpus_to_values,
    find_damage,
    text_files,
    write_description,
)
from ferryman_service.stores.corpus_text import CorpusLimits as CorpusLimits
from ferryman_service.stores.corpus_upload import FileCorpusUpload
from ferryman_service.stores.database import disk_errors, reading, writing
from ferryman_service.stores.folders import HeldFolder, move_folder, remove_abandoned
from ferryman_service.stores.free_space import FreeSpace
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.pending import FolderChange, announce, withdraw

_log = logging.getLogger(__name__)
_CORPORA: Final = tables.corpora


class FileCorpusStore:
    """The CorpusStore. A folder moves into place in the transaction that inserts its row."""

    def __init__(
        self, engine: Engine, folder: DataFolder, limits: CorpusLimits, space: FreeSpace | None = None
    ) -> None:
        """Store; `space` is asked before an upload writes, None: the folder's disk with the mark by default."""
        self._engine = engine
        self._space = space or FreeSpace(folder.root)
        self._folder = folder
        self._limits = limits

    def recover(self) -> None:
        """Remove what uploads that never ended have left, and describe the corpora of earlier releases in their
        folders; call it when a service starts."""
        self.sweep()
        with reading(self._engine) as connection:
            rows = connection.execute(select(_CORPORA)).all()
        for row in rows:
            folder = self._folder.corpora / row.corpus_id
            if folder.is_dir() and not (folder / DESCRIPTION_FILE).exists():
                _describe_again(folder, row)

    def sweep(self) -> None:
        """Remove what uploads that ended have left, in this process or in one that died; harmless at any time."""
        remove_abandoned(self._folder.incoming)

    def begin_upload(self, header: CorpusHeader, request_id: str) -> FileCorpusUpload:
        """Start an upload; an empty request_id is no key. Raises DiskFull."""
        self._space.require()

        def keep(corpus: Corpus, files: Path) -> Corpus:
            return self._keep(corpus, files, request_id or None)

        with disk_errors():
            return FileCorpusUpload(header, self._limits, HeldFolder(self._folder.incoming), self._space, keep)

    def get(self, corpus_id: str) -> Corpus:
        """Return the corpus; raises CorpusNotFound."""
        with reading(self._engine) as connection:
            row = connection.execute(select(_CORPORA).where(_CORPORA.c.corpus_id == corpus_id)).one_or_none()
        if row is None:
            shown = corpus_id[:80]
            raise CorpusNotFound(f"there is no corpus {shown!r}: ListCorpora names those there are", corpus_id=shown)
        return corpus_from_row(row)

    def list_page(self, after: str | None, limit: int) -> Sequence[Corpus]:
        """Return the corpora that follow `after`, newest first, at most `limit`."""
        place = (_CORPORA.c.create_time_ns, _CORPORA.c.corpus_id)
        query = select(_CORPORA).order_by(*(column.desc() for column in place)).limit(limit)
        if after is not None:
            last = select(*place).where(_CORPORA.c.corpus_id == after).scalar_subquery()
            query = query.where(tuple_(*place) < last)
        with reading(self._engine) as connection:
            return [corpus_from_row(row) for row in connection.execute(query)]

    def files(self, corpus_id: str) -> CorpusFiles:
        """Return where the corpus lies; raises CorpusNotFound."""
        return text_files(self._folder.corpus_dir(self.get(corpus_id).corpus_id))

    def find_damage(self, corpus_id: str) -> str:
        """Read the whole text, 0.6 GB a second and more, and say how it differs from what was uploaded; ""
        if it does not."""
        corpus = self.get(corpus_id)
        return find_damage(corpus, self._folder.corpus_dir(corpus.corpus_id))

    def _keep(self, corpus: Corpus, files: Path, request_id: str | None) -> Corpus:
        target = self._folder.corpus_dir(corpus.corpus_id)
        path = self._folder.relative(target)
        write_description(files, corpus, request_id)
        with writing(self._engine) as connection:
            announce(connection, path, FolderChange.PUBLISHING)
        with ExitStack() as undo:
            with writing(self._engine) as connection:
                if request_id is not None and (known := _corpus_of_request(connection, request_id, corpus)) is not None:
                    withdraw(connection, path)
                    return known
                move_folder(files, target)
                undo.callback(clean_up, partial(target.rename, files))  # the upload that made it removes it
                insert_corpus(connection, corpus, request_id)
                withdraw(connection, path)
            undo.pop_all()
        return corpus


def insert_corpus(connection: Connection, corpus: Corpus, request_id: str | None) -> None:
    """Insert the row of a corpus."""
    connection.execute(insert(_CORPORA).values(corpus_to_values(corpus) | {"request_id": request_id}))


def corpus_from_row(row: Row[Any]) -> Corpus:
    """Return the corpus of a whole row."""
    return corpus_from_values(dict(row._mapping))


def _describe_again(folder: Path, row: Row[Any]) -> None:
    try:
        write_description(folder, corpus_from_row(row), row.request_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s has no %s, without which its row cannot be rebuilt: %r", folder, DESCRIPTION_FILE, error)


def _corpus_of_request(connection: Connection, request_id: str, wanted: Corpus) -> Corpus | None:
    row = connection.execute(select(_CORPORA).where(_CORPORA.c.request_id == request_id)).one_or_none()
    if row is None:
        return None
    known = corpus_from_row(row)
    if (known.digest, known.header) != (wanted.digest, wanted.header):
        raise RequestIdReused(
            f"request_id {request_id} came before with another corpus, {known.corpus_id}: use a new request_id",
            request_id=request_id,
        )
    return known
