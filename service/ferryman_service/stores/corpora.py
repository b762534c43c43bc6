"""Corpora: their text in files, their rows in SQL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, delete, insert, select

from ferryman_service.domain.corpora import Corpus, CorpusFiles, CorpusHeader, Side, Split
from ferryman_service.domain.errors import CorpusInUse, RequestIdReused
from ferryman_service.domain.ids import CORPUS_PREFIX, is_id
from ferryman_service.domain.records import RunState
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.stores import tables
from ferryman_service.stores.corpus_rows import corpus_from_row, corpus_not_found, corpus_to_values
from ferryman_service.stores.corpus_text import CorpusLimits as CorpusLimits
from ferryman_service.stores.corpus_upload import FileCorpusUpload
from ferryman_service.stores.database import disk_errors, reading, writing
from ferryman_service.stores.folders import HeldFolder, move_folder, own_folders, remove_abandoned, remove_folder
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.pages import page_by_time
from ferryman_service.stores.readable import require
from ferryman_service.stores.trash import move_to_trash

_CORPORA: Final = tables.corpora
_UNFINISHED: Final = [state.value for state in RunState if not state.is_terminal]
_NAMED_RUNS: Final = 7
"""A run's id has 30 characters, and what a status says of one thing is cut at 256."""


class FileCorpusStore:
    """The CorpusStore. A folder moves into place in the transaction that inserts its row."""

    def __init__(self, engine: Engine, folder: DataFolder, limits: CorpusLimits) -> None:
        self._engine = engine
        self._folder = folder
        self._limits = limits

    def recover(self) -> None:
        """Remove what uploads that never ended have left; call it when a service starts."""
        remove_abandoned(self._folder.incoming)
        # Under the writers' lock nobody is between moving a folder and inserting its row.
        with writing(self._engine) as connection:
            known = set(connection.execute(select(_CORPORA.c.corpus_id)).scalars())
            for path in own_folders(self._folder.corpora, lambda name: is_id(name, CORPUS_PREFIX)):
                if path.name not in known:
                    remove_folder(path)

    def begin_upload(self, header: CorpusHeader, request_id: str) -> FileCorpusUpload:
        """Start an upload; an empty request_id is no key."""

        def keep(corpus: Corpus, files: Path) -> Corpus:
            return self._keep(corpus, files, request_id or None)

        with disk_errors():
            return FileCorpusUpload(header, self._limits, HeldFolder(self._folder.incoming), keep)

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
        if is_id(corpus_id, CORPUS_PREFIX):  # the id of a damaged row may be anything
            # A crash in between leaves a folder without a row, which the next start moves.
            move_to_trash(self._folder.trash, self._folder.corpus_dir(corpus_id), "deleted by DeleteCorpus")

    def files(self, corpus_id: str) -> CorpusFiles:
        """Return where the corpus lies; raises CorpusNotFound."""
        folder = self._folder.corpus_dir(self.get(corpus_id).corpus_id)
        return CorpusFiles(files={(split, side): folder / f"{split}.{side}" for split in Split for side in Side})

    def _keep(self, corpus: Corpus, files: Path, request_id: str | None) -> Corpus:
        target = self._folder.corpus_dir(corpus.corpus_id)
        try:
            with writing(self._engine) as connection:
                if request_id is not None and (known := _corpus_of_request(connection, request_id, corpus)) is not None:
                    return known
                move_folder(files, target)
                connection.execute(insert(_CORPORA).values(corpus_to_values(corpus) | {"request_id": request_id}))
        except BaseException:
            remove_folder(target)  # the id is new: the folder is ours, and no row names it
            raise
        return corpus


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
