"""A data folder with an up-to-date database, and what lies in it."""

import time

import pytest
from sqlalchemy import event

from ferryman_service.bundle import manifest as bundles
from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.models import ModelLineage, ModelScores, PublishedWeights
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import ProcessIdentity, TrainingRun
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.runs import SqlRunStore
from tests.fakes.databases import add_corpus, open_migrated


@pytest.fixture
def folder(tmp_path):
    folder = DataFolder(tmp_path / "data")
    folder.create()
    return folder


@pytest.fixture
def database(folder):
    database = open_migrated(folder.database)
    yield database
    database.dispose()


@pytest.fixture
def fill_disk(database):
    """Leave the database no page to grow by."""

    def limit(dbapi_connection, _record):
        dbapi_connection.execute("PRAGMA max_page_count = 1")  # SQLite raises it to the present size

    def fill():
        database.dispose()
        event.listen(database, "connect", limit)

    return fill


@pytest.fixture
def free_disk(database):
    """Undo fill_disk."""

    def free():
        database.dispose()
        event.listen(
            database, "connect", lambda connection, _record: connection.execute("PRAGMA max_page_count = 1000000")
        )

    return free


@pytest.fixture
def runs(database):
    add_corpus(database)
    return SqlRunStore(database)


@pytest.fixture
def worker():
    return ProcessIdentity(pid=4242, start_ticks=77, boot_id="boot")


@pytest.fixture
def make_run():
    def make(**changes):
        values = {
            "run_id": new_id(RUN_PREFIX),
            "state": RunState.QUEUED,
            "corpus_id": "cor_x",
            "model_name": "en-de",
            "recipe": resolve_recipe({"seed": 7}),
            "create_time_ns": time.time_ns(),
        }
        return TrainingRun(**values | changes)

    return make


@pytest.fixture
def running(runs, make_run, worker):
    """A run whose worker has claimed attempt 1."""

    def start(**changes):
        run = runs.create(make_run(**changes), None, 100)
        runs.begin_attempt(run.run_id, 0)
        return runs.claim_attempt(run.run_id, 1, worker)

    return start


@pytest.fixture
def exporting(runs, running):
    def start(**changes):
        run = running(**changes)
        return runs.change_state(run.run_id, 1, RunState.EXPORTING)

    return start


@pytest.fixture
def write_bundle():
    """Write a sealed bundle of a run into a folder."""

    def write(path, run_id, content="content"):
        for name in bundles.CONTENT_FILES:
            (path / name).write_text(f"{content} of {name}")
        lineage = ModelLineage(
            run_id=run_id,
            corpus_id="cor_0000000000000000000000",
            corpus_digest="ab" * 32,
            source_language="en",
            target_language="de",
            recipe=resolve_recipe({"seed": 7}),
        )
        header = bundles.ManifestHeader(
            lineage=lineage,
            scores=ModelScores(bleu=35.5, chrf=60.25, nll_per_token=1.125, weights=PublishedWeights.AVERAGE, step=900),
            parameters=12345,
            max_sentence_tokens=256,
            architecture=bundles.Architecture(d_model=128, decoder_layers=4, heads=4, vocabulary_size=8000),
        )
        bundles.seal(path, header)
        return path

    return write
