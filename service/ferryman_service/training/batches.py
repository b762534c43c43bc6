"""Which pairs form which batch: by target tokens, of similar lengths, in an order that seed and epoch decide.

Shape suffixes: P pairs, B pairs of a batch, S source positions, T target positions, N target tokens without padding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferryman_service.domain.tokens import BOS, PAD
from ferryman_service.training.pairs import TokenPairs

# Larger pools pad less, but their batches are so alike inside and so unlike each other that a model learns slower.
_POOL_BATCHES: Final = 40
_MAX_SOURCE_SLACK: Final = 1.5
_STRIPS: Final = 1.5  # measured: more pad the source, fewer the target

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Pairs that are computed together.

    `decoder_input_BT` is the target shifted right, <s> y1 .. yn; `labels_N` holds y1 .. yn </s>, one after the
    other. Label i belongs to position `label_positions_N[i]` of the flattened decoder input; padding has no label.
    """

    source_BS: Tensor
    decoder_input_BT: Tensor
    label_positions_N: Tensor
    labels_N: Tensor
    source_tokens: int

    @property
    def target_tokens(self) -> int:
        """Target tokens, end symbols included, padding not."""
        return self.labels_N.numel()

    @property
    def positions(self) -> int:
        """Source and target positions, padding included."""
        return self.source_BS.numel() + self.decoder_input_BT.numel()

    @property
    def padding_share(self) -> float:
        """The share of padding among the positions."""
        return 1.0 - (self.source_tokens + self.target_tokens) / self.positions

    def repeated(self) -> Batch:
        """Return the batch with every pair twice: first all of them, then all again."""
        positions_N = self.label_positions_N
        return Batch(
            source_BS=self.source_BS.repeat(2, 1),
            decoder_input_BT=self.decoder_input_BT.repeat(2, 1),
            label_positions_N=torch.cat((positions_N, positions_N + self.decoder_input_BT.numel())),
            labels_N=self.labels_N.repeat(2),
            source_tokens=2 * self.source_tokens,
        )

    def halves(self) -> list[Batch]:
        """Return the batch in two, or as it is if it holds one pair."""
        pairs, length = self.decoder_input_BT.shape
        if pairs == 1:
            return [self]
        cuts = [0, pairs // 2, pairs]
        sentence_N = torch.div(self.label_positions_N, length, rounding_mode="floor")
        halves = []
        for first, end in itertools.pairwise(cuts):
            mine_N = (sentence_N >= first) & (sentence_N < end)
            source = self.source_BS[first:end]
            halves.append(
                Batch(
                    source_BS=source,
                    decoder_input_BT=self.decoder_input_BT[first:end],
                    label_positions_N=self.label_positions_N[mine_N] - first * length,
                    labels_N=self.labels_N[mine_N],
                    source_tokens=int((source != PAD).sum()),
                )
            )
        return halves

    def to(self, device: torch.device) -> Batch:
        """Return the batch on that device."""
        return Batch(
            source_BS=self.source_BS.to(device),
            decoder_input_BT=self.decoder_input_BT.to(device),
            label_positions_N=self.label_positions_N.to(device),
            labels_N=self.labels_N.to(device),
            source_tokens=self.source_tokens,
        )


def make_batch(pairs: TokenPairs, index_B: Index) -> Batch:
    """Return the batch of these pairs."""
    labels_BT = pairs.target.padded(index_B)
    label_positions_N = np.flatnonzero(labels_BT != PAD)
    return Batch(
        source_BS=torch.from_numpy(pairs.source.padded(index_B)),
        decoder_input_BT=torch.from_numpy(_shift_right(labels_BT)),
        label_positions_N=torch.from_numpy(label_positions_N),
        labels_N=torch.from_numpy(labels_BT.ravel()[label_positions_N]),
        source_tokens=int(pairs.source.lengths_P[index_B].sum()),
    )


def plan_epoch(
    source_lengths_P: Index, target_lengths_P: Index, *, batch_target_tokens: int, seed: int, epoch: int, parts: int = 1
) -> list[list[Index]]:
    """Return the updates of an epoch, each of at most `parts` batches: a pure function of the arguments.

    The parts are what ranks and micro-batches share out among themselves (`share`).

    Every pair is in exactly one batch. The batches of an update have together at most `batch_target_tokens` target
    tokens (unless a single sentence has more than a part's share); each part's source positions, padding included, are
    bounded too. Batches are cut from pools of shuffled pairs that are sorted by length, then shuffled.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    shuffled_P = generator.permutation(len(target_lengths_P))
    ratio = source_lengths_P.sum() / target_lengths_P.sum()
    limit = max(1, batch_target_tokens // parts)
    limits = (limit, _MAX_SOURCE_SLACK * ratio * limit)
    pool_pairs = max(1, round(_POOL_BATCHES * limit / target_lengths_P.mean()))
    updates: list[list[Index]] = []
    for start in range(0, len(shuffled_P), pool_pairs):
        pool = shuffled_P[start : start + pool_pairs]
        by_length = sort_by_length(pool, source_lengths_P, target_lengths_P, limit)
        batches = cut_batches(by_length, source_lengths_P, target_lengths_P, limits)
        updates += [batches[i : i + parts] for i in range(0, len(batches), parts)]
    return [updates[i] for i in generator.permutation(len(updates))]


def share(update: list[Index], rank: int, ranks: int) -> list[Index]:
    """Return a rank's micro-batches of an update."""
    return update[rank::ranks]


def cut_batches(
    sorted_P: Index, source_lengths_P: Index, target_lengths_P: Index, limits: tuple[float, float]
) -> list[Index]:
    """Cut a sorted order into batches.

    The limits are (target tokens, source positions with padding); a pair above them stands alone.
    """
    max_target_tokens, max_source_positions = limits
    sources, targets = source_lengths_P[sorted_P].tolist(), target_lengths_P[sorted_P].tolist()
    cuts = [0]
    target_tokens = longest_source = 0
    for position, (source, target) in enumerate(zip(sources, targets, strict=True)):
        target_tokens += target
        longest_source = max(longest_source, source)
        size = position - cuts[-1] + 1
        if size > 1 and (target_tokens > max_target_tokens or size * longest_source > max_source_positions):
            cuts.append(position)
            target_tokens, longest_source = target, source
    return np.split(sorted_P, _share_the_rest(cuts, sources, targets, limits)[1:])


def _share_the_rest(
    cuts: list[int], sources: Sequence[int], targets: Sequence[int], limits: tuple[float, float]
) -> list[int]:
    """Return the cuts with the last moved to the middle of the last two batches, where the limits allow it.

    The last batch would else be small at random, and its few sentences make a noisy update.
    """
    if len(cuts) < 2:
        return cuts
    first, end = cuts[-2], len(targets)
    middle = first + (end - first + 1) // 2
    halves = [slice(first, middle), slice(middle, end)]
    fits = all(
        sum(targets[half]) <= limits[0] and (half.stop - half.start) * max(sources[half], default=0) <= limits[1]
        for half in halves
    )
    return [*cuts[:-1], middle] if fits and middle < cuts[-1] else cuts


def sort_by_length(pool: Index, source_lengths_P: Index, target_lengths_P: Index, batch_target_tokens: float) -> Index:
    """Return the pairs in an order whose neighbours are of similar length on both sides.

    The pairs, by target length, are cut into strips of equally many target tokens. Within a strip they go by source
    length, up and down by turns. There are about as many strips as batches in a strip, so neither side is padded much.
    """
    source, target = source_lengths_P[pool], target_lengths_P[pool]
    by_target = np.lexsort((source, target))
    tokens_before = np.cumsum(target[by_target]) - target[by_target]
    total = int(target.sum())
    strips = max(1, round(_STRIPS * math.sqrt(total / batch_target_tokens)))
    strip = np.empty_like(pool)
    strip[by_target] = tokens_before * strips // total
    return pool[np.lexsort((np.where(strip % 2 == 0, source, -source), strip))]


def _shift_right(labels_BT: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return <s> y1 .. yn where the labels are y1 .. yn </s>; where the label is padding, the input is too."""
    shifted_BT = np.roll(labels_BT, 1, axis=1)
    shifted_BT[:, 0] = BOS
    shifted_BT[labels_BT == PAD] = PAD
    return shifted_BT
