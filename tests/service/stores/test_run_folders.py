"""What a run keeps beside its records."""

import json

import pytest

from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.stores.run_folders import FileRunFolders

SCORES = {"loss": 2.5, "nll_per_token": 1.5, "bleu": 31.5, "chrf": 55.25, "translated_pairs": 3}


@pytest.fixture
def folders(folder):
    return FileRunFolders(folder)


@pytest.fixture
def leave(folder):
    """Leave a checkpoint whose position is an object, or any text; return its folder."""

    def write(run_id, step, position):
        path = folder.run_dir(run_id) / "checkpoints" / f"step-{step:010}"
        path.mkdir(parents=True)
        (path / "weights.safetensors").write_bytes(b"x" * 1000)
        text = position if isinstance(position, str) else json.dumps({"step": step, "epoch": 2, **position})
        (path / "position.json").write_text(text)
        return path

    return write


def test_a_run_without_a_folder_has_no_checkpoints(folders):
    run_id = new_id(RUN_PREFIX)
    assert (folders.checkpoints(run_id), folders.last_checkpoint(run_id)) == ([], None)


def test_checkpoints_by_rising_step(folders, leave):
    run_id = new_id(RUN_PREFIX)
    newest = leave(run_id, 30, {"best_step": 10, "validated": None})
    leave(run_id, 10, {"best_step": 10, "validated": SCORES})
    best, other = folders.checkpoints(run_id)
    assert (best.step, best.epoch, best.is_best) == (10, 2, True)
    assert (best.bleu, best.chrf, best.nll_per_token, best.translated_pairs) == (31.5, 55.25, 1.5, 3)
    assert best.size_bytes > 1000
    assert (other.step, other.is_best, other.bleu) == (30, False, None)
    assert folders.last_checkpoint(run_id) == newest


def test_a_checkpoint_of_the_release_before_has_no_scores(folders, leave):
    run_id = new_id(RUN_PREFIX)
    leave(run_id, 10, {"updates_in_epoch": 1, "best": SCORES, "best_step": 10, "validations_since_best": 0})
    [found] = folders.checkpoints(run_id)
    assert (found.step, found.epoch, found.is_best) == (10, 2, True)
    assert (found.bleu, found.chrf, found.nll_per_token, found.translated_pairs) == (None, None, None, None)


@pytest.mark.parametrize(
    "position",
    [
        "",
        "{",
        "\x00" * 40,
        "[]",
        "null",
        '"step"',
        "{}",
        '{"step": null, "epoch": 1, "best_step": 1}',
        '{"step": "many", "epoch": 1, "best_step": 1}',
        {"validated": None},
        {"best_step": 1, "validated": 7},
        {"best_step": 1, "validated": {"bleu": "good"}},
    ],
)
def test_a_damaged_checkpoint_is_left_out(folders, leave, position):
    run_id = new_id(RUN_PREFIX)
    leave(run_id, 10, {"best_step": 10, "validated": SCORES})
    leave(run_id, 20, position)
    [found] = folders.checkpoints(run_id)
    assert (found.step, found.is_best) == (10, True)


def test_checkpoint_without_position_is_left_out(folders, leave):
    run_id = new_id(RUN_PREFIX)
    path = leave(run_id, 10, "")
    (path / "position.json").unlink()
    (path.parent / "step-0000000020").write_text("no folder")
    assert folders.checkpoints(run_id) == []
