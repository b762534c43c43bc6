"""The use cases of models: what happens to memory when aliases move, and versions go."""

import asyncio

import pytest

from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.application.models import ModelUseCases
from ferryman_service.application.paging import Pager
from ferryman_service.domain.errors import (
    InvalidRequest,
    ModelDamaged,
    ModelInUse,
    ModelNotFound,
    ModelTooLarge,
    RoleNotServed,
)
from ferryman_service.domain.models import ModelReference
from tests.fakes.leases import leased

PRODUCTION = ModelReference(name="m", alias="production")


@pytest.fixture
def loaded(models, loader):
    return LoadedModels(models, loader, LoadingLimits(memory_bytes=1000))


@pytest.fixture
def use_cases(models, loaded):
    use_cases = ModelUseCases(models=models, loaded=loaded, pager=Pager(b"key"))
    yield use_cases
    use_cases.close()


@pytest.fixture
def silent(models):
    """The use cases of a server that does not translate."""
    use_cases = ModelUseCases(models=models, loaded=None, pager=Pager(b"key"))
    yield use_cases
    use_cases.close()


async def until(event):
    assert await asyncio.to_thread(event.wait, 10)


async def test_an_alias_moves_after_its_new_target_is_loaded(use_cases, models, loaded, loader, publish):
    old, new = publish(), publish()
    models.set_alias("m", "production", 1)
    loaded.load(old)
    loader.began.clear()
    loader.gate.clear()
    moving = asyncio.ensure_future(use_cases.set_alias("m", "production", 2))
    await until(loader.began)
    with leased(loaded, PRODUCTION) as (version, _):
        assert version == old, "until it is loaded, the old one serves"
    loader.gate.set()
    assert (await moving).aliases[0].version == 2
    assert loaded.is_loaded(new) and loader.made[1].warmed_up
    assert loader.loads == ["m/1", "m/2"]


async def test_the_old_target_keeps_its_memory_until_the_alias_has_moved(models, loader, publish):
    old, _ = publish(), publish()
    models.set_alias("m", "production", 1)
    loaded = LoadedModels(models, loader, LoadingLimits(max_loaded_models=1))
    cases = ModelUseCases(models=models, loaded=loaded, pager=Pager(b"key"))
    loaded.load(old)
    loader.began.clear()
    loader.gate.clear()
    moving = asyncio.ensure_future(cases.set_alias("m", "production", 2))
    await until(loader.began)
    with leased(loaded, PRODUCTION) as (version, _):
        assert version == old
    assert loaded.is_loaded(old), "there is room for one model, and it serves"
    loader.gate.set()
    await moving
    async with asyncio.timeout(10):
        while loader.open() != ["m/2"]:
            await asyncio.sleep(0.001)
    assert loader.loads == ["m/1", "m/2"]
    cases.close()


async def test_an_alias_that_nobody_uses_here_moves_without_a_load(use_cases, models, loaded, loader, publish):
    old, _ = publish(), publish()
    await use_cases.set_alias("m", "production", 1)
    loaded.load(old)
    loaded.unload(old)
    assert (await use_cases.set_alias("m", "production", 2)).aliases[0].version == 2
    assert loader.loads == ["m/1"]


@pytest.mark.parametrize("error", [ModelDamaged("broken"), None])
async def test_an_alias_stays_if_its_new_target_cannot_be_loaded(use_cases, models, loaded, loader, publish, error):
    old, _ = publish(), publish()
    models.set_alias("m", "production", 1)
    loaded.load(old)
    loader.failures, loader.memory_bytes = [error] * (error is not None), 1001
    with pytest.raises(ModelTooLarge if error is None else ModelDamaged):
        await use_cases.set_alias("m", "production", 2)
    assert models.resolve(PRODUCTION) == old
    assert [model.reference for model in loaded.loaded()] == ["m/1"]


async def test_moving_to_what_is_loaded_waits_for_no_load_in_hand(use_cases, models, loaded, loader, publish):
    """Rolling an alias back must not wait for the models that are being loaded."""
    old, new = publish(), publish()
    models.set_alias("m", "production", 2)
    loaded.load(old), loaded.load(new)
    publish("a"), publish("b")
    loader.gate.clear()
    loads = [asyncio.ensure_future(use_cases.load(name)) for name in "ab"]
    async with asyncio.timeout(5):
        assert (await use_cases.set_alias("m", "production", 1)).aliases[0].version == 1
    loader.gate.set()
    assert [model.reference for model in await asyncio.gather(*loads)] == ["a/1", "b/1"]


async def test_all_that_is_wrong_with_an_alias_is_told(use_cases, publish):
    publish()
    with pytest.raises(InvalidRequest) as caught:
        await use_cases.set_alias("../m", "7", 0)
    assert [(v.field, v.reason) for v in caught.value.violations] == [
        ("name", "INVALID_MODEL_NAME"),
        ("alias", "INVALID_ALIAS"),
        ("version", "OUT_OF_RANGE"),
    ]
    with pytest.raises(InvalidRequest):
        use_cases.delete_alias("m", "")
    with pytest.raises(ModelNotFound):
        await use_cases.set_alias("m", "production", 2)
    with pytest.raises(ModelNotFound, match="has no alias 'production'"):
        use_cases.delete_alias("m", "production")


async def test_a_deleted_version_serves_what_is_in_flight_then_leaves_memory(use_cases, loaded, loader, publish):
    version = publish()
    with loaded.lease(version) as translator:
        use_cases.delete_version("m/1")
        assert loaded.loaded() == []
        assert translator.translate(["x"], None, None)
    assert loader.open() == []
    with pytest.raises(ModelNotFound):
        await use_cases.load("m/1")


@pytest.mark.parametrize("reference", ["m", "m@production"])
def test_only_an_exact_version_is_deleted(use_cases, models, publish, reference):
    publish()
    models.set_alias("m", "production", 1)
    with pytest.raises(InvalidRequest):
        use_cases.delete_version(reference)
    with pytest.raises(ModelInUse):
        use_cases.delete_version("m/1")
    assert models.get("m").versions == (1,)


async def test_loading_and_unloading_by_any_reference(use_cases, models, publish):
    publish(), publish()
    models.set_alias("m", "production", 1)
    assert (await use_cases.load("m")).reference == "m/2"
    assert (await use_cases.load("m@production")).reference == "m/1"
    assert [model.reference for model in use_cases.loaded()] == ["m/1", "m/2"]
    assert await use_cases.unload("m/1")
    assert not await use_cases.unload("m@production")
    with pytest.raises(ModelNotFound):
        await use_cases.unload("m/3")


async def test_unloading_waits_for_what_is_in_flight_also_if_its_caller_does_not(use_cases, loaded, loader, publish):
    version = publish()
    with loaded.lease(version):
        first = asyncio.ensure_future(use_cases.unload("m"))
        done, _ = await asyncio.wait([first], timeout=0.1)
        assert not done
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert loader.open() == ["m/1"]
    assert loader.open() == []


async def test_a_server_that_does_not_translate(silent, models, publish):
    publish(), publish()
    for call in (silent.load("m"), silent.unload("m")):
        with pytest.raises(RoleNotServed):
            await call
    with pytest.raises(RoleNotServed):
        silent.loaded()
    await silent.set_alias("m", "production", 1)
    assert (await silent.set_alias("m", "production", 2)).aliases[0].version == 2
    silent.delete_version("m/1")
    assert models.get("m").versions == (2,)
