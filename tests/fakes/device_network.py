"""Random networks as graphs in the form for a GPU, opened on a CPU."""

from __future__ import annotations

from pathlib import Path

from ferryman_service.bundle.embedding import write_embedding
from ferryman_service.bundle.manifest import REORDER_FILE, Architecture, graph_files
from ferryman_service.domain.recipe import Positions
from ferryman_service.domain.translation import ComputeType
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.fp16 import Float16Products, device_decoder_graph, device_encoder_graph, reorder_graph
from ferryman_service.training.graphs import graph_weights
from ferryman_service.translation.device_model import DeviceModel
from ferryman_service.translation.onnx_model import OnnxConfig
from tests.fakes.random_network import LONGEST_SOURCE


def open_device_graphs(folder: Path, transformer: Transformer, element_type: str) -> DeviceModel:
    """Write the network's graphs and embedding into the folder and load them; `element_type` float32 is for tests
    alone."""
    config, weights, files = transformer.config, graph_weights(transformer), graph_files(ComputeType.FP16)
    products = Float16Products(weights)
    products.element_type = element_type
    encoder = device_encoder_graph(config, weights, products, LONGEST_SOURCE)
    (folder / files.encoder).write_bytes(encoder.SerializeToString())
    (folder / files.decoder).write_bytes(device_decoder_graph(config, weights, products).SerializeToString())
    (folder / REORDER_FILE).write_bytes(reorder_graph().SerializeToString())
    write_embedding(folder, weights["embedding.weight"])
    architecture = Architecture(
        d_model=config.d_model,
        decoder_layers=config.decoder_layers,
        heads=config.heads,
        vocabulary_size=config.vocabulary_size,
        rotates=config.positions is Positions.ROPE,
    )
    return DeviceModel.load(folder, architecture, OnnxConfig(compute_type=ComputeType.FP16))
