"""The database: its settings, its migrations, what its errors mean."""

import errno
import json
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError, OperationalError

from ferryman_service.application.reporting import ReporterConfig, StoreReporter
from ferryman_service.domain.errors import DatabaseDamaged, DiskFull, StoreUnavailable
from ferryman_service.domain.recipe import recipe_to_dict, resolve_recipe
from ferryman_service.domain.records import EventLevel, RunState, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import Handover, RequestKey, RunProgress
from ferryman_service.stores import database as stores_database
from ferryman_service.stores import tables
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import DatabaseTooNew, disk_errors, open_database, reading, upgrade, writing
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.stores.sqlite import ChangeCounter
from ferryman_service.stores.tables import metadata

migrations = Path(stores_database.__file__).parent / "migrations"

UPGRADE = """
import sys
from pathlib import Path
from ferryman_service.stores.database import open_database, upgrade
print("ready", flush=True)
sys.stdin.readline()
upgrade(open_database(Path(sys.argv[1])))
"""


EARLIER_RUN, EARLIER_QUEUED = "run_00000000000000000000e2", "run_00000000000000000000e1"
EARLIER_STEP = {
    "step": 3,
    "epoch": 1,
    "loss": 5.0,
    "nll_per_token": 4.0,
    "perplexity": 54.6,
    "learning_rate": 1e-4,
    "gradient_norm": float("inf"),
    "target_tokens": 900,
    "target_tokens_per_second": 1800.0,
    "duration_s": 0.5,
    "padding_share": 0.1,
    "memory_bytes": 1,
}
EARLIER_VALIDATION = {
    "step": 2,
    "epoch": 1,
    "loss": 5.0,
    "nll_per_token": 4.0,
    "perplexity": 54.6,
    "bleu": 1.5,
    "chrf": 20.0,
    "translated_pairs": 3,
    "duration_s": 0.25,
    "best": True,
}
EARLIER_PROGRESS = {
    "step": 3,
    "epoch": 1,
    "target_tokens": 2700,
    "target_tokens_per_second": 1800.0,
    "fraction": 0.5,
    "remaining_s": 1.5,
    "last_step": EARLIER_STEP,
    "best_validation": EARLIER_VALIDATION,
}


def earlier_recipe():
    """The recipe of seed 7 in the form of the release without restarts: without the options that came later."""
    recipe = recipe_to_dict(resolve_recipe({"seed": 7}))
    known = {
        "model": [
            "d_model",
            "encoder_layers",
            "decoder_layers",
            "heads",
            "ffn_dim",
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "norm",
        ],
        "data": [
            "vocabulary_size",
            "subword_algorithm",
            "character_coverage",
            "max_sentence_tokens",
            "max_length_ratio",
        ],
        "optimization": [
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "clip_norm",
            "label_smoothing",
            "batch_target_tokens",
        ],
        "stop": ["max_steps", "max_epochs", "max_duration_s", "patience"],
        "validation": ["interval_steps", "metric", "max_translated_pairs", "keep_last"],
    }
    return recipe | {part: {name: recipe[part][name] for name in names} for part, names in known.items()}


def earlier_run(**changes):
    nothing_done = {
        "step": 0,
        "epoch": 0,
        "target_tokens": 0,
        "target_tokens_per_second": 0.0,
        "fraction": 0.0,
        "remaining_s": None,
        "last_step": None,
        "best_validation": None,
    }
    row = {
        "run_id": EARLIER_QUEUED,
        "state": "queued",
        "recipe": json.dumps(earlier_recipe()),
        "create_time_ns": 1,
        "attempt": 0,
        "last_sequence": 1,
        "progress": json.dumps(nothing_done),
        "worker_pid": None,
        "request_id": None,
        "body_digest": None,
    }
    return row | changes


def earlier_event(code):
    return "event", {"level": "info", "code": code, "message": "it happened"}


