"""A trained model nobody trained: random weights, real subwords, real files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ferryman_service.domain.models import ModelLineage, ModelScores, PublishedWeights
from ferryman_service.domain.recipe import Recipe, SubwordAlgorithm, resolve_recipe
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.training import TrainedModel
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.text.subwords import train_subwords

SYLLABLES = ["ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu"]


def random_sentences(count: int, seed: int, max_words: int = 12) -> list[str]:
    """Return sentences of a language of syllables, deterministic by seed."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(8 * count)]
    return [" ".join(generator.choices(words, k=generator.randint(1, max_words))) for _ in range(count)]


def small_recipe(**model: Any) -> Recipe:
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "heads": 4, "ffn_dim": 48}
    data = {"vocabulary_size": 120, "max_sentence_tokens": 64}
    return resolve_recipe({"model": {**shape, **model}, "data": data})


def random_trained_model(folder: Path, recipe: Recipe, seed: int = 0) -> TrainedModel:
    """Write weights and subwords into `folder`. The weights are sharpened, so that few choices are close to a tie, and
    lean towards the end symbol, so that translations end."""
    subwords = train_subwords(
        random_sentences(400, seed=1),
        folder / "subwords.model",
        vocabulary_size=recipe.data.vocabulary_size,
        algorithm=SubwordAlgorithm.UNIGRAM,
        character_coverage=1.0,
        seed=1,
    )
    torch.manual_seed(seed)
    transformer = Transformer(TransformerConfig.from_recipe(recipe, subwords.size))
    with torch.no_grad():
        transformer.embedding.weight *= 2
        end = transformer.embedding.weight[EOS]
        norm = transformer.get_submodule(f"decoder_layers.{recipe.model.decoder_layers - 1}.feed_forward_residual.norm")
        assert isinstance(norm, torch.nn.LayerNorm)
        norm.bias += 3.0 * end / end.norm() ** 2
    save_file(transformer.state_dict(), folder / "weights.safetensors")
    return TrainedModel(
        weights=folder / "weights.safetensors",
        subwords=folder / "subwords.model",
        recipe=recipe,
        scores=ModelScores(bleu=12.5, chrf=30.25, nll_per_token=3.5, weights=PublishedWeights.CHECKPOINT, step=100),
        parameters=sum(parameter.numel() for parameter in transformer.parameters()),
        check_sentences=random_sentences(20, seed=2),
    )


def some_lineage(recipe: Recipe) -> ModelLineage:
    return ModelLineage(
        run_id="run_0000000000000000000000",
        corpus_id="cor_0000000000000000000000",
        corpus_digest="00" * 32,
        source_language="en",
        target_language="de",
        recipe=recipe,
    )
