"""From trained weights to a model bundle: ONNX graphs of each compute type, embedding, subword model and manifest."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnx
from safetensors.torch import load_file

from ferryman_service.bundle.embedding import write_embedding, write_int8_embedding
from ferryman_service.bundle.manifest import (
    REORDER_FILE,
    SUBWORDS_FILE,
    WEIGHTS_FILE,
    Architecture,
    ManifestHeader,
    graph_files,
    seal,
    settle_int8,
)
from ferryman_service.domain.models import Int8Scores, ModelLineage
from ferryman_service.domain.recipe import Positions
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.training import TrainedModel
from ferryman_service.domain.translation import ComputeType, SearchOptions
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.session import TorchDecoder
from ferryman_service.model.transformer import Transformer
from ferryman_service.pipeline.translator import MicroBatchLimit, TextTranslator
from ferryman_service.search.beam import search
from ferryman_service.search.sentence import SentenceSearch
from ferryman_service.text.normalise import normalise
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.fp16 import Float16Products, device_decoder_graph, device_encoder_graph, reorder_graph
from ferryman_service.training.graphs import Float32Products, Weights, decoder_graph, encoder_graph, graph_weights
from ferryman_service.training.int8 import Int8Products, Ranges, measure_ranges
from ferryman_service.training.scoring import scoring_of


class OnnxExporter:
    """A ModelExporter."""

    def export(self, trained: TrainedModel, lineage: ModelLineage, bundle: Path) -> None:
        """Write the bundle into the empty folder `bundle`, every file fsynced. Raises OSError if the disk fails."""
        transformer = load_transformer(trained)
        config, max_length = transformer.config, trained.recipe.data.max_sentence_tokens
        weights = graph_weights(transformer)
        exact, int8 = Float32Products(weights), Int8Products(weights, calibrate(transformer, trained))
        for compute_type, products in ((ComputeType.FP32, exact), (ComputeType.INT8, int8)):
            encoder = encoder_graph(config, weights, products, max_length)
            _write_graphs(encoder, decoder_graph(config, weights, products), compute_type, bundle)
        write_fp16_graphs(config, weights, max_length, bundle)
        write_embedding(bundle, weights["embedding.weight"])
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

    def bleu(self, translations: Sequence[str], references: Sequence[str], target_language: str) -> float:
        """Return sacreBLEU (cased, with the language's tokenizer), 0 to 100."""
        return scoring_of(target_language).bleu_score(translations, references)

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
    subwords, limit = Subwords.load(trained.subwords), trained.recipe.data.max_sentence_tokens
    encoded = subwords.encode([normalise(sentence) for sentence in trained.check_sentences])
    sources = [(*ids, EOS) for ids in encoded if 0 < len(ids) < limit] or [(EOS,)]
    searches = [
        SentenceSearch(options=_GREEDY, min_length=0, max_length=min(2 * len(source) + 10, limit)) for source in sources
    ]
    found = search(TorchDecoder(transformer), sources, searches, lambda: None)
    pairs = [(source, hypotheses[0].tokens) for source, hypotheses in zip(sources, found, strict=True)]
    return measure_ranges(transformer, pairs)


_GREEDY: Final = SearchOptions(beam_size=1)


def write_fp16_graphs(config: TransformerConfig, weights: Weights, max_length: int, bundle: Path) -> None:
    """Write what translating on a GPU needs beside the embedding and the subwords."""
    products = Float16Products(weights)
    encoder = device_encoder_graph(config, weights, products, max_length)
    _write_graphs(encoder, device_decoder_graph(config, weights, products), ComputeType.FP16, bundle)
    _write(reorder_graph(), bundle / REORDER_FILE)


def _write_graphs(encoder: onnx.ModelProto, decoder: onnx.ModelProto, compute_type: ComputeType, bundle: Path) -> None:
    files = graph_files(compute_type)
    _write(encoder, bundle / files.encoder)
    _write(decoder, bundle / files.decoder)


def _write(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())
