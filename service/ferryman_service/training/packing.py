"""Which pairs form which batch: by target tokens, of similar lengths, in an order that seed and epoch decide.

Shape suffixes: P pairs, K blocks of pairs that stay together, W blocks of a batch.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
Update = list[list[Index]]
"""The batches of an update: for each rank its micro-batches."""

# Larger pools pad less, but their batches are so alike inside and so unlike each other that a model learns slower: a
# pool is as small as this share of padding allows.
_PADDING_SHARE: Final = 0.046
_MIN_POOL_BATCHES: Final = 4
_MAX_POOL_BATCHES: Final = 1280
_POOL_GROWTH: Final = 1.2
# What is planned at once, if it is not a single pool: some tenths of a second and some hundred bytes a pair.
_SECTION_PAIRS: Final = 2**17

_STRIPS: Final = 2.0  # measured: fewer pad the target, more the source
_BLOCKS: Final = 16
# What a batch costs beside its positions, in positions for each target token of the limit, and what it costs more if it
# is far from full: batches of few sentences make noisy updates.
_BATCH_COST: Final = 0.2
_EMPTINESS_COST: Final = 1.0
_MAX_SOURCE_SLACK: Final = 1.5
# Where pairs of unlike lengths are kept: source positions of a batch for each target token of its limit.
_UNLIKE_SIDES: Final = 4.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a batch may hold; a pair above the limits stands alone. Source positions count padding."""

    target_tokens: float
    source_positions: float

    @classmethod
    def of(cls, source_lengths_P: NDArray[np.integer], target_lengths_P: NDArray[np.integer], tokens: int) -> Limits:
        """Return the limits for batches of so many target tokens."""
        ratio = float(source_lengths_P.sum()) / float(target_lengths_P.sum())
        return cls(target_tokens=tokens, source_positions=_MAX_SOURCE_SLACK * ratio * tokens)


@dataclass(frozen=True)
class Section:
    """A part of an epoch, planned at once: its pairs, batch after batch, where the batches begin and the last one ends,
    and which groups, of a batch for each rank, form which update."""

    order_P: NDArray[np.int32]
    cuts: Index
    groups: Sequence[Index]

    def update(self, number: int, ranks: int) -> Update:
        """Return the section's update of that number."""
        update: Update = [[] for _ in range(ranks)]
        for group in self.groups[number].tolist():
            first = group * ranks
            for rank, batch in enumerate(range(first, min(first + ranks, len(self.cuts) - 1))):
                update[rank].append(self.order_P[self.cuts[batch] : self.cuts[batch + 1]].astype(np.int64))
        return update


