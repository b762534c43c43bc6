import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.training.packing import EpochPlan, Limits, Section, batches_by_length, pack, plan_epoch

PAIRS = st.lists(st.tuples(st.integers(2, 60), st.integers(2, 60)), min_size=1, max_size=300)
LENGTHS = PAIRS.map(lambda pairs: np.array(pairs, np.uint16))
PARTS = st.integers(1, 3)


def plan(lengths, limit=128, seed=1, epoch=1, **parts):
    updates = plan_epoch(lengths[:, 0], lengths[:, 1], batch_target_tokens=limit, seed=seed, epoch=epoch, **parts)
    return [[[index.tolist() for index in batches] for batches in update] for update in updates]


def flat(updates):
    return [index for update in updates for batches in update for index in batches]


def padding_share(lengths, batches):
    return 1 - lengths.sum() / sum(len(index) * int(lengths[index].max(axis=0).sum()) for index in batches)


def captions(count=29_000):
    """Lengths like those of Multi30k: means 15.7 and 16.2, deviations 4.9 and 5.7, correlation 0.85."""
    generator = np.random.default_rng(1)
    source = generator.gamma(10.1, 1.55, count)
    target = source * generator.normal(1.035, 0.19, count)
    return np.maximum(2, np.rint(np.stack((source, target), axis=1))).astype(np.uint16)


def news(count=100_000):
    generator = np.random.default_rng(1)
    source = np.maximum(2, generator.gamma(4.0, 4.0, count))
    return np.maximum(2, np.stack((source, source * generator.normal(1.1, 0.25, count)), axis=1)).astype(np.uint16)


@given(LENGTHS, st.integers(60, 400), st.integers(0, 9), PARTS, PARTS)
def test_every_pair_is_in_exactly_one_batch(lengths, limit, seed, ranks, micro_batches):
    updates = plan(lengths, limit, seed, ranks=ranks, micro_batches=micro_batches)
    assert sorted(i for index in flat(updates) for i in index) == list(range(len(lengths)))
    for update in updates:
        assert len(update) == ranks
        assert update[0] and all(len(batches) <= micro_batches for batches in update)
        assert all(index for batches in update for index in batches)


@given(LENGTHS, st.integers(60, 400), PARTS, PARTS)
def test_the_limits_are_kept(lengths, limit, ranks, micro_batches):
    share = limit // (ranks * micro_batches)
    source, target = lengths.astype(int).T
    for index in flat(plan(lengths, limit, ranks=ranks, micro_batches=micro_batches)):
        if len(index) > 1:
            assert target[index].sum() <= share
            assert len(index) * source[index].max() <= 1.5 * share * source.sum() / target.sum()


SECTION_PAIRS = 2**17
"""About as many pairs are planned at once."""


