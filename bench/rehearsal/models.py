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

from bench.rehearsal.texts import sentences_of
from bench.shared.made_up import NO_SCORES, untrained_lineage, write_untrained_weights
from ferryman_service.bundle.manifest import SUBWORDS_FILE, WEIGHTS_FILE
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.training import TrainedModel
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
            scores=NO_SCORES,
            parameters=write_untrained_weights(recipe, weights, seed=seed, sharpened=True),
            check_sentences=check_sentences[:16],
        )
        OnnxExporter().export(trained, untrained_lineage(recipe, "xx", "yy"), folder)


def main() -> None:
    """Write both versions' bundles into FOLDER/1 and FOLDER/2."""
    torch.set_num_threads(1)
    check_sentences = sentences_of(random.Random(0), 300)
    for version in VERSIONS:
        write_bundle(Path(sys.argv[1]) / str(version), version, check_sentences)


if __name__ == "__main__":
    main()
