"""The command lines of the benchmarks: shared options, and the way from a measurement to an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench.shared.corpus import DEFAULT_DATA
from bench.shared.result import Result, publish, watched_machine


def add_corpus(parser: argparse.ArgumentParser, files: str = "train, val and test files") -> None:
    """Add the options that name a corpus and its languages."""
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"folder with {files}")
    parser.add_argument("--source", default="en", help="source language (default: en)")
    parser.add_argument("--target", default="de", help="target language (default: de)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a trained bundle."""
    parser.add_argument("--model", type=Path, help="folder of a trained bundle (default: find one, or train one)")


def measured(name: str, measure: Callable[[], Result], failures: tuple[type[Exception], ...]) -> int:
    """Measure on a watched machine and publish the result; return the exit status.

    An exception of `failures` ends the program with its message and status 1.
    """
    try:
        with watched_machine():
            return publish(measure())
    except failures as error:
        sys.exit(f"{name}: {error}")
