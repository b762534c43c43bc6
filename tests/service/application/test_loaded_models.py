"""Models in memory: loaded once, never freed while leased, bounded, and swapped without a request that fails."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ferryman_service.application.loaded_models import LoadedModels, LoadingLimits
from ferryman_service.domain.errors import ModelDamaged, ModelNotFound, ModelTooLarge, ServerShuttingDown
from ferryman_service.domain.models import ModelReference
from ferryman_service.domain.translation import ComputeType
from tests.fakes.leases import leased
from tests.fakes.observers import FakeLoadObserver

LATEST = ModelReference(name="m")
PRODUCTION = ModelReference(name="m", alias="production")


@pytest.fixture
def make_loaded(models, loader):
    return lambda **limits: LoadedModels(models, loader, LoadingLimits(**limits))


def references(loaded):
    return [model.reference for model in loaded.loaded()]


def test_a_lease_loads_and_warms_up_once(make_loaded, publish, loader):
    loaded, version = make_loaded(), publish()
    assert references(loaded) == [] and not loaded.is_loaded(version)
    with loaded.lease(version) as first, loaded.lease(version) as second:
        assert first is second
        assert first.warmed_up
    with leased(loaded, LATEST) as (found, third):
        assert (found, third) == (version, first)
    assert loader.loads == ["m/1"]
    [model] = loaded.loaded()
    assert (model.reference, model.memory_bytes) == ("m/1", 100)
    assert model.load_time_ns > 0 and model.compute_type is ComputeType.FP32
    assert loaded.is_loaded(version) and not first.closed


def test_however_many_ask_at_once_it_is_loaded_once(make_loaded, publish, loader):
    loaded, version = make_loaded(), publish()
    loader.gate.clear()
    with ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(loaded.load, version) for _ in range(16)]
        assert loader.began.wait(10)
        assert loaded.loaded() == [], "what is being loaded is not in memory yet"
        loader.gate.set()
        assert {future.result().reference for future in asked} == {"m/1"}
    assert loader.loads == ["m/1"]


def test_a_load_holds_up_nobody_who_uses_another_version(make_loaded, publish, loader):
    loaded, old = make_loaded(), publish()
    loaded.load(old)
    new = publish()
    loader.gate.clear()
    loading = threading.Thread(target=loaded.load, args=[new])
    loading.start()
    try:
        loader.began.clear()
        with loaded.lease(old) as translator:
            assert translator.reference == "m/1"
        assert references(loaded) == ["m/1"]
    finally:
        loader.gate.set()
        loading.join()
    assert references(loaded) == ["m/1", "m/2"], "used after the other was asked for"


def test_a_failed_load_leaves_the_place_empty_for_the_next_caller(make_loaded, publish, loader):
    loaded, version = make_loaded(), publish()
    loader.failures = [ModelDamaged("not today"), MemoryError()]
    with pytest.raises(ModelDamaged, match="not today"):
        loaded.load(version)
    with pytest.raises(MemoryError):
        loaded.load(version)
    assert references(loaded) == []
    assert loaded.unload(version) is None
    with loaded.lease(version) as translator:
        assert translator.warmed_up
    assert loader.loads == ["m/1"] * 3


def test_a_warm_up_that_fails_is_a_failed_load(make_loaded, publish, loader):
    loaded, version = make_loaded(), publish()
    loader.warm_up_failures.append(MemoryError())
    with pytest.raises(MemoryError):
        loaded.load(version)
    assert loader.made[0].closed
    assert loaded.load(version).reference == "m/1"


def test_the_least_recently_used_leaves_first(make_loaded, publish, loader):
    loaded = make_loaded(max_loaded_models=2)
    first, second, third = publish("a"), publish("b"), publish("c")
    for version in (first, second, first, third):
        loaded.load(version)
    assert references(loaded) == ["c/1", "a/1"]
    assert loader.open() == ["a/1", "c/1"]


def test_the_memory_budget_bounds_what_is_kept(make_loaded, publish, loader):
    loaded = make_loaded(max_loaded_models=10, memory_bytes=250)
    versions = [publish(name) for name in "abc"]
    for version in versions:
        loaded.load(version)
    assert references(loaded) == ["c/1", "b/1"]
    loader.memory_bytes = 250
    loaded.load(versions[0])
    assert references(loaded) == ["a/1"], "one that fills the budget is alone"


def test_a_model_over_the_whole_budget_is_refused_and_disturbs_nobody(make_loaded, publish, loader):
    loaded = make_loaded(memory_bytes=250)
    loaded.load(publish("small"))
    loader.memory_bytes = 251
    large = publish("large")
    with pytest.raises(ModelTooLarge) as caught:
        loaded.load(large)
    assert dict(caught.value.metadata) == {"model": "large/1", "memory_bytes": "251", "budget_bytes": "250"}
    assert loader.made[1].closed
    assert references(loaded) == ["small/1"]


@pytest.mark.parametrize("limits", [{"max_loaded_models": 1}, {"max_loaded_models": 9, "memory_bytes": 150}])
def test_leased_model_is_not_freed_whatever_the_limits(make_loaded, publish, loader, limits):
    loaded = make_loaded(**limits)
    with loaded.lease(publish("a")) as first, loaded.lease(publish("b")) as second:
        assert not first.closed and not second.closed
        assert len(references(loaded)) == 2
    assert len(references(loaded)) == 1
    assert len(loader.open()) == 1


def test_unloading_waits_for_the_last_lease_and_takes_no_new_one(make_loaded, publish, loader):
    loaded, version = make_loaded(), publish()
    with loaded.lease(version) as old, loaded.lease(version):
        freed = loaded.unload(version)
        assert references(loaded) == []
        assert not freed.done() and not old.closed
        with loaded.lease(version) as new:
            assert new is not old, "who comes later gets a copy of its own"
        assert not old.closed
    assert freed.done() and old.closed and not new.closed
    assert loaded.unload(version).done()
    assert loaded.unload(version) is None
    assert loader.open() == []


def test_unloading_while_it_loads(make_loaded, publish, loader):
    loaded, version = make_loaded(), publish()
    loader.gate.clear()
    with ThreadPoolExecutor() as threads:
        loading = threads.submit(loaded.load, version)
        assert loader.began.wait(10)
        freed = loaded.unload(version)
        loader.gate.set()
        assert loading.result().reference == "m/1"
    freed.result(timeout=10)
    assert loader.open() == []


def test_the_memory_of_what_still_drains_counts(make_loaded, publish, loader):
    loaded = make_loaded(max_loaded_models=9, memory_bytes=250)
    a, b, c = publish("a"), publish("b"), publish("c")
    loaded.load(b)
    with loaded.lease(a):
        loaded.unload(a)
        loaded.load(c)
        assert references(loaded) == ["c/1"], "a drains, so b had to leave"


def test_the_caches_of_what_is_translated_count(make_loaded, publish, loader):
    loaded = make_loaded(max_loaded_models=9, memory_bytes=350)
    versions = [publish(name) for name in "abc"]
    for version in versions:
        loaded.load(version)
    idle, _, busy = loader.made
    with loaded.lease(versions[2]), loaded.lease(versions[2]):
        busy.cached_bytes = 50
        with loaded.lease(versions[2]):
            assert references(loaded) == ["c/1", "b/1", "a/1"]
        idle.cached_bytes = 1
        with loaded.lease(versions[2]):
            assert references(loaded) == ["c/1", "b/1", "a/1"]
            assert idle.cached_bytes == 0, "what is kept for nobody goes before any model does"
        busy.cached_bytes = 51
        with loaded.lease(versions[2]):
            assert references(loaded) == ["c/1", "b/1"]
        busy.cached_bytes = 1000
    assert references(loaded) == ["c/1"]
    assert loader.open() == ["c/1"], "with its last sentence a model's own caches go, not the model"
    assert busy.cached_bytes == 0


def test_closing_frees_all_and_refuses_new_leases(make_loaded, publish, loader):
    loaded, a, b = make_loaded(), publish("a"), publish("b")
    loaded.load(b)
    with loaded.lease(a) as translator:
        loaded.close()
        assert loader.open() == ["a/1"] and not translator.closed
        with pytest.raises(ServerShuttingDown):
            loaded.load(b)
    assert loader.open() == []


def test_a_lease_without_a_block(make_loaded, publish, loader):
    loaded, version = make_loaded(max_loaded_models=2), publish()
    assert loaded.try_acquire(version) is None, "it waits for no load"
    loaded.load(version)
    loaded.load(publish("a"))
    lease = loaded.try_acquire(version)
    assert (lease.version, lease.engine) == (version, loader.made[0])
    assert references(loaded) == ["m/1", "a/1"], "it counts as used"
    another = loaded.acquire(LATEST, version)
    freed = loaded.unload(version)
    with ThreadPoolExecutor() as threads:
        lease.release(threads)
        assert not freed.done()
        another.release(threads)
        freed.result(timeout=10)
    assert loader.open() == ["a/1"]


def test_a_version_that_is_gone_is_not_called_damaged(make_loaded, publish, models):
    loaded, version = make_loaded(), publish()
    models.delete_version("m", 1)
    with pytest.raises(ModelNotFound), loaded.lease(version):
        pass
    with pytest.raises(ModelNotFound), leased(loaded, LATEST):
        pass


@pytest.mark.parametrize("reference", [LATEST, PRODUCTION])
def test_a_name_that_moves_on_before_the_lease_is_resolved_again(make_loaded, publish, models, loader, reference):
    """The version is deleted after the reference was resolved and before its files are read."""
    loaded = make_loaded()
    publish(), publish()
    models.set_alias("m", "production", 2)
    loader.gate.clear()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(lambda: next(iter(_used(loaded, reference))))
        assert loader.began.wait(10)
        models.set_alias("m", "production", 1)
        models.delete_version("m", 2)
        loader.gate.set()
        assert asked.result(timeout=10) == ("m/1", "m/1")


def _used(loaded, reference):
    with leased(loaded, reference) as (version, translator):
        yield version.reference, translator.translate(["x"], None, None)[0][0].hypotheses[0].text


def test_a_reference_to_nothing_is_not_found(make_loaded, publish):
    loaded = make_loaded()
    publish()
    for reference in (ModelReference(name="m", version=2), PRODUCTION, ModelReference(name="n")):
        with pytest.raises(ModelNotFound), leased(loaded, reference):
            pass


@pytest.mark.parametrize("limits", [{"max_loaded_models": 1}, {"max_loaded_models": 9, "memory_bytes": 250}])
def test_no_request_fails_while_versions_are_swapped_unloaded_and_deleted(make_loaded, publish, models, loader, limits):
    """Callers by name and by alias never stop; meanwhile versions are published, the alias moves, old ones go."""
    loaded = make_loaded(**limits)
    publish()
    models.set_alias("m", "production", 1)
    stop, served = threading.Event(), {LATEST: set(), PRODUCTION: set()}

    def call(reference, seed):
        chance, last = random.Random(seed), 0
        while not stop.is_set():
            [(version, text)] = _used(loaded, reference)
            assert version == text
            number = int(version.partition("/")[2])
            assert number >= last, "nobody sees an older version after a newer one"
            last = number
            served[reference].add(number)
            time.sleep(chance.random() / 1000)

    with ThreadPoolExecutor(4) as threads:
        callers = [threads.submit(call, reference, seed) for reference in served for seed in range(2)]
        try:
            for number in range(2, 9):
                old, new = models.resolve(PRODUCTION), publish()
                if number % 2:
                    with loaded.lease(new):
                        models.set_alias("m", "production", number)
                else:
                    models.set_alias("m", "production", number)
                models.delete_version("m", old.version)
                loaded.unload(old)
                if number % 3 == 0:
                    loaded.unload(new)
                time.sleep(0.01)
        finally:
            stop.set()
        for caller in callers:
            caller.result(timeout=10)
    assert all(len(numbers) > 3 for numbers in served.values())
    assert len(loader.open()) <= limits["max_loaded_models"]
    assert set(loader.open()) <= {"m/8"}, "what was deleted is freed"
    loaded.close()
    assert loader.open() == []


@pytest.mark.parametrize("seed", range(3))
def test_random_leases_loads_and_unloads_keep_the_promises(make_loaded, publish, loader, seed):
    """Whatever the order: one copy is loaded at a time for a version, leases are open, limits hold in the end."""
    loaded = make_loaded(max_loaded_models=2, memory_bytes=250)
    versions = [publish(name) for name in "abcd"]

    def work(number):
        chance = random.Random(100 * seed + number)
        for _ in range(150):
            version = chance.choice(versions)
            match chance.randrange(4):
                case 0:
                    loaded.unload(version)
                case 1:
                    assert loaded.load(version).reference == version.reference
                case _:
                    with loaded.lease(version) as translator:
                        time.sleep(chance.random() / 5000)
                        assert translator.translate(["x"], None, None)

    with ThreadPoolExecutor(6) as threads:
        for future in [threads.submit(work, number) for number in range(6)]:
            future.result(timeout=60)
    assert loader.open() == sorted(references(loaded))
    assert len(references(loaded)) <= 2


def test_loads_and_their_failures_are_observed(models, loader, publish):
    observer = FakeLoadObserver()
    loaded = LoadedModels(models, loader, LoadingLimits(memory_bytes=1000), observer)
    version = publish()
    loader.failures = [ModelDamaged("not today")]
    loader.warm_up_failures = [MemoryError()]
    for error in (ModelDamaged, MemoryError):
        with pytest.raises(error):
            loaded.load(version)
    loader.memory_bytes = 1001
    with pytest.raises(ModelTooLarge):
        loaded.load(version)
    loader.memory_bytes = 100
    assert (observer.failures, observer.loads_s) == (3, [])
    loaded.load(version)
    loaded.load(version)
    [load_s] = observer.loads_s
    assert load_s > 0 and observer.failures == 3


def test_a_version_that_was_deleted_meanwhile_is_no_failure(models, loader, publish):
    observer = FakeLoadObserver()
    loaded = LoadedModels(models, loader, LoadingLimits(), observer)
    version = publish()
    models.delete_version(version.name, version.version)
    with pytest.raises(ModelNotFound):
        loaded.load(version)
    assert observer.failures == 0
