"""Rows that were lost come back from what lies in the folders; damage is found and named."""

import dataclasses
import hashlib
import json
import os
import sqlite3

import pytest
from sqlalchemy import delete, update

from ferryman_service.bundle.manifest import ENCODER_FILE, MANIFEST_FILE, read_manifest, seal
from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.errors import DatabaseDamaged
from ferryman_service.domain.models import ModelReference
from ferryman_service.domain.records import RunState
from ferryman_service.stores import tables
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.corpus_description import DESCRIPTION_FILE
from ferryman_service.stores.database import open_database, writing
from ferryman_service.stores.integrity import DatabaseIntegrity, find_damage, refuse_damaged
from ferryman_service.stores.lock import FolderInUse, FolderLock
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.repair import repair
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.stores.sweep import FolderInDoubt, refuse_new_database, sweep
from ferryman_service.stores.verify import verify
from ferryman_service.trash import list_trash
from tests.fakes.crashes import STEP, each_crash, tree_of
from tests.fakes.databases import drop_corpus


class Stores:
    """What a process opens, and what it answers."""

    def __init__(self, folder):
        self.folder = folder
        self.database = open_database(folder.database)
        self.models = FileModelStore(self.database, folder, examine=lambda bundle: None)
        self.corpora = FileCorpusStore(self.database, folder, CorpusLimits())
        self.runs = SqlRunStore(self.database)

    def answers(self):
        """Return models, corpora and runs; the times of what was rebuilt are those of files."""
        versions = [
            (version.reference, version.digest, version.lineage, version.scores, version.size_bytes)
            for model in self.models.list_page(None, 99)
            for number in model.versions
            for version in [self.models.resolve(ModelReference(name=model.name, version=number))]
        ]
        return versions, list(self.corpora.list_page(None, 99))

    def close(self):
        self.database.dispose()


@pytest.fixture
def full(folder, database, runs, exporting, running, write_bundle):
    """A folder with two versions of a model, one published by a run that has ended, a corpus, and a run that failed."""
    database.dispose()
    stores = Stores(folder)
    upload = stores.corpora.begin_upload(
        CorpusHeader(display_name="Letters", source_language="en", target_language="de"), "request"
    )
    for split in Split:
        upload.add_pairs(split, [SentencePair(source="a", target="b")])
    upload.finish()
    run = exporting()
    staged = write_bundle(stores.models.staging_dir(run.run_id), run.run_id)
    published = stores.models.publish(run.run_id, 1, staged)
    stores.models.import_bundle(stores.models.bundle_dir(published), "en-de")
    failed = runs.change_state(running().run_id, 1, RunState.FAILED)
    drop_corpus(database)
    for each in (run, failed):
        checkpoint = folder.run_dir(each.run_id) / "checkpoints" / "step-0000000001"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights.safetensors").write_bytes(b"weights")
        digests = {"weights.safetensors": hashlib.sha256(b"weights").hexdigest()}
        (checkpoint / "manifest.json").write_text(json.dumps({"sha256": digests}))
    entry = folder.prepared / ("0" * 40)
    entry.mkdir(parents=True)
    (entry / "subwords.model").write_bytes(b"subwords")
    manifest = {"sizes": {}, "sha256": {"subwords.model": hashlib.sha256(b"subwords").hexdigest()}, "remarks": []}
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (entry / "prepared.json").write_text(json.dumps(manifest | {"seal": seal}))
    yield stores, run, failed
    stores.close()
    database.dispose()


def lose_database(folder):
    for path in folder.root.glob("ferryman.db*"):
        path.unlink()


def test_repair_rebuilds_a_lost_database_and_moves_the_rest_to_the_trash(full, folder, database):
    stores, run, failed = full
    before = stores.answers()
    stores.close()
    database.dispose()
    lose_database(folder)
    tree = tree_of(folder.root)
    planned = repair(folder, dry_run=True)
    assert tree_of(folder.root) == tree
    with pytest.raises(FolderInDoubt):
        refuse_new_database(folder)
    assert repair(folder, dry_run=False) == planned
    assert [line.partition(":")[0] for line in planned] == [
        "ferryman.db",
        "models/en-de/1",
        "models/en-de/2",
        f"corpora/{before[1][0].corpus_id}",
        f"runs/{run.run_id}",
        f"runs/{failed.run_id}",
    ]
    assert [entry.origin for entry in list_trash(folder.trash)] == [f"runs/{failed.run_id}"]
    refuse_new_database(folder)
    after = Stores(folder)
    sweep(after.database, folder)
    assert after.answers() == before
    rebuilt = after.runs.get(run.run_id)
    assert (rebuilt.state, rebuilt.model_version, rebuilt.recipe) == (RunState.SUCCEEDED, 1, run.recipe)
    assert repair(folder, dry_run=False) == []
    assert after.models.import_bundle(folder.bundle_dir("en-de", 1), "en-de").version == 3
    after.close()


