"""The short way to a leased model is never an outdated one."""

import asyncio
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from ferryman_service.application.loaded_models import Lease, LoadedModels, LoadingLimits
from ferryman_service.application.model_access import TRY_AGAIN_S, ModelAccess
from ferryman_service.domain.errors import ModelDamaged, ModelNotFound, StoreUnavailable
from ferryman_service.domain.models import ModelReference

LATEST = ModelReference(name="m")
PRODUCTION = ModelReference(name="m", alias="production")


class CountingModels:
    """A ModelStore that counts how often it is asked to resolve; `on_resolve` is called after each. While it is `lost`
    it can tell nothing, as a database on a disk that is gone."""

    def __init__(self, models):
        self._models = models
        self.resolved = 0
        self.on_resolve = lambda: None
        self.lost = False
        self._unknown = itertools.count(-1, -1)

    def revision(self):
        return next(self._unknown) if self.lost else self._models.revision()

    def __getattr__(self, name):
        return getattr(self._models, name)

    def resolve(self, reference):
        if self.lost:
            raise StoreUnavailable("the disk is gone")
        version = self._models.resolve(reference)
        self.resolved += 1
        self.on_resolve()
        return version


async def becomes(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


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


async def test_name_is_resolved_once_while_nothing_changes(serve, counting, publish):
    publish()
    assert [await serve() for _ in range(5)] == [1] * 5
    assert counting.resolved == 1


async def test_changed_name_takes_effect_at_once(serve, models, publish):
    for version in range(1, 6):
        publish()
        models.set_alias("m", "production", version)
        assert [await serve(PRODUCTION) for _ in range(2)] == [version] * 2


async def test_change_during_resolving_is_not_missed(serve, counting, models, publish):
    publish(), publish()
    models.set_alias("m", "production", 1)
    counting.on_resolve = lambda: (
        setattr(counting, "on_resolve", lambda: None),
        models.set_alias("m", "production", 2),
    )
    assert await serve(PRODUCTION) == 1, "it was so when it was asked for"
    assert await serve(PRODUCTION) == 2


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


async def test_a_slow_answer_does_not_make_an_older_version_serve_on(serve, counting, loaded, models, publish):
    publish()
    resolved, go_on = threading.Event(), threading.Event()

    def hold():
        counting.on_resolve = lambda: None
        resolved.set()
        assert go_on.wait(10)

    counting.on_resolve = hold
    slow = asyncio.create_task(serve())
    await asyncio.to_thread(resolved.wait, 10)
    newer = publish()
    assert await serve() == 2
    go_on.set()
    assert await slow == 1
    await asyncio.wrap_future(loaded.unload(newer))
    assert await serve() == 2


async def test_a_version_that_left_memory_is_loaded_again(serve, loaded, loader, models, publish):
    version = publish()
    await serve()
    await asyncio.wrap_future(loaded.unload(version))
    assert await serve() == 1
    assert loader.loads == ["m/1", "m/1"]


async def test_deleted_version_is_not_found(serve, models, publish):
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


async def test_however_many_wait_for_a_load_other_models_are_loaded(serve, loader, publish):
    """There are two threads for loads."""
    publish("slow"), publish("other")
    loader.gate.clear()
    waiting = [asyncio.create_task(serve(ModelReference(name="slow"))) for _ in range(9)]
    await becomes(lambda: loader.loads == ["slow/1"])
    waiting.append(asyncio.create_task(serve(ModelReference(name="other"))))
    try:
        await becomes(lambda: loader.loads == ["slow/1", "other/1"])
    finally:
        loader.gate.set()
    assert await asyncio.gather(*waiting) == [1] * 10


async def test_all_who_wait_for_a_load_that_fails_are_told_and_the_next_tries_again(
    serve, loaded, loader, publish, monkeypatch
):
    asked, try_acquire = 0, loaded.try_acquire

    def counted_try_acquire(version):
        nonlocal asked
        asked += 1
        return try_acquire(version)

    monkeypatch.setattr(loaded, "try_acquire", counted_try_acquire)
    publish()
    loader.gate.clear()
    waiting = [asyncio.create_task(serve()) for _ in range(5)]
    # From there to the load it takes no other turn of the event loop.
    await becomes(lambda: asked == 5 and loader.began.is_set())
    loader.failures.append(ModelDamaged("not today"))
    loader.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [ModelDamaged] * 5
    assert await serve() == 1
    assert loader.loads == ["m/1", "m/1"]


async def test_the_version_before_serves_on_until_the_newer_one_is_warm(serve, loaded, loader, publish):
    publish()
    assert await serve() == 1
    publish()
    loader.gate.clear()
    try:
        assert [await asyncio.wait_for(serve(), 5) for _ in range(5)] == [1] * 5
        await becomes(lambda: loader.loads == ["m/1", "m/2"])
        assert await serve() == 1
    finally:
        loader.gate.set()
    await becomes(lambda: "m/2" in [model.reference for model in loaded.loaded()])
    assert [await serve() for _ in range(3)] == [2] * 3
    assert loader.loads == ["m/1", "m/2"], "it is loaded once, whoever asks meanwhile"


class Threadless(ThreadPoolExecutor):
    """An executor that cannot start a thread while `fails`, and says so as the real one does: by an error, though it
    keeps the work for a thread that it has."""

    def __init__(self):
        super().__init__(1)
        self.fails = False
        self.kept = []
        self.submit(lambda: None).result()

    def submit(self, *work):
        accepted = super().submit(*work)
        if self.fails:
            self.kept.append(accepted)
            raise RuntimeError("can't start new thread")
        return accepted


@pytest.fixture
def threadless():
    with Threadless() as executor:
        yield executor


async def test_a_load_that_cannot_begin_is_an_error_and_the_next_begins(
    counting, loaded, loader, executor, threadless, publish
):
    version = publish()
    access = ModelAccess(counting, loaded, executor, threadless)
    loader.gate.clear()
    threadless.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="thread"):
            await asyncio.wait_for(access.lease(LATEST), 10)
    threadless.fails = False
    loader.gate.set()
    for kept in threadless.kept:
        await asyncio.wrap_future(kept)
    lease = await asyncio.wait_for(access.lease(LATEST), 10)
    freed = loaded.unload(version)
    lease.release(executor)
    await asyncio.wait_for(asyncio.wrap_future(freed), 10)


