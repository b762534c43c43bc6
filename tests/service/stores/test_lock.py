"""The lock on the data folder is on a file, whatever its path leads to later."""

import errno
import os
import shutil

import pytest

from ferryman_service.stores.lock import FolderInUse, FolderLock


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "data").mkdir()
    lock = FolderLock(tmp_path / "data" / "lock")
    lock.acquire()
    yield lock
    lock.release()


def test_folder_that_is_away_is_not_held_and_not_lost(lock, tmp_path):
    assert (lock.is_held(), lock.is_lost()) == (True, False)
    (tmp_path / "data").rename(tmp_path / "away")
    assert (lock.is_held(), lock.is_lost()) == (False, False)
    (tmp_path / "data").mkdir()  # as where a file system was mounted
    assert (lock.is_held(), lock.is_lost()) == (False, False)
    (tmp_path / "data").rmdir()
    (tmp_path / "away").rename(tmp_path / "data")
    assert (lock.is_held(), lock.is_lost()) == (True, False)
    with pytest.raises(FolderInUse):
        FolderLock(tmp_path / "data" / "lock").acquire()


def test_folder_of_a_file_server_that_has_made_it_anew_is_lost(lock, monkeypatch):
    def stale(descriptor):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        answers = lock.is_held(), lock.is_lost()
    assert answers == (False, True)


def test_folder_that_is_removed_is_lost(lock, tmp_path):
    shutil.rmtree(tmp_path / "data")
    assert (lock.is_held(), lock.is_lost()) == (False, True)


def test_folder_with_another_lock_is_lost(lock, tmp_path):
    (tmp_path / "data").rename(tmp_path / "away")
    (tmp_path / "data").mkdir()
    other = FolderLock(tmp_path / "data" / "lock")
    other.acquire()
    assert (lock.is_held(), lock.is_lost()) == (False, True)
    assert (other.is_held(), other.is_lost()) == (True, False)
    other.release()
    assert (other.is_held(), other.is_lost()) == (False, False)
