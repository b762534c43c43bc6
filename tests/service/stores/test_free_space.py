"""The low-water mark of the disk."""

import os

import pytest

from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.errors import DiskFull
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.free_space import DiskSpace, FreeSpace
from ferryman_service.stores.models import FileModelStore
from tests.fakes.bundles import write_bundle

MIB, GIB = 2**20, 2**30
HEADER = CorpusHeader(display_name="", source_language="en", target_language="de")
FAR_TOO_MUCH_MIB = 2**30


class ScriptedSpace(FreeSpace):
    """A disk whose free room is what the test says."""

    def __init__(self, free_bytes, mark_bytes=10 * MIB):
        self.free_bytes, self.mark_bytes = free_bytes, mark_bytes
        self._was_low = False

    def look(self):
        return DiskSpace(free_bytes=self.free_bytes, mark_bytes=self.mark_bytes)


@pytest.mark.parametrize(
    ("disk_bytes", "mark_bytes"),
    [(GIB, GIB // 20), (40 * GIB, 2 * GIB), (1000 * GIB, 2 * GIB), (64 * MIB, 64 * MIB // 20)],
)
def test_the_default_mark_is_a_twentieth_of_the_disk_and_2_gib_at_most(disk_bytes, mark_bytes, monkeypatch, tmp_path):
    found = list(os.statvfs(tmp_path))
    found[1], found[2] = 1, disk_bytes  # f_frsize, f_blocks
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(found))
    assert FreeSpace(tmp_path).look().mark_bytes == mark_bytes
    assert FreeSpace(tmp_path, min_free_mib=7).look().mark_bytes == 7 * MIB


def test_upload_past_the_mark_is_refused_with_its_numbers():
    space = ScriptedSpace(100 * MIB)
    space.require(90 * MIB)
    with pytest.raises(DiskFull, match=r"100 MiB free and must keep 10 after writing 91: delete runs") as caught:
        space.require(90 * MIB + 1)
    assert caught.value.metadata == {"free_mib": "100", "min_free_mib": "10"}


def test_the_log_tells_once_that_the_mark_was_passed(caplog):
    space = ScriptedSpace(MIB)
    caplog.set_level("INFO")
    assert [space.has_room(), space.has_room()] == [False, False]
    space.free_bytes = GIB
    assert [space.has_room(), space.has_room()] == [True, True]
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "uploads, imports and new runs are refused",
        "the disk of the data folder has room again",
    ]


def test_uploads_and_imports_stop_at_the_mark(database, folder, tmp_path):
    low = FreeSpace(folder.root, FAR_TOO_MUCH_MIB)
    with pytest.raises(DiskFull, match="min-free-mib"):
        FileCorpusStore(database, folder, CorpusLimits(), low).begin_upload(HEADER, "")
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(DiskFull):
        FileModelStore(database, folder, low, examine=lambda bundle: None).import_bundle(bundle, "m")
    assert list(folder.incoming.iterdir()) == list(folder.imports.iterdir()) == []


def test_an_upload_that_passes_the_mark_on_its_way_is_refused_and_leaves_nothing(database, folder):
    """Before another message, and before the check, which writes the text once more."""
    space = ScriptedSpace(10 * MIB)
    store = FileCorpusStore(database, folder, CorpusLimits(), space)
    pairs = [SentencePair(source="a", target="b")]
    upload = store.begin_upload(HEADER, "")
    for split in Split:
        upload.add_pairs(split, pairs)
    with pytest.raises(DiskFull):
        upload.finish()
    upload = store.begin_upload(HEADER, "")
    space.free_bytes = 0
    with pytest.raises(DiskFull):
        upload.add_pairs(Split.TRAIN, pairs)
    upload.abort()
    assert list(folder.incoming.iterdir()) == []