async def test_the_version_before_serves_on_if_the_load_of_the_newer_one_cannot_begin(
    counting, loaded, executor, threadless, publish, caplog
):
    now_s = 0.0
    access = ModelAccess(counting, loaded, executor, threadless, clock=lambda: now_s)

    async def served():
        lease = await asyncio.wait_for(access.lease(LATEST), 10)
        lease.release(executor)
        return lease.version.version

    before = publish()
    assert await served() == 1
    newer = publish()
    threadless.fails = True
    assert await served() == 1
    assert "m/1 serves on: m/2 cannot be loaded: RuntimeError" in caplog.text
    threadless.fails = False
    await asyncio.wrap_future(threadless.kept[0])
    freed = [loaded.unload(version) for version in (newer, before)]
    for each in freed:
        await asyncio.wait_for(asyncio.wrap_future(each), 10)
    now_s += TRY_AGAIN_S
    assert await served() == 2


async def test_serving_model_keeps_its_slot_while_the_newer_one_loads(counting, loader, executor, loading, publish):
    loaded = LoadedModels(counting, loader, LoadingLimits(max_loaded_models=1))
    access = ModelAccess(counting, loaded, executor, loading)
    publish()
    (await access.lease(LATEST)).release(executor)
    publish()
    loader.gate.clear()
    for _ in range(20):
        lease = await asyncio.wait_for(access.lease(LATEST), 5)
        assert lease.version.version == 1
        lease.release(executor)
        await asyncio.sleep(0.002)
    loader.gate.set()
    await becomes(lambda: loader.open() == ["m/2"])
    assert loader.loads == ["m/1", "m/2"]


