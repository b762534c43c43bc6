"""Prepared corpora: made once, shared, whole or not there."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from ferryman_service.domain.recipe import DataRecipe, SubwordAlgorithm
from ferryman_service.domain.training import InitialWeights, RunCancelled
from ferryman_service.training import prepared as prepared_module
from ferryman_service.training.prepared import open_prepared, prepare_corpus, prepared_folder
from ferryman_service.training.sampling import epoch_source

WEEK_S = 7 * 24 * 3600


def prepare(job, reporter):
    return prepare_corpus(job, reporter, threads=1)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def work(job, small_recipe, reverse_corpus):
    return dataclasses.replace(job(small_recipe(), reverse_corpus), corpus_digest="a" * 64)


def with_data(job, **changes):
    data = dataclasses.replace(job.recipe.data, **changes)
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, data=data))


def test_an_entry_that_is_there_is_not_made_again(work, reporter, reverse_corpus):
    made = prepare(work, reporter)
    for path in reverse_corpus.files.values():
        path.unlink()  # nothing could be learnt again
    os.utime(made.folder, (1, 1))
    before = files_of(made.folder)
    found = prepare(work, reporter)
    assert found == made
    assert [code for _, code, _ in found.remarks] == ["SUBWORDS_TRAINED", "PAIRS_DROPPED"]
    assert files_of(found.folder) == before
    assert time.time() - found.folder.stat().st_mtime < WEEK_S  # it counts as used
    assert reporter.events == []


OTHER_DATA = {
    "vocabulary_size": 37,
    "subword_algorithm": SubwordAlgorithm.BPE,
    "character_coverage": 0.999,
    "max_sentence_tokens": 41,
    "max_length_ratio": 5.0,
    "split_digits": True,
    "reduce_vocabulary": True,
}
SAMPLING = {"subword_regularization_alpha": 0.5, "bpe_dropout": 0.1}


def test_an_entry_is_named_by_all_that_it_depends_on(work, tmp_path):
    assert OTHER_DATA.keys() | SAMPLING.keys() == {field.name for field in dataclasses.fields(DataRecipe)}
    subwords = []
    for name in ("one", "two"):
        path = tmp_path / name
        path.write_text(name)
        subwords.append(InitialWeights(weights=path, subwords=path))
    others = [
        work,
        *(with_data(work, **{name: value}) for name, value in OTHER_DATA.items()),
        dataclasses.replace(work, corpus_digest="b" * 64),
        dataclasses.replace(work, corpus_digest=""),
        dataclasses.replace(work, corpus_digest="", run_id="run_2"),
        *(dataclasses.replace(work, initial=initial) for initial in subwords),
    ]
    assert len({prepared_folder(other) for other in others}) == len(others)


def test_sampling_seed_and_run_share_an_entry(work, small_recipe):
    same = [
        *(with_data(work, **{name: value}) for name, value in SAMPLING.items()),
        dataclasses.replace(work, run_id="run_2"),
        dataclasses.replace(work, recipe=dataclasses.replace(work.recipe, seed=2)),
        dataclasses.replace(work, recipe=small_recipe(model={"d_model": 64}, stop={"max_steps": 1})),
    ]
    assert {prepared_folder(other) for other in same} == {prepared_folder(work)}


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty_object(path):
    path.write_bytes(b"{}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("subwords.model", cut_short),
        ("pairs/source.tokens", cut_short),
        ("pairs/target.lengths", lambda path: path.unlink()),
        ("prepared.json", cut_short),
        ("prepared.json", empty_object),
        ("prepared.json", lambda path: path.unlink()),
        ("subwords.model", flip),
        ("pairs/target.tokens", flip),
        ("prepared.json", flip),
    ],
)
def test_a_damaged_entry_is_made_again_and_the_log_says_so(work, reporter, name, damage):
    whole = files_of(prepare(work, reporter).folder)
    damage(prepared_folder(work) / name)
    assert damage is flip or open_prepared(prepared_folder(work)) is None
    again = prepare(work, reporter)
    assert files_of(again.folder) == whole
    (message,) = reporter.messages("PREPARED_CORPUS_DAMAGED")
    assert "made again" in message
    assert [path.name for path in work.prepared_dir.iterdir()] == [again.folder.name]


def many_pairs(words):
    """Return a pair for every two of so many words."""
    words = ["".join(random.Random(number).choices("abdefgiklmnorstu", k=5)) for number in range(words)]
    return [(f"{word} {other}", f"{other} {word}") for word, other in itertools.product(words, repeat=2)]


@pytest.fixture
def longer_work(work, write_corpus):
    """Work in which the reporter is asked several times, while subwords are learnt and while pairs are tokenised."""
    return dataclasses.replace(work, corpus=write_corpus(many_pairs(70), many_pairs(3)))


class LookingReporter:
    """A Reporter that keeps, for each check, what a death at that moment would leave."""

    def __init__(self, source, folder):
        self.source, self.folder, self.left = source, folder, []

    def check(self):
        self.left.append(self.folder / str(len(self.left)))
        shutil.copytree(self.source, self.left[-1])


def test_death_in_the_middle_leaves_no_usable_entry(longer_work, reporter, tmp_path):
    looking = LookingReporter(longer_work.prepared_dir, tmp_path / "left")
    whole = files_of(prepare(longer_work, looking).folder)
    assert len(looking.left) >= 4
    for folder in looking.left:
        assert list(folder.iterdir())  # something was half done
        job = dataclasses.replace(longer_work, prepared_dir=folder)
        assert open_prepared(prepared_folder(job)) is None
        assert files_of(prepare(job, reporter).folder) == whole
    assert reporter.events == []


def test_a_cancelled_maker_leaves_nothing(longer_work, reporter):
    for checks in range(1, 5):
        reporter.checks_left, reporter.error = checks, RunCancelled()
        with pytest.raises(RunCancelled):
            prepare(longer_work, reporter)
        assert list(longer_work.prepared_dir.iterdir()) == []
    reporter.checks_left = -1
    assert len(prepare(longer_work, reporter).pairs()) > 4096


class MeetingReporter:
    """A Reporter at whose first check the makers wait for each other."""

    def __init__(self, barrier):
        self.barrier, self.has_met, self.events = barrier, False, []

    def check(self):
        if not self.has_met:
            self.has_met = True
            self.barrier.wait(timeout=60)

    def event(self, level, code, message, *, repeats=False):
        self.events.append(code)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_two_makers_at_once_end_with_one_whole_entry(work, reporter, is_damaged):
    """The slower one takes the faster one's, and does not take it away."""
    if is_damaged:
        cut_short(prepare(work, reporter).folder / "subwords.model")
    barrier = Barrier(2)
    reporters = [MeetingReporter(barrier), MeetingReporter(barrier)]
    with ThreadPoolExecutor(2) as makers:
        first, second = makers.map(lambda each: prepare(work, each), reporters)
    assert first == second
    assert open_prepared(first.folder) == first
    assert [path.name for path in work.prepared_dir.iterdir()] == [first.folder.name]
    assert [each.events for each in reporters] == [["PREPARED_CORPUS_DAMAGED"] * is_damaged] * 2


