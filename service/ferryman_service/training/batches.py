"""Batches: pairs that are computed together, as tensors.

Shape suffixes: B pairs of a batch, S source positions, T target positions, N target tokens without padding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferryman_service.domain.tokens import BOS, PAD
from ferryman_service.training.packing import Index
from ferryman_service.training.pairs import TokenPairs

SOURCE_MULTIPLE: Final = {"cpu": 1, "cuda": 8}
"""By device: the source positions of a batch for training are a multiple of this. A GPU's attention reads its mask of
the source in pieces of 16 bytes: another length costs a copy of the mask in every layer, and compiled code would be
compiled once for lengths that fit and once for the others. No mask has the target's length, which stays as it is."""


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
        """Return the batch on that device. Nobody waits until it has arrived on a GPU: what uses it comes after it."""
        return Batch(
            source_BS=_moved(self.source_BS, device),
            decoder_input_BT=_moved(self.decoder_input_BT, device),
            label_positions_N=_moved(self.label_positions_N, device),
            labels_N=_moved(self.labels_N, device),
            source_tokens=self.source_tokens,
        )


def make_batch(pairs: TokenPairs, index_B: Index, source_multiple: int = 1) -> Batch:
    """Return the batch of these pairs; the number of its source positions is a multiple of `source_multiple`."""
    source_BS = pairs.source.padded(index_B)
    source_BS = np.pad(source_BS, ((0, 0), (0, -source_BS.shape[1] % source_multiple)), constant_values=PAD)
    labels_BT = pairs.target.padded(index_B)
    label_positions_N = np.flatnonzero(labels_BT != PAD)
    return Batch(
        source_BS=torch.from_numpy(source_BS),
        decoder_input_BT=torch.from_numpy(_shift_right(labels_BT)),
        label_positions_N=torch.from_numpy(label_positions_N),
        labels_N=torch.from_numpy(labels_BT.ravel()[label_positions_N]),
        source_tokens=int(pairs.source.lengths_P[index_B].sum()),
    )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    # torch keeps pinned memory from being used again before the copy out of it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def _shift_right(labels_BT: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return <s> y1 .. yn where the labels are y1 .. yn </s>; where the label is padding, the input is too."""
    shifted_BT = np.roll(labels_BT, 1, axis=1)
    shifted_BT[:, 0] = BOS
    shifted_BT[labels_BT == PAD] = PAD
    return shifted_BT
