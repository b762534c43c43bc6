"""Every kind of network as graphs: each step's numbers are the network's, sentences of any age side by side."""

import itertools

import numpy as np
import onnx
import pytest
import torch

from ferryman_service.bundle import graph_io
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.training.graph_builder import CONTRIB, IR_VERSION, OPSET_VERSION, PRODUCER, GraphBuilder
from ferryman_service.training.graphs import Float32Products, decoder_graph, encoder_graph, graph_weights
from ferryman_service.translation.running_batch import OnnxRunningBatch
from tests.fakes.random_network import NaiveBatch, log_softmax, open_graphs, random_network, random_sources

BELOW_BLOCKS, IN_BLOCKS, IN_WIDE_BLOCKS = 120, 2_500, 16_401
TOLERANCE = 1e-4


def step_both(model, network, steps, *, k, width=2, seed=0):
    """Take steps with sentences that join one after the other; yield (candidates, logits, attention) of the graphs,
    then the naive ones."""
    generator, vocabulary_size = np.random.default_rng(seed), network.config.vocabulary_size
    ours = [OnnxRunningBatch(model, width, attention=True) for _ in range(2)]  # one gives candidates, one logits
    naive = NaiveBatch(network, width)
    for step in range(steps):
        if step % 2 == 0:
            sources = random_sources(2, 9, vocabulary_size, seed + step)
            for batch in (*ours, naive):
                batch.admit(sources)
        shape = naive.sentences, width
        fresh_S1 = np.array(naive.lengths())[:, None] == 0
        tokens_SW = np.where(fresh_S1, BOS, generator.integers(4, vocabulary_size, shape))
        parents_SW = np.where(fresh_S1, np.arange(width), generator.integers(0, width, shape))
        logits_SWV = naive.step_logits(tokens_SW, parents_SW)
        candidates = ours[0].step(tokens_SW, parents_SW, k)
        found_SWV = ours[1].step_logits(tokens_SW, parents_SW)
        yield (candidates, found_SWV, ours[0].attention()), (logits_SWV, naive.attention())


def assert_equal_steps(model, network, steps=5, k=12):
    for (candidates, found_SWV, found_SWL), (logits_SWV, attention_SWL) in step_both(model, network, steps, k=k):
        log_probs_SWV = log_softmax(logits_SWV)
        np.testing.assert_allclose(found_SWV, logits_SWV, atol=TOLERANCE)
        asked_SWK = np.take_along_axis(log_probs_SWV, candidates.tokens_SWK, axis=2)
        np.testing.assert_allclose(candidates.log_probs_SWK, asked_SWK, atol=TOLERANCE)
        np.testing.assert_allclose(candidates.log_probs_SWK, -np.sort(-log_probs_SWV)[:, :, :k], atol=TOLERANCE)
        assert candidates.log_probs_SWK.dtype == np.float32
        assert candidates.tokens_SWK.dtype == np.int64
        length = attention_SWL.shape[2]
        np.testing.assert_allclose(found_SWL[:, :, :length], attention_SWL, atol=TOLERANCE)
        np.testing.assert_allclose(found_SWL.sum(axis=2), 1.0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("norm", "activation", "positions"),
    [
        (norm, activation, positions)  # every two options meet
        for (norm, activation), positions in zip(
            itertools.product(NormPlacement, Activation), itertools.cycle(Positions), strict=False
        )
    ],
    ids=lambda kind: kind.value,
)
def test_every_kind_of_network_gives_its_numbers(tmp_path, norm, activation, positions):
    network = random_network(BELOW_BLOCKS, norm=norm, activation=activation, positions=positions, encoder_layers=2)
    assert_equal_steps(open_graphs(tmp_path, network), network)


@pytest.mark.parametrize(
    ("d_model", "heads", "positions"),
    [(36, 3, Positions.SINUSOIDAL), *((*shape, Positions.ROPE) for shape in [(32, 16), (36, 3), (40, 1), (12, 2)])],
)
def test_heads_of_any_width(tmp_path, d_model, heads, positions):
    network = random_network(BELOW_BLOCKS, d_model=d_model, heads=heads, positions=positions)
    assert_equal_steps(open_graphs(tmp_path, network), network)


@pytest.mark.parametrize("vocabulary_size", [2_304, IN_BLOCKS, IN_WIDE_BLOCKS])
def test_the_best_of_a_large_vocabulary_are_found_in_blocks(tmp_path, vocabulary_size):
    network = random_network(vocabulary_size, d_model=16, heads=2, ffn_dim=24)
    assert_equal_steps(open_graphs(tmp_path, network), network, steps=4, k=67)


