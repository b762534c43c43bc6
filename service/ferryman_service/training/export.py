"""From trained weights to a model bundle: two ONNX graphs, the subword model and a manifest."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim

from ferryman_service.bundle import graph_io
from ferryman_service.bundle.manifest import (
    DECODER_FILE,
    ENCODER_FILE,
    SUBWORDS_FILE,
    WEIGHTS_FILE,
    Architecture,
    ManifestHeader,
    seal,
)
from ferryman_service.domain.models import ModelLineage
from ferryman_service.domain.training import TrainedModel
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.graphs import DecoderGraph, EncoderGraph
from ferryman_service.model.session import TorchDecoder
from ferryman_service.model.transformer import Transformer
from ferryman_service.pipeline.translator import MicroBatchLimit, TextTranslator
from ferryman_service.text.subwords import Subwords

OPSET_VERSION: Final = 20
PRODUCER: Final = "ferryman"

_DYNAMIC: Final = Dim.DYNAMIC


class OnnxExporter:
    """A ModelExporter."""

    def export(self, trained: TrainedModel, lineage: ModelLineage, bundle: Path) -> None:
        """Write the bundle into the empty folder `bundle`, every file fsynced. Raises OSError if the disk fails."""
        transformer = load_transformer(trained)
        config, max_length = transformer.config, trained.recipe.data.max_sentence_tokens
        _write(export_encoder(transformer, max_length), bundle / ENCODER_FILE)
        _write(export_decoder(transformer), bundle / DECODER_FILE)
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
            ),
        )
        seal(bundle, header)

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


def export_encoder(transformer: Transformer, max_length: int) -> onnx.ModelProto:
    """Return the encoder graph for sources of at most `max_length` tokens; bundle/graph_io.py says what it takes."""
    layers = transformer.config.decoder_layers
    return _export(
        EncoderGraph(transformer, max_length),
        arguments=(torch.ones(2, 3, dtype=torch.int64),),
        dynamic_shapes=({0: _DYNAMIC, 1: _DYNAMIC},),
        inputs=[graph_io.SOURCE],
        outputs=[graph_io.BIAS, *graph_io.keys_values_names("cross", layers)],
    )


def export_decoder(transformer: Transformer) -> onnx.ModelProto:
    """Return the graph of one decoder step; bundle/graph_io.py says what it takes."""
    config = transformer.config
    layers = config.decoder_layers
    cross, past, present = (graph_io.keys_values_names(kind, layers) for kind in ("cross", "past", "present"))
    keys_values = {0: _DYNAMIC, 3: _DYNAMIC}, {0: _DYNAMIC, 2: _DYNAMIC}
    model = _export(
        DecoderGraph(transformer, graph_io.MAX_TARGET_LENGTH),
        arguments=_example_step(config),
        dynamic_shapes=(
            {0: _DYNAMIC, 1: _DYNAMIC},
            {0: _DYNAMIC, 1: _DYNAMIC},
            {},
            {0: _DYNAMIC, 3: _DYNAMIC},
            [*keys_values] * layers,
            [{0: _DYNAMIC, 2: _DYNAMIC}] * (2 * layers),
        ),
        inputs=[graph_io.STEP_INPUT, graph_io.PARENT, graph_io.POSITION, graph_io.BIAS, *cross, *past],
        outputs=[graph_io.LOG_PROBS, *present],
    )
    return _with_top_k(model)


def _example_step(config: TransformerConfig) -> tuple[Any, ...]:
    """Return arguments of DecoderGraph: all sizes differ and no tensor is given twice, else the export merges them."""
    sentences, width, past_rows, source_length, past_length = 2, 3, 4, 7, 5
    heads, head_dim = config.heads, config.head_dim
    keys, values = (heads, head_dim, source_length), (heads, source_length, head_dim)
    return (
        torch.ones(sentences, width, dtype=torch.int64),
        torch.zeros(sentences, width, dtype=torch.int64),
        torch.tensor([past_length]),
        torch.zeros(sentences, 1, 1, source_length),
        [torch.zeros(sentences, *shape) for _ in range(config.decoder_layers) for shape in (keys, values)],
        [torch.zeros(past_rows, heads, past_length, head_dim) for _ in range(2 * config.decoder_layers)],
    )


def _export(
    module: nn.Module,
    *,
    arguments: tuple[Tensor | Sequence[Tensor], ...],
    dynamic_shapes: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about torch's own use of its tree library
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET_VERSION,
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    model: onnx.ModelProto = program.model_proto
    _describe(model)
    return model


def _describe(model: onnx.ModelProto) -> None:
    """Name the producer, and forget where in whose source tree each node came from."""
    model.producer_name, model.producer_version = PRODUCER, torch.__version__
    del model.metadata_props[:], model.graph.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]


def _with_top_k(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its k best tokens in the place of all log-probabilities.

    Torch fixes k when it exports; ONNX takes it as an input. Its TopK orders equal values by the smaller index.
    """
    graph = model.graph
    all_log_probs = "all_log_probs"
    for node in graph.node:
        node.output[:] = [all_log_probs if name == graph_io.LOG_PROBS else name for name in node.output]
    graph.input.append(helper.make_tensor_value_info(graph_io.K, TensorProto.INT64, [1]))
    best = [graph_io.LOG_PROBS, graph_io.TOKENS]
    graph.node.append(helper.make_node("TopK", [all_log_probs, graph_io.K], best, axis=-1, largest=1, sorted=1))
    present = list(graph.output)[1:]
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(graph_io.LOG_PROBS, TensorProto.FLOAT, ["rows", "candidates"]))
    graph.output.append(helper.make_tensor_value_info(graph_io.TOKENS, TensorProto.INT64, ["rows", "candidates"]))
    graph.output.extend(present)
    onnx.checker.check_model(model)
    return model


def _write(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())
