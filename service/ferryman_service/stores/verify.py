"""Comparing the rows of the database with the folders beside it, and every file with its digest.

Nothing is changed, and services may go on meanwhile: what was published or deleted during the check is no finding.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, Row, Table, func, select

from ferryman_service.bundle.manifest import verify as verify_bundle
from ferryman_service.domain.corpora import Corpus
from ferryman_service.domain.errors import FerrymanError, ModelDamaged
from ferryman_service.stores import tables
from ferryman_service.stores.bundle_reader import check_manifest
from ferryman_service.stores.corpus_description import DESCRIPTION_FILE, find_damage, read_description, text_files
from ferryman_service.stores.corpus_rows import parse_corpus_row
from ferryman_service.stores.database import is_current, open_database, reading
from ferryman_service.stores.integrity import find_damage as find_database_damage
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.model_rows import parse_version_row
from ferryman_service.stores.models import describe_bundle
from ferryman_service.stores.pending import announced
from ferryman_service.stores.run_rows import DELETING, parse_record_row, parse_run_row
from ferryman_service.stores.sweep import NO_ROW, find_contents, find_orphans, is_new

_CHECKPOINT_MANIFEST: Final = "manifest.json"
_PREPARED_MANIFEST: Final = "prepared.json"
_PREPARED: Final = re.compile(r"[0-9a-f]{40}")
_UNREADABLE: Final = (ValueError, KeyError, TypeError, AttributeError, AssertionError, LookupError)
"""What decoding a row raises whose bytes are not those that were written."""
_RECORDS_AT_ONCE: Final = 1000


@dataclass
class Report:
    """What was checked, as numbers by what it is, and what is damaged, a line each."""

    checked: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        """Count something that is checked."""
        self.checked[what] = self.checked.get(what, 0) + 1


def verify(folder: DataFolder, *, deep: bool) -> Report:
    """Check the database, and that each row has its folder and each folder its row; with `deep` every digest, and every
    row and record for whether it can be read.

    Raises StoreUnavailable.
    """
    report = Report()
    if is_new(folder.database):
        if find_contents(folder).paths():
            report.findings.append(f"{folder.database.name}: missing or empty, while the folders beside it are not")
        return report
    report.count("database")
    if damage := find_database_damage(folder.database, full=deep):
        report.findings.append(f"{folder.database.name}: {damage}")
    engine = open_database(folder.database)
    try:
        if not is_current(engine):
            report.findings.append(f"{folder.database.name}: its schema is of another release, start this one first")
            return report
        _Check(engine, folder, report, deep=deep).run()
    except FerrymanError as error:
        report.findings.append(f"{folder.database.name}: {error.message}")
    finally:
        engine.dispose()
    return report


class _Check:
    def __init__(self, engine: Engine, folder: DataFolder, report: Report, *, deep: bool) -> None:
        self._engine = engine
        self._folder = folder
        self._report = report
        self._deep = deep

    def run(self) -> None:
        self._rows(tables.model_versions, "model versions", self._version)
        self._rows(tables.corpora, "corpora", self._corpus)
        self._rows(tables.runs, "runs", self._run)
        self._orphans()
        if self._deep:
            self._checkpoints()
            self._prepared()

    def _rows(self, table: Table, what: str, check: Callable[[Row[Any]], Iterator[str]]) -> None:
        """Check each row of a table by itself: one that cannot be read holds up no other."""
        keys = list(table.primary_key.columns)
        with reading(self._engine) as connection:
            found = connection.execute(select(*keys)).all()
        for key in found:
            name = "/".join(map(str, key))
            of_row = [column == value for column, value in zip(keys, key, strict=True)]
            self._report.count(what)
            try:
                with reading(self._engine) as connection:
                    row = connection.execute(select(table).where(*of_row)).one_or_none()
                findings = [] if row is None else list(check(row))
            except (*_UNREADABLE, FerrymanError) as error:
                findings = [f"its row cannot be read: {error!r}"]
            if findings and self._is_there(table, of_row):
                self._report.findings += [f"{table.name} {name}: {finding}" for finding in findings]

    def _is_there(self, table: Table, of_row: list[Any]) -> bool:
        with reading(self._engine) as connection:
            return connection.execute(select(func.count()).select_from(table).where(*of_row)).scalar_one() > 0

    def _version(self, row: Row[Any]) -> Iterator[str]:
        version = parse_version_row(row)
        bundle = self._folder.bundle_dir(version.name, version.version)
        try:
            check_manifest(version, bundle)
            if describe_bundle(version.name, version.version, bundle, version.create_time_ns) != version:
                yield "its row is not what its manifest says"
            if self._deep:
                verify_bundle(bundle)
        except ModelDamaged as error:
            yield error.message

    def _corpus(self, row: Row[Any]) -> Iterator[str]:
        corpus = parse_corpus_row(row)
        folder = self._folder.corpus_dir(corpus.corpus_id)
        missing = [path.name for path in text_files(folder).files.values() if not path.is_file()]
        if missing:
            yield f"missing: {', '.join(missing)}"
        elif self._deep:
            try:
                if damage := find_damage(corpus, folder):
                    yield damage
                yield from _describes(corpus, folder)
            except OSError as error:
                yield f"its text cannot be read: {error}"

    def _run(self, row: Row[Any]) -> Iterator[str]:
        if row.state == DELETING:
            return
        run = parse_run_row(row)
        records = tables.records.c
        of_run = records.run_id == run.run_id
        with reading(self._engine) as connection:
            # In one snapshot: a run that goes on has more of both a moment later.
            last = select(tables.runs.c.last_sequence).where(tables.runs.c.run_id == run.run_id)
            numbers = select(func.count(), func.max(records.sequence), last.scalar_subquery()).where(of_run)
            count, highest, expected = connection.execute(numbers).one()
        if expected is not None and not count == (highest or 0) == expected:
            yield f"it has {count} records, the last with number {highest}; it should have {expected}"
        if self._deep:
            yield from self._records(run.run_id, highest or 0)

    def _records(self, run_id: str, highest: int) -> Iterator[str]:
        columns = tables.records.c
        of_run = columns.run_id == run_id
        for first in range(1, highest + 1, _RECORDS_AT_ONCE):
            portion = columns.sequence.between(first, first + _RECORDS_AT_ONCE - 1)
            try:
                with reading(self._engine) as connection:
                    rows = connection.execute(select(tables.records).where(of_run, portion)).all()
                for row in rows:
                    parse_record_row(row)
            except (*_UNREADABLE, FerrymanError) as error:
                yield f"one of its records from {first} on cannot be read: {error!r}"

    def _orphans(self) -> None:
        contents = find_contents(self._folder)
        with reading(self._engine) as connection:
            changes = announced(connection)
            orphans = find_orphans(connection, self._folder, contents)
        names = [self._folder.relative(path) for path in orphans]
        self._report.findings += [f"{name}: {NO_ROW}" for name in names if name not in changes]

    def _checkpoints(self) -> None:
        for checkpoint in sorted(self._folder.runs.glob("*/checkpoints/step-*")):
            if checkpoint.name.removeprefix("step-").isdigit() and checkpoint.is_dir():
                self._report.count("checkpoints")
                self._digests(checkpoint, _CHECKPOINT_MANIFEST)

    def _prepared(self) -> None:
        for entry in sorted(self._folder.prepared.glob("*")):
            if _PREPARED.fullmatch(entry.name) and entry.is_dir():
                self._report.count("prepared corpora")
                self._digests(entry, _PREPARED_MANIFEST)

    def _digests(self, folder: Path, manifest_file: str) -> None:
        """Check a folder whose manifest holds the digests of its files, and maybe one of itself."""
        findings = list(_find_differences(folder, manifest_file))
        if findings and folder.exists():
            self._report.findings += [f"{self._folder.relative(folder)}: {finding}" for finding in findings]


def _describes(corpus: Corpus, folder: Path) -> Iterator[str]:
    if not (folder / DESCRIPTION_FILE).exists():
        return  # of an earlier release: the next start describes it
    try:
        described, _ = read_description(folder)
    except (OSError, ValueError) as error:
        yield str(error)
    else:
        if described != corpus:
            yield f"its row is not what {DESCRIPTION_FILE} says"


def _find_differences(folder: Path, manifest_file: str) -> Iterator[str]:
    try:
        manifest: dict[str, Any] = json.loads((folder / manifest_file).read_bytes())
        seal = manifest.pop("seal", None)
        digests: Mapping[str, str] = manifest.get("sha256", {})
        if seal is not None and seal != _sha256(json.dumps(manifest, sort_keys=True).encode()):
            yield f"{manifest_file} is not what was written"
    except (OSError, *_UNREADABLE) as error:
        yield f"{manifest_file} cannot be read: {error!r}"
        return
    for name, digest in digests.items():
        try:
            with (folder / name).open("rb") as file:
                intact = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
        else:
            if not intact:
                yield f"{name} is not what was written"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