def test_the_slower_maker_leaves_the_faster_ones_entry_alone(work, reporter):
    class Overtaken:
        """A Reporter at whose first check another worker makes the entry."""

        inode = None

        def check(self):
            if self.inode is None:
                self.inode = prepare(work, reporter).folder.stat().st_ino

    slower = Overtaken()
    assert prepare(work, slower).folder.stat().st_ino == slower.inode


def aged(path, seconds):
    path.mkdir(parents=True)
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_unused_entries_are_removed_after_a_week(work, reporter):
    parent = work.prepared_dir
    old = [aged(parent / f"{number:040x}", 2 * WEEK_S + number) for number in range(20)]
    recent = [aged(parent / f"{number:040x}", WEEK_S / 2) for number in range(20, 23)]
    left, in_the_making = (
        aged(parent / f".{0:040x}-{number:08x}", weeks * WEEK_S) for number, weeks in enumerate((2, 0.5))
    )
    foreign = [aged(parent / name, 2 * WEEK_S) for name in ("backup", ".snapshot")]
    made = prepare(work, reporter).folder
    kept = {path.name for path in parent.iterdir()}
    still_there = [path for path in old if path.name in kept]
    assert still_there == old[: prepared_module.KEPT - len(recent)]
    assert kept == {path.name for path in (*still_there, *recent, *foreign, in_the_making, made)}
    assert left.name not in kept


@pytest.mark.parametrize("changes", [{}, {"subword_regularization_alpha": 0.5}])
def test_a_run_that_trains_for_weeks_keeps_its_entry(work, reporter, tmp_path, changes):
    job = with_data(work, **changes)
    made = prepare(job, reporter)
    source = epoch_source(job, made, prepared_module.Subwords.load(made.subwords), tmp_path / "epochs")
    os.utime(made.folder, (1, 1))
    source(3)
    assert time.time() - made.folder.stat().st_mtime < WEEK_S
    shutil.rmtree(made.folder)
    made.keep()  # harmless when it is gone


def test_subwords_of_a_model_to_start_from_are_taken_over(work, reporter, tmp_path):
    made = prepare(work, reporter)
    given = tmp_path / "given.model"
    shutil.copyfile(made.subwords, given)
    job = dataclasses.replace(
        with_data(work, vocabulary_size=20), initial=InitialWeights(weights=given, subwords=given)
    )
    taken = prepare(job, reporter)
    assert taken.subwords.read_bytes() == given.read_bytes()
    assert taken.remarks[0][2] == "took the 36 subwords of the model to start from"
    assert json.loads((taken.folder / "prepared.json").read_bytes())["sizes"].keys() == {
        "subwords.model",
        *(f"pairs/{side}.{kind}" for side in ("source", "target") for kind in ("tokens", "lengths")),
    }
