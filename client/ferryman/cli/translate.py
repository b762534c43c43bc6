"""`ferryman translate`: translate arguments or standard input."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Final

import typer

from ferryman import Translation
from ferryman.cli.common import connect
from ferryman.errors import InvalidSentence

BATCH_SENTENCES: Final = 64
"""Lines of standard input that are sent in one call."""


def translate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help='"name" for the latest version, or "name/version".')],
    text: Annotated[
        list[str] | None, typer.Argument(help="Sentences; without any, the lines of standard input.")
    ] = None,
    beam_size: Annotated[int | None, typer.Option(help="Hypotheses kept at each step; 1 is greedy.")] = None,
    n_best: Annotated[int | None, typer.Option(help="Hypotheses to print: number, score and text, by tabs.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Exponent of the length normalisation.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest translation, in subwords.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a sentence.")] = False,
) -> None:
    """Translate sentences, one a line."""
    sentences = text or _standard_input()
    # A person who types wants each answer at once.
    batch_size = 1 if not text and sys.stdin.isatty() else BATCH_SENTENCES
    numbers = itertools.count()
    with connect(context) as client:
        for batch in _batches(sentences, batch_size):
            result = client.translate(
                model,
                batch,
                beam_size=beam_size,
                n_best=n_best,
                length_penalty=length_penalty,
                max_length=max_length,
            )
            for source, translation in zip(batch, result.translations, strict=True):
                print(_render(next(numbers), source, translation, as_json, n_best), flush=True)


def _standard_input() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidSentence(f"standard input, line {number}: not UTF-8 ({error.reason})") from error


def _batches(sentences: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(sentences)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _render(number: int, source: str, translation: Translation, as_json: bool, n_best: int | None) -> str:
    if as_json:
        return json.dumps({"source": source, **asdict(translation)}, ensure_ascii=False)
    if n_best is None:
        return translation.text
    return "\n".join(_n_best_lines(number, translation))


def _n_best_lines(number: int, translation: Translation) -> Sequence[str]:
    return [f"{number}\t{hypothesis.score:.4f}\t{hypothesis.text}" for hypothesis in translation.hypotheses]
