"""Folders without a row: kept in the trash for a week, or a reason not to start."""

import os
import shutil
import tempfile

import pytest
from sqlalchemy import delete

from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.records import RunState
from ferryman_service.stores import tables
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import open_database, upgrade, writing
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.sweep import FolderInDoubt, find_contents, finish_deletions, refuse_new_database, sweep
from ferryman_service.trash import KEPT_DAYS, empty_trash, list_trash, move_to_trash
from tests.fakes.bundles import write_bundle as write_foreign_bundle
from tests.fakes.crashes import STEP, each_crash, tree_of
from tests.fakes.databases import add_corpus, drop_corpus

DAY_NS = 24 * 3600 * 10**9


@pytest.fixture
def models(database, folder):
    return FileModelStore(database, folder, examine=lambda bundle: None)


@pytest.fixture
def fill(models, runs, running, database, folder, tmp_path):
    """Fill the folder: versions of a model, corpora, and runs that have ended."""

    bundle = write_foreign_bundle(tmp_path / "bundle")

    def fill(count):
        add_corpus(database)
        corpora = FileCorpusStore(database, folder, CorpusLimits())
        for _ in range(count):
            models.import_bundle(bundle, "en-de")
            upload = corpora.begin_upload(CorpusHeader(display_name="", source_language="en", target_language="de"), "")
            for split in Split:
                upload.add_pairs(split, [SentencePair(source="a", target="b")])
            upload.finish()
            run = runs.change_state(running().run_id, 1, RunState.FAILED)
            (folder.run_dir(run.run_id) / "checkpoints").mkdir(parents=True)
        drop_corpus(database)

    return fill


def lose_rows(database, table, count):
    with writing(database) as connection:
        key = list(table.primary_key.columns)[-1]
        keys = connection.execute(table.select().with_only_columns(key)).scalars().all()
        connection.execute(delete(table).where(key.in_(keys[:count])))


@pytest.mark.parametrize("database_is", ["missing", "empty", "without tables", "missing, but for its log"])
def test_new_database_beside_full_folders_is_refused(fill, database, folder, database_is):
    fill(1)
    database.dispose()
    folder.database.unlink()
    if database_is == "empty":
        folder.database.touch()
    elif database_is == "without tables":
        shutil.copyfile(_database_without_tables(folder), folder.database)
    elif "log" in database_is:
        for path in find_contents(folder).paths():
            shutil.rmtree(path)
        folder.database.with_name("ferryman.db-wal").write_bytes(b"pages")
    before = tree_of(folder.root)
    with pytest.raises(FolderInDoubt, match="ferryman-service repair"):
        refuse_new_database(folder)
    assert tree_of(folder.root) == before


def _database_without_tables(folder):
    path = folder.root.parent / "without-tables.db"
    path.touch()
    engine = open_database(path)
    with writing(engine) as connection:
        connection.exec_driver_sql("CREATE TABLE t (a)")
        connection.exec_driver_sql("DROP TABLE t")
    engine.dispose()
    return path


def test_a_folder_inside_the_old_data_folder_is_no_new_installation(fill, folder):
    fill(1)
    inside = DataFolder(folder.root / "own")
    with pytest.raises(FolderInDoubt, match="the folder above it has one"):
        refuse_new_database(inside)


def test_a_database_that_another_process_is_making_is_no_reason_to_refuse(folder, database):
    database.dispose()
    folder.database.unlink()
    shutil.copyfile(_database_without_tables(folder), folder.database)
    folder.database.with_name("ferryman.db-wal").write_bytes(b"the tables are on their way")
    refuse_new_database(folder)


def test_new_database_in_an_empty_folder_is_made(folder):
    refuse_new_database(folder)
    engine = open_database(folder.database)
    upgrade(engine)
    engine.dispose()


