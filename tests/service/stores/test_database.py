"""The database: its settings, its migrations, what its errors mean."""

import errno
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError, OperationalError

from ferryman_service.domain.errors import DatabaseDamaged, DiskFull, StoreUnavailable
from ferryman_service.stores import tables
from ferryman_service.stores.database import DatabaseTooNew, disk_errors, open_database, reading, upgrade, writing
from ferryman_service.stores.sqlite import ChangeCounter
from ferryman_service.stores.tables import metadata

UPGRADE = """
import sys
from pathlib import Path
from ferryman_service.stores.database import open_database, upgrade
print("ready", flush=True)
sys.stdin.readline()
upgrade(open_database(Path(sys.argv[1])))
"""


def test_the_migrated_schema_is_that_of_the_code(database):
    with reading(database) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_commits_are_durable_and_references_checked(database):
    with reading(database) as connection:
        pragmas = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert pragmas == ["wal", 2, 1, 10_000]
    with pytest.raises(IntegrityError), writing(database) as connection:
        connection.exec_driver_sql("INSERT INTO records VALUES ('run_unknown', 1, 0, 'event', '{}')")


def test_several_processes_may_start_at_once(tmp_path):
    path = tmp_path / "new.db"
    command = [sys.executable, "-c", UPGRADE, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    database = open_database(path)
    with reading(database) as connection:
        assert MigrationContext.configure(connection).get_current_heads() == ("0001",)
    database.dispose()


def test_the_first_opening_waits_for_another_process_that_is_at_it(tmp_path):
    path = tmp_path / "new.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # the file is not in WAL mode yet, and now cannot enter it
    outcome = []

    def start():
        database = open_database(path)
        try:
            upgrade(database)
            outcome.append("upgraded")
        except StoreUnavailable as error:
            outcome.append(error)
        database.dispose()

    starter = threading.Thread(target=start)
    starter.start()
    starter.join(timeout=0.1)
    other.execute("COMMIT")
    other.close()
    starter.join()
    assert outcome == ["upgraded"]


def test_a_newer_database_is_refused_and_left_alone(database):
    with writing(database) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseTooNew, match=r"9999.*newer version"):
        upgrade(database)
    with reading(database) as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"


def test_a_locked_database_is_unavailable_for_writers_only(folder, database):
    impatient = open_database(folder.database, busy_timeout_s=0.05)
    with writing(database):
        with pytest.raises(StoreUnavailable, match="locked"), writing(impatient):
            pass
        with reading(impatient) as connection:
            assert connection.execute(text("SELECT count(*) FROM runs")).scalar_one() == 0
    with writing(impatient):
        pass
    impatient.dispose()


def test_a_database_that_cannot_be_opened_is_unavailable(tmp_path):
    with pytest.raises(StoreUnavailable), reading(open_database(tmp_path / "missing" / "ferryman.db")):
        pass


def test_damaged_database_is_data_loss(folder, database):
    changes = ChangeCounter(database)
    changes.value()
    database.dispose()
    for name in ("-wal", "-shm"):
        folder.database.with_name(folder.database.name + name).unlink(missing_ok=True)
    whole = folder.database.read_bytes()
    header = 100
    for damaged in (b"\xff" * len(whole), whole[:header] + b"\xff" * (len(whole) - header)):
        folder.database.write_bytes(damaged)
        for transaction in (reading, writing):
            with pytest.raises(DatabaseDamaged, match="repair"), transaction(database) as connection:
                connection.execute(text("SELECT count(*) FROM runs"))
        with pytest.raises(DatabaseDamaged, match="is damaged"):
            upgrade(database)
        database.dispose()


def test_a_database_that_has_gone_is_not_replaced_by_an_empty_one(folder, database):
    database.dispose()
    folder.database.unlink()
    with pytest.raises(StoreUnavailable), reading(database) as connection:
        connection.execute(text("SELECT 1"))
    ChangeCounter(database).value()
    assert not folder.database.exists()


def test_a_counter_of_what_is_no_database_never_says_that_nothing_changed(tmp_path):
    path = tmp_path / "ferryman.db"
    path.write_bytes(b"\xff" * 8192)
    changes = ChangeCounter(open_database(path))
    assert changes.value() != changes.value()


def test_a_mistake_of_ours_stays_one(database):
    with pytest.raises(OperationalError), reading(database) as connection:
        connection.execute(text("SELECT * FROM nowhere"))


def test_a_failed_transaction_leaves_nothing(database):
    def write_and_fail():
        with writing(database) as connection:
            connection.execute(insert(tables.models).values(name="m", last_version=1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    with reading(database) as connection:
        assert connection.execute(text("SELECT count(*) FROM models")).scalar_one() == 0


def test_a_file_on_a_full_disk_is_a_full_disk():
    with pytest.raises(DiskFull), disk_errors(), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    with pytest.raises(FileNotFoundError), disk_errors():
        Path("/nowhere/at/all").read_bytes()


def test_a_change_by_whomever_gives_another_number(folder, database):
    changes = ChangeCounter(database)
    seen = {changes.value()}
    assert changes.value() in seen
    with reading(database) as connection:
        connection.execute(text("SELECT 1"))
    assert changes.value() in seen, "reading changes nothing"
    for _ in range(3):
        with writing(database) as connection:
            connection.execute(insert(tables.models).values(name=f"m{len(seen)}", last_version=1))
            assert changes.value() in seen, "what is not committed has not happened"
        assert changes.value() not in seen
        seen.add(changes.value())
    statement = "connection.execute('DELETE FROM models'); connection.commit()"
    elsewhere = f"import sqlite3; connection = sqlite3.connect({str(folder.database)!r}); {statement}"
    subprocess.run([sys.executable, "-c", elsewhere], check=True, timeout=60)
    assert changes.value() not in seen


def test_a_counter_that_cannot_be_read_never_says_that_nothing_changed(tmp_path):
    changes = ChangeCounter(open_database(tmp_path / "no" / "such" / "folder" / "ferryman.db"))
    assert changes.value() != changes.value()


def test_a_counter_does_not_wait_for_a_lock(folder, database):
    changes = ChangeCounter(database)
    with writing(database):
        began_s = time.monotonic()
        changes.value()
        assert time.monotonic() - began_s < 5, "half of what a transaction waits"


def test_failed_transactions_are_told(tmp_path):
    failures = []
    database = open_database(tmp_path / "ferryman.db", busy_timeout_s=0.01, on_failure=lambda: failures.append(1))
    upgrade(database)
    with writing(database), pytest.raises(StoreUnavailable), writing(database):
        pass
    assert len(failures) == 1
    with pytest.raises(DiskFull), reading(database), disk_errors():
        raise OSError(errno.ENOSPC, "no space left")
    assert len(failures) == 2
    with pytest.raises(ZeroDivisionError), reading(database):
        raise ZeroDivisionError
    assert len(failures) == 2, "a mistake of ours is none of the database's"
    database.dispose()


def test_readers_wait_for_no_writer_however_many_wait(folder, database):
    """More writers than there were connections."""
    other = open_database(folder.database)
    patient = open_database(folder.database, busy_timeout_s=60)
    wrote = []

    def write():
        with writing(patient):
            wrote.append(True)

    writers = [threading.Thread(target=write) for _ in range(20)]
    with writing(other):
        for writer in writers:
            writer.start()
        for _ in range(3):
            with reading(patient) as connection:
                assert connection.execute(text("SELECT count(*) FROM runs")).scalar_one() == 0
        assert not wrote, "all of them still wait"
    for writer in writers:
        writer.join()
    assert len(wrote) == 20
    for engine in (other, patient):
        engine.dispose()
