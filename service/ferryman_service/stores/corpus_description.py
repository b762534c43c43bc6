"""What a corpus's folder says of itself: corpus.json beside its text, from which a lost row is rebuilt.

The text is known by the digest of the corpus; the rest of the description by a digest of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

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
from ferryman_service.stores.corpus_upload import digest_of
from ferryman_service.stores.folders import sync_folder

DESCRIPTION_FILE: Final = "corpus.json"


def text_files(folder: Path) -> CorpusFiles:
    """Return where the text of a corpus lies."""
    return CorpusFiles(files={(split, side): folder / f"{split}.{side}" for split in Split for side in Side})


def text_digest(folder: Path, source_language: str, target_language: str) -> str:
    """Return the digest that a corpus of the text in the folder has; raises OSError."""
    files = text_files(folder).files
    digests = [tuple(_sha256(files[split, side]) for side in Side) for split in Split]
    return digest_of([source_language, target_language], digests)


def find_damage(corpus: Corpus, folder: Path) -> str:
    """Say how the text in the folder differs from what was uploaded, "" if it does not; raises OSError."""
    try:
        found = text_digest(folder, corpus.header.source_language, corpus.header.target_language)
    except FileNotFoundError as error:
        return f"the text of corpus {corpus.corpus_id} is gone: {error.filename}"
    if found == corpus.digest:
        return ""
    return f"the text of corpus {corpus.corpus_id} is not what was uploaded: its digest is {found}, not {corpus.digest}"


def write_description(folder: Path, corpus: Corpus, request_id: str | None) -> None:
    """Describe the corpus in its folder, durably and whole or not at all; raises OSError."""
    values = corpus_to_values(corpus) | {"request_id": request_id}
    aside = folder / f".{DESCRIPTION_FILE}"
    with aside.open("w", encoding="utf-8") as file:
        json.dump({"corpus": values, "sha256": _values_digest(values)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(folder / DESCRIPTION_FILE)
    sync_folder(folder)


def read_description(folder: Path) -> tuple[Corpus, str | None]:
    """Return the corpus and its request id as they are described; raises OSError, ValueError if they are damaged."""
    try:
        found = json.loads((folder / DESCRIPTION_FILE).read_bytes())
        if _values_digest(found["corpus"]) != found["sha256"]:
            raise ValueError(f"{DESCRIPTION_FILE} is not what was written")
        return corpus_from_values(found["corpus"]), found["corpus"]["request_id"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{DESCRIPTION_FILE} does not describe a corpus: {error!r}") from error


def corpus_to_values(corpus: Corpus) -> dict[str, Any]:
    """Return the columns of a corpus's row, without its request id."""
    values = dataclasses.asdict(corpus)
    header: dict[str, Any] = values.pop("header")
    return values | header


def corpus_from_values(values: Mapping[str, Any]) -> Corpus:
    """Return the corpus of what `corpus_to_values` returned."""
    return Corpus(
        corpus_id=values["corpus_id"],
        header=CorpusHeader(
            display_name=values["display_name"],
            source_language=values["source_language"],
            target_language=values["target_language"],
        ),
        train=_statistics_from_value(values["train"]),
        validation=_statistics_from_value(values["validation"]),
        digest=values["digest"],
        create_time_ns=values["create_time_ns"],
    )


def _statistics_from_value(value: Mapping[str, Any]) -> SplitStatistics:
    samples = tuple(SentencePair(**pair) for pair in value["samples"])
    warnings = tuple(CorpusWarning(**warning) for warning in value["warnings"])
    return SplitStatistics(**{**value, "samples": samples, "warnings": warnings})


def _values_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
