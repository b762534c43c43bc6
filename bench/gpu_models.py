"""The models of the GPU serving benchmark: random weights, and subwords that are made up, so that no text is needed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from ferryman_service.bundle.manifest import SUBWORDS_FILE, WEIGHTS_FILE
from ferryman_service.domain.models import ModelLineage, ModelScores, PublishedWeights
from ferryman_service.domain.recipe import Recipe, resolve_recipe
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.training import TrainedModel
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.export import OnnxExporter

SPECIAL: Final = ("<pad>", "<unk>", "<s>", "</s>")
_MEAN_OF_LOGARITHMS: Final = 3.144  # a mean of 27 subwords
_SIGMA: Final = 0.55
_LONGEST: Final = 120
_SEED: Final = 1


def base_recipe(vocabulary_size: int) -> Recipe:
    """Return the preset that speed is measured of."""
    return resolve_recipe({"preset": "base", "data": {"vocabulary_size": vocabulary_size}})


def small_recipe(vocabulary_size: int, **model: str) -> Recipe:
    """Return a network for checks, and for trying the program."""
    shape = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "heads": 4, "ffn_dim": 128, **model}
    return resolve_recipe({"model": shape, "data": {"vocabulary_size": vocabulary_size}})


def random_bundle(folder: Path, recipe: Recipe) -> Path:
    """Return a bundle of random weights, making it if it is not there. They are sharpened, so that few choices are
    close to a tie."""
    bundle, parts = folder / "bundle", folder / "parts"
    if bundle.exists():
        return bundle
    parts.mkdir(parents=True, exist_ok=True)
    write_subwords(parts / SUBWORDS_FILE, recipe.data.vocabulary_size)
    torch.manual_seed(_SEED)
    transformer = Transformer(TransformerConfig.from_recipe(recipe, recipe.data.vocabulary_size))
    with torch.no_grad():
        transformer.embedding.weight *= 2
    save_file(transformer.state_dict(), parts / WEIGHTS_FILE)
    trained = TrainedModel(
        weights=parts / WEIGHTS_FILE,
        subwords=parts / SUBWORDS_FILE,
        recipe=recipe,
        scores=ModelScores(bleu=0.0, chrf=0.0, nll_per_token=0.0, weights=PublishedWeights.CHECKPOINT, step=0),
        parameters=sum(weight.numel() for weight in transformer.parameters()),
        check_sentences=["w4 w5"],
    )
    lineage = ModelLineage(
        run_id="run_0000000000000000000000",
        corpus_id="cor_0000000000000000000000",
        corpus_digest="00" * 32,
        source_language="en",
        target_language="de",
        recipe=recipe,
    )
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    OnnxExporter().export(trained, lineage, partial)
    return partial.rename(bundle)


def write_subwords(path: Path, vocabulary_size: int) -> None:
    """Write a vocabulary of so many words that mean nothing."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    kinds = model.SentencePiece.CONTROL, model.SentencePiece.UNKNOWN, model.SentencePiece.NORMAL
    for token in range(vocabulary_size):
        piece = model.pieces.add()
        piece.piece = SPECIAL[token] if token < len(SPECIAL) else f"\u2581w{token}"
        piece.score = -1.0
        piece.type = kinds[1 if token == 1 else 0 if token < len(SPECIAL) else 2]
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.pad_id, model.trainer_spec.unk_id = 0, 1
    model.trainer_spec.bos_id, model.trainer_spec.eos_id = 2, 3
    model.normalizer_spec.add_dummy_prefix = True
    path.write_bytes(model.SerializeToString())


def random_sources(count: int, vocabulary_size: int, seed: int = _SEED) -> Sequence[tuple[int, ...]]:
    """Return sentences of random subwords with the end symbol; log-normal lengths, about those of news."""
    generator = random.Random(seed)
    lengths = (
        min(_LONGEST, max(2, round(generator.lognormvariate(_MEAN_OF_LOGARITHMS, _SIGMA)))) for _ in range(count)
    )
    return [(*(generator.randrange(EOS + 1, vocabulary_size) for _ in range(length - 1)), EOS) for length in lengths]
