"""The graphs for a GPU: what they take, and that nothing in them is for a CPU."""

import numpy as np
import onnx
import onnxruntime
import pytest

from ferryman_service.bundle import graph_io
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.training.fp16 import Float16Products, device_decoder_graph, device_encoder_graph, reorder_graph
from ferryman_service.training.graphs import decoder_graph, encoder_graph, graph_weights
from tests.fakes.random_network import random_network

KINDS = {
    "post": {},
    "pre": {"positions": Positions.ROPE, "norm": NormPlacement.PRE, "activation": Activation.SWIGLU},
    "gelu": {"activation": Activation.GELU},
}
ON_THE_CPU = {graph_io.SHAPE, graph_io.K, graph_io.TOTAL_LENGTH}
ROUNDING = 4e-3
ASKS_FOR_SHAPES = {"Shape", "Size", "NonZero", "Range", "If", "Loop", "Scan"}


@pytest.fixture(scope="module", params=KINDS)
def graphs(request):
    network = random_network(121, **KINDS[request.param])
    weights = graph_weights(network)
    products = Float16Products(weights)
    return network, [
        device_encoder_graph(network.config, weights, products, 64),
        device_decoder_graph(network.config, weights, products),
    ]


def test_no_node_asks_for_a_shape(graphs):
    for model in graphs[1]:
        assert not ASKS_FOR_SHAPES & {node.op_type for node in model.graph.node}


def test_cpu_inputs_feed_only_shapes_and_counts(graphs):
    takes = {"Reshape": 1, "TopK": 1, "GroupQueryAttention": 6}
    for model in graphs[1]:
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                assert name not in ON_THE_CPU or takes[node.op_type] == place


def test_matrices_keys_and_values_have_sixteen_bits(graphs):
    network, models = graphs
    stored = [weight for model in models for weight in model.graph.initializer if len(weight.dims) == 2]
    assert {weight.data_type for weight in stored} == {onnx.TensorProto.FLOAT16}
    parameters = sum(weight.numel() for weight in network.parameters() if weight.dim() == 2)
    padding = 7 * network.config.d_model
    rotations = 0
    if network.config.positions is Positions.ROPE:
        rotations = (64 + graph_io.MAX_TARGET_LENGTH) * network.config.head_dim
    assert sum(int(np.prod(weight.dims)) for weight in stored) == parameters + padding + rotations
    for value in (*models[0].graph.output, *models[1].graph.input, *models[1].graph.output):
        is_kept = "_keys_" in value.name or "_values_" in value.name or value.name == graph_io.ATTENTION
        assert (value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16) == is_kept, value.name


def test_the_form_for_a_gpu_gives_the_numbers_of_that_for_a_cpu():
    """The two forms differ in operators alone, and so in roundings."""
    network = random_network(121)
    weights = graph_weights(network)
    products = Float16Products(weights)
    x_SLD = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    inputs = {graph_io.EMBEDDED: x_SLD, graph_io.SOURCE_LENGTHS: np.array([5, 3], np.int32)}
    found = []
    for graph, more in (
        (encoder_graph(network.config, weights, products, 64), {}),
        (device_encoder_graph(network.config, weights, products, 64), {graph_io.SHAPE: np.array([2, 5, 32])}),
    ):
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, {**inputs, **more}))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == np.float16
        np.testing.assert_allclose(one[0], other[0], atol=ROUNDING)
        np.testing.assert_allclose(one[1, :, :3], other[1, :, :3], atol=ROUNDING)
    decoders = [graph(network.config, weights, products) for graph in (decoder_graph, device_decoder_graph)]
    names = [{value.name for value in decoder.graph.input} for decoder in decoders]
    assert names[1] - names[0] == {graph_io.SHAPE, graph_io.SOURCE_POSITIONS}


def test_items_are_moved():
    session = onnxruntime.InferenceSession(reorder_graph().SerializeToString(), providers=["CPUExecutionProvider"])
    data_GNX = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    index_M = np.array([2, 2, 0, 1, 1])
    (moved_GMX,) = session.run(None, {graph_io.DATA: data_GNX, graph_io.INDEX: index_M})
    np.testing.assert_array_equal(moved_GMX, data_GNX[:, index_M])
