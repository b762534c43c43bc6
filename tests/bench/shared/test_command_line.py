"""The options that benchmarks share, and their way to an exit status."""

import argparse

import pytest

from bench.shared.command_line import add_corpus, add_model, measured


class Unfit(Exception):
    """A benchmark cannot run."""


def fail():
    raise Unfit("no model")


def test_failure_ends_program_with_its_message():
    with pytest.raises(SystemExit, match="bench-x: no model"):
        measured("bench-x", fail, (Unfit,))


def test_bug_is_raised():
    with pytest.raises(Unfit):
        measured("bench-x", fail, (OSError,))


def test_default_languages_are_english_and_german():
    parser = argparse.ArgumentParser()
    add_corpus(parser)
    add_model(parser)
    arguments = parser.parse_args([])
    assert (arguments.source, arguments.target, arguments.model) == ("en", "de", None)
