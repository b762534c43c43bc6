"""Corpora: their text in files, their rows in SQL."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, insert, select, tuple_

from ferryman_service.domain.corpora import (
    Corpus,
    CorpusFiles,
    CorpusHeader,
    CorpusWarning,
    SentencePair,
    Side,
    Split,
    SplitStatistics,
)
from ferryman_service.domain.errors import CorpusNotFound, RequestIdReused
from ferryman_service.domain.ids import CORPUS_PREFIX, is_id
from ferryman_service.stores import tables
from ferryman_service.stores.corpus_text import CorpusLimits as CorpusLimits
from ferryman_service.stores.corpus_upload import FileCorpusUpload
from ferryman_service.stores.database import disk_errors, reading, writing
from ferryman_service.stores.folders import (
    HeldFolder,
    Removals,
    move_folder,
    own_folders,
    remove_abandoned,
    remove_folder,
)
from ferryman_service.stores.free_space import FreeSpace
from ferryman_service.stores.layout import DataFolder

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
        self._removals = Removals()

    def recover(self) -> None:
        """Remove what uploads that never ended have left; call it when a service starts."""
        self.sweep()
        # Under the writers' lock nobody is between moving a folder and inserting its row.
        with writing(self._engine) as connection:
            known = set(connection.execute(select(_CORPORA.c.corpus_id)).scalars())
            for path in own_folders(self._folder.corpora, lambda name: is_id(name, CORPUS_PREFIX)):
                if path.name not in known:
                    remove_folder(path)

    def sweep(self) -> None:
        """Remove what uploads that ended have left, in this process or in one that died; harmless at any time."""
        remove_abandoned(self._folder.incoming)
        self._removals.retry()

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
        return _corpus_from_row(row)

    def list_page(self, after: str | None, limit: int) -> Sequence[Corpus]:
        """Return the corpora that follow `after`, newest first, at most `limit`."""
        place = (_CORPORA.c.create_time_ns, _CORPORA.c.corpus_id)
        query = select(_CORPORA).order_by(*(column.desc() for column in place)).limit(limit)
        if after is not None:
            last = select(*place).where(_CORPORA.c.corpus_id == after).scalar_subquery()
            query = query.where(tuple_(*place) < last)
        with reading(self._engine) as connection:
            return [_corpus_from_row(row) for row in connection.execute(query)]

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
                connection.execute(insert(_CORPORA).values(_corpus_to_values(corpus) | {"request_id": request_id}))
        except BaseException:
            self._removals.remove(target)  # the id is new: the folder is ours, and no row names it
            raise
        return corpus


def _corpus_of_request(connection: Connection, request_id: str, wanted: Corpus) -> Corpus | None:
    row = connection.execute(select(_CORPORA).where(_CORPORA.c.request_id == request_id)).one_or_none()
    if row is None:
        return None
    known = _corpus_from_row(row)
    if (known.digest, known.header) != (wanted.digest, wanted.header):
        raise RequestIdReused(
            f"request_id {request_id} came before with another corpus, {known.corpus_id}: use a new request_id",
            request_id=request_id,
        )
    return known


def _corpus_to_values(corpus: Corpus) -> dict[str, Any]:
    values = dataclasses.asdict(corpus)
    header: dict[str, Any] = values.pop("header")
    return values | header


def _corpus_from_row(row: Row[Any]) -> Corpus:
    return Corpus(
        corpus_id=row.corpus_id,
        header=CorpusHeader(
            display_name=row.display_name,
            source_language=row.source_language,
            target_language=row.target_language,
        ),
        train=_statistics_from_value(row.train),
        validation=_statistics_from_value(row.validation),
        digest=row.digest,
        create_time_ns=row.create_time_ns,
    )


def _statistics_from_value(value: Mapping[str, Any]) -> SplitStatistics:
    samples = tuple(SentencePair(**pair) for pair in value["samples"])
    warnings = tuple(CorpusWarning(**warning) for warning in value.get("warnings", ()))  # none of earlier releases
    return SplitStatistics(**{**value, "samples": samples, "warnings": warnings})
