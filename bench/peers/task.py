"""The training task of every peer in `make bench-training-cpu`, and of the plain loop in `make bench-quality`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ferryman_service.domain.recipe import Precision, Preset, Recipe, SubwordAlgorithm, resolve_recipe
from ferryman_service.domain.tokens import EOS
from ferryman_service.training.pairs import TokenPairs, TokenSide

VOCABULARY = 10_000
DROPOUT = {Preset.TINY: 0.3, Preset.BASE: 0.1}

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class PeerTask:
    """A model and how it is trained. Post-norm unless `norm_first`, ReLU, one shared embedding, dropout on embeddings
    and sublayers, Adam.

    `max_tokens` bounds a peer's batch: sentences times the longest of them, on the longer side.
    """

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    ffn_dim: int
    dropout: float
    vocabulary: int
    label_smoothing: float
    clip_norm: float
    max_tokens: int
    norm_first: bool = False


def recipe_of(preset: Preset, batch_target_tokens: int, precision: Precision = Precision.FP32) -> Recipe:
    """Return our recipe: the preset with 10,000 BPE subwords and without an end."""
    return resolve_recipe(
        {
            "preset": preset,
            "model": {"dropout": DROPOUT[preset]},
            "data": {"vocabulary_size": VOCABULARY, "subword_algorithm": SubwordAlgorithm.BPE},
            "optimization": {"batch_target_tokens": batch_target_tokens, "precision": precision},
            "stop": {"max_steps": 10**9},
            "validation": {"interval_steps": 10**9},
        }
    )


def task_of(recipe: Recipe, max_tokens: int) -> PeerTask:
    """Return the same task for the peers."""
    model, optimization = recipe.model, recipe.optimization
    return PeerTask(
        d_model=model.d_model,
        encoder_layers=model.encoder_layers,
        decoder_layers=model.decoder_layers,
        heads=model.heads,
        ffn_dim=model.ffn_dim,
        dropout=model.dropout,
        vocabulary=recipe.data.vocabulary_size,
        label_smoothing=optimization.label_smoothing,
        clip_norm=optimization.clip_norm,
        max_tokens=max_tokens,
    )


def write_ids(pairs: TokenPairs, folder: Path, split: str = "train") -> None:
    """Write each sentence as a line of token ids, without its end symbol."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("source", "target"):
        side: TokenSide = getattr(pairs, name)
        lines = (" ".join(map(str, side.sentence(index)[:-1])) for index in range(len(pairs)))
        (folder / f"{split}.{name}").write_text("".join(f"{line}\n" for line in lines))


def read_ids(folder: Path, split: str = "train") -> list[Pair]:
    """Return the pairs that `write_ids` wrote, end symbols added."""
    sides = ((folder / f"{split}.{side}").read_text().splitlines() for side in ("source", "target"))
    return [([*map(int, x.split()), EOS], [*map(int, y.split()), EOS]) for x, y in zip(*sides, strict=True)]
