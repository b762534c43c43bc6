"""Subwords: SentencePiece models over both sides of a corpus (Kudo and Richardson 2018)."""

from __future__ import annotations

import heapq
import io
import operator
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import sentencepiece

from ferryman_service.domain.recipe import SubwordAlgorithm
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.tokens import BOS, EOS, PAD, UNK

MAX_TRAINING_LINES: Final = 1_000_000
MAX_TRAINING_CHARACTERS: Final = 40_000_000
"""Frequent subwords are frequent in a sample too, and the unigram trainer takes some 20 bytes a character: 800 MB."""

# SentencePiece splits its sums by thread and so rounds them differently for another number of threads: a fixed number
# keeps the model a function of the corpus alone, on any machine.
_TRAINER_THREADS: Final = 16
_MAX_LINE_BYTES: Final = 65_536
_PORTION_CHARACTERS: Final = 65_536
_SILENT: Final = 2  # log errors only
_TOO_LARGE = re.compile(r"Please set it to a value <= (\d+)")
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


class Subwords:
    """A trained subword model. Safe to use from several threads at once."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor

    @classmethod
    def load(cls, model_path: Path) -> Subwords:
        """Read a model; raises OSError if there is none, RuntimeError if the file is not a model."""
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model_path.read_bytes())
        return cls(processor)

    @property
    def size(self) -> int:
        """The number of subwords, special symbols included."""
        return int(self._processor.GetPieceSize())

    def encode(self, sentences: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the subword ids of normalised sentences, without start and end symbols.

        One thread takes a portion at a time: no other thread runs while the ids of a portion become Python's numbers.
        """
        portions = [list(sentences)] if threads > 1 else _portions(sentences)
        pieces: list[list[int]] = []
        for portion in portions:
            pieces += self._processor.Encode(portion, out_type=int, num_threads=threads)
        return pieces

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of subword ids; special symbols leave no trace, except that UNK shows as U+2047."""
        text: str = self._processor.Decode([int(token) for token in tokens])
        return text

    def piece(self, token: int) -> str:
        """Return the text of one subword; a word's first begins with U+2581."""
        return str(self._processor.IdToPiece(token))

    def token(self, piece: str) -> int | None:
        """Return the id of a subword, None if there is no such one."""
        token = int(self._processor.PieceToId(piece))
        return None if token == UNK else token

    def score(self, token: int) -> float:
        """Return a unigram's log-probability; of BPE, the smaller the later the subword was merged."""
        return float(self._processor.GetScore(token))

    def segmentations(self, word: str, count: int) -> list[list[int]]:
        """Return the `count` most probable unigram segmentations of a word, best first; fewer if there are fewer."""
        found: list[list[int]] = self._processor.NBestEncode(word, nbest_size=count, out_type=int)
        return found


def train_subwords(
    lines: Iterable[str],
    model_path: Path,
    *,
    vocabulary_size: int,
    algorithm: SubwordAlgorithm,
    character_coverage: float,
    seed: int,
    split_digits: bool = False,
    reduce_vocabulary: bool = False,
    max_lines: int = MAX_TRAINING_LINES,
    max_characters: int = MAX_TRAINING_CHARACTERS,
) -> Subwords:
    """Learn subwords from normalised lines (both sides of the corpus), write the model file, and return the model.

    With `split_digits` every digit is a subword of its own. With `reduce_vocabulary` lines that yield fewer subwords
    than `vocabulary_size` give the model of the largest size that they can fill. Of more than `max_lines` lines or
    `max_characters` a random sample is used. The model file is a function of the lines and the other arguments. Raises
    TrainingFailed: VOCABULARY_TOO_LARGE or VOCABULARY_TOO_SMALL, naming a size that works.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(_sample(lines, max_lines, max_characters, seed)),
            model_writer=model,
            vocab_size=vocabulary_size,
            model_type=algorithm.value,
            character_coverage=character_coverage,
            split_digits=split_digits,
            hard_vocab_limit=not reduce_vocabulary,
            normalization_rule_name="identity",
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            num_threads=_TRAINER_THREADS,
            max_sentence_length=_MAX_LINE_BYTES,
            minloglevel=_SILENT,
        )
    except RuntimeError as error:
        raise _training_failed(str(error), vocabulary_size) from error
    model_path.write_bytes(model.getvalue())
    return Subwords.load(model_path)


def _portions(sentences: Sequence[str]) -> Iterator[list[str]]:
    """Yield the sentences in portions of few characters, or of one sentence."""
    portion: list[str] = []
    characters = 0
    for sentence in sentences:
        if portion and characters + len(sentence) > _PORTION_CHARACTERS:
            yield portion
            portion, characters = [], 0
        portion.append(sentence)
        characters += len(sentence)
    if portion:
        yield portion


def _sample(lines: Iterable[str], max_lines: int, max_characters: int, seed: int) -> list[str]:
    """Return the lines that drew the lowest numbers, as many as fit, in their order: each is as likely as another."""
    generator = random.Random(seed)  # noqa: S311
    kept: list[tuple[float, int, str]] = []  # a heap, whose first has the highest number
    characters, limit = 0, 1.0
    for index, line in enumerate(lines):
        if (number := generator.random()) >= limit:
            continue
        heapq.heappush(kept, (-number, index, line))
        characters += len(line)
        while len(kept) > max_lines or characters > max_characters:
            limit, _, left_out = heapq.heappop(kept)
            limit, characters = -limit, characters - len(left_out)
    return [line for _, _, line in sorted(kept, key=operator.itemgetter(1))]


def _training_failed(message: str, vocabulary_size: int) -> TrainingFailed:
    asked = f"recipe.data.vocabulary_size is {vocabulary_size}, but"
    if match := _TOO_LARGE.search(message):
        text = f"{asked} the corpus yields only {match[1]} subwords: leave it out, ask for at most {match[1]}, or "
        text += "give more text"
        return TrainingFailed(FailureReason.VOCABULARY_TOO_LARGE, text)
    if match := _TOO_SMALL.search(message):
        text = f"{asked} the corpus's characters alone need {match[1]}: ask for more, or lower data.character_coverage"
        return TrainingFailed(FailureReason.VOCABULARY_TOO_SMALL, text)
    if "!sentences_.empty()" in message:
        return TrainingFailed(
            FailureReason.NO_TRAINING_PAIRS, "the training corpus holds no text to learn subwords from"
        )
    raise AssertionError(f"SentencePiece failed in a way that is not known: {message}")
