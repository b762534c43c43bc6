"""Rows of corpora <-> domain."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row

from ferryman_service.domain.corpora import Corpus
from ferryman_service.domain.errors import CorpusNotFound
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.stores import tables
from ferryman_service.stores.corpus_description import corpus_from_values
from ferryman_service.stores.readable import parse_row, read_row, shown


def corpus_from_row(connection: Connection, row: Row[Any], place: str = "") -> Corpus | UnreadableRow:
    """Return the corpus of a whole row, if it can be read; `place` is where it stands in its list."""
    return read_row(connection, tables.corpora, row, _parse_corpus, shown(row.corpus_id), place)


def corpus_not_found(corpus_id: str) -> CorpusNotFound:
    """Return the error for a corpus that does not exist."""
    name = corpus_id[:80]
    return CorpusNotFound(f"there is no corpus {name!r}: ListCorpora names those there are", corpus_id=name)


def parse_corpus_row(row: Row[Any]) -> Corpus:
    """Return the corpus of a whole row; raises one of `UNPARSABLE`."""
    return parse_row(tables.corpora, row, _parse_corpus)


def _parse_corpus(row: Row[Any]) -> Corpus:
    return corpus_from_values(dict(row._mapping))
