"""Benchmarks that translate the test set of a corpus with a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from bench.shared.command_line import add_corpus, add_model, measured
from bench.shared.result import Result
from bench.shared.trained_model import ModelUnfit, task_of, trained_bundle
from examples.local_service import ServiceFailed
from examples.parallel_text import TextMissing

Measure: TypeAlias = "Callable[[Path, Sequence[str], bool], Result]"
"""Measures a bundle on sentences; True for the short form."""
FAILURES: Final = (TextMissing, FileNotFoundError, ModelUnfit, ServiceFailed)


def run(
    name: str,
    description: str | None,
    measure: Measure,
    *,
    quick_sentences: int,
    sentences: int | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run the benchmark on the first `sentences` of the test set, or on all; return the exit status."""
    parser = argparse.ArgumentParser(prog=f"make {name}", description=description)
    add_corpus(parser)
    add_model(parser)
    parser.add_argument("--quick", action="store_true", help=f"translate the first {quick_sentences} sentences only")
    arguments = parser.parse_args(argv)

    def measure_trained() -> Result:
        task = task_of(arguments.data, arguments.source, arguments.target)
        bundle = trained_bundle(arguments.model, task)
        test = task.corpus.test.source[: quick_sentences if arguments.quick else sentences]
        return measure(bundle, test, arguments.quick)

    return measured(name, measure_trained, FAILURES)