@dataclass(frozen=True, kw_only=True)
class Sections:
    """What the sections of an epoch are planned from. Each is some of the pools, in their order."""

    order_P: NDArray[np.int32]
    pools: int
    source_lengths_P: NDArray[np.integer]
    target_lengths_P: NDArray[np.integer]
    limits: Limits
    ranks: int
    micro_batches: int
    bits: np.random.PCG64

    def __len__(self) -> int:
        return min(self.pools, max(1, round(len(self.order_P) / _SECTION_PAIRS)))

    def plan(self, number: int) -> Section:
        """Return the section of that number, counted from 0: a pure function."""
        edges = [self._pool_start(pool) for pool in range(self._first_pool(number), self._first_pool(number + 1) + 1)]
        pools, ends = [], [np.zeros(1, np.int64)]
        for first, end in itertools.pairwise(edges):
            pool, pool_ends = pack(self.order_P[first:end], self.source_lengths_P, self.target_lengths_P, self.limits)
            pools.append(pool)
            ends.append(pool_ends + first - edges[0])
        cuts = np.concatenate(ends)
        # The only section of an epoch draws on where the order of the pairs left off, as before there were sections.
        bits = self.bits.jumped(number) if number else copy.deepcopy(self.bits)
        groups = np.random.Generator(bits).permutation(-(-(len(cuts) - 1) // self.ranks))
        return Section(np.concatenate(pools), cuts, np.array_split(groups, -(-len(groups) // self.micro_batches)))

    def _first_pool(self, section: int) -> int:
        return self.pools * section // len(self)

    def _pool_start(self, pool: int) -> int:
        """Return the position of a pool's first pair; the first pools may have a pair more than the others."""
        pairs, longer = divmod(len(self.order_P), self.pools)
        return pool * pairs + min(pool, longer)


class EpochPlan(Sequence[Update]):
    """The updates of an epoch. Compact: some bytes a pair, whatever the number of updates.

    The sections of a large corpus are planned as they are reached, and all of them for the length: ask whether an
    update `exists` instead, which plans no further than needed.
    """

    def __init__(self, sections: Sections) -> None:
        self._sections = sections
        self._first_updates = [0]  # of the sections that have been planned, and of the one after them
        self._number = -1
        self._section: Section | None = None

    def exists(self, number: int) -> bool:
        """Tell whether the epoch has an update of that number, counted from 0."""
        while number >= self._first_updates[-1] and len(self._first_updates) <= len(self._sections):
            section = self._planned(len(self._first_updates) - 1)
            self._first_updates.append(self._first_updates[-1] + len(section.groups))
        return number < self._first_updates[-1]

    def __len__(self) -> int:
        self.exists(sys.maxsize)
        return self._first_updates[-1]

    @overload
    def __getitem__(self, number: int) -> Update: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Update]: ...
    def __getitem__(self, number: int | slice) -> Update | Sequence[Update]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        if number < 0 or not self.exists(number):
            raise IndexError(f"the epoch has no update {number}")
        section = bisect.bisect_right(self._first_updates, number) - 1
        return self._planned(section).update(number - self._first_updates[section], self._sections.ranks)

    def _planned(self, number: int) -> Section:
        if self._section is None or self._number != number:
            self._section, self._number = self._sections.plan(number), number
        return self._section


def plan_epoch(
    source_lengths_P: NDArray[np.integer],
    target_lengths_P: NDArray[np.integer],
    *,
    batch_target_tokens: int,
    seed: int,
    epoch: int,
    ranks: int = 1,
    micro_batches: int = 1,
) -> EpochPlan:
    """Return the updates of an epoch: a pure function of the arguments.

    Every pair is in exactly one batch. An update has at most `micro_batches` batches for each rank, together at most
    `batch_target_tokens` target tokens (unless a single sentence has more than a batch's share); each batch's source
    positions, padding included, are bounded too. What the ranks compute at the same time is of similar length; the
    micro-batches of a rank are not.

    Pools of shuffled pairs are sorted so that neighbours are alike and cut where it pads least; the batches of a
    section, which is one pool or several, are shuffled.
    """
    bits = np.random.PCG64([seed, epoch])
    generator = np.random.Generator(bits)
    order_P = generator.permutation(np.arange(len(target_lengths_P), dtype=np.int32))
    limits = Limits.of(source_lengths_P, target_lengths_P, max(1, batch_target_tokens // (ranks * micro_batches)))
    sections = Sections(
        order_P=order_P,
        pools=_number_of_pools(order_P, source_lengths_P, target_lengths_P, limits),
        source_lengths_P=source_lengths_P,
        target_lengths_P=target_lengths_P,
        limits=limits,
        ranks=ranks,
        micro_batches=micro_batches,
        bits=bits,
    )
    return EpochPlan(sections)


def batches_by_length(
    source_lengths_P: NDArray[np.integer], target_lengths_P: NDArray[np.integer], target_tokens: int
) -> list[Index]:
    """Return batches of all pairs, for when only the padding matters and not who meets whom. Long sources with short
    targets make small batches: their positions take memory too."""
    limits = Limits(target_tokens=target_tokens, source_positions=_UNLIKE_SIDES * target_tokens)
    order_P, ends = pack(np.arange(len(source_lengths_P), dtype=np.int32), source_lengths_P, target_lengths_P, limits)
    return np.split(order_P.astype(np.int64), ends[:-1])


def pack(
    pool: NDArray[np.int32],
    source_lengths_P: NDArray[np.integer],
    target_lengths_P: NDArray[np.integer],
    limits: Limits,
) -> tuple[NDArray[np.int32], Index]:
    """Return the pairs of a pool, sorted, and the position behind the last pair of each batch."""
    source, target = source_lengths_P[pool].astype(np.int64), target_lengths_P[pool].astype(np.int64)
    order = sort_by_length(source, target, limits)
    return pool[order], _cut(source[order], target[order], limits)


def sort_by_length(source: Index, target: Index, limits: Limits) -> Index:
    """Return an order whose neighbours are of similar length on both sides.

    The pairs, by target length, are cut into strips of about equally many target tokens, where the length changes.
    Within a strip they go by source length, up and down by turns. There are about as many strips as batches in a strip,
    so neither side is padded much. Pairs of the same strip and source length stay in the order in which they came.
    """
    by_target = np.argsort(target, kind="stable")
    sorted_target = target[by_target]
    tokens = np.cumsum(sorted_target)
    strips = max(1, round(_STRIPS * math.sqrt(tokens[-1] / limits.target_tokens)))
    marks = np.searchsorted(tokens, tokens[-1] * np.arange(1, strips) / strips)
    left = np.searchsorted(sorted_target, sorted_target[marks], "left")
    right = np.searchsorted(sorted_target, sorted_target[marks], "right")
    starts = np.unique(np.where(marks - left < right - marks, left, right))
    strip = np.empty_like(target)
    strip[by_target] = np.searchsorted(starts, np.arange(len(target)), "right")
    return np.lexsort((np.where(strip % 2 == 0, source, -source), strip))


def _number_of_pools(
    order_P: NDArray[np.int32],
    source_lengths_P: NDArray[np.integer],
    target_lengths_P: NDArray[np.integer],
    limits: Limits,
) -> int:
    """Return how many pools there are: as many as the padding share allows, judged by the first pairs of the epoch."""
    pairs_per_batch = limits.target_tokens / float(target_lengths_P.mean())
    batches: float = _MIN_POOL_BATCHES
    while batches < _MAX_POOL_BATCHES and batches * pairs_per_batch < len(order_P):
        pool = order_P[: max(1, round(batches * pairs_per_batch))]
        if _padding_share(pool, source_lengths_P, target_lengths_P, limits) <= _PADDING_SHARE:
            break
        batches *= _POOL_GROWTH
    return max(1, int(len(order_P) / max(1.0, batches * pairs_per_batch)))


def _padding_share(
    pool: NDArray[np.int32],
    source_lengths_P: NDArray[np.integer],
    target_lengths_P: NDArray[np.integer],
    limits: Limits,
) -> float:
    order, ends = pack(pool, source_lengths_P, target_lengths_P, limits)
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    tokens, positions = 0, 0
    for lengths_P in (source_lengths_P, target_lengths_P):
        lengths = lengths_P[order].astype(np.int64)
        tokens += int(lengths.sum())
        positions += int((np.maximum.reduceat(lengths, starts) * (ends - starts)).sum())
    return 1.0 - tokens / positions


def _cut(source: Index, target: Index, limits: Limits) -> Index:
    """Return where the batches of a sorted pool end: the cheapest way to cut it, by dynamic programming.

    A batch costs its positions on both sides, padding included, and something for being one. It may be cut where the
    source length changes, and in sixteen places more: the blocks in between stay whole.
    """
    starts_K = _block_starts(source, target, limits)
    ends_K = np.append(starts_K[1:], len(source))
    tokens_before_K = np.concatenate((np.zeros(1, np.int64), np.cumsum(target)))
    cost_KW = _costs(
        starts_K,
        ends_K,
        np.maximum.reduceat(source, starts_K),
        np.maximum.reduceat(target, starts_K),
        tokens_before_K[ends_K],
        tokens_before_K[starts_K],
        limits,
    )
    width = cost_KW.shape[1]
    best = np.full(width + len(starts_K), np.inf)  # best[width - 1 + k]: the cheapest way to cut the first k blocks
    best[width - 1] = 0.0
    blocks_of_last = np.empty(len(starts_K), np.int64)
    for block, cost_W in enumerate(cost_KW):
        total_W = cost_W + best[block : block + width]
        cheapest = int(total_W.argmin())
        best[width + block] = total_W[cheapest]
        blocks_of_last[block] = width - cheapest
    last, ends = len(starts_K) - 1, []
    while last >= 0:
        ends.append(int(ends_K[last]))
        last -= int(blocks_of_last[last])
    return np.array(ends[::-1], np.int64)


def _block_starts(source: Index, target: Index, limits: Limits) -> Index:
    """Return where the blocks begin. A block fits a batch, unless it is a single pair that does not."""
    share = np.maximum(target / limits.target_tokens, source / limits.source_positions)
    sixteenth = (_BLOCKS * (np.cumsum(share) - share)).astype(np.int64)
    is_start = np.ones(len(source), np.bool_)
    is_start[1:] = (np.diff(source) != 0) | (np.diff(sixteenth) != 0) | (share[1:] > 1 / _BLOCKS)
    return np.flatnonzero(is_start)


def _costs(
    starts_K: Index,
    ends_K: Index,
    source_K: Index,
    target_K: Index,
    tokens_up_to_K: Index,
    tokens_before_K: Index,
    limits: Limits,
) -> NDArray[np.float64]:
    """Return cost_KW: of the batch that ends with block k and begins w - W + 1 blocks before it; inf: not allowed."""
    blocks = np.arange(len(starts_K))
    first_K = np.searchsorted(tokens_before_K, tokens_up_to_K - limits.target_tokens, "left")
    width = max(1, int((blocks - first_K).max()) + 1)
    first_KW = blocks[:, None] - np.arange(width - 1, -1, -1)
    exists_KW = first_KW >= 0
    first_KW = np.maximum(first_KW, 0)
    source_KW, target_KW = (
        np.maximum.accumulate(longest_K[first_KW][:, ::-1], axis=1)[:, ::-1] for longest_K in (source_K, target_K)
    )
    pairs_KW = ends_K[:, None] - starts_K[first_KW]
    tokens_KW = tokens_up_to_K[:, None] - tokens_before_K[first_KW]
    fits_KW = (tokens_KW <= limits.target_tokens) & (pairs_KW * source_KW <= limits.source_positions)
    fits_KW[:, -1] = True  # a single block
    emptiness_KW = 1.0 - tokens_KW / limits.target_tokens
    extra_KW = limits.target_tokens * (_BATCH_COST + _EMPTINESS_COST * emptiness_KW**2)
    cost_KW = pairs_KW * (source_KW + target_KW) + extra_KW
    return np.where(fits_KW & exists_KW, cost_KW, np.inf)
