"""The data folder."""

import os
import stat
import threading

import pytest

from ferryman_service.domain.ids import CORPUS_PREFIX, RUN_PREFIX, new_id
from ferryman_service.stores.folders import HeldFolder, remove_abandoned
from ferryman_service.stores.layout import DataFolder


@pytest.mark.parametrize("text", ["", "..", "../x", "run_1", "/etc", "a/b", ".staging"])
def test_invalid_name_never_becomes_a_path(folder, text):
    for path_of in (folder.corpus_dir, folder.run_dir, folder.staging_dir):
        with pytest.raises(AssertionError):
            path_of(text)
    if text != "run_1":
        with pytest.raises(AssertionError):
            folder.bundle_dir(text, 1)


def test_an_id_of_another_kind_is_not_a_name(folder):
    with pytest.raises(AssertionError):
        folder.run_dir(new_id(CORPUS_PREFIX))
    with pytest.raises(AssertionError):
        folder.bundle_dir("en-de", 0)


def test_paths(folder):
    run_id = new_id(RUN_PREFIX)
    assert folder.worker_log(run_id, 2) == folder.root / "runs" / run_id / "worker-2.log"
    assert folder.bundle_dir("en-de", 7) == folder.root / "models" / "en-de" / "7"


def test_a_folder_that_cannot_be_made_is_told_with_the_option_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"{tmp_path}/file cannot be used: .*Not a directory; give --data-dir"):
        DataFolder(tmp_path / "file").create()


def test_unwritable_data_folder_is_refused(folder, monkeypatch):
    folder.create()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match=r"cannot be used: .*Permission denied; give --data-dir"):
        folder.create()


def test_the_key_is_made_once_whoever_comes_first_and_is_secret(folder):
    keys = []
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait()
        keys.append(folder.page_token_key())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32
    (path,) = folder.root.glob("page-token.key*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("size", [0, 31, 33])
def test_key_of_wrong_length_is_refused(folder, size):
    (folder.root / "page-token.key").write_bytes(bytes(size))
    with pytest.raises(OSError, match=rf"page-token.key has {size} bytes, must have 32: remove it"):
        folder.page_token_key()


def test_only_folders_that_nobody_holds_are_abandoned(tmp_path):
    held = HeldFolder(tmp_path)
    (held.path / "file").write_text("in use")
    (tmp_path / ("0" * 32)).mkdir()
    foreign = [tmp_path / "backup", tmp_path / ".nfs0001", tmp_path / ("1" * 32)]
    foreign[0].mkdir()
    for path in foreign[1:]:
        path.touch()
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {held.path, *foreign}
    held.release()
    held.release()
    assert set(tmp_path.iterdir()) == set(foreign)
