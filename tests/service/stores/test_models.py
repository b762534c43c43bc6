"""Published models: whole or not at all, never changed."""

import errno
import hashlib
import os
import shutil
import sys

import pytest
from sqlalchemy import delete, event

from ferryman_service.bundle import manifest as bundles
from ferryman_service.domain.errors import (
    AttemptFenced,
    DiskFull,
    InvalidRequest,
    ModelDamaged,
    ModelInUse,
    ModelNotFound,
)
from ferryman_service.domain.models import Int8Outcome, Int8Scores, ModelReference
from ferryman_service.domain.records import RunState, StateChange
from ferryman_service.domain.training import RunCancelled
from ferryman_service.stores import tables
from ferryman_service.stores.database import open_database, writing
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.sweep import sweep
from ferryman_service.trash import list_trash
from tests.fakes.bundles import write_bundle as write_foreign_bundle
from tests.fakes.failpoints import CRASHED, in_child

ELSEWHERE = "run_0000000000000000000000"


@pytest.fixture
def models(database, folder):
    return FileModelStore(database, folder, examine=lambda bundle: None)


@pytest.fixture
def stage(models, write_bundle):
    return lambda run, content="content": write_bundle(models.staging_dir(run.run_id), run.run_id, content)


def files_of(path):
    return {file.name: file.read_text() for file in path.iterdir()}


def test_publishing_ends_the_run_and_makes_a_version(models, runs, exporting, stage):
    run = exporting()
    staged = stage(run)
    content = files_of(staged)
    published = models.publish(run.run_id, 1, staged)
    assert (published.name, published.version, published.parameters) == ("en-de", 1, 12345)
    assert published.lineage.run_id == run.run_id
    assert published.lineage.recipe == run.recipe
    assert models.resolve(ModelReference(name="en-de")) == published
    assert not staged.exists()
    bundle = models.bundle_dir(published)
    assert files_of(bundle) == content
    assert published.digest == bundles.manifest_digest(bundle)
    assert published.size_bytes == sum(file.stat().st_size for file in bundle.iterdir())
    assert all(not file.stat().st_mode & 0o222 for file in bundle.iterdir())
    ended = runs.get(run.run_id)
    assert (ended.state, ended.model_version) == (RunState.SUCCEEDED, 1)
    assert ended.end_time_ns is not None
    last = runs.records_after(run.run_id, ended.last_sequence - 1, 9)
    assert [record.payload for record in last] == [
        StateChange(state=RunState.SUCCEEDED, attempt=1, message="published en-de/1")
    ]


@pytest.mark.parametrize("scores", [Int8Scores(pairs=1000, fp32_bleu=30.5, int8_bleu=30.25), Int8Scores(pairs=0)])
@pytest.mark.parametrize("kept", [True, False])
def test_a_version_says_what_int8_costs(models, exporting, stage, scores, kept):
    run = exporting()
    staged = stage(run)
    for name in bundles.INT8_FILES:
        (staged / name).write_bytes(b"int8")
    bundles.seal(staged, bundles.read_manifest(staged).header)
    bundles.settle_int8(staged, scores, keep=kept)
    models.publish(run.run_id, 1, staged)
    assert models.resolve(ModelReference(name="en-de")).int8 == Int8Outcome(scores=scores, kept=kept)
    imported = models.import_bundle(models.bundle_dir(models.resolve(ModelReference(name="en-de"))), "elsewhere")
    assert models.get("elsewhere").latest_version.int8 == imported.int8 == Int8Outcome(scores=scores, kept=kept)


def test_a_version_without_a_word_of_int8_says_nothing(models, exporting, stage):
    run = exporting()
    models.publish(run.run_id, 1, stage(run))
    assert models.resolve(ModelReference(name="en-de")).int8 is None


def test_versions_count_on_and_older_ones_stay(models, exporting, stage):
    versions = []
    for content in ("first", "second"):
        run = exporting()
        versions.append(models.publish(run.run_id, 1, stage(run, content)))
    assert models.resolve(ModelReference(name="en-de", version=1)) == versions[0]
    assert models.resolve(ModelReference(name="en-de")) == versions[1]
    assert files_of(models.bundle_dir(versions[0]))["encoder.onnx"] == "first of encoder.onnx"
    model = models.get("en-de")
    assert (model.versions, model.latest_version) == ((1, 2), versions[1])


