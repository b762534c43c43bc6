"""The short way to a leased model is never an outdated one."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.application.model_access import ModelAccess
from ferryman_service.domain.errors import ModelNotFound
from ferryman_service.domain.models import ModelReference

LATEST = ModelReference(name="m")


class CountingModels:
    """A ModelStore that counts how often it is asked to resolve; `on_resolve` is called after each."""

    def __init__(self, models):
        self._models = models
        self.resolved = 0
        self.on_resolve = lambda: None

    def __getattr__(self, name):
        return getattr(self._models, name)

    def resolve(self, reference):
        version = self._models.resolve(reference)
        self.resolved += 1
        self.on_resolve()
        return version


@pytest.fixture
def counting(models):
    return CountingModels(models)


@pytest.fixture
def loaded(counting, loader):
    return LoadedModels(counting, loader, LoadingLimits())


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def loading():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def serve(counting, loaded, executor, loading):
    """Lease what the reference names, give it back, and return its version's number."""
    access = ModelAccess(counting, loaded, executor, loading)

    async def serve(reference=LATEST):
        lease = await access.lease(reference)
        assert not lease.engine.closed
        lease.release(executor)
        return lease.version.version

    return serve


async def test_it_is_resolved_once_as_long_as_nothing_changes(serve, counting, publish):
    publish()
    assert [await serve() for _ in range(5)] == [1] * 5
    assert counting.resolved == 1


async def test_what_has_changed_counts_at_once(serve, publish):
    for version in range(1, 6):
        publish()
        assert [await serve() for _ in range(2)] == [version] * 2


async def test_what_changes_while_it_is_resolved_is_not_missed(serve, counting, publish):
    publish()
    counting.on_resolve = lambda: (setattr(counting, "on_resolve", lambda: None), publish())
    assert await serve() == 1, "it was the latest when it was asked for"
    assert await serve() == 2


async def test_a_slow_answer_does_not_replace_a_newer_one(serve, counting, publish):
    publish()
    resolved, go_on = threading.Event(), threading.Event()

    def hold():
        counting.on_resolve = lambda: None
        resolved.set()
        assert go_on.wait(10)

    counting.on_resolve = hold
    slow = asyncio.create_task(serve())
    await asyncio.to_thread(resolved.wait, 10)
    publish()
    assert await serve() == 2
    go_on.set()
    assert await slow == 1
    assert await serve() == 2


async def test_a_version_that_left_memory_is_loaded_again(serve, loaded, loader, models, publish):
    version = publish()
    await serve()
    await asyncio.wrap_future(loaded.unload(version))
    assert await serve() == 1
    assert loader.loads == ["m/1", "m/1"]


async def test_what_is_deleted_is_not_found(serve, models, publish):
    publish()
    await serve()
    models.delete_version("m", 1)
    with pytest.raises(ModelNotFound):
        await serve()


async def test_however_many_wait_for_a_load_other_models_are_served(serve, loader, publish):
    """Also when something was published meanwhile, so that names have to be resolved again."""
    publish("ready"), publish("slow")
    ready, slow = ModelReference(name="ready"), ModelReference(name="slow")
    await serve(ready)
    loader.began.clear()
    loader.gate.clear()
    waiting = [asyncio.create_task(serve(slow)) for _ in range(9)]
    assert await asyncio.to_thread(loader.began.wait, 10)
    publish("another")
    try:
        assert await asyncio.wait_for(serve(ready), 5) == 1
        assert not any(task.done() for task in waiting)
    finally:
        loader.gate.set()
    assert await asyncio.gather(*waiting) == [1] * 9
    assert loader.loads == ["ready/1", "slow/1"]


async def test_a_lease_keeps_its_model_until_it_is_released(counting, loaded, executor, loading, publish):
    version = publish()
    access = ModelAccess(counting, loaded, executor, loading)
    first, second = await access.lease(LATEST), await access.lease(LATEST)
    freed = loaded.unload(version)
    first.release(executor)
    await asyncio.sleep(0.05)
    assert not freed.done() and not second.engine.closed
    second.release(executor)
    await asyncio.wait_for(asyncio.wrap_future(freed), 10)
    assert second.engine.closed


async def test_the_last_release_frees_also_when_the_executor_has_ended(counting, loaded, loading, publish):
    publish()
    executor = ThreadPoolExecutor(1)
    lease = await ModelAccess(counting, loaded, executor, loading).lease(LATEST)
    loaded.close()
    executor.shutdown()
    lease.release(executor)
    assert lease.engine.closed
