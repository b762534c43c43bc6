"""What the quality benchmark does with its files and records."""

from datetime import UTC, datetime, timedelta

import pytest

from bench import quality
from examples.parallel_text import TextMissing
from ferryman.types import MetricRecord, RunState, StateChange, ValidationMetrics


def write_corpus(folder, test_name):
    for name in ("train", "val", test_name):
        for language in ("en", "de"):
            (folder / f"{name}.{language}").write_text(f"{name} {language}\n")


@pytest.mark.parametrize("test_name", ["test_2016_flickr", "test"])
def test_a_corpus_is_found_by_its_names(tmp_path, test_name):
    write_corpus(tmp_path, test_name)
    corpus = quality.find_corpus(tmp_path, "en", "de")
    assert corpus.test_name == test_name
    assert corpus.test.target == [f"{test_name} de"]
    assert corpus.train.source == tmp_path / "train.en"


def test_a_folder_without_test_files_is_told_apart(tmp_path):
    with pytest.raises(TextMissing, match="pass DATA=folder"):
        quality.find_corpus(tmp_path, "en", "de")


def test_the_quick_form_is_shorter_unless_minutes_are_given():
    assert quality.parse([]).minutes == 15
    assert quality.parse(["--quick"]).minutes == 6
    assert quality.parse(["--quick", "--minutes", "2"]).minutes == 2


def test_bleu_is_shown_over_the_time_since_the_start(capsys):
    validation = ValidationMetrics(
        step=500,
        epoch=1,
        loss=2.4,
        nll_per_token=2.25,
        perplexity=9.5,
        bleu=12.5,
        chrf=30.0,
        translated_pairs=100,
        seconds=1.5,
        best=True,
    )
    start = datetime(2026, 3, 3, tzinfo=UTC)
    payloads = [(0, StateChange(state=RunState.QUEUED)), (5, StateChange(state=RunState.RUNNING)), (65, validation)]
    quality.show_progress(
        [
            MetricRecord(sequence=number, time=start + timedelta(seconds=seconds), payload=payload)
            for number, (seconds, payload) in enumerate(payloads, start=1)
        ]
    )
    assert capsys.readouterr().out.splitlines()[-1].split() == ["65", "500", "12.50", "2.2500"]
