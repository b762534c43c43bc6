"""From a corpus to subwords and tokenised pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from ferryman_service.domain.corpora import CorpusFiles, Split
from ferryman_service.domain.recipe import DataRecipe
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.text.subwords import Subwords, train_subwords
from ferryman_service.training.corpus import DropReason, TextPair, clean_pairs, describe_drops
from ferryman_service.training.pairs import PairWriter, TokenPairs, TokenSide

_CHUNK_PAIRS: Final = 4096


@dataclass(frozen=True)
class ValidationPairs:
    """The usable validation pairs: sources and references, both normalised as the model sees them, and the tokens of
    both sides. `dropped` describes the others; it is empty if there are none."""

    sources: list[str]
    references: list[str]
    tokens: TokenPairs
    dropped: str


def learn_subwords(
    corpus: CorpusFiles, recipe: DataRecipe, model: Path, *, seed: int, check: Callable[[], None]
) -> Subwords:
    """Learn the joint subwords of both sides of the training pairs, into the file `model`. Raises TrainingFailed."""
    return train_subwords(
        _lines(corpus, check),
        model,
        vocabulary_size=recipe.vocabulary_size,
        algorithm=recipe.subword_algorithm,
        character_coverage=recipe.character_coverage,
        seed=seed,
        split_digits=recipe.split_digits,
        reduce_vocabulary=recipe.reduce_vocabulary,
    )


def tokenise_training_pairs(
    corpus: CorpusFiles,
    subwords: Subwords,
    recipe: DataRecipe,
    folder: Path,
    check: Callable[[], None],
    *,
    threads: int,
) -> str:
    """Write the tokenised usable training pairs into a new folder; describe the others, "" if there are none.

    Raises TrainingFailed (NO_TRAINING_PAIRS) if none is usable.
    """
    dropped: Counter[DropReason] = Counter()
    used = 0
    with PairWriter(folder) as writer:
        for chunk in _tokenised(corpus, Split.TRAIN, subwords, recipe, dropped, threads=threads):
            writer.add([pair.source_tokens for pair in chunk], [pair.target_tokens for pair in chunk])
            used += len(chunk)
            check()
    total = used + dropped.total()
    if not used:
        message = f"no training pair is usable: dropped {describe_drops(dropped, total)}"
        raise TrainingFailed(FailureReason.NO_TRAINING_PAIRS, message)
    return describe_drops(dropped, total) if dropped else ""


def tokenise_validation_pairs(
    corpus: CorpusFiles, subwords: Subwords, recipe: DataRecipe, *, threads: int
) -> ValidationPairs:
    """Return the usable validation pairs, duplicates and unlike lengths included.

    Raises TrainingFailed (NO_VALIDATION_PAIRS) if none is usable.
    """
    dropped: Counter[DropReason] = Counter()
    chunks = _tokenised(corpus, Split.VALIDATION, subwords, recipe, dropped, threads=threads)
    pairs = [pair for chunk in chunks for pair in chunk]
    total = len(pairs) + dropped.total()
    if not pairs:
        message = f"no validation pair is usable: dropped {describe_drops(dropped, total)}"
        raise TrainingFailed(FailureReason.NO_VALIDATION_PAIRS, message)
    return ValidationPairs(
        sources=[pair.text.source for pair in pairs],
        references=[pair.text.target for pair in pairs],
        tokens=TokenPairs(
            TokenSide.from_sentences([pair.source_tokens for pair in pairs]),
            TokenSide.from_sentences([pair.target_tokens for pair in pairs]),
        ),
        dropped=describe_drops(dropped, total) if dropped else "",
    )


@dataclass(frozen=True)
class _TokenisedPair:
    """A pair with the subword ids of both sides, end symbols not yet added."""

    text: TextPair
    source_tokens: list[int]
    target_tokens: list[int]

    def drop_reason(self, recipe: DataRecipe, split: Split) -> DropReason | None:
        """Return why the pair is not used, if it is not. The end symbol counts for the length, not for the ratio."""
        lengths = len(self.source_tokens), len(self.target_tokens)
        if max(lengths) + 1 > recipe.max_sentence_tokens:
            return DropReason.TOO_LONG
        if split is Split.TRAIN and max(lengths) > recipe.max_length_ratio * min(lengths):
            return DropReason.LENGTH_RATIO
        return None


def _lines(corpus: CorpusFiles, check: Callable[[], None]) -> Iterator[str]:
    for number, pair in enumerate(clean_pairs(corpus, Split.TRAIN, Counter())):
        if number % _CHUNK_PAIRS == 0:
            check()
        yield pair.source
        yield pair.target


def _tokenised(
    corpus: CorpusFiles,
    split: Split,
    subwords: Subwords,
    recipe: DataRecipe,
    dropped: Counter[DropReason],
    *,
    threads: int,
) -> Iterator[list[_TokenisedPair]]:
    """Yield the usable pairs in chunks, counting the others in `dropped`."""
    texts = clean_pairs(corpus, split, dropped, keep_duplicates=split is Split.VALIDATION)
    while chunk := list(islice(texts, _CHUNK_PAIRS)):
        sources = subwords.encode([text.source for text in chunk], threads)
        targets = subwords.encode([text.target for text in chunk], threads)
        usable = []
        for pair in map(_TokenisedPair, chunk, sources, targets):
            reason = pair.drop_reason(recipe, split)
            if reason is None:
                usable.append(pair)
            else:
                dropped[reason] += 1
        yield usable
