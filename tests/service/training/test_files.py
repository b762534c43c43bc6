from pathlib import Path

import pytest

from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.training.files import RunFiles, disk_full_is_a_failure, write_durably


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_a_failure_that_names_the_folder(tmp_path):
    with pytest.raises(TrainingFailed, match=str(tmp_path)) as caught, disk_full_is_a_failure(tmp_path):
        write_durably(Path("/dev/full"), b"x")
    assert caught.value.reason is FailureReason.DISK_FULL


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), disk_full_is_a_failure(tmp_path):
        write_durably(tmp_path / "nowhere" / "file", b"x")


def test_a_new_attempt_removes_what_the_last_one_left_and_nothing_else(tmp_path):
    files = RunFiles(tmp_path)
    files.start_afresh()
    (files.checkpoints / "step-0000000001").mkdir()
    files.pairs.mkdir()
    files.weights.write_bytes(b"old")
    files.subwords.write_bytes(b"old")
    (tmp_path / "worker.log").write_text("log")
    files.start_afresh()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "worker.log"]
