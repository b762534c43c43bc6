"""Graphs are examined before they are loaded: every kind that export writes passes."""

import dataclasses
import math
from collections import defaultdict

import pytest

from ferryman_service.bundle.graph_check import check_graphs
from ferryman_service.bundle.manifest import (
    FORMAT_VERSION,
    REORDER_FILE,
    Architecture,
    FileDigest,
    Manifest,
    graph_files,
)
from ferryman_service.bundle.onnx_graph import read_graph
from ferryman_service.bundle.sizes import NetworkSize
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions, resolve_recipe
from ferryman_service.domain.translation import ComputeType
from ferryman_service.training.export import write_fp16_graphs
from ferryman_service.training.graphs import Float32Products, decoder_graph, encoder_graph, graph_weights
from ferryman_service.training.int8 import Int8Products
from tests.fakes.bundles import HEADER
from tests.fakes.random_network import random_network

LONGEST = 64


def write_graphs(folder, vocabulary_size, **network):
    """Write the graphs of all compute types; return a manifest that names them."""
    transformer = random_network(vocabulary_size, **network)
    config, weights = transformer.config, graph_weights(transformer)
    names = [REORDER_FILE]
    for compute_type, products in (
        (ComputeType.FP32, Float32Products(weights)),
        (ComputeType.INT8, Int8Products(weights, defaultdict(lambda: 1.0))),
    ):
        files = graph_files(compute_type)
        encoder = encoder_graph(config, weights, products, LONGEST)
        (folder / files.encoder).write_bytes(encoder.SerializeToString())
        (folder / files.decoder).write_bytes(decoder_graph(config, weights, products).SerializeToString())
    write_fp16_graphs(config, weights, LONGEST, folder)
    names += [name for compute_type in ComputeType for name in vars(graph_files(compute_type)).values()]
    kind = {"norm": config.norm, "activation": config.activation, "positions": config.positions}
    shape = {
        name: getattr(config, name) for name in ("d_model", "encoder_layers", "decoder_layers", "heads", "ffn_dim")
    }
    header = dataclasses.replace(
        HEADER,
        lineage=dataclasses.replace(HEADER.lineage, recipe=resolve_recipe({"model": {**shape, **kind}})),
        max_sentence_tokens=LONGEST,
        architecture=Architecture(
            d_model=config.d_model,
            decoder_layers=config.decoder_layers,
            heads=config.heads,
            vocabulary_size=vocabulary_size,
            rotates=config.positions is Positions.ROPE,
        ),
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        header=header,
        files={name: FileDigest(sha256="", size_bytes=0) for name in names},
    )


def matrix_numbers(path):
    """Return how many numbers the matrices of a graph have."""
    constants = read_graph(memoryview(path.read_bytes())).constants.values()
    return sum(math.prod(constant.dims) for constant in constants if len(constant.dims) == 2)


@pytest.mark.parametrize("vocabulary_size", [120, 2404])
@pytest.mark.parametrize(
    "network",
    [
        {"norm": NormPlacement.POST, "activation": Activation.RELU},
        {"norm": NormPlacement.PRE, "activation": Activation.SWIGLU, "positions": Positions.ROPE, "encoder_layers": 3},
        {"norm": NormPlacement.DEEP, "activation": Activation.GELU, "decoder_layers": 1},
        {"norm": NormPlacement.DEEP, "d_model": 36, "heads": 3, "positions": Positions.ROPE},
        {"norm": NormPlacement.PRE, "d_model": 16, "heads": 16, "encoder_layers": 12, "decoder_layers": 12},
    ],
    ids=["post relu", "pre swiglu rope", "deep gelu", "heads of 12", "heads of 1"],
)
def test_every_kind_of_export_passes(tmp_path, vocabulary_size, network):
    manifest = write_graphs(tmp_path, vocabulary_size, **network)
    check_graphs(tmp_path, manifest)
    size = NetworkSize(
        network=manifest.header.lineage.recipe.model, vocabulary_size=vocabulary_size, max_sentence_tokens=LONGEST
    )
    for compute_type in ComputeType:
        files = graph_files(compute_type)
        assert matrix_numbers(tmp_path / files.encoder) <= size.encoder
        assert matrix_numbers(tmp_path / files.decoder) <= size.decoder
