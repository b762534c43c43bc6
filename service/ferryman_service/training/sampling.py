"""Training pairs segmented anew in each epoch: subword regularisation (Kudo, 2018) and BPE-dropout (Provilkov et al.,
2020).

Subwords never cross the space between words, so each word is segmented by itself. SentencePiece's own sampling depends
on the process; this one is a function of (seed, epoch), so that a resumed run sees what an unbroken one does.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.recipe import DataRecipe, SubwordAlgorithm
from ferryman_service.domain.tokens import EOS, UNK
from ferryman_service.domain.training import TrainingJob
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.pairs import PairWriter, TokenPairs, TokenSide, open_pairs
from ferryman_service.training.prepared import PreparedCorpus

_WORD_START: Final = "\u2581"
_CANDIDATES: Final = 64
_KNOWN_WORDS: Final = 50_000  # some kilobytes each
CHUNK_PAIRS: Final = 4096

Segmentation = tuple[int, ...]


def epoch_source(
    job: TrainingJob,
    prepared: PreparedCorpus,
    subwords: Subwords,
    folder: Path,
    check: Callable[[], None] = lambda: None,
) -> Callable[[int], TokenPairs]:
    """Return what gives the training pairs of an epoch; the same ones for each if the recipe samples nothing.

    Sampled pairs are written to `folder`, where those of earlier epochs are removed. `check` is called now and then
    meanwhile; if it raises, the epoch can be asked for again.
    """
    pairs, recipe = prepared.pairs(), job.recipe.data

    def unchanged(_epoch: int) -> TokenPairs:
        prepared.keep()
        return pairs

    if not (recipe.subword_regularization_alpha or recipe.bpe_dropout):
        return unchanged
    sampler = WordSampler(subwords, recipe, job.recipe.seed)

    def sampled(epoch: int) -> TokenPairs:
        prepared.keep()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with PairWriter(folder / str(epoch)) as writer:
            for first in range(0, len(pairs), CHUNK_PAIRS):
                check()
                end = min(first + CHUNK_PAIRS, len(pairs))
                sides = [
                    _resegment(side, range(first, end), sampler, [job.recipe.seed, epoch, number, first], recipe)
                    for number, side in enumerate((pairs.source, pairs.target))
                ]
                writer.add(*sides)
        return open_pairs(folder / str(epoch))

    return sampled


class WordSampler:
    """Draws segmentations of words. A word is named by the segmentation that it has without sampling."""

    def __init__(self, subwords: Subwords, recipe: DataRecipe, seed: int) -> None:
        self._subwords = subwords
        self._recipe = recipe
        self._seed = seed
        self._pieces = [subwords.piece(token) for token in range(subwords.size)]
        self.starts_word = np.array([piece.startswith(_WORD_START) for piece in self._pieces])
        self._known: dict[Segmentation, tuple[list[Segmentation], list[float]]] = {}

    def draw(self, word: Segmentation, number: float) -> Segmentation:
        """Return the segmentation that a number, equally distributed over 0 to 1, stands for."""
        found = self._known.get(word)
        if found is None:
            if len(self._known) == _KNOWN_WORDS:
                self._known.clear()  # the frequent ones are soon back
            found = self._known[word] = self._candidates(word)
        segmentations, cumulative = found
        return segmentations[min(bisect.bisect_right(cumulative, number), len(segmentations) - 1)]

    def _candidates(self, word: Segmentation) -> tuple[list[Segmentation], list[float]]:
        """Return the segmentations that may be drawn, and their cumulative probabilities."""
        text = "".join(self._pieces[token] for token in word)
        if EOS in word or UNK in word or not text.startswith(_WORD_START) or text == _WORD_START:
            return [word], [1.0]
        if self._recipe.subword_algorithm is SubwordAlgorithm.UNIGRAM:
            return self._unigram_candidates(text.removeprefix(_WORD_START))
        generator = random.Random(f"{self._seed} {text}")  # noqa: S311
        drawn = [self._merge(text, generator) for _ in range(_CANDIDATES)]
        return drawn, [(index + 1) / _CANDIDATES for index in range(_CANDIDATES)]

    def _unigram_candidates(self, text: str) -> tuple[list[Segmentation], list[float]]:
        """Return the most probable segmentations, drawn with their probability to the power of alpha."""
        found = [tuple(tokens) for tokens in self._subwords.segmentations(text, _CANDIDATES)]
        scores = [sum(map(self._subwords.score, tokens)) for tokens in found]
        weights = [math.exp(self._recipe.subword_regularization_alpha * (score - max(scores))) for score in scores]
        return found, [total / sum(weights) for total in itertools.accumulate(weights)]

    def _merge(self, text: str, generator: random.Random) -> Segmentation:
        """Merge characters as BPE does, the earliest learnt merge first, each possible one left out at random."""
        parts = list(text)
        while len(parts) > 1:
            merges = [
                (-self._subwords.score(token), index)
                for index, pair in enumerate(itertools.pairwise(parts))
                if (token := self._subwords.token("".join(pair))) is not None
                and generator.random() >= self._recipe.bpe_dropout
            ]
            if not merges:
                break
            _, index = min(merges)
            parts[index : index + 2] = ["".join(parts[index : index + 2])]
        tokens = [self._subwords.token(part) for part in parts]
        return tuple(UNK if token is None else token for token in tokens)


def _resegment(
    side: TokenSide, pairs: range, sampler: WordSampler, seed: list[int], recipe: DataRecipe
) -> list[list[int]]:
    """Return the subword ids of the sentences, without end symbols. One that would become too long stays as it was."""
    generator = np.random.Generator(np.random.PCG64(seed))
    sentences = []
    for index in pairs:
        tokens_L = side.tokens_N[side.starts_P[index] : side.starts_P[index] + side.lengths_P[index] - 1]
        words = list(_words(tokens_L, sampler.starts_word))
        drawn = [sampler.draw(word, number) for word, number in zip(words, generator.random(len(words)), strict=True)]
        tokens = list(itertools.chain.from_iterable(drawn))
        fits = len(tokens) < recipe.max_sentence_tokens
        sentences.append(tokens if fits else tokens_L.tolist())
    return sentences


def _words(tokens_L: NDArray[np.int32], starts_word_V: NDArray[np.bool_]) -> Iterator[Segmentation]:
    tokens: list[int] = tokens_L.tolist()
    cuts = [0, *(np.flatnonzero(starts_word_V[tokens_L[1:]]) + 1).tolist(), len(tokens)]
    for first, end in itertools.pairwise(cuts):
        yield tuple(tokens[first:end])
