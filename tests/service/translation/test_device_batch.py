"""The running batch for a GPU, on a CPU: whatever joins, leaves, branches and grows, it gives the network's numbers."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.translation import device_batch, device_model
from ferryman_service.translation.device_batch import DeviceRunningBatch, Layout
from tests.fakes.batch_lives import MOVES, Both, live
from tests.fakes.device_network import open_device_graphs
from tests.fakes.random_network import NaiveBatch, random_network, random_sources

VOCABULARY_SIZE = 121  # one more than a multiple of 8: there are columns that are no tokens
TOLERANCE = {"float32": 1e-4, "float16": 0.06}
KINDS = {
    "sinusoids": {},
    "rotations": {"positions": Positions.ROPE, "norm": NormPlacement.PRE, "activation": Activation.SWIGLU},
    "narrow heads": {"d_model": 20, "heads": 4},  # the cache is wider than a head, and a head no multiple of 8 bytes
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A network, and its graphs in float32, so that nothing hides behind the rounding of 16 bits."""
    network = random_network(VOCABULARY_SIZE, **KINDS[request.param])
    return network, open_device_graphs(tmp_path_factory.mktemp("graphs"), network, "float32")


def both_of(pair, width, seed, **wanted):
    network, model = pair
    ours = DeviceRunningBatch(model, width, attention=wanted.get("attention", False))
    return Both(ours, network, seed, tolerance=TOLERANCE[str(model.element_type)], **wanted)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 5), moves=MOVES, seed=st.integers(0, 2**16), kind=st.sampled_from(["plain", "all"]))
def test_any_life_of_a_batch_gives_the_networks_numbers(pair, width, moves, seed, kind):
    both = both_of(pair, width, seed, logits=kind == "all", attention=kind == "all")
    live(both, moves)


def test_positions_beyond_the_first_capacity_while_others_come_and_go(pair):
    both = both_of(pair, 3, seed=1)
    both.admit(2, 12)
    for step in range(70):  # the cache's room doubles twice
        both.step()
        if step % 11 == 5:
            both.admit(3, 8)
        if step % 11 == 9:
            both.keep(np.array([0, 1, *range(2, both.sentences, 3)]))


def test_long_sources_after_short_ones_and_back(pair):
    both = both_of(pair, 2, seed=2)
    for longest in (2, 200, 2, 90, 5):
        both.ours.admit([(*([7] * (longest - 1)), EOS)])
        both.naive.admit([(*([7] * (longest - 1)), EOS)])
        both.admit(3, longest)
        both.step()
        both.leave(0.6)
    both.leave(1.0)
    both.admit(2, 4)
    both.step()


def test_many_sentences_after_few_and_back(pair):
    both = both_of(pair, 2, seed=3)
    for count in (1, 33, 1, 70, 2):
        both.admit(count, 6)
        both.step()
        both.step()
        both.leave(0.8)
    assert both.ours.layout.places <= 32


def test_few_that_are_left_do_not_pay_for_many(pair):
    both = both_of(pair, 1, seed=6)
    both.admit(16, 6)
    both.step()
    both.keep(np.array([2, 9, 15]))
    both.step()
    assert both.ours.layout.places == 4


def test_a_long_sentence_that_left_makes_no_room_for_more(pair):
    both = both_of(pair, 1, seed=11)
    both.admit(1, 5)
    for _ in range(32):
        both.step()
    both.admit(3, 5)
    both.keep(np.arange(1, 4))
    both.step()
    assert both.ours.layout.positions == 32


def test_a_sentence_that_leaves_and_one_that_joins_make_no_new_shapes(pair):
    both = both_of(pair, 2, seed=7)
    both.admit(8, 6)
    layouts = set()
    for _ in range(12):
        both.step()
        both.keep(np.arange(1, 8))
        both.admit(1, 6)
        layouts.add(both.ours.layout)
    assert layouts == {Layout(8, 32, 16)}