@pytest.mark.parametrize("table", [tables.model_versions, tables.corpora])
def test_sweep_moves_up_to_a_tenth_to_the_trash_and_refuses_more(fill, database, folder, table):
    fill(4)
    lose_rows(database, table, 2)
    before = tree_of(folder.root)
    with pytest.raises(FolderInDoubt, match="no rows for 2 of 12 folders") as caught:
        sweep(database, folder)
    assert {tables.model_versions: "models/en-de/1", tables.corpora: "corpora/cor_"}[table] in str(caught.value)
    assert tree_of(folder.root) == before
    fill(3)
    sweep(database, folder)
    entries = list_trash(folder.trash)
    assert [entry.reason for entry in entries] == ["the database has no row for it"] * 2
    for entry in entries:
        assert not (folder.root / entry.origin).exists()
        for name, content in tree_of(entry.content).items():
            assert before[f"{entry.origin}/{name}"] == content


def test_trash_is_emptied_after_a_week(folder):
    folder.run_dir("run_" + "0" * 22).mkdir()
    (folder.trash / "not-ours").mkdir(parents=True)
    entry = move_to_trash(folder.trash, folder.run_dir("run_" + "0" * 22), "a reason")
    assert (entry.origin, entry.reason) == ("runs/run_" + "0" * 22, "a reason")
    empty_trash(folder.trash, entry.time_ns + KEPT_DAYS * DAY_NS - 1)
    assert list_trash(folder.trash) == [entry]
    empty_trash(folder.trash, entry.time_ns + KEPT_DAYS * DAY_NS + 1)
    assert [path.name for path in folder.trash.iterdir()] == ["not-ours"]


def test_crash_while_moving_to_the_trash_loses_nothing(fill, database, folder, tmp_path):
    """Whatever step of a sweep is the last one, the next sweep leaves each thing in its place or in the trash."""
    fill(4)
    lose_rows(database, tables.corpora, 1)
    database.dispose()
    lost = [path for path in find_contents(folder).corpora if "train.source" in os.listdir(path)]
    contents = {name: content for name, content in tree_of(folder.root).items() if "/" in name}

    def run(copy):
        engine = open_database(copy.database)
        try:
            sweep(engine, copy)
        finally:
            engine.dispose()

    crashes = 0
    for copy in each_crash(folder, tmp_path / "copies", run):
        run(copy)
        found = tree_of(copy.root)
        moved = [entry for entry in list_trash(copy.trash) if entry.content.exists()]
        assert len(moved) == 1
        for name, content in contents.items():
            origin = moved[0].origin
            place = os.path.relpath(moved[0].content / os.path.relpath(name, origin), copy.root)
            assert found[place if name.startswith(origin) else name] == content
        crashes += 1
    assert lost
    assert crashes * STEP >= 4


STRAYS = {
    "file": lambda path: path.touch(),
    "link to a folder": lambda path: path.symlink_to(tempfile.mkdtemp(dir=path.parent.parent.parent)),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "full folder": lambda path: (path / "x" / "y").mkdir(parents=True),
}


@pytest.mark.parametrize("stray", STRAYS)
def test_strays_stop_no_start(fill, models, database, folder, stray):
    """Whatever lies where Ferryman's own things do, under a name of their form or not."""
    fill(1)
    names = ["notes.txt", "run_" + "0" * 22, "cor_" + "0" * 22, "0" * 32, "7", "en-de", os.fsdecode(b"\xff")]
    parents = [folder.incoming, folder.imports, folder.staging, folder.models, folder.models / "en-de", folder.trash]
    folder.trash.mkdir()
    for parent in [*parents, folder.corpora, folder.runs]:
        for name in names:
            # A folder in the place of something without a row is no stray, but in doubt.
            place = {"7": "en-de", "run_" + "0" * 22: "runs", "cor_" + "0" * 22: "corpora"}.get(name)
            in_doubt = stray in ("full folder", "link to a folder") and parent.name == place
            if not os.path.lexists(parent / name) and not in_doubt:
                STRAYS[stray](parent / name)
    refuse_new_database(folder)
    FileCorpusStore(database, folder, CorpusLimits()).recover()
    models.recover()
    sweep(database, folder)
    finish_deletions(database, folder)
    empty_trash(folder.trash, 2**62)
    assert len(find_contents(folder).paths()) == 3
