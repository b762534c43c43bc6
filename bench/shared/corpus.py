"""The text of the benchmarks: a corpus in a folder of files, and news sentences beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from examples.parallel_text import ParallelFiles, ParallelLines, TextMissing, find_files, read_lines

DEFAULT_DATA: Final = Path("../shared/data/multi30k")
TEST_NAMES: Final = ("test_2016_flickr", "test")
_NO_LINES: Final = ParallelLines(source=(), target=())


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus in files; `test_name` is the prefix of its test set."""

    train: ParallelFiles
    validation: ParallelFiles
    test: ParallelLines
    test_name: str


@dataclass(frozen=True, kw_only=True)
class News:
    """Sentences in the source language to translate, and training pairs for more words; either may be missing. `test`
    names the file of the sentences."""

    test: Path | None = None
    sentences: Sequence[str] = ()
    training: ParallelLines = field(default_factory=lambda: _NO_LINES)

    @property
    def described(self) -> str:
        """The source of the news, for a line of JSON."""
        return "none found: the sentences of the test set alone" if self.test is None else str(self.test)


def find_corpus(data: Path, source: str, target: str) -> Corpus:
    """Return the corpus in a folder with train, val and test files. Raises TextMissing."""
    for name in TEST_NAMES:
        if any((data / f"{name}.{source}{suffix}").exists() for suffix in ("", ".gz")):
            return Corpus(
                train=find_files(str(data / "train"), source, target),
                validation=find_files(str(data / "val"), source, target),
                test=read_lines(find_files(str(data / name), source, target)),
                test_name=name,
            )
    raise TextMissing(f"{data} has none of {', '.join(f'{name}.{source}' for name in TEST_NAMES)}: pass DATA=folder")


def read_training_text(data: Path, source: str, target: str) -> tuple[ParallelLines, ParallelLines]:
    """Return the training and the validation pairs of a folder; raises TextMissing."""
    train, validation = (read_lines(find_files(str(data / name), source, target)) for name in ("train", "val"))
    return train, validation


def find_news(data: Path, source: str, target: str) -> News:
    """Read the news in or beside the folder of a corpus; raises TextMissing for text that cannot be read.

    Sentences are in news.LANGUAGE, or in test.LANGUAGE in a folder `news`; training pairs in train.SOURCE and
    train.TARGET in a folder `news`. Each may be packed with gzip.
    """
    folders = (data, data.parent)
    prefixes = [folder / name for folder in folders for name in ("news", "news/news", "news/test")]
    test = next((path for prefix in prefixes if (path := _found(prefix, source, source))), None)
    training = next((pair for folder in folders if (pair := _found(folder / "news/train", source, target))), None)
    return News(
        test=None if test is None else test.source,
        sentences=() if test is None else read_lines(test).source,
        training=_NO_LINES if training is None else read_lines(training),
    )


def _found(prefix: Path, source: str, target: str) -> ParallelFiles | None:
    try:
        return find_files(str(prefix), source, target)
    except TextMissing:
        return None
