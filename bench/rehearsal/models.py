"""Two versions of a model whose translations differ: `python -m bench.rehearsal.models FOLDER` writes their bundles.

They are small and have random weights, for a rehearsal is about who answers, not about what the answer says.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from bench.rehearsal.texts import sentences_of
from ferryman_service.bundle.manifest import SUBWORDS_FILE, WEIGHTS_FILE
from ferryman_service.domain.models import ModelLineage, ModelScores, PublishedWeights
from ferryman_service.domain.recipe import Recipe, resolve_recipe
from ferryman_service.domain.training import TrainedModel
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.text.subwords import train_subwords
from ferryman_service.training.export import OnnxExporter

VERSIONS: Final = (1, 2)
_RECIPE: Final[dict[str, Any]] = {
    "model": {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "heads": 4, "ffn_dim": 128},
    "data": {"vocabulary_size": 60, "max_sentence_tokens": 128},
}


def write_bundle(folder: Path, seed: int, check_sentences: Sequence[str]) -> None:
    """Write the bundle of the model that the seed gives into a folder, which is made."""
    recipe = resolve_recipe(_RECIPE)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as parts:
        subwords, weights = Path(parts) / SUBWORDS_FILE, Path(parts) / WEIGHTS_FILE
        train_subwords(
            check_sentences,
            subwords,
            vocabulary_size=recipe.data.vocabulary_size,
            algorithm=recipe.data.subword_algorithm,
            character_coverage=recipe.data.character_coverage,
            seed=seed,
        )
        trained = TrainedModel(
            weights=weights,
            subwords=subwords,
            recipe=recipe,
            scores=ModelScores(bleu=0.0, chrf=0.0, nll_per_token=0.0, weights=PublishedWeights.CHECKPOINT, step=0),
            parameters=_write_weights(recipe, weights, seed),
            check_sentences=check_sentences[:16],
        )
        OnnxExporter().export(trained, _lineage(recipe), folder)


def _write_weights(recipe: Recipe, path: Path, seed: int) -> int:
    """Write random weights, sharpened so that few choices are close to a tie; return how many there are."""
    torch.manual_seed(seed)
    transformer = Transformer(TransformerConfig.from_recipe(recipe, recipe.data.vocabulary_size))
    with torch.no_grad():
        transformer.embedding.weight *= 2
    save_file(transformer.state_dict(), path)
    return sum(parameter.numel() for parameter in transformer.parameters())


def _lineage(recipe: Recipe) -> ModelLineage:
    return ModelLineage(
        run_id="run_0000000000000000000000",
        corpus_id="cor_0000000000000000000000",
        corpus_digest="00" * 32,
        source_language="xx",
        target_language="yy",
        recipe=recipe,
    )


def main() -> None:
    """Write both versions' bundles into FOLDER/1 and FOLDER/2."""
    torch.set_num_threads(1)
    check_sentences = sentences_of(random.Random(0), 300)
    for version in VERSIONS:
        write_bundle(Path(sys.argv[1]) / str(version), version, check_sentences)


if __name__ == "__main__":
    main()
