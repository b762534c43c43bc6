"""Runs in a real store, and a registry to look into."""

import time

import pytest
from prometheus_client import CollectorRegistry

from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import ProcessIdentity, TrainingRun
from ferryman_service.stores.runs import SqlRunStore
from tests.fakes.databases import add_corpus, open_migrated


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def sample(registry):
    """The value of a sample, None if it is not shown."""
    return lambda name, **labels: registry.get_sample_value(name, labels)


@pytest.fixture
def runs(tmp_path):
    database = open_migrated(tmp_path / "ferryman.db")
    add_corpus(database)
    yield SqlRunStore(database)
    database.dispose()


@pytest.fixture
def queue_run(runs):
    def queue():
        run = TrainingRun(
            run_id=new_id(RUN_PREFIX),
            state=RunState.QUEUED,
            corpus_id="cor_x",
            model_name="en-de",
            recipe=resolve_recipe({}),
            create_time_ns=time.time_ns(),
        )
        return runs.create(run, None, 1000).run_id

    return queue


@pytest.fixture
def start_run(runs, queue_run):
    """Start a run whose worker has claimed attempt 1; return its id."""

    def start():
        run_id = queue_run()
        runs.begin_attempt(run_id, 0)
        runs.claim_attempt(run_id, 1, ProcessIdentity(pid=1, start_ticks=1, boot_id="boot"))
        return run_id

    return start
