"""What /metrics tells of the process and of where it lives."""

import importlib.metadata

from ferryman_service.observability.process import DataFolderCollector, HealthCollector, tell_build


def test_build(registry, sample):
    tell_build(registry, {"translation", "training"})
    version = importlib.metadata.version("ferryman")
    assert sample("ferryman_build_info", version=version, roles="training,translation") == 1


def test_health_is_read_when_it_is_asked_for(registry, sample):
    serving = {"": True, "ferryman.v1.TranslationService": False}
    HealthCollector(registry, lambda: serving)
    assert sample("ferryman_health_serving", service="overall") == 1
    assert sample("ferryman_health_serving", service="ferryman.v1.TranslationService") == 0
    serving[""] = False
    assert sample("ferryman_health_serving", service="overall") == 0


def test_the_disk_of_the_data_folder(registry, sample, tmp_path):
    DataFolderCollector(registry, tmp_path)
    assert 0 < sample("ferryman_data_free_bytes") <= sample("ferryman_data_size_bytes")


def test_a_folder_that_cannot_be_asked_spoils_nothing_else(registry, sample, tmp_path):
    DataFolderCollector(registry, tmp_path / "gone")
    tell_build(registry, ())
    assert sample("ferryman_data_free_bytes") is None
    assert sum(len(family.samples) for family in registry.collect()) == 1