EARLIER_RECORDS = [
    ("state_change", {"state": "queued", "attempt": 0, "message": ""}),
    ("state_change", {"state": "starting", "attempt": 1, "message": ""}),
    ("state_change", {"state": "running", "attempt": 1, "message": ""}),
    earlier_event("SUBWORDS_TRAINED"),
    earlier_event("PAIRS_DROPPED"),
    earlier_event("VALIDATION_PAIRS_DROPPED"),
    earlier_event("TRAINING_STARTED"),
    ("step", EARLIER_STEP | {"step": 1}),
    ("step", EARLIER_STEP | {"step": 2}),
    ("validation", EARLIER_VALIDATION),
    ("step", EARLIER_STEP),
]
EARLIER_SPLIT = {"pairs": 3, "source_words": 6, "target_words": 6, "empty_pairs": 0, "samples": []}
EARLIER_VERSION = """INSERT INTO model_versions
(name, version, lineage, scores, parameters, size_bytes, digest, create_time_ns)
VALUES ('{}', 1, '{{}}', '{{}}', 1, 1, 'd', 1)"""
EARLIER_ROWS = {
    """INSERT INTO runs (run_id, state, corpus_id, model_name, recipe, create_time_ns, attempt, last_sequence,
    cancel_requested, progress, worker_pid, worker_start_ticks, worker_boot_id, start_time_ns, request_id, body_digest)
    VALUES (:run_id, :state, 'cor_x', 'en-de', :recipe, :create_time_ns, :attempt, :last_sequence,
    false, :progress, :worker_pid, :worker_pid, 'boot', :worker_pid, :request_id, :body_digest)""": [
        earlier_run(),
        earlier_run(
            run_id=EARLIER_RUN,
            state="running",
            create_time_ns=2,
            attempt=1,
            last_sequence=len(EARLIER_RECORDS),
            progress=json.dumps(EARLIER_PROGRESS),
            worker_pid=4242,
            request_id="1b4e28ba-2fa1-41d2-8383-b9b5f2a3c8d1",
            body_digest="digest",
        ),
    ],
    "INSERT INTO records VALUES (:run_id, :sequence, 1, :kind, :payload)": [
        {"run_id": EARLIER_QUEUED, "sequence": 1, "kind": "state_change", "payload": json.dumps(EARLIER_RECORDS[0][1])},
        *(
            {"run_id": EARLIER_RUN, "sequence": sequence, "kind": kind, "payload": json.dumps(payload)}
            for sequence, (kind, payload) in enumerate(EARLIER_RECORDS, 1)
        ),
    ],
    "INSERT INTO corpora VALUES ('cor_x', 'x', 'en', 'de', :split, :split, 'ab', 1, NULL)": [
        {"split": json.dumps(EARLIER_SPLIT)}
    ],
    "INSERT INTO model_versions VALUES ('en-de', 1, :lineage, :scores, 5, 6, 'cd', 1)": [
        {
            "lineage": json.dumps(
                {
                    "run_id": "run_gone",
                    "corpus_id": "cor_x",
                    "corpus_digest": "ab",
                    "source_language": "en",
                    "target_language": "de",
                    "recipe": earlier_recipe(),
                }
            ),
            "scores": json.dumps({"bleu": 1.0, "chrf": 2.0, "nll_per_token": 3.0, "weights": "checkpoint", "step": 9}),
        }
    ],
}


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
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
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
        assert MigrationContext.configure(connection).get_current_heads() == ("0006",)
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


@pytest.fixture
def earlier_database(tmp_path):
    """A database of the release without restarts, with rows in all its tables."""
    path = tmp_path / "earlier.db"
    path.touch()
    database = open_database(path)
    config = Config()
    config.set_main_option("script_location", str(migrations))
    with writing(database) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for statement, rows in EARLIER_ROWS.items():
            connection.execute(text(statement), rows)
    yield database
    database.dispose()


def test_the_log_tells_once_from_where_a_database_was_brought_to_where(earlier_database, caplog):
    caplog.set_level(logging.INFO, logger="ferryman_service.stores.database")
    for _ in range(2):
        upgrade(earlier_database)
    config = Config()
    config.set_main_option("script_location", str(migrations))
    head = ScriptDirectory.from_config(config).get_current_head()
    assert caplog.messages == [f"the database was brought from schema 0001 to schema {head}"]


def test_rows_of_the_release_before_are_read_after_the_migration(earlier_database, tmp_path, worker):
    upgrade(earlier_database)
    runs = SqlRunStore(earlier_database)
    queued, run = runs.unfinished()
    assert (queued.run_id, queued.state, queued.progress) == (EARLIER_QUEUED, RunState.QUEUED, RunProgress())
    assert (run.run_id, run.state, run.attempt, run.last_sequence) == (EARLIER_RUN, RunState.RUNNING, 1, 11)
    assert (run.processes, run.initial_model, run.keep_optimizer, run.restarts) == (1, "", False, 0)
    assert run.recipe == resolve_recipe({"seed": 7, "data": {"reduce_vocabulary": False}})
    assert (run.progress.step, run.progress.last_step.loss, run.progress.fraction) == (3, 5.0, 0.5)
    assert [record.sequence for record in runs.records_after(EARLIER_RUN, 0, 100)] == list(range(1, 12))
    folder = DataFolder(tmp_path)
    assert FileCorpusStore(earlier_database, folder, CorpusLimits()).get("cor_x").train.pairs == 3
    models = FileModelStore(earlier_database, folder, examine=lambda bundle: None)
    assert models.get("en-de").latest_version.lineage.run_id == "run_gone"
    assert models.get("en-de").latest_version.int8 is None, "nobody has said what it costs"
    assert models.set_alias("en-de", "production", 1).aliases[0].version == 1
    key = RequestKey(request_id="1b4e28ba-2fa1-41d2-8383-b9b5f2a3c8d1", body_digest="digest")
    assert runs.find(key).run_id == EARLIER_RUN


