"""What a look at the data folder finds."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ferryman_service.domain.readiness import StoreState
from ferryman_service.stores.database import open_database, reading, writing
from ferryman_service.stores.integrity import DatabaseIntegrity
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.probe import DatabaseProbe
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.stores.sqlite import ChangeCounter
from tests.fakes.databases import open_migrated
from tests.fakes.open_files import no_file_left

LOOK = """
import os, sys
from pathlib import Path
from ferryman_service.stores.database import open_database
from ferryman_service.stores.probe import DatabaseProbe
os.setgid(65534), os.setuid(65534)
print(DatabaseProbe(open_database(Path(sys.argv[1])), writes=sys.argv[2] == "writes").look().name)
"""


@pytest.fixture
def folder(tmp_path):
    folder = DataFolder(tmp_path / "data")
    folder.create()
    return folder


@pytest.fixture
def engine(folder):
    engine = open_migrated(folder.database)
    yield engine
    engine.dispose()


def test_a_database_that_can_be_used(engine):
    assert DatabaseProbe(engine, writes=True).look() is StoreState.USABLE
    assert DatabaseProbe(engine, writes=False).look() is StoreState.USABLE


def test_damaged_database_is_not_usable_until_another_is_in_its_place(engine, folder):
    integrity = DatabaseIntegrity(folder.database)
    probe = DatabaseProbe(engine, writes=True, integrity=integrity)
    integrity.met("the database is damaged")
    assert probe.look() is StoreState.DAMAGED
    restored = folder.root / "restored"
    shutil.copyfile(folder.database, restored)
    restored.replace(folder.database)
    probe.look()
    assert probe.look() is StoreState.USABLE


def test_a_look_changes_nothing(engine):
    counter = ChangeCounter(engine)
    before = counter.value()
    for writes in (True, False):
        DatabaseProbe(engine, writes=writes).look()
    assert counter.value() == before


def test_a_folder_that_is_gone_and_comes_back(engine, folder):
    probe = DatabaseProbe(engine, writes=True)
    away = folder.root.with_name("away")
    folder.root.rename(away)
    assert probe.look() is StoreState.LOST
    assert not folder.root.exists(), "a look makes nothing"
    away.rename(folder.root)
    assert probe.look() is StoreState.USABLE
    assert SqlRunStore(engine).unfinished() == []


def test_a_file_that_is_no_database(engine, folder):
    probe = DatabaseProbe(engine, writes=False)
    engine.dispose()
    folder.database.write_bytes(b"no database" * 1000)
    assert probe.look() is StoreState.LOST


def test_connections_to_a_database_that_was_replaced_are_closed(engine, folder):
    """Nobody goes on writing into a file that has no name any more."""
    probe, counter = DatabaseProbe(engine, writes=True), ChangeCounter(engine)
    with writing(engine) as connection:
        connection.exec_driver_sql("CREATE TABLE old (x)")
    before = counter.value()
    shutil.copytree(folder.root, folder.root.with_name("copy"))
    folder.root.rename(folder.root.with_name("away"))
    folder.root.with_name("copy").rename(folder.root)
    assert probe.look() is StoreState.USABLE
    with writing(engine) as connection:
        connection.exec_driver_sql("CREATE TABLE new (x)")
    assert counter.value() != before
    other = open_database(folder.database)
    with reading(other) as connection:
        tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE name IN ('old', 'new')").scalars()
        assert set(tables) == {"old", "new"}
    other.dispose()


def test_a_writer_that_holds_its_place_for_too_long(engine):
    probe = DatabaseProbe(engine, writes=True, busy_timeout_s=0.05)
    with writing(engine):
        assert probe.look() is StoreState.READ_ONLY
        assert DatabaseProbe(engine, writes=False, busy_timeout_s=0.05).look() is StoreState.USABLE
    assert probe.look() is StoreState.USABLE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not write")
@pytest.mark.parametrize(("writes", "found"), [("writes", "READ_ONLY"), ("reads", "USABLE")])
def test_a_database_that_can_only_be_read(writes, found):
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to other users
        Path(root).chmod(0o755)
        folder = DataFolder(Path(root) / "data")
        folder.create()
        engine = open_migrated(folder.database)
        for path in (folder.root, *folder.root.glob("ferryman.db*")):
            path.chmod(path.stat().st_mode | 0o055)
        command = [sys.executable, "-c", LOOK, str(folder.database), writes]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.stdout.strip() == found, result.stderr
        engine.dispose()


def test_a_process_without_open_files_can_use_nothing(engine):
    probe = DatabaseProbe(engine, writes=True)
    assert probe.look() is StoreState.USABLE
    with no_file_left():
        assert probe.look() is StoreState.LOST
    assert probe.look() is StoreState.USABLE