def test_only_the_newest_attempt_of_an_exporting_run_publishes(models, runs, running, exporting, stage):
    early = running()
    other_attempt = exporting()
    cancelled = exporting()
    runs.change_state(cancelled.run_id, 1, RunState.CANCELLED)
    for run, attempt in ((early, 1), (other_attempt, 2), (cancelled, 1)):
        staged = stage(run)
        before = runs.get(run.run_id)
        with pytest.raises(AttemptFenced):
            models.publish(run.run_id, attempt, staged)
        assert runs.get(run.run_id) == before
        assert (staged / bundles.MANIFEST_FILE).exists()
    assert models.list_page(None, 9) == []


def test_an_acknowledged_cancellation_is_not_published_over(models, runs, exporting, stage):
    run = exporting()
    assert runs.request_cancel(run.run_id).cancel_requested
    with pytest.raises(RunCancelled):
        models.publish(run.run_id, 1, stage(run))
    assert runs.get(run.run_id).state is RunState.EXPORTING, "the worker writes down that it was cancelled"
    assert models.list_page(None, 9) == []


def test_a_commit_that_fails_publishes_nothing_and_may_be_tried_again(models, runs, exporting, stage, database, folder):
    run = exporting()
    staged = stage(run)

    def fail(_connection):
        if folder.bundle_dir("en-de", 1).exists():
            raise OSError(errno.ENOSPC, "no space left on device")

    event.listen(database, "commit", fail)
    with pytest.raises(DiskFull):
        models.publish(run.run_id, 1, staged)
    event.remove(database, "commit", fail)
    assert runs.get(run.run_id) == run
    assert not folder.bundle_dir("en-de", 1).exists()
    assert models.list_page(None, 9) == []
    assert models.publish(run.run_id, 1, staged).version == 1


def test_crash_before_the_commit_leaves_the_run_as_it_was(models, runs, exporting, stage, database, folder):
    run = exporting()
    staged = stage(run, "lost")
    database.dispose()  # no connection may pass through a fork

    def publish_and_die():
        mine = open_database(folder.database)
        event.listen(mine, "commit", lambda _: folder.bundle_dir("en-de", 1).exists() and os._exit(CRASHED))
        FileModelStore(mine, folder).publish(run.run_id, 1, staged)

    assert in_child(publish_and_die) == CRASHED
    orphan = folder.bundle_dir("en-de", 1)
    assert orphan.exists()
    assert runs.get(run.run_id) == run
    with pytest.raises(ModelNotFound):
        models.resolve(ModelReference(name="en-de"))
    version = models.publish(run.run_id, 1, stage(run, "second try"))
    assert version.version == 1
    assert files_of(models.bundle_dir(version))["encoder.onnx"] == "second try of encoder.onnx"
    assert bundles.verify(models.bundle_dir(version))


def test_staging_is_empty_whatever_an_earlier_attempt_left(models, exporting, stage):
    run = exporting()
    staged = stage(run)
    assert models.staging_dir(run.run_id) == staged
    assert list(staged.iterdir()) == []
    staged.rmdir()
    staged.touch()
    assert list(models.staging_dir(run.run_id).iterdir()) == []


def test_at_start_only_unfinished_runs_keep_their_staging(models, runs, exporting, stage, database, folder):
    going, ended = exporting(), exporting()
    stage(ended)
    kept = stage(going)
    runs.change_state(ended.run_id, 1, RunState.CANCELLED)
    (folder.imports / ("0" * 32)).mkdir()
    models.recover()
    sweep(database, folder)
    assert list(folder.staging.iterdir()) == [kept]
    assert list(folder.imports.iterdir()) == []
    assert len(list(kept.iterdir())) == len(bundles.CONTENT_FILES) + 1


def test_importing_copies_and_publishes(models, tmp_path, write_bundle, folder):
    bundle = tmp_path / "elsewhere"
    bundle.mkdir()
    write_bundle(bundle, ELSEWHERE)
    (bundle / "README").write_text("not part of the bundle")
    first, second = (models.import_bundle(bundle, "imported") for _ in range(2))
    assert (first.reference, second.reference) == ("imported/1", "imported/2")
    assert first.lineage.run_id == ELSEWHERE
    content = files_of(bundle)
    del content["README"]
    assert files_of(models.bundle_dir(first)) == content
    assert list(folder.imports.iterdir()) == []


