"""What /metrics tells of the decoding engines."""

from ferryman_service.observability.definitions import ROWS
from ferryman_service.observability.engine import SIZES, EngineCollector
from ferryman_service.translation.cache_memory import CacheMemory
from ferryman_service.translation.counts import ROW_BOUNDS, EngineCounts
from ferryman_service.translation.lane import Size


def test_steps_rows_and_caches(registry, sample):
    counts = EngineCounts(CacheMemory(4000))
    EngineCollector(registry, counts)
    assert sample("ferryman_engine_steps_total") == 0
    assert sample("ferryman_engine_step_rows_count") == 0
    for rows in (1, 4, 5, 2000):
        counts.step(rows)
    counts.watch(FakeEngine())
    counts.memory.change(500)
    assert sample("ferryman_engine_steps_total") == 4
    assert sample("ferryman_engine_step_rows_count") == 4
    assert sample("ferryman_engine_step_rows_sum") == 2010
    buckets = {le: sample("ferryman_engine_step_rows_bucket", le=le) for le in ("1.0", "2.0", "5.0", "1280.0", "+Inf")}
    assert buckets == {"1.0": 1, "2.0": 1, "5.0": 3, "1280.0": 3, "+Inf": 4}
    assert sample("ferryman_engine_cache_bytes") == 300
    assert sample("ferryman_engine_cache_booked_bytes") == 500
    assert sample("ferryman_engine_cache_limit_bytes") == 4000
    assert [sample("ferryman_engine_waiting_sentences", size=size) for size in SIZES] == [0, 7, 0]


class FakeEngine:
    """Implements counts.Watched."""

    def cache_bytes(self):
        return 300

    def waiting(self):
        return {"large": 7}


def test_engine_bounds_and_sizes_are_those_exported():
    assert ROW_BOUNDS == ROWS
    assert tuple(size.name.lower() for size in Size) == SIZES
