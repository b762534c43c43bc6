import json

import numpy as np
import pytest
import torch

from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.average import average_checkpoints
from ferryman_service.training.batches import make_batch
from ferryman_service.training.checkpoint import (
    CheckpointDamaged,
    Position,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.step import ScheduledRate, new_trainee, training_step

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
SCORES = ValidationScores(loss=2.5, nll_per_token=0.1 + 0.2, bleu=31.4, chrf=55.5, translated_pairs=3)


@pytest.fixture
def trained(small_recipe):
    """A trainee after one update."""
    torch.manual_seed(1)
    recipe = small_recipe()
    trainee = new_trainee(Transformer(TransformerConfig.from_recipe(recipe, 16)), recipe, RANKS)
    pairs = TokenPairs(TokenSide.from_sentences([[7, 8]]), TokenSide.from_sentences([[8, 7]]))
    batch = make_batch(pairs, np.array([0]))
    training_step(trainee, batch, batch.target_tokens)
    return trainee


def test_a_checkpoint_gives_back_every_bit(tmp_path, trained, small_recipe):
    position = Position(step=1, epoch=3, updates_in_epoch=7, best=SCORES, best_step=1, validations_since_best=2)
    path = save_checkpoint(tmp_path, trained.model, trained.optimizer, position)
    recipe = small_recipe()
    other = new_trainee(Transformer(TransformerConfig.from_recipe(recipe, 16)), recipe, RANKS)
    assert load_checkpoint(path, other.model, other.optimizer) == position
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], weight)
    for mine, theirs in zip(trained.model.parameters(), other.model.parameters(), strict=True):
        for key, value in trained.optimizer.state[mine].items():
            assert torch.equal(other.optimizer.state[theirs][key], value)
    ScheduledRate(other.optimizer, recipe.schedule, position.step)
    assert other.optimizer.param_groups[0]["lr"] == trained.optimizer.param_groups[0]["lr"]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lambda path: path.unlink()])
@pytest.mark.parametrize(
    "name", ["weights.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "position.json", "manifest.json"]
)
def test_damage_is_seen_and_nothing_is_loaded(tmp_path, trained, damage, name):
    path = save_checkpoint(tmp_path, trained.model, trained.optimizer, Position(step=1))
    before = trained.model.embedding.weight.clone()
    with torch.no_grad():
        trained.model.embedding.weight.add_(1.0)
    damage(path / name)
    with pytest.raises(CheckpointDamaged):
        load_checkpoint(path, trained.model, trained.optimizer)
    assert torch.equal(trained.model.embedding.weight, before + 1.0)


def test_a_checkpoint_that_was_not_finished_is_invisible(tmp_path, trained):
    path = save_checkpoint(tmp_path, trained.model, trained.optimizer, Position(step=1))
    path.rename(tmp_path / f"partial-{path.name}")
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(save_checkpoint(tmp_path, trained.model, trained.optimizer, Position(step=1)).parent) == [
        path
    ]
    assert not (tmp_path / f"partial-{path.name}").exists()


def test_a_failed_write_leaves_no_checkpoint(tmp_path, trained):
    (tmp_path / "partial-step-0000000001").write_bytes(b"in the way")
    with pytest.raises(OSError, match="partial-step"):
        save_checkpoint(tmp_path, trained.model, trained.optimizer, Position(step=1))
    assert list_checkpoints(tmp_path) == []


def test_the_last_ones_and_the_best_are_kept(tmp_path, trained):
    for step in (5, 10, 15, 20, 100):
        save_checkpoint(tmp_path, trained.model, trained.optimizer, Position(step=step))
    prune_checkpoints(tmp_path, keep_last=2, best_step=10)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-0000000010",
        "step-0000000020",
        "step-0000000100",
    ]


def test_the_average_is_the_mean_of_the_weights(tmp_path, trained):
    weight = trained.model.embedding.weight
    values = []
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, trained.model, trained.optimizer, Position(step=step))
        values.append(weight.detach().clone())
        with torch.no_grad():
            weight.mul_(-1.7)
    average = average_checkpoints(list_checkpoints(tmp_path))
    assert average.keys() == trained.model.state_dict().keys()
    assert average["embedding.weight"].dtype == torch.float32
    expected = (values[0].double() + values[1].double() + values[2].double()) / 3
    assert torch.equal(average["embedding.weight"], expected.float())


def test_the_files_are_safetensors_and_json(tmp_path, trained):
    path = save_checkpoint(tmp_path, trained.model, trained.optimizer, Position(step=1))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert json.loads((path / "position.json").read_bytes())["step"] == 1
    assert load_weights(path).keys() == trained.model.state_dict().keys()
