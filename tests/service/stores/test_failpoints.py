"""Whatever call of the operating system fails, and however: nothing that was acknowledged is missing, nothing half done
is visible, and leftovers are swept.

`make soak` lets every call fail, `make check` every thirtieth one.
"""

import itertools
import os
import shutil

import pytest
from sqlalchemy import select

from ferryman_service.bundle.manifest import verify
from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Side, Split
from ferryman_service.domain.errors import DiskFull, FerrymanError, ModelNotFound
from ferryman_service.domain.ids import RUN_PREFIX, is_id
from ferryman_service.domain.models import ModelReference
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import Handover
from ferryman_service.stores import tables
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import disk_errors, open_database, reading
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.run_folders import FileRunFolders
from ferryman_service.stores.run_rows import DELETING
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.stores.sweep import finish_deletions, sweep
from tests.fakes.bundles import write_bundle
from tests.fakes.databases import add_corpus, drop_corpus
from tests.fakes.failpoints import CRASHED, Failpoints, Fault, in_child

_EVERY = 1 if os.environ.get("FERRYMAN_SOAK") else 30
HEADER = CorpusHeader(display_name="", source_language="en", target_language="de")
REQUEST_ID = "1b4e28ba-2fa1-41d2-8383-b9b5f2a3c8d1"
TEXT = b"one\n" * 5_000  # more than a buffer holds