def retrain(runs, run_id, attempt, worker, reports):
    """Do again what a run of the release before had done, from the beginning, then its fourth step; return the run."""
    runs.begin_attempt(run_id, attempt)
    run = runs.claim_attempt(run_id, attempt + 1, worker)
    reporter = StoreReporter(runs, run, ReporterConfig(flush_interval_s=0.001, ack_interval_s=0.001))
    reporter.start()
    reporter.resume(0)
    for code in reports:
        reporter.event(EventLevel.INFO, code, "done again", repeats=True)
    for step in (1, 2, 3, 4):
        reporter.step(StepMetrics(**EARLIER_STEP | {"step": step}))
        if step == 2:
            reporter.validation(ValidationMetrics(**EARLIER_VALIDATION))
    reporter.close()
    return runs.get(run_id)


def steps(runs, run_id):
    payloads = [record.payload for record in runs.records_after(run_id, 0, 100)]
    return [payload.step for payload in payloads if isinstance(payload, StepMetrics | ValidationMetrics)]


EARLIER_SERIES = ("SUBWORDS_TRAINED", "PAIRS_DROPPED", "VALIDATION_PAIRS_DROPPED")


def test_steps_that_the_release_before_has_reported_are_not_reported_again(earlier_database, worker):
    upgrade(earlier_database)
    runs = SqlRunStore(earlier_database)
    runs.give_up_attempt(EARLIER_RUN, 1, Handover(state=RunState.QUEUED, message="the worker died"))
    run = retrain(runs, EARLIER_RUN, 1, worker, EARLIER_SERIES)
    assert steps(runs, EARLIER_RUN) == [1, 2, 2, 3, 4]
    assert (run.progress.step, run.progress.reports) == (4, 8)
    records = runs.records_after(EARLIER_RUN, 0, 100)
    assert [record.sequence for record in records] == list(range(1, run.last_sequence + 1))
    again = runs.give_up_attempt(EARLIER_RUN, 2, Handover(state=RunState.QUEUED, message="once more"))
    runs.begin_attempt(EARLIER_RUN, 2)
    assert runs.claim_attempt(EARLIER_RUN, 3, worker).progress == again.progress, "what is counted stays so"


def test_a_worker_of_the_release_before_may_outlive_the_migration(earlier_database, worker):
    """It goes on as before, and writes progress of its own form."""
    upgrade(earlier_database)
    progress = json.dumps({**EARLIER_PROGRESS, "step": 4})
    payload = json.dumps(EARLIER_STEP | {"step": 4})
    with writing(earlier_database) as connection:
        connection.execute(
            text("INSERT INTO records VALUES (:run, 12, 1, 'step', :payload)"), {"run": EARLIER_RUN, "payload": payload}
        )
        connection.execute(
            text("UPDATE runs SET last_sequence = 12, progress = :progress WHERE run_id = :run"),
            {"run": EARLIER_RUN, "progress": progress},
        )
    runs = SqlRunStore(earlier_database)
    runs.give_up_attempt(EARLIER_RUN, 1, Handover(state=RunState.QUEUED, message="the worker died"))
    retrain(runs, EARLIER_RUN, 1, worker, EARLIER_SERIES)
    assert steps(runs, EARLIER_RUN) == [1, 2, 2, 3, 4]


def test_numbers_of_versions_of_the_release_before_are_not_given_again(earlier_database, tmp_path, write_bundle):
    """Neither those that were there at the migration, nor those that a worker of that release publishes after it."""
    upgrade(earlier_database)
    folder = DataFolder(tmp_path / "data")
    folder.create()
    (tmp_path / "bundle").mkdir()
    bundle = write_bundle(tmp_path / "bundle", "run_0000000000000000000000")
    models = FileModelStore(earlier_database, folder, examine=lambda bundle: None)
    models.delete_version("en-de", 1)
    with writing(earlier_database) as connection:
        connection.exec_driver_sql(EARLIER_VERSION.format("late"))
    assert models.import_bundle(bundle, "en-de").version == 2
    assert models.import_bundle(bundle, "late").version == 2


def test_a_run_that_the_release_before_has_only_queued_starts_from_nothing(earlier_database, worker):
    upgrade(earlier_database)
    runs = SqlRunStore(earlier_database)
    run = retrain(runs, EARLIER_QUEUED, 0, worker, ["SUBWORDS_TRAINED"])
    assert steps(runs, EARLIER_QUEUED) == [1, 2, 2, 3, 4]
    assert run.progress.reports == 6


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
            connection.exec_driver_sql(EARLIER_VERSION.format("m"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    with reading(database) as connection:
        assert connection.execute(text("SELECT count(*) FROM model_versions")).scalar_one() == 0


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