def test_a_damaged_bundle_is_not_imported(models, tmp_path, write_bundle, folder):
    write_bundle(tmp_path, ELSEWHERE)
    (tmp_path / bundles.DECODER_FILE).write_text("damaged")
    with pytest.raises(ModelDamaged, match=r"decoder\.onnx"):
        models.import_bundle(tmp_path, "imported")
    (tmp_path / bundles.DECODER_FILE).unlink()
    with pytest.raises(ModelDamaged, match=r"decoder\.onnx"):
        models.import_bundle(tmp_path, "imported")
    assert models.list_page(None, 9) == []
    assert list(folder.imports.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../x", ".staging", "A", "a/b", "a" * 65])
def test_a_bad_name_is_refused(models, tmp_path, write_bundle, name):
    with pytest.raises(InvalidRequest) as caught:
        models.import_bundle(write_bundle(tmp_path, ELSEWHERE), name)
    assert caught.value.violations[0].field == "name"


def test_unknown_models_are_not_found(models, tmp_path, write_bundle):
    models.import_bundle(write_bundle(tmp_path, ELSEWHERE), "known")
    for name, version in (("unknown", None), ("known", 2), ("../known", 1)):
        with pytest.raises(ModelNotFound):
            models.resolve(ModelReference(name=name, version=version))
    with pytest.raises(ModelNotFound, match="'unknown'"):
        models.get("unknown")


def test_pages_by_name(models, tmp_path, write_bundle):
    write_bundle(tmp_path, ELSEWHERE)
    for name in ("b", "a", "c.1", "b", "c-1"):
        models.import_bundle(tmp_path, name)
    first = models.list_page(None, 3)
    assert [(model.name, model.versions) for model in first] == [("a", (1,)), ("b", (1, 2)), ("c-1", (1,))]
    assert [model.name for model in models.list_page("c-1", 3)] == ["c.1"]
    assert models.list_page("c.1", 3) == []


@pytest.fixture
def publish(models, tmp_path, write_bundle):
    """Publish the next version of a model; its content is told by its number."""
    bundle = tmp_path / "elsewhere"
    bundle.mkdir()

    def make(name="m", content="content"):
        return models.import_bundle(write_bundle(bundle, ELSEWHERE, content), name)

    return make


def by_alias(alias, name="m"):
    return ModelReference(name=name, alias=alias)


def test_an_alias_points_where_it_was_last_set(models, publish):
    first, second = publish(), publish()
    publish("n")
    assert models.get("m").aliases == ()
    model = models.set_alias("m", "production", 1)
    assert [(alias.alias, alias.version) for alias in model.aliases] == [("production", 1)]
    assert model.aliases[0].update_time_ns > first.create_time_ns
    assert models.resolve(by_alias("production")) == first
    models.set_alias("m", "canary", 2)
    models.set_alias("n", "production", 1)
    moved = models.set_alias("m", "production", 2)
    assert [(alias.alias, alias.version) for alias in moved.aliases] == [("canary", 2), ("production", 2)]
    assert moved.aliases[1].update_time_ns > model.aliases[0].update_time_ns
    assert models.resolve(by_alias("production")) == second
    assert models.resolve(by_alias("production", "n")).reference == "n/1"
    assert [len(model.aliases) for model in models.list_page(None, 9)] == [2, 1]
    assert models.get("m") == moved
    models.delete_alias("m", "production")
    assert [alias.alias for alias in models.get("m").aliases] == ["canary"]


@pytest.mark.parametrize(("name", "version"), [("m", 2), ("m", 0), ("nobody", 1)])
def test_an_alias_of_what_does_not_exist_is_not_made(models, publish, name, version):
    publish()
    models.set_alias("m", "production", 1)
    with pytest.raises(ModelNotFound):
        models.set_alias(name, "production", version)
    assert models.resolve(by_alias("production")).version == 1


def test_an_unknown_reference_is_told_what_there_is(models, publish):
    publish(), publish(), models.set_alias("m", "canary", 2)
    told = {
        by_alias("production"): "model 'm' has no alias 'production': its aliases are canary",
        by_alias("x", "nobody"): "there is no model 'nobody': ListModels names those there are",
        ModelReference(name="m", version=7): "model 'm' has no version 7: its versions are 1, 2",
    }
    for reference, text in told.items():
        with pytest.raises(ModelNotFound) as caught:
            models.resolve(reference)
        assert (caught.value.message, caught.value.metadata["model"]) == (text, str(reference))
    with pytest.raises(ModelNotFound, match="no alias 'production'"):
        models.delete_alias("m", "production")


def test_an_alias_moves_in_one_step_for_readers_and_crashes(models, publish, database):
    publish(), publish(), models.set_alias("m", "production", 1)

    def fail(_connection):
        raise OSError(errno.EIO, "the power went")

    event.listen(database, "commit", fail)
    with pytest.raises(OSError, match="power"):
        models.set_alias("m", "production", 2)
    event.remove(database, "commit", fail)
    assert models.resolve(by_alias("production")).version == 1


def test_a_deleted_version_is_gone_with_its_files(models, publish, folder):
    first, second = publish(), publish()
    models.delete_version("m", 1)
    assert not models.bundle_dir(first).exists()
    assert models.get("m").versions == (2,)
    assert models.resolve(ModelReference(name="m")) == second
    assert list(folder.imports.iterdir()) == []
    for version in (1, 3):
        with pytest.raises(ModelNotFound):
            models.delete_version("m", version)


def test_files_are_deleted_also_where_there_is_no_room_to_move_them_to(models, publish, folder):
    version = publish()
    folder.imports.rmdir()
    folder.imports.touch()
    models.delete_version("m", 1)
    assert not models.bundle_dir(version).exists()


def test_numbers_are_never_given_again(models, publish, exporting, stage):
    for _ in range(3):
        publish("en-de")
    models.delete_version("en-de", 3)
    assert models.resolve(ModelReference(name="en-de")).version == 2
    run = exporting()
    assert models.publish(run.run_id, 1, stage(run)).version == 4
    for version in (1, 2, 4):
        models.delete_version("en-de", version)
    assert models.list_page(None, 9) == []
    with pytest.raises(ModelNotFound):
        models.get("en-de")
    assert publish("en-de").version == 5
    assert models.get("en-de").versions == (5,)


def test_lost_model_row_does_not_repeat_a_version(models, publish, database):
    """A repair of a damaged database keeps the rows that it can read."""
    publish()
    with writing(database) as connection:
        connection.execute(delete(tables.models))
    assert publish().version == 2


def test_a_publication_that_fails_gives_no_number_away(models, publish, database, folder):
    publish()

    def fail(_connection):
        if folder.bundle_dir("m", 2).exists():
            raise OSError(errno.ENOSPC, "no space left on device")

    event.listen(database, "commit", fail)
    with pytest.raises(DiskFull):
        publish()
    event.remove(database, "commit", fail)
    assert publish().version == 2


def test_aliased_version_is_not_deleted(models, publish):
    version = publish()
    models.set_alias("m", "production", 1)
    models.set_alias("m", "canary", 1)
    with pytest.raises(ModelInUse, match="m@canary, m@production") as caught:
        models.delete_version("m", 1)
    assert dict(caught.value.metadata) == {"model": "m/1", "aliases": "canary,production"}
    assert bundles.verify(models.bundle_dir(version))
    models.delete_alias("m", "canary")
    models.delete_alias("m", "production")
    models.delete_version("m", 1)


def test_initial_model_of_an_unfinished_run_is_not_deleted(models, publish, runs, running):
    publish(), publish()
    run = running(initial_model="m/1")
    ended = running(initial_model="m/2")
    runs.change_state(ended.run_id, 1, RunState.FAILED)
    with pytest.raises(ModelInUse, match=run.run_id) as caught:
        models.delete_version("m", 1)
    assert caught.value.metadata["needed_by"] == run.run_id
    models.delete_version("m", 2)
    assert runs.get(ended.run_id).initial_model == "m/2"
    runs.change_state(run.run_id, 1, RunState.CANCELLED)
    models.delete_version("m", 1)


def test_a_run_keeps_the_number_of_the_version_that_it_made(models, runs, exporting, stage):
    run = exporting()
    models.publish(run.run_id, 1, stage(run))
    models.delete_version("en-de", 1)
    assert (runs.get(run.run_id).state, runs.get(run.run_id).model_version) == (RunState.SUCCEEDED, 1)


def test_a_deletion_that_fails_deletes_nothing(models, publish, database):
    version = publish()

    def fail(_connection):
        raise OSError(errno.EIO, "the power went")

    event.listen(database, "commit", fail)
    with pytest.raises(OSError, match="power"):
        models.delete_version("m", 1)
    event.remove(database, "commit", fail)
    assert models.resolve(ModelReference(name="m")) == version
    assert bundles.verify(models.bundle_dir(version))


def test_a_folder_without_a_row_is_not_overwritten(models, publish, folder):
    """As after a start with an older database: the next version gets a number of its own."""
    published = publish()
    kept = shutil.copytree(models.bundle_dir(published), folder.bundle_dir("m", 2))
    (folder.models / "m" / "3").touch()
    assert publish().version == 4
    assert bundles.verify(kept)
    assert (folder.models / "m" / "3").is_file()
    assert models.get("m").versions == (1, 4)


def test_a_bundle_in_anothers_place_is_not_used(models, publish, tmp_path):
    first, second = publish(), models.import_bundle(write_foreign_bundle(tmp_path / "other", encoder=b"other"), "m")
    one, other = models.bundle_dir(first), models.bundle_dir(second)
    one.rename(aside := one.with_name("aside"))
    other.rename(one)
    aside.rename(other)
    for use in (models.published_bundle, models.weights, models.open_bundle):
        with pytest.raises(ModelDamaged, match="not the one that was published as m/1"):
            use(first)


def test_crash_between_row_and_files_leaves_an_orphan_that_a_start_removes(models, publish, database, folder):
    kept = publish("kept")
    first, second = publish(), publish()
    database.dispose()  # no connection may pass through a fork

    def delete_and_die():
        sys.addaudithook(lambda name, _: name == "os.mkdir" and os._exit(CRASHED))
        FileModelStore(open_database(folder.database), folder).delete_version("m", 1)

    assert in_child(delete_and_die) == CRASHED
    assert models.get("m").versions == (2,)
    orphan = models.bundle_dir(first)
    assert orphan.exists()
    (folder.models / "a-file").touch()
    sweep(database, folder)
    assert not orphan.exists()
    assert list_trash(folder.trash) == []  # it was deleted, so nobody wants it back
    assert list(folder.imports.iterdir()) == []
    for version in (kept, second):
        assert bundles.verify(models.bundle_dir(version))
    assert publish().version == 3


def test_an_open_bundle_is_read_to_its_end_although_it_is_deleted(models, publish):
    version = publish()
    content = files_of(models.bundle_dir(version))
    reader = models.open_bundle(version)
    models.delete_version("m", 1)
    assert reader.version == version
    assert [file.name for file in reader.files] == [bundles.MANIFEST_FILE, *sorted(bundles.CONTENT_FILES)]
    for file in reader.files:
        read = b"".join(iter(lambda file=file: reader.read(file, 5), b""))
        assert read.decode() == content[file.name]
        assert (len(read), hashlib.sha256(read).hexdigest()) == (file.size_bytes, file.sha256)
    reader.close()
    reader.close()
    with pytest.raises(ModelNotFound):
        models.open_bundle(version)


@pytest.mark.parametrize("name", [bundles.DECODER_FILE, bundles.MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["longer", "gone"])
def test_a_damaged_bundle_is_not_opened(models, publish, name, damage):
    version = publish()
    path = models.bundle_dir(version) / name
    path.chmod(0o644)
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text() + " ")
    with pytest.raises(ModelDamaged, match=name):
        models.open_bundle(version)


def test_another_manifest_of_the_same_size_is_not_the_published_one(models, publish):
    version = publish()
    path = models.bundle_dir(version) / bundles.MANIFEST_FILE
    path.chmod(0o644)
    path.write_text(path.read_text().replace("12345", "54321"))
    with pytest.raises(ModelDamaged, match="not the one that was published"):
        models.open_bundle(version)
