"""The running batch gives the network's numbers whatever joins, leaves, branches and grows beside a sentence."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.translation import running_batch
from ferryman_service.translation.running_batch import OnnxRunningBatch
from tests.fakes.batch_lives import MOVES, Both, live
from tests.fakes.random_network import NaiveBatch, open_graphs, random_network, random_sources

VOCABULARY_SIZE = 120
TOLERANCE = 1e-4
KINDS = {
    "sinusoids": {},
    "rotations": {"positions": Positions.ROPE, "norm": NormPlacement.PRE, "activation": Activation.SWIGLU},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A network, and its graphs."""
    network = random_network(VOCABULARY_SIZE, **KINDS[request.param])
    return network, open_graphs(tmp_path_factory.mktemp("graphs"), network)


def both_of(pair, width, seed, **wanted):
    network, model = pair
    return Both(OnnxRunningBatch(model, width, attention=wanted.get("attention", False)), network, seed, **wanted)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 5), moves=MOVES, seed=st.integers(0, 2**16), kind=st.sampled_from(["plain", "all"]))
def test_any_life_of_a_batch_gives_the_networks_numbers(pair, width, moves, seed, kind):
    both = both_of(pair, width, seed, logits=kind == "all", attention=kind == "all")
    live(both, moves)


def test_positions_beyond_the_first_capacity_while_others_come_and_go(pair):
    both = both_of(pair, 3, seed=1)
    both.admit(2, 12)
    for step in range(140):  # the cache's room doubles twice
        both.step()
        if step % 11 == 5:
            both.admit(3, 8)
        if step % 11 == 9:
            kept_S = np.append(np.arange(2), np.flatnonzero(np.arange(both.sentences) % 3 == 2))
            kept_S = np.unique(kept_S)
            both.ours.keep(kept_S)
            both.naive.keep(kept_S)


def test_long_sources_after_short_ones_and_back(pair):
    both = both_of(pair, 2, seed=2)
    for longest in (2, 200, 2, 90, 5):
        sources = random_sources(3, longest, VOCABULARY_SIZE, longest)
        both.admit_sources([(*([7] * (longest - 1)), EOS), *sources])
        for _ in range(3):
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


def test_stale_cache_contents_count_nothing(pair):
    """The memory of those who left is used again as it is: here it is filled with large numbers."""
    both = both_of(pair, 3, seed=4)
    both.admit(6, 60)
    for _ in range(5):
        both.step()
    both.leave(1.0)
    both.ours._cache.array[...] = 1e4
    both.ours._cross.array[...] = -1e4
    for _ in range(2):
        both.admit(2, 7)
        for _ in range(4):
            both.step()


def test_an_answer_is_never_no_number(pair):
    _, model = pair
    batch = OnnxRunningBatch(model, 2)
    for count, longest in ((3, 30), (2, 3)):
        batch.admit(random_sources(count, longest, VOCABULARY_SIZE, longest))
        for _ in range(4):
            tokens_SW = np.full((batch.sentences, 2), 9)
            found = batch.step(tokens_SW, np.tile([1, 0], (batch.sentences, 1)), VOCABULARY_SIZE)
            assert np.isfinite(found.log_probs_SWK).all()
            assert (np.sort(found.tokens_SWK, axis=2) == np.arange(VOCABULARY_SIZE)).all()


def test_more_candidates_than_tokens_are_all_tokens(pair):
    _, model = pair
    batch = OnnxRunningBatch(model, 1)
    batch.admit([(5, EOS)])
    found = batch.step(np.array([[BOS]]), np.array([[0]]), VOCABULARY_SIZE + 50)
    assert found.tokens_SWK.shape == (1, 1, VOCABULARY_SIZE)


def test_the_number_of_candidates_may_change(pair):
    network, model = pair
    batch, naive = OnnxRunningBatch(model, 1), NaiveBatch(network, 1)
    for one in (batch, naive):
        one.admit([(5, 6, EOS), (7, EOS)])
    for token, k in ((BOS, 4), (9, 6), (10, 4), (11, 1)):
        tokens_S1, parents_S1 = np.full((2, 1), token), np.zeros((2, 1), np.int64)
        found, wanted = (one.step(tokens_S1, parents_S1, k) for one in (batch, naive))
        np.testing.assert_array_equal(found.tokens_SWK, wanted.tokens_SWK)


def test_shapes_that_come_back_find_other_memory(pair):
    """The number of sentences and all rooms are as they were once, the memory is not."""
    both = both_of(pair, 2, seed=5)
    both.admit_sources([(5, 6, 7, EOS), (8, 9, EOS), (10, EOS)])
    both.step()
    for source in [(*([7] * 90), EOS), (11, 12, EOS)] * 2:
        both.ours.keep(np.array([0, 1]))
        both.naive.keep(np.array([0, 1]))
        both.admit_sources([source])
        both.step()
        both.step()


def test_an_empty_batch_gives_its_memory_back(pair, monkeypatch):
    _, model = pair
    monkeypatch.setattr(running_batch, "KEPT_BYTES", 1 << 16)
    batch = OnnxRunningBatch(model, 4)
    batch.admit(random_sources(64, 200, VOCABULARY_SIZE, 0))
    batch.step(np.full((64, 4), BOS), np.tile(np.arange(4), (64, 1)), 3)
    full_bytes = batch.size_bytes
    batch.keep(np.empty(0, np.int64))
    assert batch.size_bytes < full_bytes / 8


def test_memory_that_was_given_back_is_not_used_again(pair, monkeypatch):
    monkeypatch.setattr(running_batch, "KEPT_BYTES", 1 << 10)
    both = both_of(pair, 3, seed=6)
    for _ in range(3):
        both.admit_sources([(*([7] * 20), EOS), (5, 6, EOS)])
        for _ in range(4):
            both.step()
        both.leave(1.0)


def test_few_bindings_are_kept_however_many_shapes_there_were(pair, monkeypatch):
    monkeypatch.setattr(running_batch, "MOST_BINDINGS", 5)
    both = both_of(pair, 1, seed=7)
    for count in [*range(1, 9), *range(8, 0, -1)]:
        both.admit(count, 9)
        both.step()
        both.step()
        assert len(both.ours._bindings) <= 5
        both.leave(1.0)
