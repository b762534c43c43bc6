"""What goes by itself, and what must not."""

import fcntl
import os

import pytest

from ferryman_service.domain.records import RunState
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.retention import limit_prepared, remove_old_checkpoints

DAY_NS = 24 * 3600 * 10**9


@pytest.fixture
def leave(folder):
    """Leave two checkpoints of a run; return what tells the steps that are left."""

    def leave(run_id):
        parent = folder.run_dir(run_id) / "checkpoints"
        for step in (7, 8):
            (parent / f"step-{step:010}").mkdir(parents=True)
        return lambda: sorted(int(path.name.removeprefix("step-")) for path in parent.iterdir())

    return leave


def test_old_checkpoints_go_but_for_what_keep_optimizer_may_want(
    database, folder, runs, running, exporting, write_bundle, leave
):
    models = FileModelStore(database, folder)
    published, other = exporting(), exporting()
    models.publish(published.run_id, 1, write_bundle(models.staging_dir(published.run_id), published.run_id))
    runs.change_state(other.run_id, 1, RunState.FAILED)
    unfinished = running()
    left = [leave(run.run_id) for run in (published, other, unfinished)]
    end_ns = max(runs.get(run.run_id).end_time_ns for run in (published, other))
    remove_old_checkpoints(database, folder, 30, end_ns + 29 * DAY_NS)
    assert [steps() for steps in left] == [[7, 8], [7, 8], [7, 8]]
    remove_old_checkpoints(database, folder, 30, end_ns + 31 * DAY_NS)
    assert [steps() for steps in left] == [[8], [], [7, 8]]
    models.delete_version("en-de", 1)
    remove_old_checkpoints(database, folder, 30, end_ns + 31 * DAY_NS)
    assert [steps() for steps in left] == [[], [], [7, 8]]


def test_a_version_that_cannot_tell_its_run_keeps_the_last_checkpoints(
    database, folder, runs, exporting, write_bundle, leave
):
    models, run = FileModelStore(database, folder), exporting()
    models.publish(run.run_id, 1, write_bundle(models.staging_dir(run.run_id), run.run_id))
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE model_versions SET lineage = '{'")
    steps = leave(run.run_id)
    remove_old_checkpoints(database, folder, 30, runs.get(run.run_id).end_time_ns + 31 * DAY_NS)
    assert steps() == [8]


def test_the_least_recently_used_prepared_corpora_go_first_and_never_one_that_is_held(folder):
    limit_prepared(folder.prepared, 0)
    names = [str(number) * 40 for number in range(4)]
    for age, name in enumerate(names):
        (folder.prepared / name / "pairs").mkdir(parents=True)
        (folder.prepared / name / "pairs" / "tokens").write_bytes(bytes(1000))
        os.utime(folder.prepared / name, (age, age))
    (folder.prepared / "somebody's").mkdir()
    held = os.open(folder.prepared / names[1], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    limit_prepared(folder.prepared, 2500)
    assert sorted(path.name for path in folder.prepared.iterdir()) == [names[1], names[3], "somebody's"]
    limit_prepared(folder.prepared, 0)
    assert sorted(path.name for path in folder.prepared.iterdir()) == [names[1], "somebody's"]
    os.close(held)
    limit_prepared(folder.prepared, 0)
    assert [path.name for path in folder.prepared.iterdir()] == ["somebody's"]