@pytest.mark.parametrize("vocabulary_size", [BELOW_BLOCKS, IN_BLOCKS])
def test_equal_tokens_are_ordered_by_number_across_blocks(tmp_path, vocabulary_size):
    """Half of the tokens have a row in common, and a quarter its opposite: one of both groups is always likely."""
    network = random_network(vocabulary_size, d_model=16, heads=2)
    tokens = np.random.default_rng(0).permutation(np.arange(4, vocabulary_size))
    groups = [sorted(tokens[: vocabulary_size // 2].tolist()), sorted(tokens[-vocabulary_size // 4 :].tolist())]
    with torch.no_grad():
        common_D = network.embedding.weight[5] * 3
        for group, sign in zip(groups, (1, -1), strict=True):
            network.embedding.weight[group] = sign * common_D
    batch = OnnxRunningBatch(open_graphs(tmp_path, network), 1)
    batch.admit([(5, 8, EOS), (9, EOS)])
    seen = 0
    for token in (BOS, 7, 20, 31, 40):
        found = batch.step(np.full((2, 1), token), np.zeros((2, 1), np.int64), 20)
        for log_probs_K, tokens_K in zip(found.log_probs_SWK[:, 0], found.tokens_SWK[:, 0], strict=True):
            keys = list(zip((-log_probs_K).tolist(), tokens_K.tolist(), strict=True))
            assert keys == sorted(keys)
            for group in groups:
                present = [one for one in tokens_K.tolist() if one in set(group)]
                assert present == group[: len(present)]
                seen += len(present) > 5
    assert seen > 5, "equal tokens stand among the best"


def test_padding_columns_are_no_tokens(tmp_path):
    network = random_network(IN_BLOCKS, d_model=16, heads=2)
    with torch.no_grad():
        network.embedding.weight *= 1e-3  # all logits are close to 0, as a column of zeros would be
    batch = OnnxRunningBatch(open_graphs(tmp_path, network), 1)
    batch.admit([(5, EOS)])
    found = batch.step(np.array([[BOS]]), np.array([[0]]), 70)
    assert found.tokens_SWK.max() < IN_BLOCKS
    np.testing.assert_allclose(found.log_probs_SWK, -np.log(IN_BLOCKS), atol=0.01)


def test_equal_weights_make_equal_files(tmp_path):
    contents = []
    for name in ("one", "other"):
        open_graphs(tmp_path / name, random_network(IN_BLOCKS, seed=3))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3


@pytest.fixture(scope="module")
def graphs():
    network = random_network(IN_BLOCKS, positions=Positions.ROPE)
    weights = graph_weights(network)
    products = Float32Products(weights)
    return network, [
        encoder_graph(network.config, weights, products, 64),
        decoder_graph(network.config, weights, products),
    ]


def test_the_graphs_say_who_made_them_and_nothing_else(graphs):
    for model in graphs[1]:
        onnx.checker.check_model(model)
        assert (model.producer_name, model.ir_version, model.doc_string) == (PRODUCER, IR_VERSION, "")
        assert {opset.domain: opset.version for opset in model.opset_import} == {"": OPSET_VERSION, CONTRIB: 1}
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
        assert not model.metadata_props


def test_every_matrix_is_stored_once_and_the_embedding_in_the_decoder_alone(graphs):
    network, models = graphs
    wanted = {"encoder": 0, "decoder": 0}
    for name, weight in network.named_parameters():
        if weight.dim() == 2 and name != "embedding.weight":
            is_encoders = name.startswith("encoder") or "cross_attention.key_value" in name
            wanted["encoder" if is_encoders else "decoder"] += weight.numel()
    embedding = network.embedding.weight.shape[1] * -(-IN_BLOCKS // 32) * 32
    rotations = {"encoder": 2 * 64 * 4, "decoder": 2 * graph_io.MAX_TARGET_LENGTH * 4}
    for model in models:
        shapes = [tuple(weight.dims) for weight in model.graph.initializer if len(weight.dims) == 2]
        found, name = sum(rows * columns for rows, columns in shapes), model.graph.name
        assert found == wanted[name] + rotations[name] + (embedding if name == "decoder" else 0)


def test_inputs_and_outputs_are_those_that_serving_calls(graphs):
    encoder, decoder = graphs[1]
    assert [value.name for value in encoder.graph.input] == [graph_io.EMBEDDED, graph_io.SOURCE_LENGTHS, "positions"]
    cross = graph_io.keys_values_names("cross", 2)
    assert [value.name for value in encoder.graph.output] == cross
    assert {graph_io.LOGITS, graph_io.LOG_PROBS, graph_io.TOKENS, graph_io.ATTENTION} <= {
        value.name for value in decoder.graph.output
    }
    assert set(graph_io.keys_values_names("present", 2)) <= {value.name for value in decoder.graph.output}


def test_small_constants_are_stored_once():
    builder = GraphBuilder("g")
    assert builder.constant([1, 2]) == builder.constant([1, 2])
    assert builder.constant([1]) != builder.constant(np.array([1], np.int32))
    assert builder.constant([1]) != builder.constant(np.array(1, np.int64))
