from pathlib import Path

import pytest

from ferryman_service.domain.training import DiskIsFull
from ferryman_service.training.files import Disk, disk_full_is_told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_names_the_folder(tmp_path):
    with pytest.raises(DiskIsFull, match=str(tmp_path)), disk_full_is_told(tmp_path):
        Disk().write(Path("/dev/full"), [b"x"])


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), disk_full_is_told(tmp_path):
        Disk().write(tmp_path / "nowhere" / "file", [b"x"])


def test_a_folder_is_removed_with_what_is_in_it_and_missing_ones_do_no_harm(tmp_path):
    disk = Disk()
    disk.make_folder(tmp_path / "a")
    disk.write(tmp_path / "a" / "file", [b"x", memoryview(b"y")])
    assert (tmp_path / "a" / "file").read_bytes() == b"xy"
    disk.rename(tmp_path / "a", tmp_path / "b")
    disk.sync(tmp_path)
    disk.remove(tmp_path / "b")
    disk.remove(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
