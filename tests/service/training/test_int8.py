"""Networks in 8 bits: close to float32, and each sentence's numbers its own to the last bit."""

import functools

import numpy as np
import pytest
import torch

from ferryman_service.bundle.embedding import Embedding, write_int8_embedding
from ferryman_service.bundle.manifest import Architecture
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.domain.translation import ComputeType
from ferryman_service.training.graphs import PROJECTION
from ferryman_service.training.int8 import measure_ranges
from ferryman_service.translation.running_batch import OnnxRunningBatch
from tests.fakes.random_network import NaiveBatch, log_softmax, open_graphs, random_network, random_sources

SMALL, IN_BLOCKS = 120, 2_500
KINDS = {
    "post relu": {},
    "pre swiglu rope": {
        "norm": NormPlacement.PRE,
        "activation": Activation.SWIGLU,
        "positions": Positions.ROPE,
    },
    "deep gelu": {"norm": NormPlacement.DEEP, "activation": Activation.GELU},
}


def some_pairs(vocabulary_size, seed=7, count=24):
    sources = random_sources(count, 12, vocabulary_size, seed)
    targets = [source[:-1] for source in random_sources(count, 12, vocabulary_size, seed + 1)]
    return list(zip(sources, targets, strict=True))


def in_int8(folder, network):
    ranges = measure_ranges(network, some_pairs(network.config.vocabulary_size))
    return open_graphs(folder, network, ranges)


def follow(batch, targets):
    """Feed each sentence its target, in one row, and return logits_STV of its steps."""
    found = [[] for _ in targets]
    for step in range(len(targets[0])):
        tokens_S1 = np.array([[target[step]] for target in targets])
        logits_SWV = batch.step_logits(tokens_S1, np.zeros_like(tokens_S1))
        for sentence, logits_V in enumerate(logits_SWV[:, 0]):
            found[sentence].append(logits_V.copy())
    return np.array(found)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Returns the network of a kind and its graphs in 8 bits, made once."""

    @functools.cache
    def quantise(kind, vocabulary_size):
        network = random_network(vocabulary_size, **KINDS[kind])
        return network, in_int8(tmp_path_factory.mktemp("int8"), network)

    return quantise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary_size", [SMALL, IN_BLOCKS])
def test_int8_is_close_to_the_network(quantised, kind, vocabulary_size):
    network, model = quantised(kind, vocabulary_size)
    batch, naive = OnnxRunningBatch(model, 1), NaiveBatch(network, 1)
    sources = random_sources(40, 12, vocabulary_size, 3)
    generator = np.random.default_rng(4)
    targets = [(BOS, *generator.integers(4, vocabulary_size, 7).tolist()) for _ in sources]
    for one in (batch, naive):
        one.admit(sources)
    found_STV, wanted_STV = (log_softmax(follow(one, targets)) for one in (batch, naive))
    deviation = float(np.abs(found_STV - wanted_STV).mean())
    spread = float(wanted_STV.std())
    assert deviation < 0.1 * spread, f"log-probabilities differ by {deviation:.3f}, they spread by {spread:.3f}"
    same = float((found_STV.argmax(axis=2) == wanted_STV.argmax(axis=2)).mean())
    assert same > 0.8, f"{same:.0%} of the best tokens are the same"


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_has_the_same_numbers_alone_in_company_and_joining_late(quantised, kind):
    """To the last bit."""
    _, model = quantised(kind, IN_BLOCKS)
    sources = random_sources(64, 30, IN_BLOCKS, 5)
    generator = np.random.default_rng(6)
    targets = [(BOS, *generator.integers(4, IN_BLOCKS, 9).tolist()) for _ in sources]
    together = OnnxRunningBatch(model, 1)
    together.admit(sources)
    found_STV = follow(together, targets)
    for sentence in range(0, 64, 7):
        alone = OnnxRunningBatch(model, 1)
        alone.admit([sources[sentence]])
        np.testing.assert_array_equal(follow(alone, [targets[sentence]])[0], found_STV[sentence])
    joined = OnnxRunningBatch(model, 1)
    joined.admit(sources[:20])
    for token in (BOS, 9, 11, 13):
        joined.step(np.full((20, 1), token), np.zeros((20, 1), np.int64), 3)
    joined.admit(sources[20:23])
    joined.keep(np.array([3, 4, 9, 20, 21, 22]))
    tokens = [(15,) * 10] * 3 + targets[20:23]
    np.testing.assert_array_equal(follow(joined, tokens)[3:], found_STV[20:23])


def test_padding_columns_have_no_probability_whatever_the_range(tmp_path):
    network = random_network(IN_BLOCKS, d_model=16, heads=2)
    ranges = dict.fromkeys(measure_ranges(network, some_pairs(IN_BLOCKS)), 1e-8)
    batch = OnnxRunningBatch(open_graphs(tmp_path, network, ranges), 1)
    batch.admit([(5, EOS)])
    found = batch.step(np.array([[BOS]]), np.array([[0]]), 70)
    assert found.tokens_SWK.max() < IN_BLOCKS
    logits_SWV = batch.step_logits(np.array([[9]]), np.array([[0]]))
    assert logits_SWV.shape == (1, 1, IN_BLOCKS)
    padding_RP = batch._logits_RV[:1, IN_BLOCKS:]
    assert padding_RP.shape[1] == -IN_BLOCKS % 32
    assert (np.exp(padding_RP - logits_SWV.max()) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_has_a_range(kind):
    network = random_network(SMALL, **KINDS[kind])
    ranges = measure_ranges(network, some_pairs(SMALL))
    linears = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(ranges) == {*linears, PROJECTION}
    assert all(value > 0 for value in ranges.values())


def test_a_range_covers_what_is_common_and_cuts_off_what_is_rare():
    network = random_network(SMALL)
    seen = {}

    def note(module, inputs):
        seen.setdefault("largest", []).append(float(inputs[0].abs().max()))

    module = network.get_submodule("encoder_layers.0.feed_forward.inner")
    hook = module.register_forward_pre_hook(note)
    range_ = measure_ranges(network, some_pairs(SMALL))["encoder_layers.0.feed_forward.inner"]
    hook.remove()
    assert 0.2 * max(seen["largest"]) <= range_ <= max(seen["largest"]) * 1.0001


def test_measuring_leaves_the_network_as_it_was():
    network = random_network(SMALL)
    measure_ranges(network, some_pairs(SMALL, count=1))
    assert not any(module._forward_pre_hooks for module in network.modules())


def compare(folder, network, tolerance):
    """Assert that the greedy choices' log-probabilities are within a tolerance of the network's, and finite."""
    batch, naive = OnnxRunningBatch(in_int8(folder, network), 1), NaiveBatch(network, 1)
    sources = random_sources(20, 12, SMALL, 3)
    for one in (batch, naive):
        one.admit(sources)
    targets = [(BOS, 9, 30, 41)] * len(sources)
    found_STV, wanted_STV = (log_softmax(follow(one, targets)) for one in (batch, naive))
    assert np.isfinite(found_STV).all()
    deviation = float(np.abs(found_STV - wanted_STV).mean())
    assert deviation < tolerance * float(wanted_STV.std()), deviation


def test_rows_of_zeros_and_dead_rows_keep_their_bias(tmp_path):
    """A row whose weights are all but zero gives its bias, however large that is beside them."""
    network = random_network(SMALL)
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[0] = 0.0
                module.weight[1] = 0.0 if "attention" in name else 1e-12
                module.bias[:2] = 2.5
    compare(tmp_path, network, 0.1)


def test_a_network_whose_activations_are_huge(tmp_path):
    network = random_network(SMALL, norm=NormPlacement.PRE)
    with torch.no_grad():
        for name, module in network.named_modules():
            if name.endswith("feed_forward.inner"):
                module.weight *= 300
                module.bias *= 300
            if name.endswith("feed_forward.outer"):
                module.weight *= 1 / 300
    compare(tmp_path, network, 0.15)


def test_a_network_that_only_ever_says_nothing(tmp_path):
    """All that is multiplied is zero: the ranges are tiny, and the answer is the biases' alone."""
    network = random_network(SMALL)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "embedding.weight":
                parameter.zero_()
    ranges = measure_ranges(network, some_pairs(SMALL))
    assert ranges[PROJECTION] > 0
    batch = OnnxRunningBatch(open_graphs(tmp_path, network, ranges), 1)
    batch.admit([(5, EOS)])
    found = batch.step(np.array([[BOS]]), np.array([[0]]), SMALL)
    np.testing.assert_allclose(found.log_probs_SWK, -np.log(SMALL), atol=1e-5)
    assert found.tokens_SWK[0, 0].tolist() == list(range(SMALL))


