"""What /metrics tells of the models in memory."""

from ferryman_service.domain.models import LoadedModel
from ferryman_service.domain.translation import ComputeType
from ferryman_service.observability.models import LoadedModelsCollector, LoadMetrics


def loaded_model(reference, memory_bytes=100):
    return LoadedModel(reference=reference, memory_bytes=memory_bytes, load_time_ns=1, compute_type=ComputeType.INT8)


def test_labels_are_there_as_long_as_the_model_is(registry, sample):
    there = [loaded_model("en-de/7", 500), loaded_model("en-fr/1")]
    LoadedModelsCollector(registry, lambda: there)
    assert sample("ferryman_model_loaded_info", model="en-de", version="7", compute_type="int8") == 1
    assert sample("ferryman_model_memory_bytes", model="en-de", version="7") == 500
    assert sample("ferryman_model_memory_bytes", model="en-fr", version="1") == 100
    del there[0]
    assert sample("ferryman_model_loaded_info", model="en-de", version="7", compute_type="int8") is None
    assert sample("ferryman_model_memory_bytes", model="en-de", version="7") is None
    there.clear()
    assert [s for family in registry.collect() for s in family.samples] == []


def test_loads(registry, sample):
    metrics = LoadMetrics(registry)
    assert sample("ferryman_model_load_failures_total") == 0
    metrics.loaded(0.75)
    metrics.failed()
    assert sample("ferryman_model_load_seconds_count") == 1
    assert sample("ferryman_model_load_seconds_bucket", le="1.0") == 1
    assert sample("ferryman_model_load_seconds_bucket", le="0.5") == 0
    assert sample("ferryman_model_load_failures_total") == 1
