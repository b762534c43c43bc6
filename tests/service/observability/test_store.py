"""What /metrics tells of the database."""

import pytest

from ferryman_service.domain.errors import StoreUnavailable
from ferryman_service.observability.store import StoreMetrics
from ferryman_service.stores.database import writing
from tests.fakes.databases import open_migrated


def test_a_locked_database_is_counted(registry, sample, tmp_path):
    database = open_migrated(tmp_path / "ferryman.db", 0.01, StoreMetrics(registry).failed)
    assert sample("ferryman_store_errors_total") == 0
    with writing(database), pytest.raises(StoreUnavailable), writing(database):
        pass
    assert sample("ferryman_store_errors_total") == 1
    database.dispose()


def test_damage_is_shown_while_it_is_known(registry, sample):
    damage = [""]
    StoreMetrics(registry).watch_damage(lambda: damage[0])
    assert sample("ferryman_database_damaged") == 0
    damage[0] = "a page"
    assert sample("ferryman_database_damaged") == 1


def test_lag(registry, sample):
    StoreMetrics(registry).lagged(3.0)
    assert sample("ferryman_store_lag_seconds_sum") == 3
    assert sample("ferryman_store_lag_seconds_bucket", le="2.5") == 0
    assert sample("ferryman_store_lag_seconds_bucket", le="5.0") == 1
