"""Rows of corpora <-> domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row

from ferryman_service.domain.corpora import Corpus, CorpusHeader, CorpusWarning, SentencePair, SplitStatistics
from ferryman_service.domain.errors import CorpusNotFound
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.stores import tables
from ferryman_service.stores.readable import read_row, shown


def corpus_to_values(corpus: Corpus) -> dict[str, Any]:
    """Return the row of a corpus, without its request id."""
    values = dataclasses.asdict(corpus)
    header: dict[str, Any] = values.pop("header")
    return values | header


def corpus_from_row(connection: Connection, row: Row[Any], place: str = "") -> Corpus | UnreadableRow:
    """Return the corpus of a whole row, if it can be read; `place` is where it stands in its list."""
    return read_row(connection, tables.corpora, row, _parse_corpus, shown(row.corpus_id), place)


def corpus_not_found(corpus_id: str) -> CorpusNotFound:
    """Return the error for a corpus that does not exist."""
    name = corpus_id[:80]
    return CorpusNotFound(f"there is no corpus {name!r}: ListCorpora names those there are", corpus_id=name)


def _parse_corpus(row: Row[Any]) -> Corpus:
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
