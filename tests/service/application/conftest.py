"""The use cases run on the real store."""

import time

import pytest

from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import ProcessIdentity, TrainingRun
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.runs import SqlRunStore
from tests.fakes.bundle_loader import SpyBundleLoader
from tests.fakes.bundles import write_bundle
from tests.fakes.databases import add_corpus, open_migrated


@pytest.fixture
def runs_database(tmp_path):
    database = open_migrated(tmp_path / "ferryman.db")
    add_corpus(database)
    yield database
    database.dispose()


@pytest.fixture
def runs(runs_database):
    return SqlRunStore(runs_database)


@pytest.fixture
def worker():
    return ProcessIdentity(pid=4242, start_ticks=1, boot_id="boot")


@pytest.fixture
def new_run():
    """A maker of runs that nobody has stored yet."""

    def make(corpus_id="cor_x", **recipe):
        return TrainingRun(
            run_id=new_id(RUN_PREFIX),
            state=RunState.QUEUED,
            corpus_id=corpus_id,
            model_name="en-de",
            recipe=resolve_recipe(recipe),
            create_time_ns=time.time_ns(),
        )

    return make


@pytest.fixture
def queue_run(runs, new_run):
    def queue(**recipe):
        return runs.create(new_run(**recipe), None, 100)

    return queue


@pytest.fixture
def running_run(runs, queue_run, worker):
    """A run whose worker has claimed attempt 1."""

    def start(**recipe):
        run = queue_run(**recipe)
        runs.begin_attempt(run.run_id, 0)
        return runs.claim_attempt(run.run_id, 1, worker)

    return start


@pytest.fixture
def models(tmp_path):
    folder = DataFolder(tmp_path / "data")
    folder.create()
    database = open_migrated(folder.database)
    yield FileModelStore(database, folder, examine=lambda bundle: None)
    database.dispose()


@pytest.fixture
def publish(models, tmp_path):
    """A publisher of the next version of a model."""
    bundle = write_bundle(tmp_path / "bundle")
    return lambda name="m": models.import_bundle(bundle, name)


@pytest.fixture
def loader():
    return SpyBundleLoader()
