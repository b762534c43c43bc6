"""What a process can do, by its store and its memory."""

import pytest

from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.application.readiness import Abilities, Readiness
from ferryman_service.domain.readiness import StoreState
from ferryman_service.domain.threads import Threads
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from tests.fakes.bundles import write_bundle
from tests.fakes.databases import open_migrated
from tests.fakes.store_probe import FakeStoreProbe
from tests.fakes.translator import FakeBundleLoader


@pytest.fixture
def models(tmp_path):
    folder = DataFolder(tmp_path / "data")
    folder.create()
    engine = open_migrated(folder.database)
    yield FileModelStore(engine, folder, examine=lambda bundle: None)
    engine.dispose()


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (StoreState.USABLE, Abilities()),
        (StoreState.READ_ONLY, Abilities(trains=False, writes=False)),
        (StoreState.DAMAGED, Abilities(trains=False, writes=False)),
        (StoreState.LOST, Abilities(trains=False, writes=False, reads=False, translates=False)),
    ],
)
async def test_without_a_model_in_memory_everything_depends_on_the_store(state, found, models):
    loaded = LoadedModels(models, FakeBundleLoader(), LoadingLimits())
    assert await Readiness(FakeStoreProbe(state), loaded, Threads(1, "probe")).look() == found
    assert await Readiness(FakeStoreProbe(state), None, Threads(1, "probe")).look() == found


async def test_a_supervisor_that_does_not_work_concerns_training_alone():
    readiness = Readiness(FakeStoreProbe(StoreState.USABLE), None, Threads(1, "probe"), lambda: False)
    assert await readiness.look() == Abilities(trains=False)


async def test_a_disk_below_its_mark_concerns_uploads_alone():
    probe, thread = FakeStoreProbe(StoreState.USABLE), Threads(1, "probe")
    readiness = Readiness(probe, None, thread, has_space=lambda: False)
    assert await readiness.look() == Abilities(writes=False)


async def test_a_model_in_memory_translates_on_without_the_store(models, tmp_path):
    loaded = LoadedModels(models, FakeBundleLoader(), LoadingLimits())
    loaded.load(models.import_bundle(write_bundle(tmp_path / "bundle"), "en-de"))
    found = await Readiness(FakeStoreProbe(StoreState.LOST), loaded, Threads(1, "probe")).look()
    assert found == Abilities(trains=False, writes=False, reads=False, translates=True)


def test_abilities_cover_themselves_and_fewer():
    assert Abilities().covers(Abilities(trains=False))
    assert not Abilities(trains=False).covers(Abilities())
    assert not Abilities(trains=False).covers(Abilities(reads=False))
