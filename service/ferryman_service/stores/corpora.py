"""Corpora: their text in files, their rows in SQL."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, delete, insert, select

from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.corpora import Corpus, CorpusFiles, CorpusHeader
from ferryman_service.domain.errors import CorpusInUse, RequestIdReused
from ferryman_service.domain.ids import CORPUS_PREFIX, is_id
from ferryman_service.domain.records import RunState
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.stores import tables
from ferryman_service.stores.corpus_description import (
    DESCRIPTION_FILE,
    corpus_to_values,
    find_damage,
    text_files,
    write_description,
)
from ferryman_service.stores.corpus_rows import corpus_from_row, corpus_not_found
from ferryman_service.stores.corpus_text import CorpusLimits as CorpusLimits
from ferryman_service.stores.corpus_upload import FileCorpusUpload
from ferryman_service.stores.database import disk_errors, reading, writing
from ferryman_service.stores.folders import HeldFolder, move_folder, remove_abandoned
from ferryman_service.stores.free_space import FreeSpace
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.pages import page_by_time
from ferryman_service.stores.pending import FolderChange, announce, withdraw
from ferryman_service.stores.readable import require
from ferryman_service.trash import move_to_trash

_log = logging.getLogger(__name__)
_CORPORA: Final = tables.corpora
_UNFINISHED: Final = [state.value for state in RunState if not state.is_terminal]
_NAMED_RUNS: Final = 7
"""A run's id has 30 characters, and what a status says of one thing is cut at 256."""


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
            found = [(corpus_from_row(connection, row), row.request_id) for row in rows]
        for corpus, request_id in found:
            if isinstance(corpus, UnreadableRow) or not is_id(corpus.corpus_id, CORPUS_PREFIX):
                continue
            folder = self._folder.corpus_dir(corpus.corpus_id)
            if folder.is_dir() and not (folder / DESCRIPTION_FILE).exists():
                _describe_again(folder, corpus, request_id)

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
                raise corpus_not_found(corpus_id)
            return require(corpus_from_row(connection, row))

    def list_page(self, after: str | None, limit: int) -> Sequence[Corpus | UnreadableRow]:
        """Return the corpora that follow the place `after`, newest first, at most `limit`."""
        with reading(self._engine) as connection:
            page = page_by_time(connection, _CORPORA, (), after, limit)
            return [corpus_from_row(connection, row, place) for row, place in page]

    def present(self, corpus_ids: Iterable[str]) -> Set[str]:
        """Return those of the ids that are a corpus's."""
        query = select(_CORPORA.c.corpus_id).where(_CORPORA.c.corpus_id.in_(list(corpus_ids)))
        with reading(self._engine) as connection:
            return set(connection.execute(query).scalars())

    def delete(self, corpus_id: str) -> None:
        """Remove the corpus, first its row, then its files, which move to the trash.

        Raises CorpusNotFound; CorpusInUse if unfinished runs train on it.
        """
        of_corpus = _CORPORA.c.corpus_id == corpus_id
        with writing(self._engine) as connection:
            if connection.execute(select(_CORPORA.c.corpus_id).where(of_corpus)).one_or_none() is None:
                raise corpus_not_found(corpus_id)
            _check_not_in_use(connection, corpus_id)
            connection.execute(delete(_CORPORA).where(of_corpus))
            if not is_id(corpus_id, CORPUS_PREFIX):  # the id of a damaged row may be anything
                return
            folder = self._folder.corpus_dir(corpus_id)
            announce(connection, self._folder.relative(folder), FolderChange.TO_TRASH)
        # What fails here is done by the next `finish_deletions`.
        clean_up(partial(move_to_trash, self._folder.trash, folder, "deleted by DeleteCorpus"))

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


def _describe_again(folder: Path, corpus: Corpus, request_id: str | None) -> None:
    try:
        write_description(folder, corpus, request_id)
    except OSError as error:
        _log.warning("%s has no %s, without which its row cannot be rebuilt: %r", folder, DESCRIPTION_FILE, error)


def _corpus_of_request(connection: Connection, request_id: str, wanted: Corpus) -> Corpus | None:
    row = connection.execute(select(_CORPORA).where(_CORPORA.c.request_id == request_id)).one_or_none()
    if row is None:
        return None
    known = require(corpus_from_row(connection, row))
    if (known.digest, known.header) != (wanted.digest, wanted.header):
        raise RequestIdReused(
            f"request_id {request_id} came before with another corpus, {known.corpus_id}: use a new request_id",
            request_id=request_id,
        )
    return known


def _check_not_in_use(connection: Connection, corpus_id: str) -> None:
    """Raise CorpusInUse if unfinished runs train on the corpus: each reads it again whenever it is resumed."""
    runs = tables.runs.c
    query = select(runs.run_id).where(runs.corpus_id == corpus_id, runs.state.in_(_UNFINISHED)).order_by(runs.run_id)
    if run_ids := connection.execute(query).scalars().all():
        more = len(run_ids) - _NAMED_RUNS
        named = ", ".join(run_ids[:_NAMED_RUNS]) + (f" and {more:,} more" if more > 0 else "")
        text = f"corpus {corpus_id} is trained on by {named}: wait until they have ended, or cancel them"
        raise CorpusInUse(text, corpus_id=corpus_id, runs=",".join(run_ids[:_NAMED_RUNS]))