def test_an_outlier_is_cut_off_and_changes_nobody_else(tmp_path):
    """The embedding of a token that held-out sentences lack is a hundred times larger than all others."""
    network = random_network(SMALL, norm=NormPlacement.PRE)
    with torch.no_grad():
        network.embedding.weight[119] *= 100
    pairs = [(source, target) for source, target in some_pairs(SMALL) if 119 not in (*source, *target)]
    model = open_graphs(tmp_path, network, measure_ranges(network, pairs))
    alone, beside = OnnxRunningBatch(model, 1), OnnxRunningBatch(model, 1)
    alone.admit([(5, 6, EOS)])
    beside.admit([(119, 119, EOS), (5, 6, EOS)])
    wanted = follow(alone, [(BOS, 9, 11)])
    found = follow(beside, [(BOS, 119, 119), (BOS, 9, 11)])
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[1], wanted[0])


def test_the_embedding_loses_little(tmp_path):
    weight_VD = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    weight_VD[7] = 0.0
    weight_VD[8] *= 1000.0
    write_int8_embedding(tmp_path, weight_VD)
    architecture = Architecture(d_model=32, decoder_layers=1, heads=4, vocabulary_size=50, rotates=True)
    embedding = Embedding.open(tmp_path, ComputeType.INT8, architecture)
    found_VD = embedding.of_sources(np.arange(50)[None])[0]
    scaled_VD = weight_VD * np.sqrt(32)
    steps_V1 = np.abs(scaled_VD).max(axis=1, keepdims=True) / 127
    assert (np.abs(found_VD - scaled_VD) <= steps_V1 * 0.501).all()
    assert not found_VD[7].any()