def test_repair_keeps_what_is_there(full, folder):
    """As with a database that is older than the folders: rows are added, none is changed or removed."""
    stores, _, failed = full
    before = stores.answers()
    damaged = folder.bundle_dir("en-de", 2) / ENCODER_FILE
    damaged.chmod(0o644)
    damaged.write_bytes(b"other")
    with writing(stores.database) as connection:
        connection.execute(delete(tables.model_versions))
        connection.execute(delete(tables.corpora))
    lines = repair(folder, dry_run=False)
    assert [line.partition(":")[0] for line in lines] == [
        "models/en-de/1",
        f"corpora/{before[1][0].corpus_id}",
        "models/en-de/2",
    ]
    assert "encoder.onnx has 5 bytes" in lines[-1]
    assert stores.answers() == (before[0][:1], before[1])
    assert stores.runs.get(failed.run_id) == failed
    assert [entry.origin for entry in list_trash(folder.trash)] == ["models/en-de/2"]


def test_corpus_without_a_description_is_described_by_a_start_or_by_its_model(full, folder):
    """As that of an earlier release."""
    stores, _, _ = full
    [corpus] = stores.answers()[1]
    path = folder.corpus_dir(corpus.corpus_id) / DESCRIPTION_FILE
    described = path.read_bytes()
    path.unlink()
    stores.corpora.recover()
    assert path.read_bytes() == described
    path.unlink()
    with writing(stores.database) as connection:
        connection.execute(delete(tables.corpora))
    [line] = repair(folder, dry_run=True)
    assert "no model was trained on it" in line
    bundle = folder.bundle_dir("en-de", 2)
    header = read_manifest(bundle).header
    lineage = dataclasses.replace(header.lineage, corpus_id=corpus.corpus_id, corpus_digest=corpus.digest)
    (bundle / MANIFEST_FILE).unlink()
    seal(bundle, dataclasses.replace(header, lineage=lineage))
    repair(folder, dry_run=False)
    [rebuilt] = stores.corpora.list_page(None, 9)
    assert (rebuilt.corpus_id, rebuilt.digest, rebuilt.train) == (corpus.corpus_id, corpus.digest, corpus.train)


def test_repair_keeps_the_rows_of_a_damaged_database_that_can_be_read(full, folder, database):
    stores, run, failed = full
    stores.models.set_alias("en-de", "production", 1)
    before = stores.answers()
    records = stores.runs.records_after(run.run_id, 0, 99)
    stores.close()
    database.dispose()
    _damage_index(folder.database)
    assert find_damage(folder.database, full=True)
    lines = repair(folder, dry_run=False)
    assert len(lines) == 1
    assert "damaged" in lines[0]
    assert find_damage(folder.database, full=True) == ""
    after = Stores(folder)
    assert after.answers() == before
    assert after.runs.records_after(run.run_id, 0, 99) == records
    assert after.runs.get(failed.run_id) == failed
    assert after.models.resolve(ModelReference(name="en-de", alias="production")).version == 1
    [entry] = list_trash(folder.trash)
    assert (entry.content / "ferryman.db").stat().st_size
    after.close()


def _damage_index(path):
    """Change one byte of an index."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    [page_bytes] = connection.execute("PRAGMA page_size").fetchone()
    query = "SELECT rootpage FROM sqlite_master WHERE name = 'ix_runs_state'"
    [page] = connection.execute(query).fetchone()
    connection.close()
    content = bytearray(path.read_bytes())
    place = content.index(b"failed", (page - 1) * page_bytes)
    content[place] ^= 1
    path.write_bytes(content)


def _damage_page(path):
    """Change the first byte of a table's page, which says what the page is."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    [page_bytes] = connection.execute("PRAGMA page_size").fetchone()
    [page] = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'corpora'").fetchone()
    connection.close()
    content = bytearray(path.read_bytes())
    content[(page - 1) * page_bytes] ^= 4
    path.write_bytes(content)


def test_damaged_database_is_refused_at_start_and_found_by_the_daily_check(full, folder, database):
    stores, _, _ = full
    integrity = DatabaseIntegrity(folder.database)
    integrity.check()
    assert integrity.damage() == ""
    stores.close()
    database.dispose()
    _damage_index(folder.database)
    refuse_damaged(folder.database)  # the quick check does not compare indexes with tables
    integrity.check()
    assert "restore ferryman.db" in integrity.damage()
    integrity.forget()
    integrity.stop()
    integrity.check()
    assert integrity.damage() == ""
    _damage_page(folder.database)
    with pytest.raises(DatabaseDamaged, match="ferryman-service repair"):
        refuse_damaged(folder.database)


