"""Made-up text and untrained models, for benchmarks that need no data."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from examples.parallel_text import ParallelLines
from ferryman_service.domain.models import ModelLineage, ModelScores, PublishedWeights
from ferryman_service.domain.recipe import Recipe

NO_SCORES: Final = ModelScores(bleu=0.0, chrf=0.0, nll_per_token=0.0, weights=PublishedWeights.CHECKPOINT, step=0)
_WORDS: Final = 9_000
_SEED: Final = 1


def untrained_lineage(recipe: Recipe, source_language: str = "en", target_language: str = "de") -> ModelLineage:
    """Return the lineage of a model that no run has trained."""
    return ModelLineage(
        run_id="run_0000000000000000000000",
        corpus_id="cor_0000000000000000000000",
        corpus_digest="00" * 32,
        source_language=source_language,
        target_language=target_language,
        recipe=recipe,
    )


def write_untrained_weights(recipe: Recipe, path: Path, *, seed: int = _SEED, sharpened: bool = False) -> int:
    """Write weights as training would start with them; return how many there are.

    `sharpened` doubles the embedding, so that few choices of a search are close to a tie.
    """
    import torch  # slow to import, and not every benchmark needs it
    from safetensors.torch import save_file

    from ferryman_service.model.config import TransformerConfig
    from ferryman_service.model.transformer import Transformer

    torch.manual_seed(seed)
    transformer = Transformer(TransformerConfig.from_recipe(recipe, recipe.data.vocabulary_size))
    if sharpened:
        with torch.no_grad():
            transformer.embedding.weight *= 2
    save_file(transformer.state_dict(), path)
    return sum(weight.numel() for weight in transformer.parameters())


def made_up_text(pairs: int) -> ParallelLines:
    """Return sentences of made-up words, as long as captions are, whose translations are other words in their order."""
    generator = random.Random(_SEED)
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvwz" for vowel in "aeiou"]
    lexicon = [
        tuple("".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(2)) for _ in range(_WORDS)
    ]
    frequencies = [1 / (rank + 10) for rank in range(_WORDS)]
    sentences = [
        generator.choices(lexicon, frequencies, k=min(40, max(3, round(generator.gauss(12, 4))))) for _ in range(pairs)
    ]
    source, target = ([" ".join(word[side] for word in words) for words in sentences] for side in (0, 1))
    return ParallelLines(source=source, target=target)