class Stores:
    """What a service or a worker opens in its data folder."""

    def __init__(self, folder):
        self.folder = folder
        self.database = open_database(folder.database, busy_timeout_s=5)
        self.runs = SqlRunStore(self.database)
        self.corpora = FileCorpusStore(self.database, folder, CorpusLimits())
        self.models = FileModelStore(self.database, folder, examine=lambda bundle: None)
        self.run_folders = FileRunFolders(folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.database.dispose()

    def recover(self):
        """What a start does."""
        self.models.recover()
        self.runs.recover()
        sweep(self.database, self.folder)
        self.corpora.recover()

    def sweep(self):
        """What is done every hour."""
        for store in (self.corpora, self.models):
            store.sweep()
        finish_deletions(self.database, self.folder)

    def run_ids(self):
        with reading(self.database) as connection:
            visible = tables.runs.c.state != DELETING
            return list(connection.execute(select(tables.runs.c.run_id).where(visible)).scalars())

    def only_run(self):
        [run_id] = self.run_ids()
        return self.runs.get(run_id)


class Upload:
    """A caller uploads a corpus, and tries again with the same request_id."""

    def prepare(self, stores, make_run, tmp_path):
        pass

    def act(self, stores):
        upload = stores.corpora.begin_upload(HEADER, REQUEST_ID)
        try:
            for side in Side:
                upload.add_chunk(Split.TRAIN, side, TEXT)
            upload.add_pairs(Split.VALIDATION, [SentencePair(source="a", target="b")])
            upload.finish()
        finally:
            upload.abort()

    def is_done(self, stores):
        found = stores.corpora.list_page(None, 10)
        for corpus in found:
            files = stores.corpora.files(corpus.corpus_id).files
            assert files[Split.TRAIN, Side.TARGET].read_bytes() == TEXT
            assert files[Split.VALIDATION, Side.SOURCE].read_bytes() == b"a\n"
        assert len(found) <= 1
        return bool(found)


class Publication:
    """A worker stages a bundle and publishes it; the next attempt of the run does it again."""

    def prepare(self, stores, make_run, tmp_path):
        add_corpus(stores.database)
        run = stores.runs.create(make_run(), None, 100)
        drop_corpus(stores.database)
        self._to_exporting(stores, run)

    def act(self, stores):
        run = stores.only_run()
        if run.state is RunState.QUEUED:
            run = self._to_exporting(stores, run)
        try:
            staged = stores.models.staging_dir(run.run_id)
            staged.rmdir()
            with disk_errors():
                write_bundle(staged, run_id=run.run_id)
            stores.models.publish(run.run_id, run.attempt, staged)
        except BaseException:
            stores.models.discard_staging(run.run_id)
            raise

    def is_done(self, stores):
        run = stores.only_run()
        assert run.state in (RunState.EXPORTING, RunState.QUEUED, RunState.SUCCEEDED)
        if run.state is RunState.EXPORTING:  # the supervisor finds its worker dead
            stores.runs.give_up_attempt(run.run_id, run.attempt, Handover(state=RunState.QUEUED, message="died"))
        return run.state is RunState.SUCCEEDED

    def _to_exporting(self, stores, run):
        stores.runs.begin_attempt(run.run_id, run.attempt)
        stores.runs.claim_attempt(run.run_id, run.attempt + 1, WORKER)
        return stores.runs.change_state(run.run_id, run.attempt + 1, RunState.EXPORTING)


class Import:
    """An operator imports a bundle."""

    def prepare(self, stores, make_run, tmp_path):
        write_bundle(stores.folder.root.parent / "elsewhere")

    def act(self, stores):
        stores.models.import_bundle(stores.folder.root.parent / "elsewhere", "m")

    def is_done(self, stores):
        return bool(stores.models.list_page(None, 10))


class ModelDeletion:
    """A caller deletes one of two versions."""

    def prepare(self, stores, make_run, tmp_path):
        for _ in range(2):
            bundle = write_bundle(stores.folder.root.parent / "elsewhere")
            stores.models.import_bundle(bundle, "m")
            shutil.rmtree(bundle)

    def act(self, stores):
        stores.models.delete_version("m", 1)

    def is_done(self, stores):
        try:
            stores.models.resolve(ModelReference(name="m", version=1))
        except ModelNotFound:
            return True
        return False


class RunDeletion:
    """A caller deletes a run that has ended, with its checkpoints."""

    def prepare(self, stores, make_run, tmp_path):
        add_corpus(stores.database)
        run = stores.runs.create(make_run(), None, 100)
        drop_corpus(stores.database)
        stores.runs.request_cancel(run.run_id)
        checkpoint = stores.folder.run_dir(run.run_id) / "checkpoints" / "step-0000000001"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(b"weights")

    def act(self, stores):
        run = stores.only_run()
        stores.runs.delete(run.run_id)
        stores.run_folders.delete(run.run_id)

    def is_done(self, stores):
        return not list(stores.run_ids())


OPERATIONS = {kind.__name__: kind() for kind in (Upload, Publication, Import, ModelDeletion, RunDeletion)}
WORKER = None


def leftovers(stores):
    """What lies in the data folder and no row names, or lies in a folder for what is in progress."""
    folder = stores.folder
    runs = set(stores.run_ids())
    left = [path for parent in (folder.incoming, folder.imports, folder.staging) for path in parent.iterdir()]
    corpora = {corpus.corpus_id for corpus in stores.corpora.list_page(None, 10)}
    left += [path for path in folder.corpora.iterdir() if path != folder.incoming and path.name not in corpora]
    left += [path for path in folder.runs.iterdir() if is_id(path.name, RUN_PREFIX) and path.name not in runs]
    bundles = {folder.bundle_dir(model.name, n) for model in stores.models.list_page(None, 10) for n in model.versions}
    for bundle in bundles:
        verify(bundle)
    return left + [path for _, _, path in folder.bundles() if path not in bundles]


@pytest.fixture
def prepared(database, folder, make_run, worker, tmp_path):
    """A maker of copies of a data folder in which an operation can begin."""
    global WORKER
    WORKER = worker
    copies = itertools.count()

    def prepare(operation):
        with Stores(folder) as stores:
            operation.prepare(stores, make_run, tmp_path)
        database.dispose()

        def copy():
            root = tmp_path / f"copy-{next(copies)}"
            shutil.copytree(folder.root, root / "data")
            if (tmp_path / "elsewhere").exists():
                shutil.copytree(tmp_path / "elsewhere", root / "elsewhere")
            return DataFolder(root / "data")

        return copy

    return prepare


def check(operation, stores, name, *, acknowledged):
    """Nothing acknowledged is missing, nothing is half there, and who tries again succeeds."""
    assert operation.is_done(stores) or not acknowledged, name
    stores.sweep()
    assert leftovers(stores) == [], name
    if not operation.is_done(stores):
        operation.act(stores)
        assert operation.is_done(stores), name
        assert leftovers(stores) == [], name


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("fault", Fault)
def test_failure_at_any_call_leaves_nothing_half_done(prepared, operation, fault):
    copy = prepared(operation)
    with Stores(copy()) as stores, Failpoints(stores.folder.root) as points:
        operation.act(stores)
    struck = [number for number, name in enumerate(points.seen) if fault.strikes(name)]
    assert struck, points.seen
    for number in struck[min(fault.value % _EVERY, len(struck) - 1) :: _EVERY]:
        name = f"{fault.name} at {number}: {points.seen[number]}"
        folder = copy()
        if fault is Fault.CRASH:
            _crash(operation, folder, number, name)
        else:
            _fail(operation, folder, fault, number, name)
        shutil.rmtree(folder.root.parent)


def _crash(operation, folder, number, name):
    def work():
        with Stores(folder) as stores, Failpoints(folder.root, Fault.CRASH, number):
            operation.act(stores)

    assert in_child(work) == CRASHED, name
    with Stores(folder) as stores:
        stores.recover()
        check(operation, stores, name, acknowledged=False)


def _fail(operation, folder, fault, number, name):
    error = None
    with Stores(folder) as stores:
        with Failpoints(folder.root, fault, number):
            try:
                operation.act(stores)
            except (FerrymanError, OSError) as raised:
                error = raised
        assert error is None or isinstance(error, DiskFull) or fault is not Fault.ENOSPC, name
        check(operation, stores, name, acknowledged=error is None)
    with Stores(folder) as stores:
        stores.recover()
        assert leftovers(stores) == [], name
        assert operation.is_done(stores), name
