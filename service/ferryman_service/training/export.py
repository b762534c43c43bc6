"""From trained weights to a model bundle: ONNX graphs in float32 and in int8, embedding, subword model and manifest."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnx
from sacrebleu.metrics.bleu import BLEU
from safetensors.torch import load_file

from ferryman_service.bundle.embedding import write_embedding, write_int8_embedding
from ferryman_service.bundle.manifest import (
    DECODER_FILE,
    DECODER_INT8_FILE,
    ENCODER_FILE,
    ENCODER_INT8_FILE,
    SUBWORDS_FILE,
    WEIGHTS_FILE,
    Architecture,
    ManifestHeader,
    seal,
    settle_int8,
)
from ferryman_service.domain.models import Int8Scores, ModelLineage
from ferryman_service.domain.recipe import Positions
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.training import TrainedModel
from ferryman_service.domain.translation import SearchOptions
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.session import TorchDecoder
from ferryman_service.model.transformer import Transformer
from ferryman_service.pipeline.translator import MicroBatchLimit, TextTranslator
from ferryman_service.search.beam import search
from ferryman_service.search.sentence import SentenceSearch
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.graphs import (
    Float32Products,
    Products,
    Weights,
    decoder_graph,
    encoder_graph,
    graph_weights,
)
from ferryman_service.training.int8 import Int8Products, Ranges, measure_ranges


class OnnxExporter:
    """A ModelExporter."""

    def export(self, trained: TrainedModel, lineage: ModelLineage, bundle: Path) -> None:
        """Write the bundle into the empty folder `bundle`, every file fsynced. Raises OSError if the disk fails."""
        transformer = load_transformer(trained)
        config, max_length = transformer.config, trained.recipe.data.max_sentence_tokens
        weights = graph_weights(transformer)
        _write_graphs(config, weights, Float32Products(weights), max_length, bundle, (ENCODER_FILE, DECODER_FILE))
        write_embedding(bundle, weights["embedding.weight"])
        int8 = Int8Products(weights, calibrate(transformer, trained))
        _write_graphs(config, weights, int8, max_length, bundle, (ENCODER_INT8_FILE, DECODER_INT8_FILE))
        write_int8_embedding(bundle, weights["embedding.weight"])
        shutil.copyfile(trained.subwords, bundle / SUBWORDS_FILE)
        shutil.copyfile(trained.weights, bundle / WEIGHTS_FILE)
        header = ManifestHeader(
            lineage=lineage,
            scores=trained.scores,
            parameters=trained.parameters,
            max_sentence_tokens=max_length,
            architecture=Architecture(
                d_model=config.d_model,
                decoder_layers=config.decoder_layers,
                heads=config.heads,
                vocabulary_size=config.vocabulary_size,
                rotates=config.positions is Positions.ROPE,
            ),
        )
        seal(bundle, header)

    def bleu(self, translations: Sequence[str], references: Sequence[str]) -> float:
        """Return sacreBLEU (cased, 13a), 0 to 100."""
        return float(BLEU().corpus_score(list(translations), [list(references)]).score)

    def settle_int8(self, bundle: Path, scores: Int8Scores, *, keep: bool) -> None:
        """Write into an exported bundle what its int8 graphs cost, and remove them unless they are kept."""
        settle_int8(bundle, scores, keep=keep)

    def reference(self, trained: TrainedModel) -> TextTranslator:
        """Return a translator that runs the trained weights in PyTorch, on the CPU."""
        return TextTranslator(
            Subwords.load(trained.subwords),
            TorchDecoder(load_transformer(trained)),
            trained.recipe.data.max_sentence_tokens,
            MicroBatchLimit(),
        )


def load_transformer(trained: TrainedModel) -> Transformer:
    """Return the trained network on the CPU, in evaluation mode."""
    config = TransformerConfig.from_recipe(trained.recipe, Subwords.load(trained.subwords).size)
    transformer = Transformer(config)
    transformer.load_state_dict(load_file(trained.weights))
    return transformer.eval()


def calibrate(transformer: Transformer, trained: TrainedModel) -> Ranges:
    """Return the ranges of the products' inputs while the held-out sentences are translated greedily."""
    subwords = Subwords.load(trained.subwords)
    sources = [(*ids, EOS) for ids in subwords.encode(list(trained.check_sentences)) if ids]
    sources = sources or [(EOS,)]
    limit = trained.recipe.data.max_sentence_tokens
    searches = [
        SentenceSearch(options=_GREEDY, min_length=0, max_length=min(2 * len(source) + 10, limit)) for source in sources
    ]
    found = search(TorchDecoder(transformer), sources, searches, lambda: None)
    pairs = [(source, hypotheses[0].tokens) for source, hypotheses in zip(sources, found, strict=True)]
    return measure_ranges(transformer, pairs)


_GREEDY: Final = SearchOptions(beam_size=1)


def _write_graphs(
    config: TransformerConfig,
    weights: Weights,
    products: Products,
    max_length: int,
    bundle: Path,
    names: Sequence[str],
) -> None:
    encoder, decoder = names
    _write(encoder_graph(config, weights, products, max_length), bundle / encoder)
    _write(decoder_graph(config, weights, products), bundle / decoder)


def _write(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())