def test_stale_cache_contents_count_nothing(pair):
    """The memory of those who left is used again as it is: here it is filled with large numbers."""
    both = both_of(pair, 3, seed=4)
    both.admit(6, 60)
    for _ in range(5):
        both.step()
    both.leave(1.0)
    for cache in (both.ours._cache, both.ours._cross):
        for memory in cache._memory:
            if memory is not None:
                memory.numpy().view(np.float32)[...] = 1e4
    for _ in range(2):
        both.admit(2, 7)
        for _ in range(4):
            both.step()


def test_an_answer_is_never_no_number(pair):
    _, model = pair
    batch = DeviceRunningBatch(model, 2)
    for count, longest in ((3, 30), (2, 3)):
        batch.admit(random_sources(count, longest, VOCABULARY_SIZE, longest))
        for _ in range(4):
            tokens_SW = np.full((batch.sentences, 2), 9)
            found = batch.step(tokens_SW, np.tile([1, 0], (batch.sentences, 1)), VOCABULARY_SIZE + 5)
            assert np.isfinite(found.log_probs_SWK).all()
            assert (np.sort(found.tokens_SWK, axis=2) == np.arange(VOCABULARY_SIZE)).all()


def test_the_number_of_candidates_may_change(pair):
    network, model = pair
    batch, naive = DeviceRunningBatch(model, 1), NaiveBatch(network, 1)
    for one in (batch, naive):
        one.admit([(5, 6, EOS), (7, EOS)])
    for token, k in ((BOS, 4), (9, 6), (10, 4), (11, 1)):
        tokens_S1, parents_S1 = np.full((2, 1), token), np.zeros((2, 1), np.int64)
        found, wanted = (one.step(tokens_S1, parents_S1, k) for one in (batch, naive))
        np.testing.assert_array_equal(found.tokens_SWK, wanted.tokens_SWK)


def test_memory_is_moved_in_pieces_where_a_gpu_could_not_count_it(pair, monkeypatch):
    monkeypatch.setattr(device_model, "MOST_NUMBERS", 5000)
    both = both_of(pair, 2, seed=8)
    both.admit(3, 20)
    for _ in range(4):
        both.step()


def test_many_sentences_are_encoded_in_turns(pair, monkeypatch):
    monkeypatch.setattr(device_model, "ENCODED_AT_ONCE", 32)
    both = both_of(pair, 1, seed=9)
    both.admit(7, 14)
    both.step()


def test_bound_shapes_are_forgotten_and_bound_again(pair, monkeypatch):
    monkeypatch.setattr(device_batch, "KEPT_BINDINGS", 2)
    both = both_of(pair, 2, seed=10)
    for count in (1, 2, 4):
        both.admit(count, 5)
        both.step()
        both.step()
    assert len(both.ours._bindings) <= 2


def test_an_empty_batch_gives_its_memory_back(pair, monkeypatch):
    _, model = pair
    monkeypatch.setattr(device_batch, "KEPT_BYTES", 1 << 20)
    batch = DeviceRunningBatch(model, 4)
    least_bytes = batch.size_bytes
    batch.admit(random_sources(64, 200, VOCABULARY_SIZE, 0))
    batch.step(np.full((64, 4), BOS), np.tile(np.arange(4), (64, 1)), 3)
    assert batch.size_bytes > 10 * least_bytes
    batch.keep(np.empty(0, np.int64))
    assert batch.size_bytes < 20 * least_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_close_to_the_network(tmp_path, kind):
    network = random_network(VOCABULARY_SIZE, **KINDS[kind])
    model = open_device_graphs(tmp_path, network, "float16")
    assert model.element_type == np.float16
    both = both_of((network, model), 2, seed=5, attention=True)
    for joining in (3, 2):
        both.admit(joining, 30)
        for _ in range(6):
            both.step()
    both.leave(0.5)
    both.step()
