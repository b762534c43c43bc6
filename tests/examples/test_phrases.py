"""The built-in corpus: what it must be whatever the seed, and pairs checked by hand."""

import datetime
import hashlib
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from random import Random

import pytest

from examples import phrases
from examples.phrases import Pair

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus():
    return phrases.generate(seed=1)


def test_splits_have_requested_sizes(corpus):
    assert [len(split) for split in (corpus.train, corpus.validation, corpus.test)] == [30_000, 500, 300]


def test_source_sentences_are_unique(corpus):
    sources = [pair.source for split in (corpus.train, corpus.validation, corpus.test) for pair in split]
    assert len(set(sources)) == len(sources)


def test_source_has_one_target_for_all_seeds(corpus):
    targets = {pair.source: pair.target for pair in corpus.train}
    other = phrases.generate(seed=2, train=10_000)
    shared = [pair for pair in other.train if pair.source in targets]
    assert len(shared) > 100
    assert all(targets[pair.source] == pair.target for pair in shared)


def test_seed_determines_corpus():
    program = (
        "from examples import phrases\n"
        "for pair in phrases.generate(seed=5, train=200, validation=10, test=10).train: print(pair)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 200 * 20


def test_other_seed_gives_other_sentences():
    first, second = (phrases.generate(seed=seed, train=50, validation=1, test=1).train for seed in (1, 2))
    assert list(first) != list(second)


def test_sentences_are_single_nfc_lines_with_plain_spaces(corpus):
    for pair in [*corpus.train, *corpus.validation, *corpus.test]:
        for text in (pair.source, pair.target):
            assert unicodedata.is_normalized("NFC", text)
            assert text == " ".join(text.split())
            assert text.isprintable()
            assert text.endswith(".")


def test_template_sides_have_same_known_slots():
    for template in phrases.TEMPLATES:
        names = phrases.slots_of(template.source)
        assert names == phrases.slots_of(template.target), template
        assert {name.rstrip("2") for name in names} <= set(phrases.SLOTS), template


def test_every_slot_and_template_is_used(corpus):
    used = {name.rstrip("2") for template in phrases.TEMPLATES for name in phrases.slots_of(template.source)}
    assert used == set(phrases.SLOTS)
    assert len(phrases.TEMPLATES) >= 25
    beginnings = {" ".join(pair.target.split()[:1]) for pair in corpus.test}
    assert len(beginnings) > 25


def test_second_draw_of_slot_differs():
    template = Pair("{city} {city2}", "{city} {city2}")
    rng = Random(0)
    for _ in range(300):
        first, second = phrases.fill(template, rng).target.split()
        assert first != second


def test_sentences_use_plain_spaces_where_cldr_has_none():
    template = Pair("{percentage}", "{percentage}")
    assert {phrases.fill(template, Random(seed)).target[-2:] for seed in range(20)} == {" %"}


@pytest.mark.parametrize(
    ("pair", "source", "target"),
    [
        (phrases.decimal(1_234_567), "1,234,567", "1.234.567"),
        (phrases.percent(34), "3.4%", "3,4\u00a0%"),
        (phrases.percent(400), "40%", "40\u00a0%"),
        (phrases.price(124_990, "EUR"), "€1,249.90", "1.249,90\u00a0€"),
        (phrases.price(5, "GBP"), "£0.05", "0,05\u00a0£"),
        (phrases.cardinal(342), "three hundred and forty-two", "dreihundertzweiundvierzig"),
        (phrases.ordinal(3), "third", "dritte"),
        (phrases.ordinal(23), "twenty-third", "dreiundzwanzigste"),
        (phrases.ordinal_number(23), "23rd", "23."),
        (phrases.year_words(1987), "nineteen eighty-seven", "neunzehnhundertsiebenundachtzig"),
        (
            phrases.date(datetime.date(2026, 3, 3), "EEEE, d MMMM y", "EEEE, d. MMMM y"),
            "Tuesday, 3 March 2026",
            "Dienstag, 3. März 2026",
        ),
        (phrases.clock(16, 35), "4:35 pm", "16:35"),
        (phrases.clock(0, 5), "12:05 am", "0:05"),
        (phrases.clock(12, 0), "12:00 pm", "12:00"),
        (phrases.spoken_clock(1, 0), "one o'clock", "ein Uhr"),
        (phrases.spoken_clock(6, 0), "six o'clock", "sechs Uhr"),
        (phrases.spoken_clock(1, 15), "a quarter past one", "Viertel nach eins"),
        (phrases.spoken_clock(5, -10), "ten to five", "zehn vor fünf"),
        (phrases.spoken_clock(3, 30), "half past three", "halb vier"),
        (phrases.spoken_clock(12, 30), "half past twelve", "halb eins"),
        (phrases.unit(1, "duration-hour"), "1 hour", "1 Stunde"),
        (phrases.unit(-7, "temperature-celsius", "short"), "-7°C", "-7 °C"),
        (phrases.dative_duration(1, "day"), "1 day", "1 Tag"),
        (phrases.dative_duration(4, "week"), "4 weeks", "4 Wochen"),
        (phrases.dative_duration(11, "month"), "11 months", "11 Monaten"),
        (phrases.dative_duration(40, "year"), "40 years", "40 Jahren"),
    ],
)
def test_slot_values_are_correct_in_both_languages(pair, source, target):
    assert pair == Pair(source, target)


@pytest.mark.parametrize(
    ("start", "source", "target"),
    [
        (
            "{vehicle} to",
            "The train to Vienna leaves on Tuesday, 3 March 2026 at 4:35 pm.",
            "Der Zug nach Wien fährt am Dienstag, 3. März 2026 um 16:35 Uhr ab.",
        ),
        (
            "Take {medicine",
            "Take half a tablet every six hours for ten days.",
            "Nehmen Sie zehn Tage lang alle sechs Stunden eine halbe Tablette ein.",
        ),
        (
            "{relative}'s birthday",
            "My aunt's birthday is on the twenty-third of August.",
            "Meine Tante hat am dreiundzwanzigsten August Geburtstag.",
        ),
    ],
)
def test_sample_sentences_are_correct(start, source, target):
    """Each slot yields the value that a person wrote down; only the template is under test."""
    values = {
        "vehicle": Pair("The train", "Der Zug"),
        "city": Pair("Vienna", "Wien"),
        "full_date": phrases.date(datetime.date(2026, 3, 3), "EEEE, d MMMM y", "EEEE, d. MMMM y"),
        "time": phrases.clock(16, 35),
        "medicine_accusative": Pair("half a tablet", "eine halbe Tablette"),
        "few_words": phrases.cardinal(6),
        "few_words2": phrases.cardinal(10),
        "relative": Pair("My aunt", "Meine Tante"),
        "day_words": phrases.ordinal(23),
        "month": Pair("August", "August"),
    }
    template = next(template for template in phrases.TEMPLATES if template.source.startswith(start))
    english = template.source.format(**{name: pair.source for name, pair in values.items()})
    german = template.target.format(**{name: pair.target for name, pair in values.items()})
    assert (english, german) == (source, target)


def test_demo_corpus_is_pinned(corpus):
    """The share that the demo promises is of these 300 sentences, after these pairs; with pinned CLDR and num2words."""
    pairs = [pair for split in (corpus.train, corpus.validation, corpus.test) for pair in split]
    text = "".join(f"{pair.source}\t{pair.target}\n" for pair in pairs)
    assert len(corpus.test) == 300
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "90688650c895c86d1b318f0efffe67b560d97c1c82eb694cde83fbeb26a14566"
    )


def test_program_writes_uploadable_files(tmp_path, capsys):
    assert phrases.main([str(tmp_path), "--small"]) == 0
    assert capsys.readouterr().out == "2,000 training, 100 validation and 100 test pairs\n"
    lines = {path.name: path.read_text(encoding="utf-8").splitlines() for path in tmp_path.iterdir()}
    assert {name: len(text) for name, text in lines.items()} == {
        f"{split}.{language}": count
        for split, count in (("train", 2000), ("val", 100), ("test", 100))
        for language in ("en", "de")
    }
    assert all("birthday is on the" in line for line in lines["train.en"])
    assert not set(lines["train.en"]) & set(lines["test.en"])
