import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.training.batches import make_batch, plan_epoch
from ferryman_service.training.pairs import PairWriter, TokenPairs, TokenSide, open_pairs

LENGTHS = st.lists(st.tuples(st.integers(2, 60), st.integers(2, 60)), min_size=1, max_size=300).map(np.array)


def plan(lengths, limit=128, seed=1, epoch=1, parts=1):
    updates = plan_epoch(lengths[:, 0], lengths[:, 1], batch_target_tokens=limit, seed=seed, epoch=epoch, parts=parts)
    return [[index.tolist() for index in update] for update in updates]


def realistic_lengths(count=100_000):
    generator = np.random.default_rng(1)
    source = np.maximum(2, generator.gamma(4.0, 4.0, count)).astype(int)
    target = np.maximum(2, source * generator.normal(1.1, 0.25, count)).astype(int)
    return np.stack((source, target), axis=1)


@given(LENGTHS, st.integers(60, 400), st.integers(0, 9), st.integers(1, 3))
def test_every_pair_is_in_exactly_one_batch(lengths, limit, seed, parts):
    updates = plan(lengths, limit, seed, parts=parts)
    assert sorted(i for update in updates for index in update for i in index) == list(range(len(lengths)))
    assert all(1 <= len(update) <= parts and all(update) for update in updates)


@given(LENGTHS, st.integers(60, 400), st.integers(1, 3))
def test_the_token_limit_is_kept(lengths, limit, parts):
    for update in plan(lengths, limit, parts=parts):
        for index in update:
            assert lengths[index, 1].sum() <= limit // parts or len(index) == 1


@given(LENGTHS, st.integers(1, 3))
def test_the_plan_is_a_function_of_seed_and_epoch(lengths, epoch):
    assert plan(lengths, epoch=epoch) == plan(lengths, epoch=epoch)


def test_epochs_and_seeds_differ():
    lengths = realistic_lengths(500)
    plans = [plan(lengths, epoch=1), plan(lengths, epoch=2), plan(lengths, seed=2)]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_the_order_is_not_that_of_the_lengths():
    lengths = realistic_lengths(5000)
    means = [lengths[update[0], 1].mean() for update in plan(lengths, 512)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("limit", [768, 2048, 8192])
def test_there_is_little_padding_and_batches_are_full(limit):
    lengths = realistic_lengths()
    updates = plan(lengths, limit)
    padded = sum(len(index) * (lengths[index].max(axis=0).sum()) for (index,) in updates)
    assert 1 - lengths.sum() / padded < 0.17  # lengths of news; image captions are less diverse and pad half as much
    target_tokens = [lengths[index, 1].sum() for (index,) in updates]
    assert np.mean(target_tokens) > 0.9 * limit
    assert np.quantile(target_tokens, 0.02) > 0.4 * limit


def test_a_batch_holds_the_target_shifted_right():
    pairs = TokenPairs(TokenSide.from_sentences([[7], [8, 9, 10]]), TokenSide.from_sentences([[11, 12, 13], [14]]))
    batch = make_batch(pairs, np.array([1, 0]))
    assert batch.source_BS.tolist() == [[8, 9, 10, EOS], [7, EOS, PAD, PAD]]
    assert batch.decoder_input_BT.tolist() == [[BOS, 14, PAD, PAD], [BOS, 11, 12, 13]]
    assert batch.labels_N.tolist() == [14, EOS, 11, 12, 13, EOS]
    assert batch.label_positions_N.tolist() == [0, 1, 4, 5, 6, 7]
    assert (batch.target_tokens, batch.positions, batch.padding_share) == (6, 16, pytest.approx(4 / 16))


@given(st.lists(st.tuples(*[st.lists(st.integers(4, 99), min_size=1, max_size=5)] * 2), min_size=1, max_size=20))
def test_pairs_survive_the_files(tmp_path_factory, sentences):
    folder = tmp_path_factory.mktemp("x") / "pairs"
    with PairWriter(folder) as writer:
        for source, target in sentences:
            writer.add([source], [target])
    pairs = open_pairs(folder)
    assert len(pairs) == len(sentences)
    for i, (source, target) in enumerate(sentences):
        assert (pairs.source.sentence(i), pairs.target.sentence(i)) == ([*source, EOS], [*target, EOS])