def test_the_sections_of_a_large_corpus_hold_every_pair_once():
    lengths = captions(3 * SECTION_PAIRS)
    updates = plan(lengths, 4096, ranks=2, micro_batches=2)
    batches = flat(updates)
    assert sorted(i for index in batches for i in index) == list(range(len(lengths)))
    assert padding_share(lengths, batches) < 0.05
    assert sum(len(update[0]) < 2 for update in updates) <= 3  # the last update of each section may be smaller
    means = [lengths[index, 1].mean() for index in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1


def test_an_update_is_the_same_whatever_was_asked_before():
    lengths = captions(2 * SECTION_PAIRS)

    def fresh():
        return plan_epoch(lengths[:, 0], lengths[:, 1], batch_target_tokens=2048, seed=1, epoch=1, micro_batches=2)

    def listed(update):
        return [index.tolist() for batches in update for index in batches]

    in_order = [listed(update) for update in fresh()]
    again = fresh()
    for number in (len(in_order) - 1, 0, len(in_order) // 2, -1):
        assert listed(again[number]) == in_order[number]


class CountedSections:
    """Sections of so many updates, of one pair each, in the order of the pairs; it keeps which were planned."""

    ranks = 1

    def __init__(self, sizes):
        self.sizes = sizes
        self.planned = []

    def __len__(self):
        return len(self.sizes)

    def plan(self, number):
        self.planned.append(number)
        first, size = sum(self.sizes[:number]), self.sizes[number]
        groups = [np.array([group]) for group in range(size)]
        return Section(np.arange(first, first + size, dtype=np.int32), np.arange(size + 1), groups)


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@given(SIZES, st.data())
def test_updates_are_numbered_through_the_sections(sizes, data):
    epoch = EpochPlan(CountedSections(sizes))
    for number in data.draw(st.lists(st.integers(0, sum(sizes) + 2), max_size=10)):
        assert epoch.exists(number) is (number < sum(sizes))
        if epoch.exists(number):
            assert epoch[number][0][0].tolist() == [number]
        else:
            with pytest.raises(IndexError, match=f"no update {number}"):
                epoch[number]
    assert len(epoch) == sum(sizes)
    assert [update[0][0].tolist() for update in epoch] == [[number] for number in range(sum(sizes))]
    assert [update[0][0].tolist() for update in epoch[-2:]] == [[n] for n in range(sum(sizes))[-2:]]


def test_a_section_is_planned_when_it_is_reached_and_once():
    sections = CountedSections([3, 2, 4])
    epoch = EpochPlan(sections)
    for number, planned in enumerate([[0], [0], [0], [0, 1], [0, 1], [0, 1, 2]]):
        assert epoch.exists(number)
        epoch[number]
        assert sections.planned == planned


@given(LENGTHS, PARTS, PARTS, PARTS)
def test_the_plan_is_a_function_of_its_arguments(lengths, epoch, ranks, micro_batches):
    plans = [plan(copy, epoch=epoch, ranks=ranks, micro_batches=micro_batches) for copy in (lengths, lengths.copy())]
    assert plans[0] == plans[1]


def test_epochs_and_seeds_differ():
    lengths = captions(500)
    plans = [plan(lengths, epoch=1), plan(lengths, epoch=2), plan(lengths, seed=2)]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_the_order_is_not_that_of_the_lengths():
    lengths = captions(5000)
    means = [lengths[index, 1].mean() for index in flat(plan(lengths, 512))]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("limit", [1024, 4096])
def test_captions_are_padded_by_less_than_a_twentieth(limit):
    lengths = captions()
    batches = flat(plan(lengths, limit))
    assert padding_share(lengths, batches) < 0.05
    target_tokens = [lengths[index, 1].sum() for index in batches]
    assert np.mean(target_tokens) > 0.9 * limit
    assert np.quantile(target_tokens, 0.02) > 0.4 * limit


@pytest.mark.parametrize("limit", [768, 2048])
def test_wide_lengths_get_larger_pools_not_more_padding(limit):
    lengths = news()
    assert padding_share(lengths, flat(plan(lengths, limit))) < 0.05


def test_like_lengths_are_left_mixed():
    """Where nothing needs padding the pools stay small: the neighbours of a pair are a matter of chance."""
    lengths = np.full((20_000, 2), 16, np.uint16)
    lengths[::2] += 1
    batches = flat(plan(lengths, 1024))
    assert padding_share(lengths, batches) < 0.05
    met = {int(index[0]): set(index) for index in batches}
    again = {int(index[0]): set(index) for index in flat(plan(lengths, 1024, epoch=2))}
    shared = [len(met[first] & again[first]) for first in met.keys() & again.keys()]
    assert np.mean(shared) < 3


def test_ranks_compute_alike_and_micro_batches_do_not():
    lengths = news(20_000)
    updates = [
        update for update in plan(lengths, 4096, ranks=2, micro_batches=2) if len(update[0]) == len(update[1]) == 2
    ]
    assert len(updates) > 50
    longest = np.array([[[int(lengths[index].max()) for index in batches] for batches in update] for update in updates])
    between_ranks = np.abs(longest[:, 0] - longest[:, 1]).mean()
    between_micro_batches = np.abs(longest[:, :, 0] - longest[:, :, 1]).mean()
    assert between_ranks < 0.3 * between_micro_batches


def test_no_cut_of_the_same_order_is_cheaper():
    """Against all cuts of a small pool, one pair a block."""
    lengths = np.array([[3, 9], [4, 8], [7, 7], [9, 7], [12, 3], [14, 3], [5, 9]], np.uint16)
    limits = Limits(target_tokens=20, source_positions=math.inf)
    order, ends = pack(np.arange(7, dtype=np.int32), *lengths.T, limits)

    def cost(cuts):
        batches = np.split(order, cuts)
        tokens = [int(lengths[b, 1].sum()) for b in batches]
        if max(tokens) > 20:
            return math.inf
        positions = sum(len(b) * int(lengths[b].max(axis=0).sum()) for b in batches)
        return positions + sum(20 * (0.2 + (1 - t / 20) ** 2) for t in tokens)

    every = [[place + 1 for place in range(6) if cuts >> place & 1] for cuts in range(64)]
    assert cost(ends[:-1]) == pytest.approx(min(map(cost, every)))


@given(LENGTHS, st.integers(60, 400))
def test_batches_by_length_hold_all_pairs(lengths, limit):
    batches = batches_by_length(*lengths.T, limit)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(lengths[index, 1].sum() <= limit for index in batches)


def test_batches_by_length_are_small_where_sources_are_long():
    lengths = np.tile(np.array([[256, 2]], np.int64), (1500, 1))
    batches = batches_by_length(*lengths.T, 4096)
    assert sum(map(len, batches)) == 1500
    assert max(map(len, batches)) * 256 <= 4 * 4096
    assert len(batches) < 40