@pytest.mark.parametrize("start", ["damaged", "older"])
def test_crash_in_a_repair_is_understood_by_the_next_start_and_repair(full, folder, database, tmp_path, start):
    """Whatever step is the last one: a start refuses or finds everything, and a second repair ends as one does."""
    stores, run, failed = full
    before = stores.answers()
    if start == "older":
        with writing(stores.database) as connection:
            connection.execute(delete(tables.model_versions))
            connection.execute(delete(tables.records).where(tables.records.c.run_id == failed.run_id))
            connection.execute(delete(tables.runs).where(tables.runs.c.run_id == failed.run_id))
    stores.close()
    database.dispose()
    if start == "damaged":
        _damage_index(folder.database)
    crashes = 0
    for copy in each_crash(folder, tmp_path / "copies", lambda copy: repair(copy, dry_run=False)):
        crashes += 1
        try:
            refuse_new_database(copy)
            refuse_damaged(copy.database)
            begun = Stores(copy)
            try:
                sweep(begun.database, copy)
                assert begun.answers() == before
            finally:
                begun.close()
        except FolderInDoubt:
            pass
        repair(copy, dry_run=False)
        after = Stores(copy)
        assert after.answers() == before
        assert after.runs.get(run.run_id).state is RunState.SUCCEEDED
        in_trash = [entry for entry in list_trash(copy.trash) if entry.origin == f"runs/{failed.run_id}"]
        assert copy.run_dir(failed.run_id).exists() or any(entry.content.exists() for entry in in_trash)
        after.close()
    assert crashes * STEP > 2


def test_repair_waits_for_no_service(full, folder):
    lock = FolderLock(folder.root / "training-service.lock")
    lock.acquire()
    with pytest.raises(FolderInUse, match="stop all services"):
        repair(folder, dry_run=False)
    lock.release()


def flip(path):
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def changed_row(table, **values):
    def change(stores, folder):
        with writing(stores.database) as connection:
            connection.execute(update(table).values(**values))

    return change


def flipped(pattern):
    return lambda stores, folder: flip(next(folder.root.glob(pattern)))


DAMAGES = {
    "a bundle's file": (flipped(f"models/en-de/1/{ENCODER_FILE}"), "model_versions en-de/1", True),
    "a bundle's manifest": (flipped(f"models/en-de/1/{MANIFEST_FILE}"), "model_versions en-de/1", False),
    "a corpus's text": (flipped("corpora/*/train.source"), "corpora cor_", True),
    "a corpus's description": (flipped(f"corpora/*/{DESCRIPTION_FILE}"), "corpora cor_", True),
    "a checkpoint": (flipped("runs/*/checkpoints/*/weights.safetensors"), "runs/run_", True),
    "tokens of a prepared corpus": (flipped("prepared/*/subwords.model"), f"prepared/{'0' * 40}", True),
    "the manifest of a prepared corpus": (flipped("prepared/*/prepared.json"), f"prepared/{'0' * 40}", True),
    "a missing text": (
        lambda stores, folder: next(folder.corpora.glob("cor_*/train.source")).unlink(),
        "missing: train.source",
        False,
    ),
    "a row of a version": (changed_row(tables.model_versions, parameters=1), "not what its manifest says", False),
    "a row of a corpus": (changed_row(tables.corpora, display_name="x"), "not what corpus.json says", True),
    "a row of a run": (changed_row(tables.runs, state="rumming"), "runs run_", False),
    "a row's number": (changed_row(tables.runs, last_sequence=99), "it should have 99", False),
    "a record": (changed_row(tables.records, kind="stop"), "one of its records", True),
    "a lost row": (
        lambda stores, folder: changed_row(tables.corpora, corpus_id="cor_" + "1" * 22)(stores, folder),
        "the database has no row for it",
        False,
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_damaged_and_changes_nothing(full, folder, damage):
    stores, _, _ = full
    report = verify(folder, deep=True)
    assert report.findings == []
    assert report.checked == {
        "database": 1,
        "model versions": 2,
        "corpora": 1,
        "runs": 2,
        "checkpoints": 2,
        "prepared corpora": 1,
    }
    do, words, needs_deep = DAMAGES[damage]
    do(stores, folder)
    before = tree_of(folder.root)
    findings = verify(folder, deep=True).findings
    assert any(words in finding for finding in findings), findings
    assert bool(verify(folder, deep=False).findings) is not needs_deep
    assert tree_of(folder.root) == before


def test_text_of_a_corpus_is_checked_against_its_row(full, folder):
    stores, _, _ = full
    [corpus] = stores.answers()[1]
    assert stores.corpora.find_damage(corpus.corpus_id) == ""
    text = next(folder.corpora.glob("cor_*/validation.target"))
    flip(text)
    assert "is not what was uploaded" in stores.corpora.find_damage(corpus.corpus_id)
    os.unlink(text)
    assert f"is gone: {text}" in stores.corpora.find_damage(corpus.corpus_id)
