import hashlib
import json

import numpy as np
import pytest
import torch

from ferryman_service.domain.recipe import Averaging
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.average import average_checkpoints
from ferryman_service.training.batches import make_batch
from ferryman_service.training.checkpoint import (
    Checkpoint,
    CheckpointDamaged,
    Position,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from ferryman_service.training.files import Disk
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.resume import newest_usable
from ferryman_service.training.retention import prune_checkpoints, with_candidate
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.step import new_trainee

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
SCORES = ValidationScores(loss=2.5, nll_per_token=0.1 + 0.2, bleu=31.4, chrf=55.5, translated_pairs=3)


@pytest.fixture
def trained(small_recipe):
    """A trainee after one update."""
    torch.manual_seed(1)
    recipe = small_recipe(optimization={"ema_decay": 0.9})
    trainee = new_trainee(Transformer(TransformerConfig.from_recipe(recipe, 16)), recipe, RANKS)
    pairs = TokenPairs(TokenSide.from_sentences([[7, 8]]), TokenSide.from_sentences([[8, 7]]))
    batch = make_batch(pairs, np.array([0]))
    trainee.step([batch], batch.target_tokens)
    return trainee


def save(folder, trainee, position):
    return save_checkpoint(folder, Checkpoint(trainee.tensors(), trainee.counters(), position), Disk())


def test_checkpoint_gives_back_every_bit(tmp_path, trained, small_recipe):
    position = Position(
        step=1,
        epoch=3,
        updates_in_epoch=7,
        validated=SCORES,
        best=SCORES,
        best_step=1,
        validations_since_best=2,
        candidates=((1, (31.4, -0.3)),),
        reports=9,
        elapsed_s=1.5,
        validation_s=0.25,
    )
    checkpoint = load_checkpoint(save(tmp_path, trained, position))
    assert checkpoint.position == position
    recipe = small_recipe(optimization={"ema_decay": 0.9})
    other = new_trainee(Transformer(TransformerConfig.from_recipe(recipe, 16)), recipe, RANKS)
    other.load(checkpoint.tensors, checkpoint.counters)
    assert other.counters() == trained.counters()
    assert trained.tensors().keys() == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    for group, tensors in trained.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(other.tensors()[group][name], tensor), (group, name)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lambda path: path.unlink()])
@pytest.mark.parametrize(
    "name",
    [
        "weights.safetensors",
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "ema.safetensors",
        "position.json",
        "manifest.json",
    ],
)
def test_damaged_checkpoint_is_refused(tmp_path, trained, damage, name):
    path = save(tmp_path, trained, Position(step=1))
    damage(path / name)
    with pytest.raises(CheckpointDamaged):
        load_checkpoint(path)


def test_checkpoint_of_a_newer_release_gives_way_to_the_one_before(tmp_path, trained):
    before = save(tmp_path, trained, Position(step=1))
    path = save(tmp_path, trained, Position(step=2))
    position = json.loads((path / "position.json").read_bytes())
    (path / "position.json").write_text(json.dumps(position | {"news": 1}))
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["sha256"]["position.json"] = hashlib.sha256((path / "position.json").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamaged, match="another release"):
        load_checkpoint(path)
    found, [damage] = newest_usable(tmp_path)
    assert found == before
    assert str(path) in damage


def test_unfinished_checkpoint_is_invisible(tmp_path, trained):
    path = save(tmp_path, trained, Position(step=1))
    path.rename(tmp_path / f"partial-{path.name}")
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(save(tmp_path, trained, Position(step=1)).parent) == [path]
    assert not (tmp_path / f"partial-{path.name}").exists()


def test_a_failed_write_leaves_no_checkpoint(tmp_path, trained):
    (tmp_path / "partial-step-0000000001").write_bytes(b"in the way")
    with pytest.raises(OSError, match="partial-step"):
        save(tmp_path, trained, Position(step=1))
    assert list_checkpoints(tmp_path) == []


def kept_after(tmp_path, trained, recipe, scores):
    """Return the steps of the checkpoints that are left after one for each score, every tenth step."""
    position = Position()
    for step, score in enumerate(scores, 1):
        best = position.best_step if position.best_step and scores[position.best_step - 1] >= score else step
        candidates = with_candidate(position.candidates, step, (score,), recipe)
        position = Position(step=step, best_step=best, candidates=candidates)
        save(tmp_path, trained, position)
        prune_checkpoints(tmp_path, position, Disk())
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)]


@pytest.mark.parametrize(
    ("averaging", "kept"),
    [(Averaging.LAST, [2, 4, 5, 6]), (Averaging.BEST, [1, 2, 4, 5, 6]), (Averaging.NONE, [2, 4, 5, 6])],
)
def test_candidates_best_and_newest_two_are_kept(tmp_path, trained, small_recipe, averaging, kept):
    recipe = small_recipe(validation={"keep_last": 3, "averaging": averaging}).validation
    assert kept_after(tmp_path, trained, recipe, [8.0, 9.0, 1.0, 7.0, 2.0, 3.0]) == kept


def test_the_average_is_the_mean_of_the_weights(tmp_path, trained):
    weight = trained.model.embedding.weight
    values = []
    for step in (1, 2, 3):
        save(tmp_path, trained, Position(step=step))
        values.append(weight.detach().clone())
        with torch.no_grad():
            weight.mul_(-1.7)
    for path in list_checkpoints(tmp_path):
        (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"ema.', '"other.'))
    average = average_checkpoints(list_checkpoints(tmp_path))
    assert average.keys() == trained.model.state_dict().keys()
    assert average["embedding.weight"].dtype == torch.float32
    expected = (values[0].double() + values[1].double() + values[2].double()) / 3
    assert torch.equal(average["embedding.weight"], expected.float())


def test_the_files_are_safetensors_and_json(tmp_path, trained):
    path = save(tmp_path, trained, Position(step=1))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((path / "position.json").read_bytes())["step"] == 1
    assert load_weights(path).keys() == trained.model.state_dict().keys()