async def test_old_version_serves_on_if_the_newer_one_fails_to_load(
    counting, loaded, loader, executor, loading, publish, caplog
):
    now_s = 0.0
    access = ModelAccess(counting, loaded, executor, loading, clock=lambda: now_s)

    async def serve():
        lease = await access.lease(LATEST)
        lease.release(executor)
        await asyncio.sleep(0.005)
        return lease.version.version

    publish()
    assert await serve() == 1
    publish()
    loader.failures += [ModelDamaged("not today"), ModelDamaged("nor today")]
    for tries in (1, 2):
        assert await serve() == 1
        await becomes(lambda tries=tries: len(caplog.records) == tries)
        now_s += TRY_AGAIN_S - 1
        assert [await serve() for _ in range(5)] == [1] * 5
        assert len(loader.loads) == 1 + tries, "not at every request"
        now_s += 2
    assert await serve() == 1
    await becomes(lambda: loader.open() == ["m/1", "m/2"])
    assert await serve() == 2


async def test_deleted_or_unloaded_version_stops_serving(serve, models, loaded, publish):
    """Deleted by another process, that is: here it would leave memory."""
    publish()
    assert await serve() == 1
    publish()
    models.delete_version("m", 1)
    assert await serve() == 2
    publish()
    await asyncio.wrap_future(loaded.unload(models.resolve(ModelReference(name="m", version=2))))
    assert await serve() == 3


async def test_versions_never_go_back_for_a_caller(serve, loaded, models, publish):
    old, new = publish(), publish()
    assert await serve(ModelReference(name="m", version=1)) == 1
    assert await serve() == 2
    await asyncio.wrap_future(loaded.unload(new))
    assert loaded.is_loaded(old)
    assert await serve() == 2


async def test_an_alias_and_a_number_are_served_as_they_say(serve, models, publish):
    publish()
    models.set_alias("m", "production", 1)
    assert [await serve(), await serve(PRODUCTION)] == [1, 1]
    publish()
    models.set_alias("m", "production", 2)
    assert await serve(PRODUCTION) == 2
    publish()
    assert await serve(ModelReference(name="m", version=3)) == 3


async def test_a_lease_that_comes_just_when_its_caller_gives_up_is_given_back(
    counting, loaded, executor, loading, publish, monkeypatch
):
    version = publish()
    asked = asyncio.create_task(ModelAccess(counting, loaded, executor, loading).lease(LATEST))
    share = Lease.share

    def share_and_cancel(lease):
        asyncio.get_running_loop().call_soon(asked.cancel)
        return share(lease)

    monkeypatch.setattr(Lease, "share", share_and_cancel)
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert loaded.is_loaded(version)
    await asyncio.wait_for(asyncio.wrap_future(loaded.unload(version)), 5)


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


async def test_without_the_database_what_is_in_memory_serves_on(serve, counting, loaded, models, publish):
    version = publish()
    models.set_alias("m", "production", 1)
    for reference in (LATEST, PRODUCTION):
        assert await serve(reference) == 1
    counting.lost = True
    for reference in (LATEST, PRODUCTION) * 2:
        assert await serve(reference) == 1
    with pytest.raises(StoreUnavailable):
        await serve(ModelReference(name="other"))
    await asyncio.wrap_future(loaded.unload(version))
    with pytest.raises(StoreUnavailable):
        await serve()
    counting.lost = False
    publish()
    assert await serve() == 2


async def test_versions_that_are_out_of_memory_are_forgotten_with_the_next_change(
    serve, counting, loaded, models, publish
):
    resolved, resolve = [], models.resolve

    def watched_resolve(reference):
        version = resolve(reference)
        resolved.append(weakref.ref(version))
        return version

    counting.resolve = watched_resolve
    publish(), publish()
    for number in (1, 2):
        assert await serve(ModelReference(name="m", version=number)) == number
        await asyncio.wrap_future(loaded.unload(resolved[-1]()))
    publish("other")
    assert await serve(ModelReference(name="other")) == 1
    gc.collect()
    assert [version() is None for version in resolved] == [True, True, False]


async def test_deleted_version_stays_gone_without_the_database(serve, counting, models, publish):
    publish()
    assert await serve() == 1
    models.delete_version("m", 1)
    with pytest.raises(ModelNotFound):
        await serve()
    counting.lost = True
    with pytest.raises(StoreUnavailable):
        await serve()
