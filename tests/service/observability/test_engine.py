"""What /metrics tells of the decoding engines."""

from ferryman_service.observability.definitions import ROWS
from ferryman_service.observability.engine import EngineCollector
from ferryman_service.translation.counts import ROW_BOUNDS, EngineCounts


def test_steps_rows_and_caches(registry, sample):
    counts = EngineCounts()
    EngineCollector(registry, counts)
    assert sample("ferryman_engine_steps_total") == 0
    assert sample("ferryman_engine_step_rows_count") == 0
    for rows in (1, 4, 5, 2000):
        counts.step(rows)
    counts.watch(lambda: 300)
    assert sample("ferryman_engine_steps_total") == 4
    assert sample("ferryman_engine_step_rows_count") == 4
    assert sample("ferryman_engine_step_rows_sum") == 2010
    buckets = {le: sample("ferryman_engine_step_rows_bucket", le=le) for le in ("1.0", "2.0", "5.0", "1280.0", "+Inf")}
    assert buckets == {"1.0": 1, "2.0": 1, "5.0": 3, "1280.0": 3, "+Inf": 4}
    assert sample("ferryman_engine_cache_bytes") == 300


def test_the_engine_counts_by_the_bounds_that_are_exported():
    assert ROW_BOUNDS == ROWS
